"""The files that a URL names: one, those of a folder, or those that a pattern matches."""

from __future__ import annotations

import re
from typing import Any

from launcher.data.sources.files import data_files
from launcher.data.sources.kinds import KNOWN, kind
from launcher.data.sources.remote import Remote, described, open_file_system, reaching
from launcher.errors import DataError
from launcher.plan.plan import SourcePlan


def remote_files(source: SourcePlan) -> list[Remote]:
    """The files of `source`, in the order of their names. Raises DataError."""
    url = source.path
    if source.split is not None:
        raise DataError(f"{url}: a URL has no split {source.split!r}", hint="leave `split` out, and name its files")
    with reaching(url):
        file_system, path = open_file_system(url)
        if "*" in path or ("[" in path and not url.startswith("http")):
            found = {name: info for name, info in file_system.glob(path, detail=True).items() if _is_file(info)}
            if not found:
                raise DataError(f"{url}: nothing matches", hint="`*` matches within a folder, `**` any number of them")
            one_split, above = False, re.split(r"[*?\[]", path)[0].rpartition("/")[0]
        else:
            info = file_system.info(path)
            if _is_file(info):
                return [_known(described(url, info))]
            found = {name: info for name, info in file_system.find(path, detail=True).items() if _is_file(info)}
            one_split, above = True, path
    below = {name.removeprefix(above).lstrip("/"): name for name in found}
    names = [below[name] for name in data_files(url, below, one_split=one_split)]
    chain = "::".join(["", *url.split("::")[1:]])
    return [described(file_system.unstrip_protocol(name) + chain, found[name]) for name in names]


def _is_file(info: dict[str, Any]) -> bool:
    return info["type"] == "file"


def _known(remote: Remote) -> Remote:
    if kind(remote.url) is None:
        raise DataError(
            f"{remote.url}: unknown kind of file",
            hint=f"known kinds: {KNOWN}; for files in an archive: zip://*.jsonl::{remote.url}",
        )
    return remote
