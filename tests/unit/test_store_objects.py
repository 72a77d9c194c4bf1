"""An object store that cannot be reached, refuses, forgets to answer or is slow; and the spool in front of one."""

from __future__ import annotations

import errno
import itertools
import os
import random
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import RunFolderError
from launcher.store import objects
from launcher.store.folder import FolderStore
from launcher.store.location import open_store
from launcher.store.objects import ObjectStore
from launcher.store.spool import Spool, pull
from tests.unit.s3_server import BUCKET, ask, environment, s3_server

ROOT = Path(__file__).parents[2]
REFUSALS = {
    "busy": (503, "SlowDown", "Please reduce your request rate."),
    "broken": (500, "InternalError", "We encountered an internal error."),
    "gone": (404, "NoSuchUpload", "The specified upload does not exist."),
}
CONTENT = random.Random(0).randbytes(12 << 20)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture(autouse=True)
def surroundings(server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in environment(server).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOME", str(tmp_path))


def new_url() -> str:
    return f"s3://{BUCKET}/{uuid.uuid4()}"


def refused(url: str) -> RunFolderError:
    with pytest.raises(RunFolderError) as error:
        ObjectStore(url).check()
    assert error.value.hint
    assert "\n" not in error.value.message
    assert error.value.message.startswith(f"{url}: ")
    return error.value


class Proxy(ThreadingHTTPServer):
    """In front of the server: `rule` says of each request, numbered from 1, what becomes of it.

    drop: closed before the server hears of it; lost: the server has done it, and the answer is lost; half: the answer
    breaks off; one of REFUSALS; bare: sent on without If-None-Match; anything else: sent on.
    """

    daemon_threads = True

    def __init__(self, target: str, rule: Callable[[int, str, str], str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target = target.removeprefix("http://")
        self.rule = rule
        self.numbers = itertools.count(1)
        self.seen: list[tuple[str, str]] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the test."""


class Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        what = self.server.rule(next(self.server.numbers), self.command, self.path)
        self.server.seen.append((what, f"{self.command} {self.path}"))
        if what == "drop":
            self.close_connection = True
        elif what in REFUSALS:
            status, code, message = REFUSALS[what]
            content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
            self.answer(status, [("Content-Length", str(len(content)))], content)
        else:
            self.forward(what, body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def forward(self, what: str, body: bytes) -> None:
        headers = {name: value for name, value in self.headers.items() if name != "Expect"}
        if what == "bare":
            headers.pop("If-None-Match", None)
        connection = HTTPConnection(self.server.target)
        connection.request(self.command, self.path, body, headers)
        found = connection.getresponse()
        content = found.read()
        connection.close()
        if what in ("lost", "half"):
            self.close_connection = True
        if what != "lost":
            kept = [(name, value) for name, value in found.getheaders() if name.lower() not in ("connection", "server")]
            self.answer(found.status, kept, content[: len(content) // 2] if what == "half" else content)

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def through(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Proxy]]:
    """Put a proxy with a rule before the server, for stores that are made after that."""
    started = []

    def start(rule: Callable[[int, str, str], str]) -> Proxy:
        proxy = Proxy(server, rule)
        thread = threading.Thread(target=proxy.serve_forever, args=(0.01,))
        thread.start()
        started.append((proxy, thread))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")
        return proxy

    yield start
    for proxy, thread in started:
        proxy.shutdown()
        thread.join()
        proxy.server_close()


def first(what: list[str], method: str, part: str) -> Callable[[int, str, str], str]:
    """That becomes of the first requests with this method and part of their path; the rest is sent on."""
    left = what[::-1]
    return lambda _, command, path: left.pop() if left and command == method and part in path else ""


def test_a_store_that_works_passes_its_check() -> None:
    store = ObjectStore(new_url())
    store.check()
    store.check(writes=False)
    assert store.names() == []
    ObjectStore(f"s3://{BUCKET}").check()


def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    url = new_url()
    error = refused(url)
    assert error.message == f"{url}: listing files failed: Unable to locate credentials"
    for word in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "role", "AWS_ENDPOINT_URL"):
        assert word in str(error.hint)
    with pytest.raises(PermissionError, match="Unable to locate credentials"):
        ObjectStore(url).write("a", b"1")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "profile (nobody)" in refused(url).message
    assert "AWS_PROFILE" in str(refused(url).hint)


def test_the_wrong_credentials(server: str) -> None:
    """Moto asks for real ones from now on, and knows none."""
    assert ask(server, "POST", "/moto-api/reset-auth", b"0")[0] == 200
    try:
        error = refused(new_url())
        assert "does not exist in our records (InvalidAccessKeyId)" in error.message
        assert "AWS_ACCESS_KEY_ID" in str(error.hint)
        store = ObjectStore(new_url())
        for call in (lambda: store.read("a"), lambda: store.names(), lambda: store.create("a", b"1"), store.is_there):
            with pytest.raises(PermissionError):
                call()
    finally:
        assert ask(server, "POST", "/moto-api/reset-auth", b"inf")[0] == 200


def test_no_such_bucket() -> None:
    error = refused("s3://nowhere/run")
    assert error.message == "s3://nowhere/run: listing files failed: there is no such bucket"
    assert "make the bucket" in str(error.hint)
    store = ObjectStore("s3://nowhere/run")
    assert not store.is_there()
    with pytest.raises(FileNotFoundError, match="there is no such bucket"):
        store.write("a", b"1")
    assert "Invalid bucket name" in refused("s3://not a bucket/run").message


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that nothing listens on, and one that takes connections and says nothing."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unused.getsockname()[1]}")
        began = time.monotonic()
        error = refused(new_url())
        assert time.monotonic() - began < 20
        assert "Could not connect to the endpoint URL" in error.message
        assert "AWS_ENDPOINT_URL" in str(error.hint)
        with pytest.raises(OSError, match="Could not connect") as unreachable:
            ObjectStore(new_url(), attempts=1).read("a")
        assert unreachable.value.errno == errno.EHOSTUNREACH
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = ObjectStore(new_url(), patience_s=1)
        for call in (lambda: store.read("a"), lambda: store.write("a", b"1"), lambda: store.remove("a")):
            began = time.monotonic()
            with pytest.raises(TimeoutError, match="no answer within 1 s"):
                call()
            assert time.monotonic() - began < 20


def test_urls_that_name_no_store() -> None:
    for url, said, hint in [
        ("s3://", "names no bucket", "s3://bucket"),
        ("file:///tmp/run", "names no bucket", "plain path"),
        ("nosuch://bucket/run", "unknown kind of store", "such as s3://"),
    ]:
        with pytest.raises(RunFolderError, match=said) as error:
            open_store(url)
        assert hint in str(error.value.hint)


def test_a_package_that_is_missing() -> None:
    code = """if True:
        import sys
        sys.modules.update(s3fs=None, gcsfs=None)  # what the interpreter does for a package it did not find
        from launcher.errors import RunFolderError
        from launcher.store.location import open_store
        for url in ("s3://bucket/run", "gs://bucket/run"):
            try:
                open_store(url)
            except RunFolderError as error:
                print(error, "|", error.hint)
        """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    s3, gs = done.stdout.splitlines()
    assert s3.startswith("s3://bucket/run: s3:// needs a package that is not installed")
    assert s3.endswith("| pip install 'slipway[s3]'")
    assert gs.endswith("| pip install gcsfs")


def test_a_network_that_fails_now_and_then(through: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every third connection breaks, before, after or amid the answer, and every fourth request finds a busy server
    or a broken one.
    """

    def rule(number: int, command: str, path: str) -> str:
        if number % 3 == 0:
            return ("drop", "lost", "half")[number // 3 % 3]
        return {4: "busy", 0: "broken"}.get(number % 8, "")

    proxy = through(rule)
    monkeypatch.setattr(objects, "_PART_BYTES", 5 << 20)  # S3's least
    monkeypatch.setattr(objects, "_BLOCK_BYTES", 3 << 20)
    store = ObjectStore(new_url())

    def small(number: int) -> None:
        content = b"%d" % number * 100
        store.write(f"small/{number}", content)
        assert store.create(f"made/{number}", content)
        assert not store.create(f"made/{number}", b"other")
        assert store.read(f"small/{number}") == store.read(f"made/{number}") == content

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(small, range(4)))
    with store.writing("large") as write:
        write(CONTENT)
    assert b"".join(bytes(block) for block in store.blocks("large")) == CONTENT
    target = bytearray(5 << 20)
    store.read_into("large", 1000, memoryview(target))
    assert target == CONTENT[1000 : 1000 + len(target)]
    assert store.names() == ["large", "made", "small"]
    assert store.sizes("") == {"large": len(CONTENT)}
    store.remove("small")
    assert store.names() == ["large", "made"]
    happened = [what for what, _ in proxy.seen]
    assert {"drop", "lost", "half", "busy", "broken", ""} == set(happened)
    assert happened.count("") < 0.6 * len(happened)


def test_a_file_that_was_created_though_the_answer_was_lost(through: Callable[..., Proxy]) -> None:
    proxy = through(first(["lost"], "PUT", "/COMMIT"))
    assert ObjectStore(new_url()).create("COMMIT", b"mine")
    assert [what for what, request in proxy.seen if "PUT" in request] == ["lost", ""]
    through(first(["lost"], "PUT", "/COMMIT"))
    store = ObjectStore(new_url())
    store.write("other", b"1")
    assert store.create("COMMIT", b"first")
    assert not store.create("COMMIT", b"second")
    assert store.read("COMMIT") == b"first"


@pytest.mark.parametrize("then", ["", "gone"])
def test_parts_that_were_joined_though_the_answer_was_lost(
    through: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch, then: str
) -> None:
    """Some servers join them again; others say that there is no such upload any more."""
    monkeypatch.setattr(objects, "_PART_BYTES", 5 << 20)
    proxy = through(first(["lost", then], "POST", "?uploadId="))
    store = ObjectStore(new_url())
    with store.writing("large") as write:
        write(CONTENT)
    assert store.sizes("") == {"large": len(CONTENT)}
    assert [what for what, request in proxy.seen if "POST" in request and "?uploadId=" in request] == ["lost", then]
    through(first(["gone"], "POST", "?uploadId="))
    store = ObjectStore(store.url)
    with pytest.raises(FileNotFoundError, match="NoSuchUpload"), store.writing("large") as write:
        write(CONTENT[::-1])
    assert b"".join(bytes(block) for block in store.blocks("large")) == CONTENT


def test_a_part_that_fails_for_good(
    server: str, through: Callable[..., Proxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "_PART_BYTES", 5 << 20)
    through(lambda _, command, path: "busy" if "partNumber=2" in path else "")
    url = new_url()
    store = ObjectStore(url, attempts=1)
    with pytest.raises(OSError, match=r"Please reduce your request rate \(SlowDown\)"), store.writing("large") as write:
        write(CONTENT)
    assert store.names() == []
    # Those of other tests may be there: of a beginning whose answer was lost nobody knows.
    assert Path(url).name not in ask(server, "GET", f"/{BUCKET}?uploads")[1].decode()


def test_a_server_that_ignores_if_none_match(through: Callable[..., Proxy]) -> None:
    through(lambda number, command, path: "bare")
    error = refused(new_url())
    assert "two launchers could not be told apart" in error.message
    assert "If-None-Match" in str(error.hint)


def test_another_kind_of_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    """fsspec's own one in memory takes the way of gs:// and az://, on which no S3 package is."""
    monkeypatch.setattr(objects, "_BLOCK_BYTES", 5)
    store = ObjectStore(f"memory://{uuid.uuid4()}/run")
    store.check()
    with store.writing("a/stream") as write:
        write(b"one, ")
        write(memoryview(b"two"))
    assert b"".join(bytes(block) for block in store.blocks("a/stream")) == store.read("a/stream") == b"one, two"
    target = bytearray(3)
    store.read_into("a/stream", 5, memoryview(target))
    assert target == b"two"
    with pytest.raises(EOFError):
        store.read_into("a/stream", 6, memoryview(target))
    assert store.create("a/[1]", b"1")
    assert not store.create("a/[1]", b"2")
    assert store.sizes("a") == {"[1]": 1, "stream": 8}
    assert abs(store.modified("a/[1]") - time.time()) < 5
    store.write("ab", b"1")
    store.remove("a")
    store.remove("a")
    assert store.names() == ["ab"]
    with pytest.raises(FileNotFoundError, match="no such file"):
        store.read("a/stream")


@pytest.fixture
def spooled(tmp_path: Path) -> tuple[ObjectStore, Path]:
    (tmp_path / "spool").mkdir()
    return ObjectStore(new_url()), tmp_path / "spool"


def test_a_push_sends_what_is_new(spooled: tuple[ObjectStore, Path], through: Callable[..., Proxy]) -> None:
    store, folder = spooled
    (folder / "logs" / "deep").mkdir(parents=True)
    (folder / "metrics.jsonl").write_bytes(b"1\n")
    (folder / "logs" / "worker-0.log").write_bytes(b"")
    (folder / "logs" / "deep" / "x.log").write_bytes(CONTENT)
    (folder / "logs" / ".draft-x.log").write_bytes(b"half")
    (folder / "other").write_bytes(b"not named")
    proxy = through(lambda *_: "")
    names = ["metrics.jsonl", "logs", "verdict.json", "nowhere"]
    spool = Spool(store, folder)
    assert spool.needed
    spool.push(names)
    assert store.names() == ["logs", "metrics.jsonl"]
    assert store.sizes("logs") == {"worker-0.log": 0}
    assert b"".join(bytes(block) for block in store.blocks("logs/deep/x.log")) == CONTENT
    proxy.seen.clear()
    spool.push(names)
    assert proxy.seen == []
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b"2\n")
    spool.push(names)
    assert [request.rpartition("/")[2].split("?")[0] for _, request in proxy.seen] == ["metrics.jsonl"]
    assert store.read("metrics.jsonl") == b"1\n2\n"
    (folder / "metrics.jsonl").unlink()
    spool.push(names)
    assert store.read("metrics.jsonl") == b"1\n2\n"


def test_what_could_not_be_sent_is_sent_the_next_time(
    spooled: tuple[ObjectStore, Path], through: Callable[..., Proxy]
) -> None:
    _, folder = spooled
    (folder / "a").write_bytes(b"a")
    (folder / "b").write_bytes(b"b")
    down = True
    through(lambda _, command, path: "busy" if down and path.endswith("/a") else "")
    store = ObjectStore(new_url(), attempts=1)
    spool = Spool(store, folder)
    with pytest.raises(OSError, match="SlowDown"):
        spool.push(["a", "b"])
    assert store.names() == ["b"]
    down = False
    spool.push(["a", "b"])
    assert store.names() == ["a", "b"]


def test_a_file_that_grows_while_it_is_sent(spooled: tuple[ObjectStore, Path]) -> None:
    store, folder = spooled
    spool, done = Spool(store, folder), threading.Event()
    line = b"x" * 99 + b"\n"

    def grow() -> None:
        with open(folder / "log", "ab", buffering=0) as file:
            for _ in range(100):
                file.write(line * 1000)
                if done.is_set():
                    return

    (folder / "log").write_bytes(line * 100_000)
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(grow)
        spool.push(["log"])
        done.set()
        task.result()
    sent = b"".join(bytes(block) for block in store.blocks("log"))
    assert len(sent) >= 10_000_000
    assert (folder / "log").read_bytes().startswith(sent)
    spool.push(["log"])
    assert store.sizes("")["log"] == (folder / "log").stat().st_size


def test_a_pull_fetches_what_is_missing_once(spooled: tuple[ObjectStore, Path], through: Callable[..., Proxy]) -> None:
    store, folder = spooled
    store.write("plan.json", b"{}")
    store.write("base/config.json", b"config")
    with store.writing("base/deep/model.bin") as write:
        write(CONTENT)
    store.write("base/../out", b"out")
    store.write("basement", b"1")
    proxy = through(lambda *_: "")
    store = ObjectStore(store.url)
    names = ["base", "plan.json", "nothing"]
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: pull(store, folder, names), range(3)))
    assert (folder / "base/deep/model.bin").read_bytes() == CONTENT
    fetched = [request for _, request in proxy.seen if "GET" in request and "list-type" not in request]
    assert sum("model.bin" in request for request in fetched) == 2, "blocks of 8 MiB"
    assert sum("plan.json" in request for request in fetched) == 1
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert found == [".pull.lock", "base/config.json", "base/deep/model.bin", "plan.json"]
    assert not (folder.parent / "out").exists()
    (folder / "base/config.json").write_bytes(b"conf")
    (folder / "plan.json").unlink()
    pull(store, folder, names)
    assert (folder / "base/config.json").read_bytes() == b"config"
    assert (folder / "plan.json").read_bytes() == b"{}"


def test_a_pull_that_fails_leaves_no_part(spooled: tuple[ObjectStore, Path], through: Callable[..., Proxy]) -> None:
    store, folder = spooled
    store.write("base/a", b"1")
    store.write("base/b", CONTENT)
    through(lambda _, command, path: "busy" if path.endswith("/b") and command == "GET" else "")
    with pytest.raises(OSError, match="SlowDown"):
        pull(ObjectStore(store.url, attempts=1), folder, ["base"])
    assert sorted(os.listdir(folder / "base")) == ["a"]


def test_a_run_in_a_folder_needs_no_spool(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"1")
    spool = Spool(store, tmp_path)
    assert not spool.needed
    spool.push(["metrics.jsonl"])
    pull(store, tmp_path, ["metrics.jsonl"])
    assert os.listdir(tmp_path) == ["metrics.jsonl"]
    (tmp_path / "elsewhere").mkdir()
    pull(store, tmp_path / "elsewhere", ["metrics.jsonl"])
    assert (tmp_path / "elsewhere" / "metrics.jsonl").read_bytes() == b"1"
