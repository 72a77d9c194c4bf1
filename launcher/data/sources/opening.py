"""A file's bytes: decompressed, from a position on, and certain to be those of the file that was looked at before."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from launcher.data.sources import files
from launcher.data.sources.kinds import kind
from launcher.data.sources.ranges import File
from launcher.data.sources.remote import local
from launcher.errors import DataError

LONGEST_BYTES = 256 << 20
"""Of one row's text. More is a file whose line ends or quotes are wrong, and would be read into memory whole."""

_BLOCK_BYTES = 1 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_BROKEN = (EOFError, OSError, lzma.LZMAError, zlib.error)
_DISGUISES = {
    b"\xff\xfe": ("UTF-16, not UTF-8", "save the file as UTF-8"),
    b"\xfe\xff": ("UTF-16, not UTF-8", "save the file as UTF-8"),
    b"\x1f\x8b": ("gzip data", "name it .gz, after the name's own suffix"),
    b"\x28\xb5\x2f\xfd": ("zstd data", "name it .zst, after the name's own suffix"),
    b"\xfd7zXZ\0": ("xz data", "name it .xz, after the name's own suffix"),
    b"PK\x03\x04": ("a zip archive", "unpack it, or give zip://*.jsonl::file.zip"),
    b"PAR1": ("a Parquet file", "name it .parquet"),
    b"ARROW1": ("an Arrow file", "name it .arrow"),
    b"version https://git-lfs": ("a Git LFS pointer, not the data itself", "fetch it with git lfs pull"),
    b"<!doctype html": ("a web page, not data", "give the address of the file itself, not of the page about it"),
    b"<html": ("a web page, not data", "give the address of the file itself, not of the page about it"),
}
"""First bytes of what is often found under the name of a text file."""


@contextmanager
def opened(file: File, start: int = 0) -> Iterator[BinaryIO]:
    """The decompressed bytes of `file` from byte `start` on.

    Raises DataError where the file cannot be opened, is damaged (with the line that was reached), or is no longer the
    one of `file.stamp`, now or when reading ends.
    """
    path = local(file)
    _require_same(file, path)
    try:
        with _decompressed(path, file) as stream:
            if _compression(file) is None:
                stream.seek(start)
            else:
                _skip(stream, start)
            yield stream
    except _BROKEN as error:
        raise _broken(file, path, error) from error
    _require_same(file, path)


@contextmanager
def seekable(file: File) -> Iterator[str]:
    """The path of `file` for readers that go back and forth; of a compressed one a decompressed copy, for the time."""
    if _compression(file) is None:
        path = local(file)
        _require_same(file, path)
        yield str(path)
        _require_same(file, path)
        return
    import shutil
    import tempfile

    with tempfile.NamedTemporaryFile() as copy:
        with opened(file) as stream:
            shutil.copyfileobj(stream, copy, _BLOCK_BYTES)
        copy.flush()
        yield copy.name


def text_start(file: File) -> int:
    """Where the text of `file` begins: behind a byte order mark, as Windows editors write it.

    Raises DataError for what is no UTF-8 text at all.
    """
    with opened(file) as stream:
        head = stream.read(64)
    for magic, (what, hint) in _DISGUISES.items():
        if head.lower().startswith(magic) if magic.startswith(b"<") else head.startswith(magic):
            raise DataError(f"{file.name}: this is {what}", hint=hint)
    return len(_BYTE_ORDER_MARK) if head.startswith(_BYTE_ORDER_MARK) else 0


def too_long(where: str, what: str) -> DataError:
    """A row of more than LONGEST_BYTES."""
    return DataError(
        f"{where}: {what} of more than {LONGEST_BYTES >> 20} MiB",
        hint="is a line end or a closing quote or bracket missing?",
    )


def _compression(file: File) -> str | None:
    found = kind(file.name)
    return found.compression if found else None


def _decompressed(path: Path, file: File) -> BinaryIO:
    match _compression(file):
        case "gzip":
            return cast(BinaryIO, gzip.open(path))
        case "bz2":
            return cast(BinaryIO, bz2.open(path))
        case "xz":
            return cast(BinaryIO, lzma.open(path))
        case "zstd":
            import pyarrow

            return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"), _BLOCK_BYTES)
        case _:
            return path.open("rb", buffering=_BLOCK_BYTES)


def _skip(stream: BinaryIO, num_bytes: int) -> None:
    # Their own `seek` does the same 8 KiB at a time.
    while num_bytes > 0 and (block := stream.read(min(num_bytes, _BLOCK_BYTES))):
        num_bytes -= len(block)


def _require_same(file: File, path: Path) -> None:
    if not file.remote and files.stamp(path) != file.stamp:
        raise DataError(
            f"{file.name}: it has changed since the preparation began",
            hint="start again once nothing writes to it; copies on several machines need the same times (rsync -t)",
        )


def _broken(file: File, path: Path, error: Exception) -> DataError:
    """What is wrong, with the line up to which the file can be read."""
    line = 1
    try:
        with _decompressed(path, file) as stream:
            while block := cast(io.BufferedReader, stream).read1(1 << 14):
                line += block.count(b"\n")
    except _BROKEN:
        pass
    if _compression(file) is None:
        return DataError(f"{file.name}:{line}: {error}", hint="check the disk that it lies on")
    said = "the compressed data ends too early" if isinstance(error, EOFError) else f"damaged: {error}"
    return DataError(f"{file.name}:{line}: {said}", hint="fetch or write the file again; gzip -t and its like check it")
