"""Data once tokenized and packed, kept under a key of everything that decided it.

    <key>/documents/*.arrow  packs.arrow  eval.arrow  classes.json   see store.py
          test.jsonl       {where, prompt_text, prompt_ids, answer, slices}
          dropped.jsonl    {where, reason, detail, text}: every row that was left out
          report.json      what the data is like, see report.py
          tokenizer/       with the chat template in effect
          facts.json       DataFacts

The folder appears whole or not at all: it is made beside its place, under a lock, and renamed. What a crash leaves of
it is taken up again by the next start.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from launcher.data.prepare.work import Progress, Spread
from launcher.data.sources import fingerprint
from launcher.data.tokenizer import is_trained, tokenizer_name, trained_vocab_size
from launcher.errors import DataError, RunFolderError
from launcher.plan.plan import DataFacts, DataPlan, ModelPlan

CODE_VERSION = 3
"""Raised with every change that gives other tokens, masks or packs for the same input."""
DECIDING_PACKAGES = (
    *("transformers", "tokenizers", "sentencepiece", "Jinja2", "numpy"),
    *("datasketch", "py3langid", "ftfy"),
)
"""Their versions are part of the key: they may render, tokenize or judge otherwise."""

_TOKENIZER_SUFFIXES = {".json", ".jinja", ".txt", ".model", ".py"}


def prepare(
    model: ModelPlan,
    data: DataPlan,
    *,
    seed: int,
    cache_dir: Path,
    progress: Progress | None = None,
    workers: int | None = None,
    spread: Spread | None = None,
) -> DataFacts:
    """Tokenize, split and pack `data` for `model`, or find it done in `cache_dir`.

    Args:
        model: whose tokenizer and chat template are taken
        data: what to read, and everything that decides what becomes of it
        seed: draws augmentation; nothing else is drawn at random, so that runs of several seeds learn from the same
            rows and are measured on the same rows
        cache_dir: folder of prepared data
        progress: told what is being done
        workers: processes on this machine; None: as many as the data deserves
        spread: runs the work elsewhere, such as on a cluster; None: on this machine

    Raises:
        DataError: data that cannot be used.
        ModelError: a tokenizer that cannot be used.
        RunFolderError: `cache_dir` cannot be written.
        RunFailed: a process died.
    """
    if not data.train:
        raise DataError("data.train names no file", hint="add data.train: [{path: my.jsonl}]")
    key, num_bytes = _key(model, data, seed)
    folder = Path(os.path.abspath(cache_dir)) / key
    try:
        if found := _find(folder):
            return found
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if found := _find(folder):  # another process made it while this one waited
                return found
            staging = folder.with_name(f".{key}.staging")
            staging.mkdir(exist_ok=True)
            # Imported here: finding prepared data must not cost what making it does.
            from launcher.data.prepare.build import Build

            try:
                facts = Build(model, data, seed, staging, progress, workers, spread, num_bytes).run(folder)
            except DataError:  # the user will change the data, and with it the key
                shutil.rmtree(staging, ignore_errors=True)
                raise
            if _key(model, data, seed) != (key, num_bytes):
                shutil.rmtree(staging, ignore_errors=True)
                raise DataError("the data changed while it was being prepared", hint="start again once it is complete")
            with (staging / "facts.json").open("w", encoding="utf-8") as stream:
                stream.write(facts.model_dump_json(indent=2) + "\n")
                stream.flush()
                os.fsync(stream.fileno())
            shutil.rmtree(folder, ignore_errors=True)  # of which facts.json was damaged
            staging.rename(folder)
    except OSError as error:
        raise RunFolderError(
            f"{error.filename or folder.parent}: the prepared data cannot be written: {error.strerror or error}",
            hint="free some space there, or give another folder",
        ) from error
    return facts


def _find(folder: Path) -> DataFacts | None:
    try:
        facts = DataFacts.model_validate_json((folder / "facts.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):  # not there, or not whole
        return None
    # The cache may have been moved since.
    return facts.model_copy(update={"folder": str(folder)})


def _key(model: ModelPlan, data: DataPlan, seed: int) -> tuple[str, int]:
    """The cache's key, and the bytes of the sources as far as they are known."""
    prints = [fingerprint(source) for source in (*data.sources, *data.clean.contamination)]
    parts = {
        "code": CODE_VERSION,
        "packages": [_version(package) for package in DECIDING_PACKAGES],
        "files": [found.digest for found in prints],
        "data": data.model_dump(mode="json"),
        "augmentation": _file_hash(data.augment.function_file),
        "tokenizer": _tokenizer_identity(model, data),
        "add_tokens": model.add_tokens,
        "chat_template": model.chat_template,
        "template_kwargs": model.template_kwargs,
        "seed": seed,
    }
    key = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
    return key, sum(found.num_bytes or 0 for found in prints)


def _tokenizer_identity(model: ModelPlan, data: DataPlan) -> list[str | int | None]:
    if is_trained(model):  # that of an encoder puts control tokens around a text
        kind = None if data.head is None else str((model.scratch or {})["model_type"])
        return ["trained", trained_vocab_size(model), kind]
    name, revision = tokenizer_name(model)
    folder = Path(name)
    if not folder.is_dir():
        return [name, revision]
    files = sorted(path for path in folder.iterdir() if path.suffix in _TOKENIZER_SUFFIXES)
    return [f"{path.name}:{_file_hash(str(path))}" for path in files]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _file_hash(path: str | None) -> str | None:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else None
