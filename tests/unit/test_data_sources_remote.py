"""Reading by URL and from the hub: real servers on the loopback, and every way in which they fail."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import pytest

from launcher.data.sources import fingerprint, pieces, read, read_all
from launcher.errors import DataError
from launcher.plan.plan import SourcePlan
from tests.plans import source_plan

ROWS = [{"n": n, "text": "é" * n} for n in range(30)]
LINES = b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def url(path: str, **changes: Any) -> SourcePlan:
    return source_plan(path, kind="url", **changes)


def rows(plan: SourcePlan) -> list[Any]:
    """All rows; in small pieces the same, with the same places."""
    whole = list(read_all(plan))
    assert [row for piece in pieces(plan, 0, num_bytes=50) for row in read(plan, piece)] == whole
    return [row for _, row in whole]


def refused(plan: SourcePlan) -> DataError:
    with pytest.raises(DataError) as error:
        list(read_all(plan))
    assert error.value.message.startswith(plan.path)
    assert error.value.hint
    return error.value


@pytest.fixture(autouse=True)
def downloads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "slipway" / "downloads"


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    for path in list(files.store):
        files.rm_file(path)


class Handler(BaseHTTPRequestHandler):
    """Serves `files`; the path's first part says how."""

    files: dict[str, bytes]
    asked: list[str]
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        _, how, name = self.path.split("?")[0].split("/", 2)
        self.asked.append(f"{self.command} {how}")
        if how.isdigit():
            return self.send_error(int(how))
        body = self.files[name]
        self.send_response(200)
        if how == "tagged":
            self.send_header("ETag", f'"{hash(body)}"')
        if how == "dated":
            self.send_header("Last-Modified", "Fri, 20 Nov 2026 12:00:00 GMT")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if how == "cut" else body)
            if how == "cut":
                self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no error of the test."""


@pytest.fixture
def server() -> Iterator[tuple[str, type[Handler]]]:
    handler = type("OwnHandler", (Handler,), {"files": {"a.jsonl": LINES}, "asked": []})
    with Server(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", handler
        running.shutdown()
        thread.join()


def test_a_file_a_folder_and_a_pattern(memory: Any, downloads: Path) -> None:
    memory.pipe_file("/data/b.jsonl", LINES)
    memory.pipe_file("/data/sub/a.json.gz", gzip.compress(json.dumps(ROWS).encode()))
    memory.pipe_file("/data/README.md", b"words")
    assert rows(url("memory://data/b.jsonl")) == ROWS
    assert rows(url("memory://data")) == rows(url("memory://data/**")) == ROWS * 2
    assert rows(url("memory://data/*/*.json.gz")) == ROWS
    assert rows(url("memory://data", limit=40)) == (ROWS * 2)[:40]
    first, *_, last = read_all(url("memory://data"))
    assert (first[0], last[0]) == ("memory:///data/b.jsonl:1", "memory:///data/sub/a.json.gz:1")
    assert len(list((downloads / "contents").iterdir())) == 2
    for path, said in [
        ("memory://data/c.jsonl", "no such file"),
        ("memory://data/*.csv", "nothing matches"),
        ("memory://data/README.md", "unknown kind of file"),
        ("memory://nowhere/", "no such file"),
    ]:
        assert f": {said}" in refused(url(path)).message
    memory.pipe_file("/data/x.bin", b"")
    assert "files of no known kind: x.bin" in refused(url("memory://data")).message
    assert "has no split 'train'" in refused(url("memory://data/b.jsonl", split="train")).message


def test_a_folder_of_several_splits_is_not_read_as_one(memory: Any) -> None:
    memory.pipe_file("/data/train.jsonl", LINES)
    memory.pipe_file("/data/test.jsonl", LINES)
    assert "holds several splits" in refused(url("memory://data")).message


def test_files_in_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/one.jsonl", LINES)
        archive.writestr("in/two.jsonl", LINES)
    assert rows(url(f"zip://in/one.jsonl::file://{tmp_path}/a.zip")) == ROWS
    found = list(read_all(url(f"zip://in/*.jsonl::file://{tmp_path}/a.zip")))
    assert found[-1] == (f"zip://in/two.jsonl::file://{tmp_path}/a.zip:30", ROWS[-1])
    assert "unknown kind of file" in refused(url(f"file://{tmp_path}/a.zip")).message
    plan = url(f"zip://in/*.jsonl::file://{tmp_path}/a.zip")
    before = fingerprint(plan)
    assert fingerprint(plan) == before
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("in/one.jsonl", LINES[::-1])
    assert fingerprint(plan) != before


@pytest.mark.parametrize("how", ["tagged", "dated", "plain"])
def test_http(server: tuple[str, type[Handler]], how: str) -> None:
    """What a stamp identifies is fetched once in all; the rest once a fingerprint."""
    address, handler = server
    plan = url(f"{address}/{how}/a.jsonl?download=true")
    before = fingerprint(plan)
    assert rows(plan) == ROWS
    assert fingerprint(plan) == before
    assert rows(plan) == ROWS
    assert handler.asked.count(f"GET {how}") == (2 if how == "plain" else 1)
    assert before.num_bytes == len(LINES)
    handler.files["a.jsonl"] = LINES.replace(b"29", b"31")
    assert (fingerprint(plan) == before) == (how == "dated")  # nothing that the server says has changed


def test_another_machine_fetches_the_same_content_or_says_so(
    server: tuple[str, type[Handler]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address, handler = server
    plan = url(f"{address}/tagged/a.jsonl")
    found = pieces(plan, 0, num_bytes=200)
    assert len(found) > 3
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    with ThreadPoolExecutor(4) as pool:  # at once, and it is fetched once
        parts = list(pool.map(lambda piece: [row for _, row in read(plan, piece)], found))
    assert [row for part in parts for row in part] == ROWS
    assert handler.asked.count("GET tagged") == 2
    handler.files["a.jsonl"] = LINES.replace(b"29", b"31")
    assert len(list(read(plan, found[0]))) > 0  # what was fetched stays as it was
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "third"))
    with pytest.raises(DataError, match="has changed since the preparation began"):
        list(read(plan, found[0]))


def test_http_that_fails(server: tuple[str, type[Handler]], downloads: Path) -> None:
    address, _ = server
    for how, said, hint in [
        ("404", "no such file", "check the address"),
        ("403", "access is denied (HTTP status 403)", "credentials"),
        ("500", "cannot be read: 500", "connection"),
        ("cut", "cannot be read: ", "start again"),
    ]:
        error = refused(url(f"{address}/{how}/a.jsonl"))
        assert error.message.startswith(f"{address}/{how}/a.jsonl: {said}"), error.message
        assert hint in str(error.hint)
    assert {path.name for path in downloads.iterdir()} == {"locks"}, "nothing half fetched is left"
    assert "cannot be read: " in refused(url("http://127.0.0.1:9/a.jsonl")).message


def test_no_space_in_the_download_folder(server: tuple[str, type[Handler]], tmp_path: Path) -> None:
    """A real file system of 1 MiB."""
    address, handler = server
    handler.files["a.jsonl"] = LINES * 1000
    (tmp_path / "cache").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path / "cache")]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    try:
        error = refused(url(f"{address}/tagged/a.jsonl"))
        assert "no space left in" in error.message
        assert "XDG_CACHE_HOME" in str(error.hint)
    finally:
        subprocess.run(["umount", str(tmp_path / "cache")], check=True)


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_file_systems_that_are_not_there() -> None:
    error = refused(url("gs://bucket/a.jsonl"))
    assert "needs a package that is not installed" in error.message
    assert error.hint == "pip install gcsfs"
    assert "Protocol not known: nosuch" in refused(url("nosuch://a.jsonl")).message


HUB_CLIENT = """
import json, sys
from launcher.data.sources import fingerprint, pieces, pinned, read, read_all
from launcher.errors import DataError
from tests.plans import source_plan

