"""Damaged checkpoints are named and not loaded; the older one is. And which ones retention lets go."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launcher.checkpoint import lease
from launcher.checkpoint.layout import COMMIT, MANIFEST, checkpoint_dir, committed, staging_dir, step_of
from launcher.checkpoint.load import load_weights, newest_sound
from launcher.checkpoint.manifest import Manifest, measure_all
from launcher.checkpoint.retain import retain
from launcher.errors import CheckpointError


def write_checkpoint(run_dir: Path, step: int, eval_loss: float | None = None) -> Path:
    """A checkpoint of one parameter of shape (2, 3) in two shards, as two ranks would write it."""
    folder = checkpoint_dir(run_dir, step)
    folder.mkdir(parents=True)
    for rank in range(2):
        offsets = f'{{"master.w": {{"saved_offsets": [{rank * 3}]}}}}'
        values = torch.arange(rank * 3, rank * 3 + 3, dtype=torch.float32) + step
        save_file({"master.w": values}, folder / f"shard-{rank}.safetensors", {"DCP_SHARDING_INFO": offsets})
    content = Manifest(
        step=step,
        attempt=1,
        trajectory="t",
        layout={},
        world_size=2,
        optimizer_step=step,
        parameters={"w": (2, 3)},
        progress={"eval_loss": eval_loss} if eval_loss is not None else {},
        files=measure_all(folder.glob("*.safetensors")),
    ).to_json()
    (folder / MANIFEST).write_bytes(content)
    (folder / COMMIT).write_text(hashlib.sha256(content).hexdigest() + "\n")
    return folder


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped": (lambda folder: flip(folder / "shard-1.safetensors"), "shard-1.safetensors: content changed"),
    "flipped in the header": (lambda folder: flip(folder / "shard-0.safetensors", 20), "shard-0.safetensors: content"),
    "truncated": (lambda folder: truncate(folder / "shard-0.safetensors"), "shard-0.safetensors: .* bytes instead of"),
    "deleted": (lambda folder: (folder / "shard-1.safetensors").unlink(), "shard-1.safetensors: missing"),
    "stray": (
        lambda folder: shutil.copy(folder / "shard-1.safetensors", folder / "x.safetensors"),
        "x.safetensors: not in the manifest",
    ),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json"),
    "manifest flipped": (lambda folder: flip(folder / MANIFEST, 30), "manifest.json"),
    "COMMIT emptied": (lambda folder: (folder / COMMIT).write_text(""), "COMMIT"),
}


def test_weights_are_joined_from_all_shards(tmp_path: Path) -> None:
    weights = load_weights(write_checkpoint(tmp_path, 100))
    assert torch.equal(weights["w"], torch.arange(100, 106, dtype=torch.float32).view(2, 3))


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_older_one_taken(tmp_path: Path, name: str) -> None:
    older, newer = write_checkpoint(tmp_path, 100), write_checkpoint(tmp_path, 200)
    assert newest_sound(tmp_path) == (newer, [])
    spoil, said = DAMAGES[name]
    spoil(newer)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_weights(newer)
    assert str(newer) in str(caught.value)
    assert caught.value.hint
    assert newest_sound(tmp_path) == (older, [str(caught.value)])


def test_where_none_is_sound_there_is_none(tmp_path: Path) -> None:
    assert newest_sound(tmp_path) == (None, [])
    truncate(write_checkpoint(tmp_path, 100) / "shard-0.safetensors")
    newest, messages = newest_sound(tmp_path)
    assert newest is None
    assert len(messages) == 1


def test_progress_comes_back_as_it_was(tmp_path: Path) -> None:
    manifest = Manifest(
        step=1,
        attempt=1,
        trajectory="t",
        layout={},
        world_size=1,
        optimizer_step=1,
        parameters={},
        progress={"loss": 0.1 + 0.2, "worst": float("inf"), "order": [3, 1], "text": "ä", "none": None},
        files={},
    )
    assert Manifest.model_validate_json(manifest.to_json()) == manifest


def steps(run_dir: Path) -> list[int]:
    return [step_of(path) for path in committed(run_dir)]


def test_the_last_and_the_best_stay(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, float("nan")), (6, 2.5)):
        write_checkpoint(tmp_path, step, loss)
    gone = retain(tmp_path, keep_last=2, keep_best=2)
    assert [step_of(path) for path in gone] == [1, 4]
    assert steps(tmp_path) == [2, 3, 5, 6]
    assert retain(tmp_path, keep_last=0, keep_best=0) != []
    assert steps(tmp_path) == [6]


def test_the_newest_sound_one_is_never_deleted(tmp_path: Path) -> None:
    for step in range(1, 6):
        write_checkpoint(tmp_path, step, eval_loss=step)
    for step in (4, 5):
        flip(checkpoint_dir(tmp_path, step) / "shard-0.safetensors")
    retain(tmp_path, keep_last=2, keep_best=1)
    assert steps(tmp_path) == [1, 3, 4, 5]
    assert newest_sound(tmp_path)[0] == checkpoint_dir(tmp_path, 3)


def test_what_crashes_left_is_swept_and_what_is_under_way_is_not(tmp_path: Path) -> None:
    lease.acquire(tmp_path).release()
    lease.acquire(tmp_path).release()
    newest = write_checkpoint(tmp_path, 3)
    for attempt in (1, 2):
        staging_dir(tmp_path, 4, attempt).mkdir()
    (write_checkpoint(tmp_path, 2) / COMMIT).unlink()
    half_deleted = newest.with_name(".removed-step-00000001")
    half_deleted.mkdir()
    assert retain(tmp_path, keep_last=1, keep_best=0) == []
    assert sorted(path.name for path in newest.parent.iterdir()) == [".staging-00000004-2", "step-00000003"]


def test_a_folder_that_cannot_be_deleted_stays_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    retain(tmp_path, keep_last=1, keep_best=0)
    assert steps(tmp_path) == [2]
    assert "old checkpoints stay" in caplog.text
