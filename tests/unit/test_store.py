"""What every store promises, of a folder and of a real S3 server; and what a folder promises beyond it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from threading import Barrier, Event

import pytest

from launcher.store.folder import FolderStore
from launcher.store.location import is_url, local_folder, open_store, run_url
from launcher.store.objects import ObjectStore
from launcher.store.store import Store
from tests.unit.s3_server import BUCKET, ask, environment, s3_server

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as address, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(address).items():
            patch.setenv(name, value)
        yield address


@pytest.fixture(params=["folder", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An own one for each test."""
    if request.param == "folder":
        return str(tmp_path)
    request.getfixturevalue("server")
    return f"s3://{BUCKET}/{uuid.uuid4()}/run"


@pytest.fixture
def store(location: str) -> Store:
    return open_store(location)


def content_of(store: Store, name: str) -> bytes:
    return b"".join(bytes(block) for block in store.blocks(name))


def test_files_are_written_listed_and_read(store: Store) -> None:
    assert store.is_there()
    assert store.names() == []
    store.write("one.json", b"1")
    store.write("a/b/deep.bin", b"deep")
    store.write("a/empty", b"")
    before = time.time()
    store.write("a/file", b"old")
    store.write("a/file", b"replaced")
    assert store.names() == store.names("") == ["a", "one.json"]
    assert store.names("a") == ["b", "empty", "file"]
    assert store.sizes("a") == {"empty": 0, "file": 8}
    assert store.sizes("") == {"one.json": 1}
    assert store.names("nowhere") == store.names("one.json") == []
    assert store.sizes("nowhere") == store.sizes("one.json") == {}
    assert store.read("a/file") == content_of(store, "a/file") == b"replaced"
    assert store.read("a/empty") == content_of(store, "a/empty") == b""
    assert before - 2 <= store.modified("a/file") <= time.time() + 1


def test_what_is_missing_is_said(store: Store) -> None:
    store.write("a/file", b"1")
    for name in ("nothing", "a/nothing", "b/nothing"):
        for call in (
            lambda name: store.read(name),
            lambda name: store.read_into(name, 0, memoryview(bytearray(1))),
            lambda name: list(store.blocks(name)),
            lambda name: store.modified(name),
        ):
            with pytest.raises(FileNotFoundError, match=name):
                call(name)


def test_a_part_of_a_file_is_read_from_several_threads(store: Store) -> None:
    content = random.Random(0).randbytes(1 << 20)
    store.write("file", content)

    def part(start: int) -> bytes:
        target = bytearray(1 << 17)
        store.read_into("file", start, memoryview(target))
        return bytes(target)

    with ThreadPoolExecutor(8) as pool:
        assert b"".join(pool.map(part, range(0, 1 << 20, 1 << 17))) == content
    target = bytearray(10)
    store.read_into("file", len(content) - 4, memoryview(target)[3:7])
    assert bytes(target) == bytes(3) + content[-4:] + bytes(3)
    store.read_into("file", 5, memoryview(target)[:0])
    for start in (len(content) - 9, len(content), len(content) + 5):
        with pytest.raises(EOFError, match="file ends at"):
            store.read_into("file", start, memoryview(target))


def test_a_file_of_several_parts(store: Store) -> None:
    """More than two of the 32 MiB that go to S3 at once, in pieces that do not divide them."""
    piece = random.Random(1).randbytes(11 << 20)
    digest, total = hashlib.sha256(), 0
    with store.writing("folder/large") as write:
        for number in range(7):
            content = memoryview(piece)[number:]
            write(content)
            digest.update(content)
            total += len(content)
    assert store.sizes("folder") == {"large": total}
    found = hashlib.sha256()
    for block in store.blocks("folder/large"):
        assert len(block) <= 8 << 20
        found.update(block)
    assert found.digest() == digest.digest()
    tail = bytearray(100)
    store.read_into("folder/large", total - 100, memoryview(tail))
    assert bytes(tail) == piece[-100:]
    blocks = store.blocks("folder/large")
    assert bytes(next(iter(blocks))[:5]) == piece[:5]
    blocks.close()  # type: ignore[attr-defined]


def test_small_and_empty_streams(store: Store) -> None:
    with store.writing("a/empty"):
        pass
    with store.writing("a/small") as write:
        write(b"one, ")
        write(b"")
        write(memoryview(b"two"))
    assert store.read("a/small") == b"one, two"
    assert store.sizes("a") == {"empty": 0, "small": 8}


@pytest.mark.parametrize("num_parts", [0, 2])
def test_a_stream_that_fails_leaves_no_object(server: str, num_parts: int) -> None:
    store = open_store(f"s3://{BUCKET}/{uuid.uuid4()}")
    store.write("kept", b"before")
    for name in ("kept", "new"):
        with pytest.raises(KeyError, match="in the block"), store.writing(name) as write:  # noqa: PT012
            write(b"x" * 100)
            for _ in range(num_parts):
                write(bytes(33 << 20))
            raise KeyError("in the block")
    assert store.names() == ["kept"]
    assert store.read("kept") == b"before"
    assert b"<UploadId>" not in ask(server, "GET", f"/{BUCKET}?uploads")[1]


