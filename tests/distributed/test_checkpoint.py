"""E4 and E5 over real DeepSpeed, and what a save does when it cannot."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launcher.checkpoint.layout import Checkpoint, committed
from launcher.checkpoint.lease import Attempt, acquire, begin
from launcher.checkpoint.load import load, load_newest, load_weights
from launcher.checkpoint.manifest import newest_sound, read
from launcher.checkpoint.save import save
from launcher.errors import CheckpointError, DamagedCheckpoint, RunFolderError, Superseded
from launcher.store.folder import FolderStore
from tests.distributed.group import run_group
from tests.distributed.tiny import quiet, tiny_engine, tiny_plan, train

pytestmark = pytest.mark.distributed

SAVED_AT = 4
FIRST = Attempt(0, 1)

# (ZeRO stage, dtype, offload); bf16 at stage 1 is one class of DeepSpeed's with offload and another without.
LAYOUTS = [(zero, dtype, False) for dtype in ("fp32", "bf16") for zero in range(4)]
LAYOUTS += [(1, "bf16", True), (2, "fp32", True), (3, "bf16", True)]


def folder_of(root: Path, zero: int, dtype: str, offload: bool) -> Path:
    return root / f"{dtype}-zero{zero}{'-offload' if offload else ''}"


def checkpoint_at(run_dir: Path, step: int) -> Checkpoint:
    return Checkpoint(FolderStore(run_dir), step)


def begun(run_dir: Path) -> FolderStore:
    """The run's store, in which the attempt FIRST has begun. Collective."""
    store = FolderStore(run_dir)
    if dist.get_rank() == 0:
        run_dir.mkdir(exist_ok=True)
        assert begin(store, 0) == FIRST
    dist.barrier()
    return store


def uninterrupted(root: Path) -> dict[str, list[float]]:
    """Train eight steps with each layout, saved after the fourth and the last; the losses of the second half."""
    quiet()
    losses = {}
    for zero, dtype, offload in LAYOUTS:
        run_dir = folder_of(root, zero, dtype, offload)
        store = begun(run_dir)
        plan = tiny_plan(run_dir, zero, dtype, offload)
        with tiny_engine(plan) as engine:
            before = train(engine, plan, 0, SAVED_AT)
            save(store, SAVED_AT, FIRST, engine, {"losses": before, "eval_loss": before[-1]}, plan)
            losses[run_dir.name] = train(engine, plan, SAVED_AT, 4)
            save(store, 8, FIRST, engine, {}, plan)
    return losses


def resumed(root: Path, again: Path) -> dict[str, list[float]]:
    """Go on from each step-4 checkpoint in this fresh process, and save the end under `again`."""
    quiet()
    losses = {}
    for zero, dtype, offload in LAYOUTS:
        run_dir = folder_of(root, zero, dtype, offload)
        plan = tiny_plan(run_dir, zero, dtype, offload)
        with tiny_engine(plan) as engine:
            progress = load(checkpoint_at(run_dir, SAVED_AT), engine, plan)
            assert len(progress["losses"]) == SAVED_AT  # type: ignore[arg-type]
            losses[run_dir.name] = train(engine, plan, SAVED_AT, 4)
            save(begun(again / run_dir.name), 8, FIRST, engine, {}, plan)
    return losses


def resharded(root: Path, pairs: list[tuple[str, int, bool]]) -> list[list[float]]:
    """Losses after loading each named run's step-4 checkpoint into an engine of (stage, offload) that was in use."""
    quiet()
    losses = []
    for name, zero, offload in pairs:
        plan = tiny_plan(root / name, zero, name.partition("-")[0], offload)
        with tiny_engine(plan) as engine:
            # ZeRO-3 gathers its small parameters at the first forward and keeps them: from then on they can be stale.
            train(engine, plan, 0, 1)
            load(checkpoint_at(root / name, SAVED_AT), engine, plan)
            losses.append(train(engine, plan, SAVED_AT, 4))
    return losses


