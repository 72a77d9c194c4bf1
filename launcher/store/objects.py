"""An object store as a store: S3 and what speaks its language, and through the same package Google's and Azure's."""

from __future__ import annotations

import contextlib
import errno
import io
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from launcher.errors import RunFolderError
from launcher.store.refusals import code_of, os_error, refused
from launcher.store.store import Store, Write

_MIB = 1 << 20
_PART_BYTES = 32 * _MIB
_PARTS_PER_SIZE = 2500
"""S3 takes 10,000 parts a file: after each quarter of them they double, which makes 1.1 TiB."""
_BLOCK_BYTES = 8 * _MIB
_AT_ONCE = 4
"""Parts or blocks of one file that are on their way together: one connection alone does not fill a network."""
_CONNECT_S, _ANSWER_S = 5, 20
_SLOWEST = 256 << 10
"""Bytes per second below which a connection counts as dead."""
_JOIN_S = 240
"""S3 may take minutes to join a file's parts, during which it keeps the connection alive."""


class ObjectStore(Store):
    """Objects below the prefix that a URL names, `proto://bucket/prefix`, over fsspec.

    What fails for a moment is tried again: `attempts` times a request, within `patience_s` seconds and what the bytes
    take on a slow line. Making one asks the server nothing; `check` does. Not for use after a fork.
    """

    def __init__(self, url: str, attempts: int = 6, patience_s: float = 60) -> None:
        """Raises RunFolderError where `url` names no bucket, an unknown kind of store, or one without its package."""
        import fsspec
        from fsspec.registry import known_implementations

        self.url = url.rstrip("/")
        self._patience_s = patience_s
        protocol, _, path = self.url.partition("://")
        if not path.strip("/") or path.startswith("/"):
            raise RunFolderError(
                f"{url}: names no bucket", hint="such as s3://bucket/runs/first; a folder is given as a plain path"
            )
        options: dict[str, Any] = {}
        self._is_s3 = protocol in ("s3", "s3a")
        if self._is_s3:
            options["max_concurrency"] = 1  # or reading a file asks for its size first, which may change between
            options["config_kwargs"] = {
                # The other modes stop trying once the client as a whole has tried often, as after an outage.
                "retries": {"mode": "legacy", "total_max_attempts": attempts},
                "connect_timeout": _CONNECT_S,
                "read_timeout": _ANSWER_S,
                "max_pool_connections": 32,
            }
        try:
            self._files, path = fsspec.core.url_to_fs(
                self.url, skip_instance_cache=True, use_listings_cache=False, **options
            )
        except ImportError as error:
            package = "'slipway[s3]'" if self._is_s3 else known_implementations[protocol]["class"].split(".")[0]
            raise RunFolderError(
                f"{url}: {protocol}:// needs a package that is not installed ({error})", hint=f"pip install {package}"
            ) from error
        except Exception as error:  # each package has its own; some look for credentials here
            if protocol in known_implementations:
                raise refused(self.url, "opening", os_error(error, self.url, patience_s)) from error
            raise RunFolderError(f"{url}: unknown kind of store", hint="such as s3://, gs:// or az://") from error
        self._root = path.rstrip("/")

    def __str__(self) -> str:
        return self.url

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectStore) and other.url == self.url

    def __hash__(self) -> int:
        return hash(self.url)

    def check(self, writes: bool = True) -> None:
        """Prove that files can be listed and, if it `writes`, made, made only once, read and deleted.

        Raises:
            RunFolderError: no credentials or the wrong ones, no such bucket, no such server, or one that cannot make
                a file only where there is none.
        """
        quick = ObjectStore(self.url, attempts=2, patience_s=min(self._patience_s, 20))
        name, content, other = f".check-{secrets.token_hex(8)}", secrets.token_bytes(16), secrets.token_bytes(16)
        doing = "listing files"
        try:
            if not quick.is_there():
                raise FileNotFoundError(errno.ENOENT, "there is no such bucket", self.url)
            if not writes:
                return
            doing = "making a file"
            made = quick.create(name, content)
            doing = "making a file only where there is none"
            again = quick.create(name, other)
            doing = "reading a file"
            found = quick.read(name)
            doing = "deleting a file"
            quick.remove(name)
        except OSError as error:
            raise refused(self.url, doing, error) from error
        if not made or again or found != content:
            raise RunFolderError(
                f"{self}: the server overwrites a file that was to be made only where there is none, so two launchers "
                "could not be told apart",
                hint="use a server that honours If-None-Match: Amazon's, or a newer version of this one",
            )

    def is_there(self) -> bool:
        """Whether the bucket is; the prefix need not be."""
        try:
            self._list("")
        except FileNotFoundError as error:
            return (
                code_of(error) != "NoSuchBucket" if self._is_s3 else bool(self._files.exists(self._root.split("/")[0]))
            )
        return True

    def names(self, folder: str = "") -> list[str]:
        """As any store."""
        try:
            return sorted({name for name, _ in self._list(folder)})
        except FileNotFoundError:
            return []

    def sizes(self, folder: str) -> dict[str, int]:
        """As any store."""
        try:
            return {name: size for name, size in self._list(folder) if size is not None}
        except FileNotFoundError:
            return {}

    def modified(self, name: str) -> float:
        """As any store: the server's clock, which for S3 is in whole seconds."""
        if self._is_s3:
            return float(self._info(name)["LastModified"].timestamp())
        return float(self._ask(name, self._files.modified, self._path(name)).timestamp())

    def read(self, name: str) -> bytes:
        """As any store; one request, for what fits well into memory."""
        return bytes(self._ask(name, self._files.cat_file, self._path(name)))

    def read_into(self, name: str, start: int, target: memoryview) -> None:
        """As any store."""
        target = target.cast("B")
        while target:
            block = self._range(name, start, start + min(len(target), 2 * _BLOCK_BYTES))
            target[: len(block)] = block
            start, target = start + len(block), target[len(block) :]

    def blocks(self, name: str) -> Iterator[bytes | memoryview]:
        """As any store; some are fetched ahead."""
        size = self._info(name)["size"]
        ahead: deque[Future[bytes]] = deque()
        pool = ThreadPoolExecutor(_AT_ONCE, "slipway-read")
        try:
            for start in range(0, size, _BLOCK_BYTES):
                ahead.append(pool.submit(self._range, name, start, min(start + _BLOCK_BYTES, size)))
                if len(ahead) == _AT_ONCE:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def write(self, name: str, content: bytes) -> None:
        """As any store."""
        self._ask(name, self._files.pipe_file, self._path(name), content, extra_s=len(content) / _SLOWEST)

    def create(self, name: str, content: bytes) -> bool:
        """As any store: the server decides. Content must differ from what others would create under this name.

        A request whose answer was lost is sent again and refused then: what is there tells who made it.
        """
        azure = {"overwrite": False} if self.url.startswith(("az://", "abfs")) else {"mode": "create"}
        for wait_s in (0.1, 0.4, 1.6, None):
            try:
                self._ask(name, self._files.pipe_file, self._path(name), content, **azure)
                return True
            except FileExistsError:
                break
            except OSError as error:
                if wait_s is None or code_of(error) != "ConditionalRequestConflict":
                    raise
                time.sleep(wait_s)  # S3 is deciding between several, and asks for another try
        with contextlib.suppress(FileNotFoundError):
            return self.read(name) == content
        return False

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Write]:
        """As any store; after an error nothing new is there. Takes up to five parts of 32 MiB in memory."""
        if self._is_s3:
            upload = _Upload(self, name)
            try:
                yield upload.write
                upload.finish()
            except BaseException:
                upload.abort()
                raise
            finally:
                upload.close()
            return
        file = self._ask(name, self._files.open, self._path(name), "wb", block_size=_PART_BYTES)
        try:
            yield lambda content: self._ask(name, file.write, content)
            self._ask(name, file.close)
        except BaseException:
            with contextlib.suppress(Exception):
                file.discard()
            file.closed = True  # or it is finished when it is collected
            raise

    def remove(self, name: str) -> None:
        """As any store."""
        paths = self._ask(name, self._files.find, self._path(name))
        if not self._is_s3:
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    self._ask(name, self._files.rm_file, path)
            return
        # Not `rm`, which takes [ and * in a name for a pattern and says nothing of what the server refused.
        for start in range(0, len(paths), 1000):
            keys = [{"Key": self._files.split_path(path)[1]} for path in paths[start : start + 1000]]
            answer = self._s3(name, "delete_objects", key=False, Delete={"Objects": keys, "Quiet": True})
            for left in answer.get("Errors", [])[:1]:
                number = errno.EACCES if left.get("Code") == "AccessDenied" else errno.EIO
                words = f"cannot be deleted: {left.get('Message', '')} ({left.get('Code')})"
                raise OSError(number, words, f"{self.url}/{name}")

    def prune(self, folder: str) -> None:
        """As any store: here a folder is its files."""

    def _path(self, name: str) -> str:
        return f"{self._root}/{name.strip('/')}".rstrip("/")

    def _list(self, folder: str) -> list[tuple[str, int | None]]:
        """Name and size of what is directly in `folder`; no size for a folder. FileNotFoundError where nothing is."""
        path = self._path(folder)
        return [
            (entry["name"].rstrip("/").rpartition("/")[2], None if entry["type"] == "directory" else entry["size"])
            for entry in self._ask(folder, self._files.ls, path, detail=True)
            if entry["name"].rstrip("/") != path  # the file itself, or the empty object that some tools make of it
        ]

    def _info(self, name: str) -> dict[str, Any]:
        info: dict[str, Any] = self._ask(name, self._files.info, self._path(name))
        if info["type"] != "file":
            raise FileNotFoundError(errno.ENOENT, "no such file", f"{self.url}/{name}")
        return info

    def _range(self, name: str, start: int, end: int) -> bytes:
        """The bytes of a file from `start` to `end`, all of them, or EOFError."""
        block = b""
        try:
            path = self._path(name)
            block = self._ask(name, self._files.cat_file, path, start=start, end=end, extra_s=(end - start) / _SLOWEST)
        except OSError as error:
            if error.errno != errno.ERANGE:
                raise
        if len(block) < end - start:
            raise EOFError(f"{self.url}/{name} ends at {start + len(block)}")
        return block

    def _s3(self, name: str, method: str, key: bool = True, **options: Any) -> Any:
        """A request in S3's own words."""
        bucket, path, _ = self._files.split_path(self._path(name))
        place = {"Bucket": bucket, "Key": path} if key else {"Bucket": bucket}
        return self._ask(name, self._files.call_s3, method, **place, **options)

    def _ask(self, name: str, call: Callable[..., Any], *args: Any, extra_s: float = 0, **options: Any) -> Any:
        """Call fsspec for the file `name`, which may take `extra_s` beyond the patience. All errors are OSErrors."""
        limit_s = self._patience_s + extra_s
        if self._is_s3:
            options["timeout"] = limit_s  # the request is cancelled then
        try:
            return call(*args, **options)
        except Exception as error:  # each package has its own
            raise os_error(error, f"{self.url}/{name}".rstrip("/"), limit_s) from error