def test_of_several_that_create_a_file_one_succeeds(store: Store) -> None:
    assert store.create("x", b"mine")
    assert not store.create("x", b"other")
    assert store.read("x") == b"mine"
    start = Barrier(8)

    def attempt(number: int) -> bool:
        start.wait()
        return store.create(f"race/{number // 8}", b"%d" % number)

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(attempt, range(80)))
    for race in range(10):
        assert sum(made[race * 8 : race * 8 + 8]) == 1
        assert store.read(f"race/{race}") == b"%d" % made.index(True, race * 8)
    assert store.names("race") == sorted(str(race) for race in range(10))


CONTENDER = """
import sys
from launcher.store.location import open_store
store = open_store(sys.argv[1])
store.names()
print("ready", flush=True)
sys.stdin.readline()
made = [store.create(f"race/{n}", f"{sys.argv[2]} {n}".encode()) for n in range(20)]
print("".join("x" if one else "." for one in made))
"""


def test_of_several_processes_that_create_a_file_one_succeeds(location: str, store: Store) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, location, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for number in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    made = [process.communicate()[0].strip() for process in processes]
    for race in range(20):
        winners = [number for number in range(3) if made[number][race] == "x"]
        assert len(winners) == 1, made
        assert store.read(f"race/{race}") == f"{winners[0]} {race}".encode()


def test_removing_a_folder_takes_all_of_it_and_no_sibling(store: Store) -> None:
    for name in ("step-1/a", "step-1/deep/er/b", "step-10/a", "step-1.json", "step-", "other/step-1/a"):
        store.write(name, b"1")
    store.remove("step-1")
    store.remove("step-1")
    store.remove("never/there")
    assert store.names() == ["other", "step-", "step-1.json", "step-10"]
    assert store.names("step-10") == ["a"]
    store.remove("step-1.json")
    store.remove("other/step-1/a")
    assert store.names("other/step-1") == []
    assert [name for name in store.names() if name != "other"] == ["step-", "step-10"]


def test_more_objects_than_one_request_lists_or_deletes(server: str) -> None:
    place = f"{BUCKET}/{uuid.uuid4()}"
    with contextlib.closing(HTTPConnection(server.removeprefix("http://"))) as connection:
        for number in range(1003):
            connection.request("PUT", f"/{place}/many/{number // 600}/{number:04}", b"")
            connection.getresponse().read()
    store = open_store(f"s3://{place}")
    store.write("manyfold", b"1")
    assert len(store.names("many/0")) == 600
    store.remove("many")
    assert store.names() == ["manyfold"]


def test_names_with_signs_that_mean_something_elsewhere(store: Store) -> None:
    names = sorted(
        ["a b", "a+b", "a%20b", "ä", "a\u0308", "日本", "x[1]", "x1", "*", "q?x=1&y#z", "it's", "=:,;@$!~()", "{0}"]
    )
    for name in names:
        store.write(f"folder of {name}/{name}", name.encode())
        assert store.create(f"made/{name}", name.encode())
    assert store.names("made") == names
    assert store.names() == sorted([*(f"folder of {name}" for name in names), "made"])
    for name in names:
        assert store.sizes(f"folder of {name}") == {name: len(name.encode())}
        assert store.read(f"folder of {name}/{name}") == content_of(store, f"made/{name}") == name.encode()
        store.remove(f"made/{name}")
        store.remove(f"folder of {name}")
        assert name not in store.names("made")
    assert store.names("made") == []


def test_threads_do_not_disturb_each_other(store: Store) -> None:
    def work(number: int) -> list[int]:
        folder = f"of-{number}"
        for turn in range(3):
            store.write(f"{folder}/state", b"%d" % turn * 1000)
            with store.writing(f"{folder}/{turn}") as write:
                write(b"x" * turn)
        sizes = store.sizes(folder)
        assert store.read(f"{folder}/state") == b"2" * 1000
        store.remove(f"{folder}/0")
        assert store.names(folder) == ["1", "2", "state"]
        return sorted(sizes.values())

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(work, range(8))) == [[0, 1, 2, 1000]] * 8


def test_locations() -> None:
    assert is_url("s3://bucket/run")
    assert is_url("S3://bucket/run")
    assert not is_url("/tmp/run")
    assert not is_url("C:/run")
    assert run_url("S3://Bucket/Run//") == "s3://Bucket/Run"
    assert open_store("s3://bucket/run/") == open_store("S3://bucket/run") == ObjectStore("s3://bucket/run")
    assert open_store("s3://bucket/run") != open_store("s3://bucket/other")
    assert str(open_store("s3://bucket/run/")) == "s3://bucket/run"
    assert local_folder("s3://bucket/run") == local_folder("s3://bucket/run/")
    assert local_folder("s3://bucket/run") != local_folder("s3://other/run")