def tried(call, *arguments):
    try:
        return call(*arguments)
    except DataError as error:
        assert error.hint
        return f"{error.message} | {error.hint}"

answers = []
for path, changes in json.loads(sys.argv[1]):
    plan = tried(pinned, source_plan(path, **({"kind": "hub"} | changes)))
    if isinstance(plan, str):
        answers.append([plan, None, None])
        continue
    rows = tried(lambda: list(read_all(plan)))
    if not isinstance(rows, str):
        parts = pieces(plan, 3, num_rows=2)
        assert rows == [row for piece in parts for row in read(plan, piece)]
    answers.append([plan.revision, rows, getattr(tried(fingerprint, plan), "digest", None)])
print(json.dumps(answers))
"""


def write_repository(folder: Path, **files: str) -> None:
    for name, kind in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps({"question": f"{kind} {n}?", "answer": str(n)}) + "\n" for n in range(5))
        path.with_suffix(".jsonl").write_text(text)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a process that uses a hub on the loopback."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.unit.loopback_hub", str(tmp_path / "hub")],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert server.stdout is not None
    address = server.stdout.readline().strip()
    yield {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "hf"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    server.terminate()
    server.communicate()


def ask(environment: dict[str, str], *sources: tuple[str, dict[str, str]]) -> list[Any]:
    """For each source its commit or what is wrong, its rows or what is wrong, and its fingerprint."""
    done = subprocess.run(
        [sys.executable, "-c", HUB_CLIENT, json.dumps(sources)],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    answers: list[Any] = json.loads(done.stdout)
    return answers


def test_the_hub(hub: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    repositories = tmp_path / "hub" / "org"
    write_repository(repositories / "one", data="one")
    write_repository(repositories / "splits", train="train", test="test")
    write_repository(repositories / "subsets", main__train="main", other__train="other")
    configurations = "".join(
        f"- config_name: {name}\n  data_files: [{{split: train, path: {name}/train.jsonl}}]\n"
        for name in ("main", "other")
    )
    (repositories / "subsets" / "README.md").write_text(f"---\nconfigs:\n{configurations}---\n")
    write_repository(repositories / "gated", train="gated")
    (repositories / "gated" / ".gated").write_text("")
    (repositories / "script").mkdir()
    (repositories / "script" / "script.py").write_text("raise SystemExit('never run')\n")

    one, tag, other, splits, test, dev, subsets, main, typo, gated, script, none, nothing, by_url, gone = ask(
        hub,
        ("org/one", {}),
        ("org/one", {"revision": "v1"}),
        ("org/one", {"revision": "v2"}),
        ("org/splits", {}),
        ("org/splits", {"split": "test"}),
        ("org/splits", {"split": "dev"}),
        ("org/subsets", {}),
        ("org/subsets", {"subset": "main"}),
        ("org/subsets", {"subset": "man"}),
        ("org/gated", {}),
        ("org/script", {}),
        ("org/none", {}),
        ("not an id", {}),
        ("hf://datasets/org/one/*.jsonl", {"kind": "url"}),
        ("hf://datasets/org/one/gone.jsonl", {"kind": "url"}),
    )
    assert gone[1] == "hf://datasets/org/one/gone.jsonl: no such file | check the address"
    assert by_url[1][4] == ["hf://datasets/org/one/data.jsonl:5", {"question": "one 4?", "answer": "4"}]
    assert len(one[0]) == 40
    assert one[1] == [[f"org/one:{n + 1}", {"question": f"one {n}?", "answer": str(n)}] for n in range(5)]
    assert tag == one
    assert other[0].startswith("org/one has no revision 'v2' | ")
    assert splits[1] == "org/splits: several splits and none asked for | give split: one of test, train"
    assert test[1][0] == ["org/splits/test:1", {"question": "test 0?", "answer": "0"}]
    assert dev[1] == "org/splits: no split 'dev' | give split: one of test, train"
    assert subsets[1] == "org/subsets: several subsets and none asked for | give subset: one of main, other"
    assert main[1][4] == ["org/subsets/main:5", {"question": "main 4?", "answer": "4"}]
    assert typo[1] == "org/subsets: no subset 'man' | give subset: one of main, other"
    assert len({answer[2] for answer in (one, splits, test, dev, subsets, main, typo)}) == 7
    assert gated[0].startswith("org/gated is gated | accept its terms")
    assert script[1].startswith("org/script is loaded by a script, which is never run here | ")
    assert none[0].startswith("org/none is neither a file here nor a data set on the hub | ")
    assert nothing[0].startswith("not an id is neither")

    # Offline: the same commit and rows from the cache, and nothing guessed from what happens to lie in it.
    write_repository(repositories / "one", data="new")
    (new,) = ask(hub, ("org/one", {}))
    assert new[0] != one[0]
    offline = hub | {"HF_HUB_OFFLINE": "1"}
    now, old, again, guess, other, none = ask(
        offline,
        ("org/one", {}),
        ("org/one", {"revision": one[0]}),
        ("org/subsets", {"subset": "main"}),
        ("org/subsets", {}),
        ("org/subsets", {"subset": "other"}),
        ("org/none", {}),
    )
    assert now == new
    assert old[1].startswith(
        f"org/one: the hub does not answer, and the cache has {new[0][:8]}, not commit {one[0][:8]}"
    )
    assert again == main
    assert guess[1].endswith("| give subset: main")
    assert "with subset 'other' is not in the cache" in other[1]
    assert none[0].startswith("org/none is no file here, and the hub cannot be reached: HF_HUB_OFFLINE is set | ")
