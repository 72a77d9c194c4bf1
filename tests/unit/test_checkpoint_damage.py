"""A damaged checkpoint is named and not loaded, whatever is damaged, in a folder and in an object store; the older one
is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from launcher.checkpoint.layout import COMMIT, MANIFEST, Checkpoint
from launcher.checkpoint.load import load_weights
from launcher.checkpoint.manifest import Manifest, newest_sound, verify
from launcher.errors import DamagedCheckpoint
from launcher.store.folder import FolderStore
from launcher.store.store import Store
from tests.checkpoints import FIRST, STORES, opened, values, write_checkpoint

RANKS = 3
SHARDS = tuple(f"shard-{rank:05d}.safetensors" for rank in range(RANKS))


@dataclass(frozen=True)
class Two:
    """Two checkpoints of one run; tests damage the newer one and mend it again."""

    older: Checkpoint
    newer: Checkpoint

    @property
    def store(self) -> Store:
        return self.newer.store

    def path(self, name: str) -> str:
        """Of a file of the newer one in its store."""
        return self.newer.commit if name == COMMIT else f"{self.newer.staging(FIRST)}/{name}"

    @contextlib.contextmanager
    def damaged(self, name: str, change: Callable[[bytes], bytes | None]) -> Iterator[None]:
        """One file changed, or deleted where `change` gives None, for the block."""
        good = self.store.read(self.path(name))
        bad = change(good)
        assert bad != good
        if bad is None:
            self.store.remove(self.path(name))
        else:
            self.store.write(self.path(name), bad)
        try:
            yield
        finally:
            self.store.write(self.path(name), good)

    def refused(self, said: str) -> None:
        """The newer one is not loaded, its message has `said` in it, and the older one is taken."""
        with pytest.raises(DamagedCheckpoint, match=said) as caught:
            load_weights(self.newer)
        message = caught.value.message
        assert message.startswith(f"{self.newer} is damaged: ")
        assert caught.value.hint
        assert newest_sound(self.store) == (self.older, [message])


@pytest.fixture(scope="module", params=STORES)
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Two]:
    with opened(request.param, tmp_path_factory.mktemp("run")) as store:
        yield Two(*(write_checkpoint(store, step, ranks=RANKS) for step in (100, 200)))


@pytest.fixture(scope="module")
def in_folder(tmp_path_factory: pytest.TempPathFactory) -> Two:
    """For what is too slow to be done over a network a hundred times; what is read is the same."""
    store = FolderStore(tmp_path_factory.mktemp("run"))
    return Two(*(write_checkpoint(store, step, ranks=RANKS) for step in (100, 200)))


def test_weights_are_joined_from_all_shards(two: Two) -> None:
    weights = load_weights(two.newer)
    assert torch.equal(weights["norm.weight"], values("master.norm.weight", 5, 200))
    assert torch.equal(weights["up.weight"], values("master.up.weight", 21, 200).view(7, 3))


def flipped(position: int, mask: int = 1) -> Callable[[bytes], bytes]:
    return lambda content: content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :]


def first_of_data(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


DAMAGES: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "first byte of the head's length": (flipped(0), "content changed"),
    "last byte of the head's length": (flipped(7), "content changed"),
    "in the head": (flipped(40), "content changed"),
    "last byte of the head": (lambda content: flipped(first_of_data(content) - 1)(content), "content changed"),
    "first byte of the data": (lambda content: flipped(first_of_data(content))(content), "content changed"),
    "last byte of the data": (lambda content: flipped(len(content) - 1)(content), "content changed"),
    "a byte less": (lambda content: content[:-1], r"\d+ bytes instead of \d+"),
    "empty": (lambda content: b"", r"0 bytes instead of \d+"),
    "a byte more": (lambda content: content + b"\0", r"\d+ bytes instead of \d+"),
    "deleted": (lambda content: None, "missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_shard_is_named(two: Two, damage: str) -> None:
    change, said = DAMAGES[damage]
    for shard in SHARDS if isinstance(two.store, FolderStore) else SHARDS[1:2]:
        with two.damaged(shard, change):
            two.refused(f"is damaged: {shard}: {said}$")
    assert newest_sound(two.store) == (two.newer, [])


MANIFEST_DAMAGES: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "flipped": (flipped(30), f"{MANIFEST} is not the one that COMMIT names"),
    "a byte less": (lambda content: content[:-1], f"{MANIFEST} is not the one that COMMIT names"),
    "a byte more": (lambda content: content + b"\n", f"{MANIFEST} is not the one that COMMIT names"),
    "empty": (lambda content: b"", f"{MANIFEST} is not the one that COMMIT names"),
    "deleted": (lambda content: None, f"{MANIFEST} of attempt 0.1, which COMMIT names, is missing"),
}


@pytest.mark.parametrize("damage", MANIFEST_DAMAGES)
def test_a_damaged_manifest_is_named(two: Two, damage: str) -> None:
    change, said = MANIFEST_DAMAGES[damage]
    with two.damaged(MANIFEST, change):
        two.refused(said)


COMMIT_DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "COMMIT: content changed"),
    "half": (lambda content: content[: len(content) // 2], "COMMIT: content changed"),
    "no text": (lambda content: bytes(range(256)), "COMMIT: content changed"),
    "another attempt": (
        lambda content: content.replace(b"0.1", b"0.2"),
        f"{MANIFEST} of attempt 0.2, which COMMIT names, is missing",
    ),
    "no attempt": (lambda content: content.replace(b"0.1", b"../"), "COMMIT: content changed"),
    "another hash": (lambda content: content.replace(b'sha256":"', b'sha256":"0'), "is not the one that COMMIT names"),
    "more in it": (lambda content: content.replace(b"{", b'{"x":1,'), "COMMIT: content changed"),
}


@pytest.mark.parametrize("damage", COMMIT_DAMAGES)
def test_a_damaged_commit_is_named(two: Two, damage: str) -> None:
    change, said = COMMIT_DAMAGES[damage]
    with two.damaged(COMMIT, change):
        two.refused(said)


def test_a_stray_shard_is_named(two: Two) -> None:
    stray = two.path("shard-00007.safetensors")
    two.store.write(stray, two.store.read(two.path(SHARDS[0])))
    try:
        two.refused("shard-00007.safetensors: not in the manifest$")
    finally:
        two.store.remove(stray)


def test_shards_that_have_changed_places_are_named(two: Two) -> None:
    """Each is whole and of a size that the manifest knows; only the hash tells."""
    first, second = (two.store.read(two.path(shard)) for shard in SHARDS[:2])
    with two.damaged(SHARDS[0], lambda _: second), two.damaged(SHARDS[1], lambda _: first):
        two.refused(f"{SHARDS[0]}.*; {SHARDS[1]}")


def test_every_damaged_file_is_named_at_once(two: Two) -> None:
    with two.damaged(SHARDS[0], flipped(9)), two.damaged(SHARDS[2], lambda _: None):
        two.refused(f"{SHARDS[2]}: missing; {SHARDS[0]}: content changed")


def test_where_none_is_sound_each_is_named(two: Two) -> None:
    older = Two(two.newer, two.older)
    with two.damaged(SHARDS[1], flipped(9)), older.damaged(SHARDS[0], lambda _: None):
        newest, messages = newest_sound(two.store)
        assert newest is None
        assert [message.partition(" is damaged: ")[0] for message in messages] == [str(two.newer), str(two.older)]
        for checkpoint in (two.older, two.newer):
            with pytest.raises(DamagedCheckpoint):
                load_weights(checkpoint)


def test_without_commit_it_is_no_checkpoint_and_no_damaged_one(two: Two) -> None:
    with two.damaged(COMMIT, lambda _: None):
        assert newest_sound(two.store) == (two.older, [])


EXAMPLES = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@EXAMPLES
@given(
    shard=st.sampled_from(SHARDS),
    positions=st.dictionaries(st.integers(0, 10**6), st.integers(1, 255), min_size=1, max_size=3),
)
def test_any_other_byte_in_a_shard_is_found(in_folder: Two, shard: str, positions: dict[int, int]) -> None:
    def change(content: bytes) -> bytes:
        found = bytearray(content)
        for position, mask in positions.items():
            found[position % len(content)] ^= mask
        return bytes(found) if found != content else content + b"\0"

    with in_folder.damaged(shard, change):
        in_folder.refused(f"is damaged: {shard}: ")


@EXAMPLES
@given(shard=st.sampled_from(SHARDS), share=st.floats(0, 1, exclude_max=True))
def test_any_shorter_shard_is_found(in_folder: Two, shard: str, share: float) -> None:
    with in_folder.damaged(shard, lambda content: content[: int(share * len(content))]):
        in_folder.refused(f"is damaged: {shard}: ")


@EXAMPLES
@given(name=st.sampled_from((COMMIT, MANIFEST)), position=st.integers(0, 10**6), mask=st.integers(1, 255))
def test_any_other_byte_in_commit_and_manifest_is_found(in_folder: Two, name: str, position: int, mask: int) -> None:
    good = in_folder.store.read(in_folder.path(name))
    place = position % len(good)
    with in_folder.damaged(name, flipped(place, mask)):
        if name == COMMIT and place == len(good) - 1 and good[place] ^ mask in b" \t\r":
            assert verify(in_folder.newer).step == 200  # another white space at its end says the same
        else:
            in_folder.refused(rf"is damaged: ({COMMIT}|{MANIFEST})")


def test_every_byte_of_commit_counts(in_folder: Two) -> None:
    # Of the hash the first two and the last: its digits are alike.
    content = in_folder.store.read(in_folder.newer.commit)
    digits = content.index(b'256":"') + 6
    for position in (*range(digits + 2), *range(digits + 63, len(content))):
        with in_folder.damaged(COMMIT, flipped(position)):
            in_folder.refused(rf"is damaged: ({COMMIT}|{MANIFEST})")


def test_progress_comes_back_as_it_was() -> None:
    manifest = Manifest(
        step=1,
        attempt="0.1",
        plan="p",
        trajectory="t",
        layout={},
        world_size=1,
        optimizer_step=1,
        parameters={},
        progress={"loss": 0.1 + 0.2, "worst": float("inf"), "order": [3, 1], "text": "ä", "none": None},
        files={},
    )
    assert Manifest.model_validate_json(manifest.to_json()) == manifest
