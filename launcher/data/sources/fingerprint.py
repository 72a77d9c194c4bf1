"""What decides a source's content, cheap enough to be asked at every start."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from launcher.data.sources.files import contents, local_files, stamp, unreadable
from launcher.data.sources.hub import hub_file
from launcher.data.sources.ranges import File
from launcher.data.sources.remote import fetch
from launcher.data.sources.remote_files import remote_files
from launcher.errors import DataError
from launcher.plan.plan import SourcePlan


@dataclass(frozen=True)
class Fingerprint:
    """Equal for equal content."""

    digest: str
    """SHA-256, in hex digits."""
    num_bytes: int | None
    """Of all files, as they lie there; None where that is not known, as of a hub id."""


def fingerprint(source: SourcePlan) -> Fingerprint:
    """The identity of everything that `source` holds.

    Local files: their names relative to each other and their content, which is read. URLs: what the file system says
    of each file (checksum, or size and time of change); where it says nothing, the content, which is fetched. Hub ids:
    the commit. Raises DataError where something is missing or unreadable.
    """
    digest = hashlib.sha256(source.kind.encode())
    num_bytes: int | None = 0
    for identity, size in _identities(source):
        digest.update(f"\0{identity}".encode())
        num_bytes = None if num_bytes is None or size is None else num_bytes + size
    return Fingerprint(digest.hexdigest(), num_bytes)


def _identities(source: SourcePlan) -> Iterator[tuple[str, int | None]]:
    if source.kind == "hub":
        file = hub_file(source)
        yield f"{source.path}\0{source.subset}\0{source.split}\0{file.stamp}", None
    elif source.kind == "url":
        for remote in remote_files(source):
            yield f"{remote.url}\0{remote.stamp or fetch(remote, anew=True).stamp}", remote.num_bytes
    else:
        yield from _local(local_files(source))


def _local(files: list[File]) -> Iterator[tuple[str, int]]:
    above = os.path.commonpath([Path(file.name).parent for file in files])
    for file in files:
        for path in contents(file):
            try:
                with path.open("rb") as stream:
                    content = hashlib.file_digest(stream, "sha256").hexdigest()
                    size = stream.tell()
            except OSError as error:
                raise unreadable(path, error) from error
            yield f"{os.path.relpath(path, above)}\0{content}", size
        if stamp(Path(file.name)) != file.stamp:
            raise DataError(f"{file.name}: it changed while it was read", hint="start again once nothing writes to it")
