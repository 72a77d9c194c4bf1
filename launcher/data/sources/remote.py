"""Files that a URL names, on any file system that fsspec knows. Each is fetched once, whole, into a folder:

    downloads/contents/<SHA-256 of the content>
              known/<SHA-256 of URL and stamp>     the content that a file system once gave for them
              locks/<SHA-256 of URL>               held while it is fetched

The folder is $XDG_CACHE_HOME/slipway/downloads, otherwise ~/.cache/slipway/downloads; it may be deleted at any time
when nothing runs. Readers get a local file, and what they get is what the hash says, on every machine.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from launcher.data.sources.ranges import File
from launcher.errors import DataError

_STAMPS = ("etag", "md5", "checksum", "crc", "digest", "blob_id", "generation", "versionid", "version_id")
"""What a file system may say about content, as part of a key in any spelling (ETag, md5Hash, CRC)."""
_TIMES = ("mtime", "modified", "updated")

_fetched: dict[str, str] = {}
"""URL to content of files without a stamp: this process fetches them anew only to fingerprint them."""


@dataclass(frozen=True)
class Remote:
    """A file of a URL."""

    url: str
    stamp: str | None
    """Size, and checksum or time of change; None where the file system tells neither: only the content can."""
    num_bytes: int | None


def fetch(remote: Remote, *, anew: bool = False) -> File:
    """`remote` as a File whose content lies in the download folder; `anew`: also where this process fetched it before,
    if nothing but the content tells whether it is the same.

    Raises DataError for a file that cannot be read, or that changes meanwhile.
    """
    folder = _folder()
    known: Path | None = None
    with _alone(folder, remote.url):
        if remote.stamp is not None:
            known = folder / "known" / hashlib.sha256(f"{remote.url}\0{remote.stamp}".encode()).hexdigest()
            digest = known.read_text() if known.is_file() else None
        else:
            digest = None if anew else _fetched.get(remote.url)
        if digest is None or not (folder / "contents" / digest).is_file():
            digest = _download(remote.url, folder, remote)
            _fetched[remote.url] = digest
            if known is not None:
                _write(known, digest)
    return File(remote.url, digest, remote=True)


def local(file: File) -> Path:
    """Where the bytes of `file` lie, fetched if this machine has not got them yet.

    Raises DataError where the URL no longer gives what it gave when the preparation began.
    """
    if not file.remote:
        return Path(file.name)
    folder = _folder()
    path = folder / "contents" / file.stamp
    if not path.is_file():
        with _alone(folder, file.name):
            if not path.is_file() and _download(file.name, folder, None) != file.stamp:
                raise _changed(file.name)
    return path


def _download(url: str, folder: Path, expected: Remote | None) -> str:
    """Fetch `url` and return the SHA-256 of what came."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".part-", delete=False) as part:
        try:
            with reaching(url):
                file_system, path = open_file_system(url)
                file_system.get_file(path, part.name)
                after = described(url, file_system.info(path))
            with open(part.name, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
                size = stream.seek(0, os.SEEK_END)
            if after.num_bytes is not None and size != after.num_bytes:
                raise DataError(
                    f"{url}: {size} of {after.num_bytes} bytes came", hint="check the connection, and start again"
                )
            if expected is not None and (after.stamp, after.num_bytes) != (expected.stamp, expected.num_bytes):
                raise _changed(url)
            (folder / "contents").mkdir(exist_ok=True)
            os.replace(part.name, folder / "contents" / digest)
        except BaseException:
            os.unlink(part.name)
            raise
    return digest


def _alone(folder: Path, url: str) -> FileLock:
    """Held while `url` is fetched: whoever else on this machine wants it waits."""
    (folder / "locks").mkdir(exist_ok=True)
    return FileLock(folder / "locks" / hashlib.sha256(url.encode()).hexdigest())


def open_file_system(url: str) -> tuple[Any, str]:
    """The file system of `url`, without memory of earlier listings, and the path in it."""
    import fsspec

    options: dict[str, Any] = {}
    if "::" in url:  # an archive's file system would keep the table of contents that it read first
        options["skip_instance_cache"] = True
    for link in url.split("::"):
        protocol = link.split("://")[0]
        if protocol in ("http", "https"):
            import aiohttp

            # By default a download may take five minutes in all, however well it goes on.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
            options[protocol] = {"client_kwargs": {"timeout": timeout}}
    file_system, path = fsspec.core.url_to_fs(url, **options)
    file_system.invalidate_cache()
    return file_system, path


def described(url: str, info: Mapping[str, Any]) -> Remote:
    """What a file system says of a file."""
    size = info.get("size")
    parts = {key: value for key, value in info.items() if value and any(name in key.lower() for name in _STAMPS)}
    if not parts and size is not None:
        parts = {key: value for key, value in info.items() if value and any(name in key.lower() for name in _TIMES)}
    stamp = "; ".join(f"{key} {parts[key]}" for key in sorted(parts))
    return Remote(url, f"{size} bytes; {stamp}" if stamp else None, size)


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turns whatever a file system raises into a DataError that says what to do: each raises its own."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise _unreachable(url, error) from error


def _unreachable(url: str, error: Exception) -> DataError:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    if isinstance(error, ImportError):
        return DataError(
            f"{url}: its file system needs a package that is not installed", hint=f"pip install {_package(url)}"
        )
    if isinstance(error, ValueError) and str(error).startswith("Protocol not known"):
        return DataError(f"{url}: {error}", hint="such as s3://, gs://, https:// or hf://")
    status = next((found for link in chain if (found := _status(link)) is not None), None)
    refused = any(isinstance(link, PermissionError) or "Credential" in type(link).__name__ for link in chain)
    if refused or status in (401, 403):
        return DataError(
            f"{url}: access is denied" + (f" (HTTP status {status})" if status else ""),
            hint="give the credentials of this file system, as its own tools take them; for the hub set HF_TOKEN",
        )
    # fsspec reports everything that HTTP can answer, and no answer, as a missing file.
    missing = isinstance(error, FileNotFoundError) and "http" not in url
    if missing or status in (404, 410):
        return DataError(f"{url}: no such file", hint="check the address")
    if any(isinstance(link, OSError) and link.errno == errno.ENOSPC for link in chain):
        return DataError(
            f"{url}: no space left in {_folder()}", hint="free some, or set XDG_CACHE_HOME to another place"
        )
    said = next((text for link in reversed(chain) if (text := str(link).strip())), type(error).__name__)
    return DataError(
        f"{url}: cannot be read: {said.splitlines()[0]}", hint="check the address and the connection, and start again"
    )


def _status(error: BaseException) -> int | None:
    """The HTTP status that `error` is about, as aiohttp and the hub's client keep it."""
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _package(url: str) -> str:
    """What is missing for the first file system of `url` that cannot be imported."""
    import fsspec
    from fsspec.registry import known_implementations

    for protocol in (link.split("://")[0] for link in url.split("::")):
        try:
            fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            package = str(known_implementations[protocol]["class"]).split(".")[0]
            return package if package != "fsspec" else str(getattr(error.__cause__, "name", None) or error)
        except ValueError:  # a part of the path
            continue
    return "the package that it names"


def _changed(url: str) -> DataError:
    return DataError(f"{url}: it has changed since the preparation began", hint="start again once nothing writes to it")


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(cache, "slipway", "downloads")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"{folder}: the download folder cannot be made: {error.strerror}", hint="set XDG_CACHE_HOME to another"
        ) from error
    return folder


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as part:
        part.write(text)
    os.replace(part.name, path)