def worst(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


RESHARDS = {
    1: [("fp32-zero3", 0, False), ("fp32-zero3", 2, False), ("fp32-zero0", 3, True), ("bf16-zero3", 1, False)],
    2: [
        ("fp32-zero3", 1, False),
        ("fp32-zero3", 2, True),
        ("fp32-zero0", 3, False),
        ("fp32-zero2-offload", 0, False),
        ("fp32-zero1", 3, True),
        ("bf16-zero1", 3, False),
        ("bf16-zero0", 2, False),
        ("bf16-zero3-offload", 0, False),
    ],
    3: [("fp32-zero3", 3, False), ("fp32-zero0", 1, False), ("fp32-zero1", 0, False), ("bf16-zero2", 3, False)],
}


def fresh(root: Path, again: Path) -> tuple[dict[str, list[float]], list[list[float]]]:
    """Both in one group: most of a spawned group's time goes into its imports."""
    return resumed(root, again), resharded(root, RESHARDS[2])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[float]]]:
    root = tmp_path_factory.mktemp("runs")
    return root, run_group(2, uninterrupted, root)[0]


def check_resharded(found: list[list[float]], world_size: int, expected: dict[str, list[float]]) -> None:
    for losses, (name, zero, offload) in zip(found, RESHARDS[world_size], strict=True):
        error = worst(losses, expected[name])
        print(f"{name} at 2 ranks -> ZeRO {zero}{' offload' if offload else ''} at {world_size}: {error:.1e}")
        assert error <= (1e-5 if name.startswith("fp32") else 1e-3), (losses, expected[name])


def test_fresh_processes_go_on_bit_for_bit_and_at_any_stage(
    runs: tuple[Path, dict[str, list[float]]], tmp_path: Path
) -> None:
    root, expected = runs
    again, elsewhere = run_group(2, fresh, root, tmp_path)[0]
    assert again == expected
    for name in expected:
        first, second = checkpoint_at(root / name, 8), checkpoint_at(tmp_path / name, 8)
        assert read(first).optimizer_step == read(second).optimizer_step == 8
        assert read(first).files == read(second).files  # masters and both moments, every byte
    check_resharded(elsewhere, 2, expected)


@pytest.mark.parametrize("world_size", [1, pytest.param(3, marks=pytest.mark.long)])
def test_goes_on_at_another_world_size_from_the_first_step(
    runs: tuple[Path, dict[str, list[float]]], world_size: int
) -> None:
    root, expected = runs
    check_resharded(run_group(world_size, resharded, root, RESHARDS[world_size])[0], world_size, expected)


def test_weights_are_whole_without_a_process_group(runs: tuple[Path, dict[str, list[float]]]) -> None:
    root, expected = runs
    fp32 = [load_weights(checkpoint_at(root / name, 8)) for name in expected if name.startswith("fp32")]
    assert fp32[0]["model.embed_tokens.weight"].shape == (127, 32)
    for weights in fp32[1:]:
        assert weights.keys() == fp32[0].keys()
        for name, tensor in weights.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor, fp32[0][name], rtol=1e-3, atol=1e-4)


def frozen_and_untrained(root: Path) -> list[list[str]]:
    """Save a model with frozen layers after one step, and one that has taken no step; the names of what each holds."""
    quiet()
    names = []
    for zero, count in ((0, 1), (3, 1), (0, 0), (1, 0), (2, 0), (3, 0)):
        run_dir = root / f"zero{zero}-after{count}"
        store = begun(run_dir)
        plan = tiny_plan(run_dir, zero, "bf16")
        with tiny_engine(plan, freeze_first=True) as engine:
            train(engine, plan, 0, count)
            whole = [p.detach().clone() for p in engine.module.parameters()]
            path = save(store, count, FIRST, engine, {}, plan)
            assert all(torch.equal(a, b) for a, b in zip(whole, engine.module.parameters(), strict=True))
            names.append(sorted(read(path).parameters))
            expected = train(engine, plan, count, 2)
        with tiny_engine(plan, freeze_first=True) as engine:
            load(path, engine, plan)
            assert train(engine, plan, count, 2) == expected
    return names


OddSaves = list[tuple[list[list[str]], dict[str, str], Path]]


