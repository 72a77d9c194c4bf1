"""What a name says about a file: how it is read, and how it is compressed."""

from __future__ import annotations

import re
from pathlib import PurePosixPath
from typing import NamedTuple

READERS = {
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
}
COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
KNOWN = ", ".join(READERS) + "; each also with " + ", ".join(COMPRESSIONS)

_URL_END = re.compile(r"[?#].*")


class Kind(NamedTuple):
    reader: str
    compression: str | None


def kind(name: str) -> Kind | None:
    """How the file `name` (a path, or a URL, whose query is no part of the name) is read; None for an unknown kind."""
    if "://" in name:
        name = _URL_END.sub("", name.split("::")[0])
    suffixes = [suffix.lower() for suffix in PurePosixPath(name).suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression is not None:
        suffixes.pop()
    reader = READERS.get(suffixes[-1]) if suffixes else None
    return Kind(reader, compression) if reader is not None else None
