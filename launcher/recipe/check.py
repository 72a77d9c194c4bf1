"""What no single key shows to be wrong: keys that exclude or need one another, and text with a form of its own."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator

from launcher.errors import UserError
from launcher.recipe.check_evaluate import check_evaluate
from launcher.recipe.check_guard import check_guard
from launcher.recipe.check_task import check_task
from launcher.recipe.check_train import check_train
from launcher.recipe.conflict import Conflict, in_pattern
from launcher.recipe.named import sources
from launcher.recipe.schema import Recipe, Workers
from launcher.recipe.schema_data import WORDING_PARTS, Data, HeldOut
from launcher.units import parse_bytes, parse_seconds

_LANGUAGES = (
    "af am an ar as az ba be bg bn br bs ca cs cy da de dz el en eo es et eu fa fi fo fr fy ga gd gl gu ha he hi hr ht "
    "hu hy id ig is it ja jv ka kk km kn ko ku ky la lb lg ln lo lt lv mg mk ml mn mr ms mt my ne nl nn no oc om or pa "
    "pl ps pt qu ro ru rw sa se si sk sl sn so sq sr st sv sw ta te tg th tk tl tr tt ug uk ur uz vi vo wa xh yo zh zu"
)
LANGUAGES = tuple(_LANGUAGES.split())
"""ISO 639-1 codes that py3langid tells. Written down, and held to the library by a test: importing it takes long."""


def check(recipe: Recipe) -> Iterator[Conflict]:
    """Every conflict in a recipe whose single values are all well-formed."""
    yield from _model(recipe)
    yield from _data(recipe)
    yield from _numbers(recipe)
    yield from check_train(recipe)
    yield from check_evaluate(recipe)
    yield from check_guard(recipe)
    yield from check_task(recipe)
    yield from _logging(recipe)
    yield from _texts(recipe)


def _model(recipe: Recipe) -> Iterator[Conflict]:
    model = recipe.model
    both = ("model.path", "model.scratch")
    if model.path and model.scratch:
        yield Conflict(both, "given together with model.scratch", "keep one; `scratch: null` drops an inherited one")
    if model.path is None and model.scratch is None:
        yield Conflict(both, "missing", "give a model folder or hub id, or model.scratch to start from random weights")
    if model.path == "":
        yield Conflict(("model.path",), "empty", "give a model folder or hub id")
    if model.scratch is not None and not isinstance(model.scratch.get("model_type"), str):
        yield Conflict(("model.scratch",), "needs model_type", "such as `model_type: llama`")
    if model.scratch and model.revision:
        yield Conflict(("model.revision", "model.scratch"), "a scratch model has no revision", "leave it out")
    for name in model.template_kwargs:
        if not name.isidentifier() or name.lower() in ("none", "true", "false", "messages", "tools"):
            yield Conflict((f"model.template_kwargs.{name}",), "no name of a variable", "such as enable_thinking")
    for number, text in enumerate(model.add_tokens):
        if not text.strip():
            yield Conflict((f"model.add_tokens.{number}",), "blank", "such as `<|im_start|>`")
        if text in model.add_tokens[:number]:
            yield Conflict((f"model.add_tokens.{number}",), f"'{text}' is given twice", "name each token once")
    if recipe.method.targets == ():
        yield Conflict(("method.targets",), "empty", "name linear layers, or leave it out for all-linear")


def _data(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    if not data.train:
        yield Conflict(("data.train",), "nothing to train on", "such as `train: [{path: train.jsonl}]`")
    yield from _held_out("data.eval", data.eval, "null for no evaluation")
    yield from _held_out("data.test", data.test, "null for no test")
    shares = (data.eval.split or 0.0, data.test.split or 0.0)
    if min(shares) > 0 and max(shares) < 1 <= sum(shares):
        keys = ("data.eval.split", "data.test.split")
        yield Conflict(keys, "with data.test.split, nothing would be left to train on", "keep their sum below 1")
    yield from _classes(recipe)
    yield from _cleaning(data)
    for number, wording in enumerate(data.augment.wordings):
        yield from _wording(f"data.augment.wordings.{number}", wording)
    if recipe.evaluate.generate and not data.test.sources and not data.test.split and not data.test.rows:
        keys = ("evaluate.generate", "data.test")
        yield Conflict(keys, "needs data.test", "name a file of held-out rows there, or set evaluate.generate to null")


def _held_out(section: str, held_out: HeldOut, none: str) -> Iterator[Conflict]:
    split, rows, sources = f"{section}.split", f"{section}.rows", f"{section}.sources"
    if held_out.split is not None and held_out.rows is not None:
        yield Conflict((split, rows), f"given together with {rows}", "hold out a share or a number of rows, not both")
    if held_out.split is not None and held_out.sources:
        yield Conflict((split, sources), f"given together with {sources}", "hold out a share or name files, not both")
    if held_out.rows is not None and held_out.sources:
        hint = "hold out a number of rows or name files, not both"
        yield Conflict((rows, sources), f"given together with {sources}", hint)
    if held_out.split in (0.0, 1.0):
        left = "nothing would be held out" if held_out.split == 0 else "nothing would be left to train on"
        yield Conflict((split,), left, f"give a share between 0 and 1, or {none}")


def _classes(recipe: Recipe) -> Iterator[Conflict]:
    data = recipe.data
    # `auto` may turn out to be classification, whose rows have a class; where it does not, reading the data says so.
    unknown = not any(source.format in ("auto", "classification") for source in data.train)
    if data.label is None and unknown and recipe.task == "causal_lm":
        hint = "name the column with each row's class"
        if data.stratify:
            yield Conflict(("data.stratify", "data.label"), "needs data.label", hint)
        if data.balance != "none":
            yield Conflict(("data.balance", "data.label"), "needs data.label", hint)
    for key, source in sources(recipe):
        twice = next((label for i, label in enumerate(source.labels) if label in source.labels[:i]), None)
        number = next((label for i, label in enumerate(source.labels) if label.isdigit() and label != str(i)), None)
        if number is not None:
            hint = "write the words for 0, 1, 2, ...: `[one star, two stars]`"
            yield Conflict((f"{key}.labels",), f"'{number}' is a word that reads as the number of another", hint)
        if twice is not None:
            yield Conflict((f"{key}.labels",), f"'{twice}' is given twice", "one word for each number, from 0")


def _cleaning(data: Data) -> Iterator[Conflict]:
    clean = data.clean
    if clean.include is not None:
        yield from in_pattern("data.clean.include", clean.include)
    for number, pattern in enumerate(clean.exclude):
        yield from in_pattern(f"data.clean.exclude.{number}", pattern)
    for number, code in enumerate(clean.languages):
        if code not in LANGUAGES:
            meant = re.split("[-_]", code.lower())[0]
            hint = f"did you mean {meant}?" if meant in LANGUAGES else "two letters of ISO 639-1, such as en, de or zh"
            yield Conflict((f"data.clean.languages.{number}",), f"'{code}' is no language that can be told", hint)


def _wording(key: str, wording: str) -> Iterator[Conflict]:
    try:
        fields = [field for field in string.Formatter().parse(wording) if field[1] is not None]
    except ValueError as error:
        yield Conflict((key,), f"not a wording: {error}", "write a brace that is meant as one twice: {{ or }}")
        return
    known = f"a row's parts are {' and '.join(f'{{{part}}}' for part in WORDING_PARTS)}"
    unknown = next((name for _, name, _, _ in fields if name not in WORDING_PARTS), None)
    if unknown is not None:
        yield Conflict((key,), f"unknown part {{{unknown}}}", f"{known}; write a brace that is meant as one twice")
    elif not fields:
        yield Conflict((key,), "names no part of the row", known)
    elif any(spec or conversion for _, _, spec, conversion in fields):
        yield Conflict((key,), "a part is put in as it is", known)


def _numbers(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.schedule.warmup > 1 and not recipe.schedule.warmup.is_integer():
        message = f"{recipe.schedule.warmup:g} is neither a share of the steps nor a whole number of them"
        yield Conflict(("schedule.warmup",), message, "below 1 it is a share, otherwise a number of steps")
    workers = recipe.cluster.workers
    if isinstance(workers, Workers):
        if workers.min > workers.max:
            keys = ("cluster.workers.min", "cluster.workers.max")
            message = f"{workers.min} is more than cluster.workers.max, {workers.max}"
            yield Conflict(keys, message, "such as {min: 2, max: 16}")
        elif workers.min < workers.max and recipe.optimizer.name == "adamw_8bit" and recipe.parallel.zero != 0:
            message = "the 8-bit moments of adamw_8bit fit one number of workers only: the run cannot change its size"
            hint = "give cluster.workers one number, or set optimizer.name to adamw, or parallel.zero to 0"
            yield Conflict(("cluster.workers.min", "optimizer.name", "parallel.zero"), message, hint)
    if recipe.parallel.zero == 0 and recipe.parallel.offload == "cpu":
        keys = ("parallel.offload", "parallel.zero")
        yield Conflict(keys, "ZeRO 0 has nothing to offload", "set parallel.zero to 1, 2, 3 or auto")


def _logging(recipe: Recipe) -> Iterator[Conflict]:
    trackers = recipe.logging.trackers
    twice = next((name for i, name in enumerate(trackers) if name in trackers[:i]), None)
    if twice is not None:
        yield Conflict(("logging.trackers",), f"'{twice}' is given twice", "name each tracker once")
    if recipe.logging.project is not None and not {"wandb", "mlflow"}.intersection(trackers):
        keys, hint = ("logging.project", "logging.trackers"), "add wandb or mlflow to logging.trackers, or leave it out"
        yield Conflict(keys, "W&B's project and MLflow's experiment, and neither is in logging.trackers", hint)


def _texts(recipe: Recipe) -> Iterator[Conflict]:
    if recipe.train.max_time is not None:
        yield from _parsed("train.max_time", recipe.train.max_time, parse_seconds)
    yield from _parsed("checkpoint.grace", recipe.checkpoint.grace, parse_seconds)
    yield from _parsed("export.max_shard_size", recipe.export.max_shard_size, parse_bytes)
    if recipe.name is not None and (not recipe.name.strip(".") or "/" in recipe.name):
        yield Conflict(("name",), f"'{recipe.name}' cannot name a folder", "give a word without slashes")


def _parsed(key: str, text: str, parse: Callable[[str], float]) -> Iterator[Conflict]:
    try:
        if parse(text) <= 0:
            yield Conflict((key,), f"'{text}' is nothing", "give more than zero")
    except UserError as error:
        yield Conflict((key,), error.message, error.hint)
