"""Data once tokenized and packed, kept under a key of everything that decided it.

    <key>/train.arrow  eval.arrow  packs.arrow     see store.py
          test.jsonl                               {where, prompt_text, prompt_ids, answer}
          dropped.jsonl                            {where, reason, detail}: every row that was left out
          notes.json                               counts of what was changed without leaving a row out
          tokenizer/                               with the chat template in effect
          facts.json                               DataFacts

The folder appears whole or not at all: it is written beside its place, under a lock, and renamed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from launcher.data.sources import fingerprint
from launcher.data.tokenizer import is_trained, tokenizer_name, trained_vocab_size
from launcher.errors import DataError, RunFolderError
from launcher.plan.plan import DataFacts, DataPlan, ModelPlan

CODE_VERSION = 1
"""Raised with every change that gives other tokens, masks or packs for the same input."""

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, the rows done and, where known, the rows in all."""

_TOKENIZER_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".py"}


def prepare(
    model: ModelPlan, data: DataPlan, *, seed: int, cache_dir: Path, progress: Progress | None = None
) -> DataFacts:
    """Tokenize, split and pack `data` for `model`, or find it done in `cache_dir`.

    Nothing here is drawn at random: `seed` is in the key and decides nothing else, so that runs of several seeds learn
    from the same rows and are measured on the same rows. Raises DataError for data that cannot be used, ModelError for
    the tokenizer and RunFolderError where `cache_dir` cannot be written.
    """
    if not data.train:
        raise DataError("data.train names no file", hint="add data.train: [{path: my.jsonl}]")
    key, num_rows = _key(model, data, seed)
    folder = Path(os.path.abspath(cache_dir)) / key
    try:
        if found := _find(folder):
            return found
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if found := _find(folder):  # another process made it while this one waited
                return found
            staging = folder.with_name(f".{key}.staging")
            shutil.rmtree(staging, ignore_errors=True)  # left by a process that was killed
            staging.mkdir()
            try:
                # Imported here: finding prepared data must not cost what making it does.
                from launcher.data.build import Build

                facts = Build(model, data, staging, progress, num_rows).run(folder)
                (staging / "facts.json").write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")
                staging.rename(folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except OSError as error:
        raise RunFolderError(
            f"{error.filename or folder.parent}: the prepared data cannot be written: {error.strerror or error}",
            hint="free some space there, or give another folder",
        ) from error
    return facts


def _find(folder: Path) -> DataFacts | None:
    try:
        text = (folder / "facts.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    # The cache may have been moved since.
    return DataFacts.model_validate_json(text).model_copy(update={"folder": str(folder)})


def _key(model: ModelPlan, data: DataPlan, seed: int) -> tuple[str, int | None]:
    """The cache's key, and how many rows the sources hold where that is known."""
    prints = [fingerprint(source) for source in data.sources]
    parts = {
        "code": CODE_VERSION,
        "files": [digest for digest, _ in prints],
        "data": data.model_dump(mode="json"),
        "tokenizer": _tokenizer_identity(model),
        "chat_template": model.chat_template,
        "seed": seed,
    }
    counts = [count for _, count in prints if count is not None]
    total = sum(counts) if len(counts) == len(prints) else None
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16], total


def _tokenizer_identity(model: ModelPlan) -> list[str | int | None]:
    if is_trained(model):
        return ["trained", trained_vocab_size(model)]
    name, revision = tokenizer_name(model)
    folder = Path(name)
    if not folder.is_dir():
        return [name, revision]
    files = sorted(path for path in folder.iterdir() if path.suffix in _TOKENIZER_SUFFIXES)
    return [f"{path.name}:{hashlib.sha256(path.read_bytes()).hexdigest()}" for path in files]
