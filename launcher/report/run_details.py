"""The lower half of a run's page: its answers, slices, data, settings, environment and recipe."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.evaluate.slices import GAP
from launcher.plan.plan import Plan
from launcher.report.data_parts import data_plots, shown_rows
from launcher.report.data_rows import Row, place
from launcher.report.data_tables import Table, fact_table, tables
from launcher.report.history import History
from launcher.report.markup import section, table_html
from launcher.report.settings import Setting, settings
from launcher.report.text import cut, escaped

if TYPE_CHECKING:
    from launcher.data.prepare.report import Report

SHOWN_ANSWERS, FIRST_ANSWERS = 24, 6
"""All, and those that are seen at once."""
MOST_GROUPS = 200
"""In a table of slices or classes: those of the most rows."""
MOST_TOKENS = 4000
"""Of the rows that are shown token by token: about 250 KB."""


def answer_section(plan: Plan, history: History) -> str:
    """Answers, or predicted classes, before training beside those to the same questions after it."""
    run_dir = Path(plan.run_dir)
    kind = next((kind for kind in ("answers", "predictions") if any(run_dir.glob(f"{kind}-*.jsonl"))), None)
    if kind is None:
        return ""
    files = sorted(run_dir.glob(f"{kind}-*.jsonl"))
    # Of the step that became the model, which is not the last one where the run went back to its best.
    step = history.best_steps[-1] if plan.lifecycle.export_best and history.best_steps else history.step
    of_model = run_dir / f"{kind}-{step:08d}.jsonl"
    ends = files[0], of_model if of_model in files else files[-1]
    first, last = _answers(ends[0]) if ends[0] != ends[1] else {}, _answers(ends[1])
    titles = ["expected", *map(_when, ends)]
    pairs = [(first.get(where), answer) for where, answer in last.items()]
    # Those that have changed say more than those that were right, or wrong, all along.
    changed = [pair for pair in pairs if pair[0] and _correct(pair[0]) != _correct(pair[1])]
    chosen = _spread(changed, SHOWN_ANSWERS // 2)
    chosen += _spread([pair for pair in pairs if pair not in chosen], SHOWN_ANSWERS - len(chosen))
    said = f"{len(chosen):,} of {len(last):,} questions" + (", those with another verdict first" if changed else "")
    if num_cut := history.last_answers.get("cut"):
        said += f"; {num_cut:,} answers were longer than evaluate.generate.max_new_tokens and are cut off"
    items = [_answer(before, after, titles) for before, after in chosen]
    rest = "\n".join(items[FIRST_ANSWERS:])
    more = f"<details><summary>{len(items) - FIRST_ANSWERS} more</summary>\n{rest}\n</details>" if rest else ""
    seen = "\n".join(items[:FIRST_ANSWERS])
    return section("answers", "Answers", f'<p class="faint">{said}</p>\n{seen}\n{more}')


def _when(file: Path) -> str:
    step = int(file.stem.rpartition("-")[2])
    return f"after step {step:,}" if step else "before training"


def _answers(file: Path) -> dict[str, dict[str, Any]]:
    found = {}
    with file.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines):
            try:
                answer = json.loads(line)
                if "predicted" in answer:
                    right = answer["label"] == answer["predicted"]
                    said = {"prompt": answer["text"], "reference": answer["label"], "answer": answer["predicted"]}
                    answer = {"where": answer["where"], "correct": right} | said
                found[str(answer.get("where", number))] = answer
            except (ValueError, TypeError, KeyError, AttributeError):  # torn
                continue
    return found


def _correct(answer: Mapping[str, Any]) -> bool | None:
    return answer.get("correct")


def _spread(pairs: list[Any], most: int) -> list[Any]:
    """At most so many, from all over."""
    if most <= 0:
        return []
    return [pairs[len(pairs) * i // most] for i in range(most)] if len(pairs) > most else list(pairs)


def _answer(before: Mapping[str, Any] | None, after: Mapping[str, Any], titles: Sequence[str]) -> str:
    """One question; `titles` are those of what is expected, of `before` and of `after`."""
    sides: list[tuple[str, str, bool | None]] = [(titles[0], str(after.get("reference", "")), None)]
    for title, one in zip(titles[1:], (before, after), strict=True):
        if one is not None:
            sides.append((title, str(one.get("answer", "")), _correct(one)))
    cells = "\n".join(
        f'<div><h4>{escaped(title)}</h4><p class="said{_mark(correct)}" dir="auto">{_cut(text)}</p></div>'
        for title, text, correct in sides
    )
    return (
        f'<div class="answer"><h4>{_cut(Path(str(after.get("where", ""))).name)}</h4>\n'
        f'<p class="said prompt" dir="auto">{_cut(str(after.get("prompt", "")))}</p>\n'
        f'<div class="sides">\n{cells}\n</div></div>'
    )


def _mark(correct: bool | None) -> str:
    return "" if correct is None else " right" if correct else " wrong"


def _cut(text: str) -> str:
    return escaped(cut(text.strip()))


def slice_section(history: History) -> str:
    """The latest scores by the values of columns, and the gap between best and worst."""
    found = []
    for record, what in ((history.last_eval, "held-out rows"), (history.last_answers, "answers")):
        for column, values in record.get("slices", {}).items():
            groups = {value: figures for value, figures in values.items() if value != GAP}
            found.append(_groups(f"{column}: {what} at step {record['step']:,}", groups, values.get(GAP, {})))
    answered = history.last_answers.get("classes") or {}
    of_classes = (history.last_eval, history.last_eval.get("classes")), (history.last_answers, answered.get("of"))
    for record, classes in of_classes:
        if classes:
            found.append(_groups(f"classes at step {record['step']:,}", classes, {}))
    return section("slices", "By group", "\n".join(found), "grid") if found else ""


def _groups(title: str, groups: Mapping[str, Mapping[str, Any]], gap: Mapping[str, Any]) -> str:
    """A table of the figures of each group, and how far apart they are where there is a `gap`."""
    left_out = len(groups) - MOST_GROUPS
    if left_out > 0:
        most = sorted(groups, key=lambda value: -groups[value].get("rows", 0))[:MOST_GROUPS]
        groups = {value: groups[value] for value in most}
    found = {value: _flat(figures) for value, figures in groups.items()}
    names = list(dict.fromkeys(name for figures in found.values() for name in figures))
    rows = [(value, *(_number(figures.get(name)) for name in names)) for value, figures in found.items()]
    flat = _flat(gap)
    if gap:
        rows.append(("best - worst", *("" if name == "rows" else _number(flat.get(name)) for name in names)))
    table = table_html(Table(title, ("", *names), tuple(rows), "l" + "r" * len(names)))
    notes = [f"{left_out:,} groups of fewer rows are not shown"] if left_out > 0 else []
    if least := gap.get("least_rows"):
        notes.append(f"best - worst: of groups of at least {least} rows")
    return table + (f'<p class="faint">{"; ".join(notes)}</p>' if notes else "")


def _flat(figures: Mapping[str, Any], before: str = "") -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}.") if name != "of" else {}
        elif isinstance(value, int | float) and name != "least_rows":
            found[before + name] = value
    return found


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def data_section(plan: Plan, report: Report | None, findings: Iterable[str], rows: list[Row]) -> str:
    """What was trained on: findings, counts, plots, and some rows token by token."""
    found = tables(report, ()) if report else [fact_table(plan.data)]
    said = "".join(f"<li>{escaped(finding)}</li>" for finding in findings)
    parts = [f'<div id="findings"><ul>{said}</ul></div>' if said else ""]
    if report is not None:
        parts.append(f'<div class="grid">{data_plots(report)}</div>')
    inner = "\n".join(map(table_html, found))
    parts.append(f'<details><summary>numbers of the data</summary>\n<div class="grid">\n{inner}\n</div></details>')
    if rows:
        parts.append(f'<h3 id="rows">What is learned of a row</h3>\n{shown_rows(rows, MOST_TOKENS)}')
    else:
        parts.append(f'<p class="faint">Its rows are not on this machine: {escaped(plan.data.folder)}</p>')
    return section("data", "Data", "\n".join(part for part in parts if part))


def settings_section(plan: Plan) -> str:
    """Every value of the Plan with its origin: first those that somebody wrote or the planner decided."""
    found = settings(plan)
    decided = {key: one for key, one in found.items() if one.origin not in ("default", "")}
    others = {key: one for key, one in found.items() if key not in decided}
    search = '<input id="search" type="search" placeholder="search settings" aria-label="search settings">'
    return section(
        "settings",
        "Settings",
        f'<p class="faint">All that was decided before the first step. Bold: written in the recipe or on the command '
        f'line.</p>\n{search}<span id="found" class="faint" role="status"></span>\n{_settings(decided)}\n'
        f"<details><summary>{len(others)} that nobody wrote</summary>\n{_settings(others)}\n</details>",
    )


def _settings(found: Mapping[str, Setting]) -> str:
    lines = []
    for key, setting in found.items():
        planned = setting.origin.startswith("planner: ")
        kind = "plain" if setting.origin in ("default", "") else "" if planned else "set"
        origin = setting.origin.removeprefix("planner: ")
        cells = f"<td>{_cut(setting.text)}</td><td>{escaped(place(origin))}</td>"
        lines.append(f'<tr class="{kind}"><th scope="row">{escaped(key)}</th>{cells}</tr>')
    head = '<thead><tr><th scope="col">key</th><th scope="col">value</th><th scope="col">from</th></tr></thead>'
    content = "\n".join(lines)
    return f'<div class="scroll"><table>\n{head}\n<tbody>\n{content}\n</tbody></table></div>'


def environment_section(run_dir: Path, history: History) -> str:
    """Versions, machines and git."""
    try:
        environment = json.loads((run_dir / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        environment = {}
    rows = [(name, _plain(value)) for name, value in environment.items() if name != "packages" and value is not None]
    workers = (history.last_start or {}).get("workers", [])
    hosts: dict[str, list[str]] = {}
    for worker in workers:
        hosts.setdefault(str(worker["host"]), []).append(str(worker.get("gpu") or "CPU"))
    rows += [
        (f"host {host}", ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)))
        for host, kinds in hosts.items()
    ]
    packages = tuple((name, str(version)) for name, version in environment.get("packages", {}).items())
    found = [Table("machine", ("", ""), tuple(rows), "ll"), Table("packages", ("", ""), packages, "ll")]
    return section("environment", "Environment", "\n".join(table_html(table) for table in found if table.rows), "grid")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def recipe_section(run_dir: Path) -> str:
    """As it is kept with the run."""
    try:
        text = (run_dir / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return section("recipe", "Recipe", f"<pre>{escaped(text)}</pre>")
