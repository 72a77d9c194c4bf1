"""A damaged checkpoint never reaches an engine: the older one does, in a folder and in an object store. And a deep
check reads what any engine saves.

All is done in one process group: most of a group's time goes into imports.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from launcher.checkpoint.deep import Expected, check
from launcher.checkpoint.layout import COMMIT, MANIFEST, Checkpoint
from launcher.checkpoint.lease import begin
from launcher.checkpoint.load import load, load_newest
from launcher.checkpoint.manifest import verify
from launcher.checkpoint.save import save
from launcher.checkpoint.shards import parameter_shapes, training_state
from launcher.errors import CheckpointError, DamagedCheckpoint
from launcher.plan.plan import Plan
from launcher.store.location import open_store
from launcher.store.store import Store
from tests.checkpoints import FIRST, opened
from tests.distributed.group import run_group
from tests.distributed.test_moments_8bit import engine_of, plan_at
from tests.distributed.tiny import quiet, tiny_engine, tiny_plan, train

pytestmark = pytest.mark.distributed

SHARDS = ("shard-00000.safetensors", "shard-00001.safetensors")


def middle(content: bytes) -> bytes:
    place = len(content) // 2
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


DAMAGES: dict[str, tuple[str, Callable[[bytes], bytes | None]]] = {
    "shard flipped": (SHARDS[1], middle),
    "shard's head flipped": (SHARDS[0], lambda content: bytes([content[0] ^ 1]) + content[1:]),
    "shard truncated": (SHARDS[0], lambda content: content[:-1]),
    "shard empty": (SHARDS[1], lambda content: b""),
    "shard longer": (SHARDS[0], lambda content: content + b"\0"),
    "shard deleted": (SHARDS[0], lambda content: None),
    "stray shard": ("shard-00002.safetensors", lambda content: b"\0"),
    "manifest flipped": (MANIFEST, middle),
    "manifest deleted": (MANIFEST, lambda content: None),
    "COMMIT flipped": (COMMIT, middle),
    "COMMIT empty": (COMMIT, lambda content: b""),
}
OVER_NETWORK = ("shard flipped", "manifest deleted")


def path_of(checkpoint: Checkpoint, name: str) -> str:
    return checkpoint.commit if name == COMMIT else f"{checkpoint.staging(FIRST)}/{name}"


def put(store: Store, path: str, content: bytes | None) -> None:
    """Rank 0 makes or deletes a file. Collective."""
    dist.barrier()
    if dist.get_rank() == 0 and content is None:
        store.remove(path)
    elif dist.get_rank() == 0:
        store.write(path, content or b"")
    dist.barrier()


def begun(plan: Plan) -> Store:
    store = open_store(plan.location)
    if dist.get_rank() == 0:
        Path(plan.run_dir).mkdir(exist_ok=True)
        assert begin(store, 0) == FIRST
    dist.barrier()
    return store


def damaged_one_after_another(plan: Plan, damages: tuple[str, ...]) -> dict[str, str]:
    """What is said of each damage of the newer of two checkpoints, which is mended again."""
    store, said = begun(plan), {}
    with tiny_engine(plan) as engine:

        def state() -> dict[str, torch.Tensor]:
            return {name: shard.held.clone() for name, shard in training_state(engine).items()}

        def same(found: dict[str, torch.Tensor]) -> bool:
            return all(torch.equal(tensor, found[name]) for name, tensor in state().items())

        train(engine, plan, 0, 1)
        older, first = save(store, 1, FIRST, engine, {"step": 1}, plan), state()
        train(engine, plan, 1, 1)
        newer, second = save(store, 2, FIRST, engine, {"step": 2}, plan), state()
        assert not same(first)
        for damage in damages:
            train(engine, plan, 2, 1)
            untouched = state()
            name, change = DAMAGES[damage]
            path = path_of(newer, name)
            good = None if damage == "stray shard" else store.read(path)
            put(store, path, change(good or b""))
            with pytest.raises(DamagedCheckpoint) as caught:
                load(newer, engine, plan)
            assert same(untouched), damage
            found, progress, [message] = load_newest(store, lambda one: load(one, engine, plan))
            assert (found, progress, message) == (older, {"step": 1}, caught.value.message), damage
            assert same(first), damage
            said[damage] = message
            put(store, path, good)
        assert load_newest(store, lambda one: load(one, engine, plan)) == (newer, {"step": 2}, [])
        assert same(second)
        for checkpoint in (older, newer):
            put(store, path_of(checkpoint, SHARDS[0]), b"")
        with pytest.raises(CheckpointError) as none:
            load_newest(store, lambda one: load(one, engine, plan))
        said["all"] = none.value.message
    return said


STAGES = [("adamw", 3), ("adamw_8bit", 0), ("adamw_8bit", 2)]


def deeply_checked(root: Path) -> dict[tuple[str, int], set[str]]:
    """Save at some stages, in 32 bits and in 8, and read all of it back; of each the kinds of state that were read."""
    kinds = {}
    for optimizer, zero in STAGES:
        plan = plan_at(root, zero, "fp32", optimizer)
        store = begun(plan)
        with engine_of(plan) as engine:
            train(engine, plan, 0, 2)
            checkpoint = save(store, 2, FIRST, engine, {"step": 2}, plan)
            shapes = parameter_shapes(engine)
            kinds[optimizer, zero] = {name.partition(".")[0] for name in training_state(engine)}
        expected = Expected(plan.trajectory.hash(), plan.trajectory.optimizer, shapes, "the engine")
        manifest = verify(checkpoint)
        check(checkpoint, manifest, expected)
        half = manifest.model_copy(update={"files": {SHARDS[0]: manifest.files[SHARDS[0]]}})
        with pytest.raises(DamagedCheckpoint, match="missing"):
            check(checkpoint, half, expected)
    return kinds


Said = list[dict[str, str]]


def everything(root: Path, locations: list[str]) -> tuple[Said, dict[tuple[str, int], set[str]]]:
    quiet()
    said = []
    for location, damages in zip(locations, (tuple(DAMAGES), OVER_NETWORK), strict=True):
        plan = tiny_plan(root / "run", 2).model_copy(update={"location": location})
        said.append(damaged_one_after_another(plan, damages))
    return said, deeply_checked(root)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Said, dict[tuple[str, int], set[str]]]]:
    root = tmp_path_factory.mktemp("damage")
    with opened("s3", root) as store:
        return run_group(2, everything, root, [str(root / "run"), str(store)])


def test_every_damage_is_named_on_all_ranks_and_the_older_one_loaded(
    found: list[tuple[Said, dict[tuple[str, int], set[str]]]],
) -> None:
    assert found[0][0] == found[1][0]
    for said, damages in zip(found[0][0], (tuple(DAMAGES), OVER_NETWORK), strict=True):
        everywhere = said.pop("all")
        assert tuple(said) == damages
        store = everywhere.removeprefix("no checkpoint of ").partition(" is whole: ")[0]
        newer, older = (f"{store}/checkpoints/step-0000000{step}" for step in (2, 1))
        empty = f"{SHARDS[0]}: 0 bytes instead of "
        assert f": {newer} is damaged: {empty}" in everywhere
        assert f"; {older} is damaged: {empty}" in everywhere
        for damage, message in said.items():
            name = MANIFEST if damage == "COMMIT flipped" else DAMAGES[damage][0]
            assert message.startswith(f"{newer} is damaged: {name}"), damage
            assert older not in message


def test_a_deep_check_reads_what_stages_and_optimizers_save(
    found: list[tuple[Said, dict[tuple[str, int], set[str]]]],
) -> None:
    for (optimizer, _), kinds in found[0][1].items():
        assert "master" in kinds
        assert ("exp_avg_sq_8bit" in kinds) == (optimizer == "adamw_8bit")
        assert ("exp_avg_absmax" in kinds) == (optimizer == "adamw_8bit")
    assert list(found[0][1]) == STAGES
