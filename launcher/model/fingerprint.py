"""Which weights a model folder holds: one hash that names them, and a stamp of each file so that a resume need not
read 140 GB again to see that nothing has changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from launcher.errors import ModelError
from launcher.store.durable import replace_synced

STAMPS = "base.json"
"""In the run's folder: {file of the base: its Stamp}."""
_THREADS = 8
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Stamp:
    """One file as it was when its content was read."""

    bytes: int
    mtime_ns: int
    sha256: str


def fingerprint(folder: Path, stamps: Path | None = None) -> str:
    """SHA-256 over names, sizes and hashes of the files that make a folder's model.

    Those are its weights (safetensors, or .bin where there are none), their index, and config.json. With `stamps`, what
    this file says is believed of every file whose size and time of change agree, and it is written anew.

    Raises:
        ModelError: the folder is gone, holds no weights, or cannot be read.
    """
    with _readable(folder):
        found = _stamped(folder, _read(stamps))
    if stamps is not None:
        _write(stamps, found)
    return _fingerprint(found)


def check_unchanged(folder: Path, expected: str, stamps: Path) -> None:
    """Compare a run's base with its fingerprint; refreshes `stamps` where files were only copied or touched.

    Raises:
        ModelError: the folder is gone, cannot be read, or is another model by now; the message names the files.
    """
    if not folder.is_dir():
        raise ModelError(
            f"the base model {folder} is gone",
            hint="bring it back to that place, or start a new run from another base",
        )
    known = _read(stamps)
    with _readable(folder):
        found = _stamped(folder, known)
    if _fingerprint(found) != expected:
        raise ModelError(
            f"the base model {folder} is not the one that this run began with: {_differences(known, found)}",
            hint="restore it, or start a new run from it: the checkpoints are only true of the base they were made on",
        )
    if found != known:
        _write(stamps, found)


def _files(folder: Path) -> list[Path]:
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not weights:
        raise ModelError(
            f"{folder} holds no weights",
            hint="the folder needs config.json and safetensors weights, as save_pretrained writes them",
        )
    # The configuration too: the same weights under another rope_theta are another model.
    return [*weights, *sorted(folder.glob("*.index.json")), *folder.glob("config.json")]


def _stamped(folder: Path, known: dict[str, Stamp]) -> dict[str, Stamp]:
    """{file: its stamp}; only what `known` does not tell is read, several files at a time."""
    files = _files(folder)
    given_up = threading.Event()
    # Hashing and reading release the interpreter's lock.
    pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1, len(files)), thread_name_prefix="fingerprint")
    try:
        stamps = pool.map(lambda file: _stamp(file, known.get(file.name), given_up), files)
        return {file.name: stamp for file, stamp in zip(files, stamps, strict=True)}
    finally:
        given_up.set()  # Ctrl-C does not wait for the end of a file of 5 GB
        pool.shutdown(cancel_futures=True)


def _stamp(file: Path, known: Stamp | None, given_up: threading.Event) -> Stamp:
    before = file.stat()
    if known is not None and (known.bytes, known.mtime_ns) == (before.st_size, before.st_mtime_ns):
        return known
    digest, block = hashlib.sha256(), bytearray(_BLOCK_BYTES)
    with open(file, "rb", buffering=0) as stream:
        while not given_up.is_set() and (count := stream.readinto(block)):
            digest.update(memoryview(block)[:count])
    return Stamp(before.st_size, before.st_mtime_ns, digest.hexdigest())


def _fingerprint(stamps: dict[str, Stamp]) -> str:
    content = {name: [stamp.bytes, stamp.sha256] for name, stamp in stamps.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _differences(known: dict[str, Stamp], found: dict[str, Stamp]) -> str:
    """Which files differ from the stamps, in words."""
    lost = [f"{name} is missing" for name in sorted(known.keys() - found.keys())]
    new = [f"{name} is new" for name in sorted(found.keys() - known.keys())] if known else []
    both = sorted(known.keys() & found.keys())
    other = [f"{name} has changed" for name in both if known[name].sha256 != found[name].sha256]
    return "; ".join(lost + other + new) or "its files have another hash"


def _read(stamps: Path | None) -> dict[str, Stamp]:
    """What a file of stamps says; nothing where it is missing or cannot be understood."""
    if stamps is None:
        return {}
    try:
        said = json.loads(stamps.read_text(encoding="utf-8"))
        return {name: Stamp(entry["bytes"], entry["mtime_ns"], entry["sha256"]) for name, entry in said.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


def _write(stamps: Path, content: dict[str, Stamp]) -> None:
    said = {name: asdict(stamp) for name, stamp in content.items()}
    with contextlib.suppress(OSError):  # stamps save time and decide nothing
        replace_synced(stamps, json.dumps(said, indent=2).encode() + b"\n")


@contextlib.contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"the model {folder} cannot be read: {error.strerror or error}", hint="check the folder and its permissions"
        ) from error