class _Upload:
    """A file on its way to S3 in parts. Nothing is there before `finish`."""

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store = store
        self._name = name
        self._token = secrets.token_hex(16)
        self._id: str | None = None
        self._part = io.BytesIO()
        self._pool = ThreadPoolExecutor(_AT_ONCE, "slipway-write")
        self._sent: list[Future[dict[str, Any]]] = []

    def write(self, content: bytes | memoryview) -> None:
        """Take a piece; waits while too many parts are on their way."""
        left = memoryview(content).cast("B")
        while left:
            room = (_PART_BYTES << len(self._sent) // _PARTS_PER_SIZE) - self._part.tell()
            self._part.write(left[:room])
            if len(left) >= room:
                self._send()
            left = left[room:]

    def finish(self) -> None:
        """Make it one file."""
        if self._id is None:
            self._store.write(self._name, self._part.getvalue())
            return
        if self._part.tell():
            self._send()
        parts = {"Parts": [future.result() for future in self._sent]}
        try:
            self._ask("complete_multipart_upload", MultipartUpload=parts, extra_s=_JOIN_S)
        except FileNotFoundError as error:
            # The answer to an earlier try was lost: the upload is no more because the file is there.
            if code_of(error) != "NoSuchUpload" or not self._has_arrived():
                raise

    def abort(self) -> None:
        """Leave nothing behind, where the server can be reached."""
        self.close()  # a part that comes after the end would stay
        if self._id is not None:
            with contextlib.suppress(OSError):
                self._ask("abort_multipart_upload")

    def close(self) -> None:
        """Wait for what is on its way, and send nothing more."""
        self._pool.shutdown(cancel_futures=True)

    def _send(self) -> None:
        if self._id is None:
            begun = self._store._s3(self._name, "create_multipart_upload", Metadata={"slipway-upload": self._token})
            self._id = begun["UploadId"]
        if len(self._sent) >= _AT_ONCE:
            self._sent[-_AT_ONCE].result()
        self._sent.append(self._pool.submit(self._send_part, len(self._sent) + 1, self._part))
        self._part = io.BytesIO()

    def _send_part(self, number: int, content: io.BytesIO) -> dict[str, Any]:
        num_bytes = content.tell()
        content.seek(0)
        answer = self._ask("upload_part", PartNumber=number, Body=content, extra_s=num_bytes / _SLOWEST)
        sums = {key: value for key, value in answer.items() if key == "ETag" or key.startswith("Checksum")}
        return {"PartNumber": number, **sums}

    def _ask(self, method: str, **options: Any) -> Any:
        return self._store._s3(self._name, method, UploadId=self._id, **options)

    def _has_arrived(self) -> bool:
        found = self._store._s3(self._name, "head_object")
        return bool(found["Metadata"].get("slipway-upload") == self._token)