REWRITER = """
import json, os, random, signal, sys
from pathlib import Path
from launcher.store.folder import FolderStore

store, random = FolderStore(Path(sys.argv[1])), random.Random(0)
for round in range(30):
    ready, at_work = os.pipe()
    child = os.fork()
    if child == 0:
        n = 0
        while True:
            content = json.dumps({"n": n, "fill": "x" * 20_000}).encode()
            store.write("state.json", content)
            store.create(f"made/{round}-{n}.json", content)
            if n == 0:
                os.write(at_work, b"1")
            n += 1
    os.read(ready, 1)
    signal.sigtimedwait([], random.random() * 0.02)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for name in ["state.json", *(f"made/{name}" for name in store.names("made"))]:
        found = json.loads(store.read(name))
        assert len(found["fill"]) == 20_000
        assert name == "state.json" or name.endswith(f"-{found['n']}.json")
    made = {int(name.split("-")[1].split(".")[0]) for name in store.names("made") if name.startswith(f"{round}-")}
    assert made == set(range(len(made))), "none is missing"
    assert json.loads(store.read("state.json"))["n"] - max(made) in (0, 1), "what was written before is there"
    store.remove("made")
print("killed 30")
"""


def test_a_killed_writer_leaves_no_torn_file(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", REWRITER, str(tmp_path)], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "killed 30\n", done.stderr
    assert FolderStore(tmp_path).names() == ["state.json"]


def test_a_folder_that_vanished_is_never_made_again(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "gone")
    assert not store.is_there()
    for call in (
        lambda: store.write("a/b", b"1"),
        lambda: store.create("a", b"1"),
        lambda: store.writing("a/b").__enter__(),
    ):
        with pytest.raises(FileNotFoundError):
            call()
    assert store.names() == []
    store.remove("a")
    assert not (tmp_path / "gone").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a file system")
    yield tmp_path
    if os.path.ismount(tmp_path):
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    store = FolderStore(small_disk)
    store.write("state", b"before")
    too_much = bytes(2 << 20)
    for call in (lambda: store.write("state", too_much), lambda: store.create("new", too_much)):
        with pytest.raises(OSError, match="o space left") as error:
            call()
        assert error.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="o space left"), store.writing("stream") as write:
        write(too_much)
    store.remove("stream")
    assert os.listdir(small_disk) == ["state"], "no draft is left that would fill the disk"
    assert store.read("state") == b"before"
    store.write("state", bytes(500_000))
    assert store.sizes("") == {"state": 500_000}


def test_a_disk_that_becomes_read_only_and_is_unmounted(small_disk: Path) -> None:
    (small_disk / "run").mkdir()
    store = FolderStore(small_disk / "run")
    store.write("a/state", b"before")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for call in (
        lambda: store.write("a/state", b"1"),
        lambda: store.create("a/new", b"1"),
        lambda: store.writing("b/new").__enter__(),
        lambda: store.remove("a"),
    ):
        with pytest.raises(OSError, match="Read-only file system") as error:
            call()
        assert error.value.errno == errno.EROFS
    assert store.names("a") == ["state"]
    assert store.read("a/state") == b"before"
    subprocess.run(["umount", str(small_disk)], check=True)
    assert not store.is_there()
    with pytest.raises(FileNotFoundError):
        store.write("a/state", b"1")
    assert os.listdir(small_disk) == []


def test_a_folder_without_the_right_to_write(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")
    store = FolderStore(tmp_path)
    tmp_path.chmod(0o555)
    try:
        for call in (lambda: store.write("a", b"1"), lambda: store.create("a", b"1")):
            with pytest.raises(PermissionError):
                call()
    finally:
        tmp_path.chmod(0o755)


def test_files_deleted_meanwhile_hide_no_other(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.write("kept", b"12")
    done = Event()

    def come_and_go() -> None:
        while not done.is_set():
            for number in range(20):
                (tmp_path / str(number)).write_bytes(b"1")
            for number in range(20):
                (tmp_path / str(number)).unlink()

    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(come_and_go)
        try:
            for _ in range(500):
                assert store.sizes("")["kept"] == 2
                assert "kept" in store.names()
        finally:
            done.set()
        task.result()


def test_several_remove_the_same_folder_at_once(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    for _ in range(5):
        for number in range(200):
            (tmp_path / f"a/{number % 7}").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"a/{number % 7}/{number}").write_bytes(b"1")
        start = Barrier(4)

        def remove(_: int, start: Barrier = start) -> None:
            start.wait()
            store.remove("a")

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(remove, range(4)))
        assert os.listdir(tmp_path) == []
