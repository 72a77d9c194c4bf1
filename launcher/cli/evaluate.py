"""`slipway evaluate`: what a run's model or any model folder is worth, on held-out rows or by lm-evaluation-harness."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from launcher.cli import render
from launcher.cli.arguments import Json
from launcher.errors import DataError, RunFolderError, UserError

if TYPE_CHECKING:
    from launcher.plan.plan import GeneratePlan, Plan, SourcePlan

FOLDER = "evaluations"
"""Of a run: what has been measured since its end, a file each."""
MAX_NEW_TOKENS = 256
"""Longest answer to rows that no recipe tells more about."""


def command(
    model: Annotated[str, typer.Argument(metavar="RUN|FOLDER", help="A run's folder or URL, or a model folder")],
    data: Annotated[
        str | None, typer.Option("--data", metavar="FILE", help="Rows to measure on, not the run's held-out ones")
    ] = None,
    format: Annotated[str, typer.Option("--format", help="Of --data, where its columns do not tell it")] = "auto",
    metrics: Annotated[
        str | None, typer.Option("--metrics", metavar="A,B", help="Of answers: exact_match, classes, rouge, ...")
    ] = None,
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="STEP|best|last", help="Of a run, instead of its model/")
    ] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=1, help="At most so many, the first ones")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens")
    ] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Prompts answered at once")] = None,
    slices: Annotated[
        str | None, typer.Option("--slices", metavar="A,B", help="Columns by whose values the scores are also given")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option("--lm-eval", metavar="A,B", help="Tasks of lm-evaluation-harness instead, or YAML files of such"),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="With --lm-eval: questions of each task")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Write the answers there, as JSON lines")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a finished run or a model folder: loss, perplexity, and what its answers score."""
    plan = plan_of(model)
    if plan is None and checkpoint is not None:
        raise UserError(f"{model} is no run and has no checkpoints", hint="leave out --checkpoint")
    if lm_eval is not None and (data or metrics or rows or max_new_tokens or slices or out):
        raise UserError("--lm-eval brings rows and metrics of its own", hint="leave the options about them out")
    settings = None if lm_eval is not None else generation(plan, metrics, rows, max_new_tokens, batch_size)
    source = source_of(data, format) if data is not None else None
    asked: dict[str, Any] = {"model": model, "checkpoint": checkpoint, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    with tempfile.TemporaryDirectory(prefix="slipway-") as scratch:
        folder = folder_of(model, plan, checkpoint, Path(scratch))
        if lm_eval is not None:
            found, lines = by_harness(folder, [task.strip() for task in lm_eval.split(",")], limit, batch_size), b""
        else:
            assert settings is not None
            columns = tuple(column.strip() for column in slices.split(",")) if slices is not None else None
            found, lines = by_rows(folder, plan, source, settings, rows, columns, Path(scratch))
    result = asked | found
    kept = keep(plan, result, lines) if plan is not None else None
    if as_json:
        render.print_json(result)
    else:
        show(result)
    if kept is not None:
        render.note(f"kept: {kept}")
    if out is not None:
        write_lines(out, lines)


def plan_of(model: str) -> Plan | None:
    """The Plan of a run; None where a model folder is named. Raises RunFolderError, ModelError."""
    from launcher.driver.resume import existing_plan
    from launcher.store.location import is_url

    return existing_plan(model) if is_url(model) or (Path(model) / "plan.json").exists() else None


def generation(
    plan: Plan | None, metrics: str | None, rows: int | None, max_new_tokens: int | None, batch_size: int | None
) -> GeneratePlan:
    """How rows are answered and measured: as in the run, but for what is asked for. Raises UserError."""
    from launcher.plan.plan import GeneratePlan
    from launcher.recipe.schema_evaluate import Generate

    of_run = plan.lifecycle.generate if plan is not None else None
    settings = of_run or GeneratePlan(**(Generate().model_dump() | {"max_new_tokens": MAX_NEW_TOKENS}))
    asked: dict[str, Any] = {"rows": rows, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    asked["metrics"] = chosen(metrics) if metrics is not None else None
    return settings.model_copy(update={key: value for key, value in asked.items() if value is not None})


def chosen(metrics: str) -> tuple[str, ...]:
    """The metrics that `--metrics` names, functions of the user's by their absolute files. Raises UserError for what a
    recipe is refused for."""
    from launcher.recipe.check_evaluate import check_generate
    from launcher.recipe.schema_evaluate import METRICS, Generate

    names = tuple(name.strip() for name in metrics.split(","))
    for conflict in check_generate(Generate(metrics=names)):
        raise UserError(f"--metrics: {conflict.message}", conflict.hint)
    found = []
    for name in names:
        file, _, function = name.rpartition(":")
        if file and not (Path(file).is_file() and function.isidentifier()):
            raise UserError(f"--metrics: {name!r} names no function in a file", hint="write it as file.py:name")
        found.append(name if name in METRICS else f"{Path(file).resolve()}:{function}")
    return tuple(found)


def source_of(path: str, format: str) -> SourcePlan:
    """What `--data` names. Raises UserError where it is not there."""
    from launcher.plan.plan import SourcePlan
    from launcher.plan.resolve_data import find_source
    from launcher.recipe.origin import DEFAULT
    from launcher.recipe.schema_data import Source, SourceFormat

    if format not in get_args(SourceFormat):
        raise UserError(f"--format: {format!r} is none", hint=f"there are {', '.join(get_args(SourceFormat))}")
    found = find_source(path, DEFAULT)
    if found is None:
        raise DataError(f"--data: {path} does not exist", hint="give a file, a folder, a pattern, a URL or a hub id")
    kind, place = found
    return SourcePlan(**(Source(path=place, format=format).model_dump() | {"kind": kind}))


def folder_of(model: str, plan: Plan | None, checkpoint: str | None, scratch: Path) -> Path:
    """The model folder, of a checkpoint exported for the purpose. Raises ModelError, CheckpointError."""
    from launcher.cli.chat import model_folder
    from launcher.cli.launch import export
    from launcher.driver.resume import ready_again

    (scratch / "model").mkdir()
    if plan is None or checkpoint is None:
        return model_folder(model, scratch / "model")
    export(ready_again(plan), scratch / "checkpoint", False, checkpoint)
    return scratch / "checkpoint"


def by_rows(
    folder: Path,
    plan: Plan | None,
    source: SourcePlan | None,
    settings: GeneratePlan,
    limit: int | None,
    columns: tuple[str, ...] | None,
    scratch: Path,
) -> tuple[dict[str, Any], bytes]:
    """Loss and answers on the rows of `source`, or on those that the run held out; and the answers.

    Raises:
        UserError: there are no such rows, they cannot be used, or the model cannot be loaded.
    """
    from launcher.cli.progress import preparing
    from launcher.driver.resume import ready_again

    with render.err().status("loading"):
        from launcher.data.loader import EvalData, TestRows
        from launcher.export.evaluation import evaluate_folder, left_out, prepare_rows

    found: dict[str, Any] = {}
    if source is not None:
        slices, data = columns or (), plan.trajectory.data if plan is not None else None
        with preparing(render.err()) as report:
            facts = prepare_rows(folder, source, data, slices, scratch / "data", report)
        most, questions, found["data"] = limit, limit, source.path
        found |= {"left_out": left_out(facts)} if facts.dropped else {}
    elif plan is not None:
        slices, facts = plan.lifecycle.slices if columns is None else columns, ready_again(plan).data
        refuse_other_slices(plan, slices)
        most, questions, found["data"] = limit or plan.lifecycle.eval_max_rows, settings.rows, "the run's held-out rows"
    else:
        raise UserError(f"{folder} is no run and has no held-out rows", hint="name some with --data FILE")
    if not facts.eval_documents and not facts.test_documents:
        raise DataError("the run holds no rows out", hint="name some with --data FILE")
    prepared, seed = Path(facts.folder), plan.trajectory.seed if plan is not None else 0
    with render.err().status("measuring"):
        held_out = EvalData(prepared, most, slices=slices)
        worth = evaluate_folder(folder, held_out, list(TestRows(prepared, questions)), settings, seed, slices)
    if worth.loss is not None:
        found["eval"] = worth.loss
    if worth.answers is not None:
        found |= {"answers": worth.answers, "generate": settings.model_dump(mode="json", exclude={"rows", "during"})}
    return found, worth.lines


def refuse_other_slices(plan: Plan, columns: tuple[str, ...]) -> None:
    """Raise UserError for a column that the run's rows were prepared without."""
    for column in columns:
        if column not in plan.trajectory.data.slices:
            raise UserError(
                f"--slices: the run's held-out rows were prepared without their column {column}",
                hint="name the file with --data, or evaluate.slices before the run",
            )


def by_harness(folder: Path, tasks: list[str], limit: int | None, batch_size: int | None) -> dict[str, Any]:
    """What lm-evaluation-harness says of its tasks. Raises UserError where it or one of them is not there."""
    from launcher.export.harness import require, run_tasks

    require()
    with render.err().status("running lm-evaluation-harness"):
        return {"tasks": run_tasks(folder, tasks, limit, batch_size)}


def keep(plan: Plan, result: dict[str, Any], lines: bytes) -> str:
    """Write the result into the run; returns where. Raises RunFolderError."""
    from launcher.cli.launch import place
    from launcher.store.location import open_store

    name = f"{FOLDER}/{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        store = open_store(plan.location)
        if lines:
            store.write(f"{name}.jsonl", lines)
        store.write(f"{name}.json", json.dumps(result, indent=2, ensure_ascii=False).encode() + b"\n")
    except OSError as error:
        said = f"{plan.location} takes no {FOLDER}: {error.strerror or error}"
        raise RunFolderError(said, hint="--out FILE keeps the answers elsewhere") from error
    return f"{place(plan.location)}/{name}.json"


def write_lines(file: Path, lines: bytes) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        file.write_bytes(lines)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror}", hint="choose another --out") from error


def show(result: dict[str, Any]) -> None:
    """The figures as tables on stdout."""
    if "data" in result:
        print(render.printable(result["data"]))
    for reason, number in result.get("left_out", {}).items():
        render.note(f"left out: {number} {reason}")
    tables = {"held-out rows": result.get("eval"), "answers": result.get("answers")} | result.get("tasks", {})
    for title, figures in tables.items():
        if figures is not None:
            print(f"\n{title}" + (f", {figures['rows']} rows" if "rows" in figures else ""))
            show_figures(figures)


def show_figures(figures: dict[str, Any]) -> None:
    """A line a number, and a line a class."""
    from launcher.evaluate.value import figures as by_name
    from launcher.evaluate.value import shown

    of_classes = figures.get("classes", {})
    of_classes = of_classes.get("of", of_classes)  # of answers, or of a sequence classification
    single = {name: value for name, value in figures.items() if value is not of_classes}
    found = {name: value for name, value in by_name(single).items() if not name.startswith("slices.")}
    render.print_columns([(f"  {name}", shown(name, value)) for name, value in found.items()])
    if of_classes:
        columns = ("precision", "recall", "f1")
        lines = [
            (f"  {label}", *(f"{of[name]:.1%}" for name in columns), str(of["rows"]))
            for label, of in of_classes.items()
        ]
        render.print_table(("  class", *columns, "rows"), lines, "lrrrr")
    for column, values in figures.get("slices", {}).items():
        for value, of in values.items():
            said = ", ".join(f"{name} {shown(name, number)}" for name, number in by_name(of).items())
            print(render.printable(f"  {column} {value}: {said}" + (f"; {of['rows']} rows" if "rows" in of else "")))