def odd(root: Path) -> tuple[list[list[str]], dict[str, str], Path]:
    """Both in one group, for the same reason as above."""
    run_dir = root / "failing"
    run_dir.mkdir(exist_ok=True)
    return frozen_and_untrained(root), failing(run_dir), run_dir


@pytest.fixture(scope="module")
def odd_saves(tmp_path_factory: pytest.TempPathFactory) -> OddSaves:
    return run_group(2, odd, tmp_path_factory.mktemp("odd"))


def test_what_is_frozen_is_not_written_and_no_step_is_needed(odd_saves: OddSaves) -> None:
    names = odd_saves[0][0]
    assert all(found == names[0] for found in names)
    assert "model.layers.1.mlp.up_proj.weight" in names[0]
    assert not any("layers.0" in name or "embed" in name for name in names[0])


def failing(run_dir: Path) -> dict[str, str]:
    """What each failure says on this rank."""
    quiet()
    said: dict[str, str] = {}
    plan, store, second, third = tiny_plan(run_dir, 3), FolderStore(run_dir), Attempt(2, 1), Attempt(3, 1)

    def failed(kind: type[Exception], what: str, action: Callable[[], object]) -> None:
        try:
            action()
        except kind as error:
            said[what] = str(error)
        else:
            raise AssertionError(f"{what}: nothing was raised")
        dist.barrier()

    if dist.get_rank() == 0:
        for launch in (1, 2):
            with acquire(store):
                begin(store, launch)
    dist.barrier()
    with tiny_engine(plan) as engine:
        first = save(store, 1, second, engine, {"n": 1}, plan)
        commit = run_dir / first.commit
        written = commit.stat().st_mtime_ns
        assert save(store, 1, second, engine, {"n": 2}, plan) == first
        assert commit.stat().st_mtime_ns == written

        # A disk that takes no more, on one rank only: the kernel itself refuses the write.
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, unlimited[1]))
        failed(RunFolderError, "full", lambda: save(store, 2, second, engine, {}, plan))
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert committed(store) == [first]
        assert checkpoint_at(run_dir, 2).attempts() == []
        failed(CheckpointError, "progress", lambda: save(store, 2, second, engine, {"x": object()}, plan))
        assert checkpoint_at(run_dir, 2).attempts() == []
        dist.barrier()

        if dist.get_rank() == 0:
            with acquire(store):
                begin(store, 3)
        dist.barrier()
        failed(Superseded, "orphan", lambda: save(store, 2, second, engine, {}, plan))
        failed(RunFolderError, "vanished", lambda: save(FolderStore(run_dir / "gone"), 2, third, engine, {}, plan))

        # A damaged checkpoint of a step is no reason not to save that step again.
        if dist.get_rank() == 0:
            flip(next((run_dir / first.staging(second)).glob("*.safetensors")))
        dist.barrier()
        failed(DamagedCheckpoint, "damaged", lambda: load(first, engine, plan))
        failed(CheckpointError, "none whole", lambda: load_newest(store, lambda one: load(one, engine, plan)))
        assert save(store, 1, third, engine, {"n": 3}, plan) == first
        assert load_newest(store, lambda one: load(one, engine, plan)) == (first, {"n": 3}, [])

        other = tiny_plan(run_dir, 3, seed=1)
        failed(CheckpointError, "trajectory", lambda: load(first, engine, other))
    with tiny_engine(plan, freeze_first=True) as engine:
        failed(CheckpointError, "parameters", lambda: load(first, engine, plan))
    return said


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_failure_on_one_rank_is_the_same_error_on_all_and_costs_nothing_committed(odd_saves: OddSaves) -> None:
    (_, said, run_dir), (_, also, _) = odd_saves
    assert said == also
    assert "File too large" in said["full"]
    assert "rank 1" in said["full"]
    assert "3" in said["orphan"]
    assert "vanished" in said["vanished"]
    assert ".safetensors: content changed" in said["damaged"]
    assert "another trajectory" in said["trajectory"]
    assert "embed_tokens" in said["parameters"]
    assert "no checkpoint of" in said["none whole"]
    assert newest_sound(FolderStore(run_dir)) == (checkpoint_at(run_dir, 1), [])
