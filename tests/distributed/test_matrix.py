"""E5: saved on any number of ranks at any ZeRO stage and loaded on any other, a run goes on as if nothing had been.

Every layout trains eight steps. After the fourth and the sixth its state is saved twice, synchronously and beside the
next two steps, and both must be the same bytes. What was written beside training is what the others load.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from launcher.checkpoint.load import load, read_whole
from launcher.checkpoint.manifest import read
from launcher.checkpoint.moments import KINDS
from launcher.checkpoint.save import save
from launcher.checkpoint.saver import Saver
from launcher.checkpoint.shards import MASTER, optimizer_steps, training_state
from launcher.plan.batch import batch_layout
from launcher.plan.plan import Plan
from launcher.store.folder import FolderStore
from tests.checkpoints import FIRST, checkpoint_at
from tests.distributed.group import run_group
from tests.distributed.runs import METHODS, tiny_run, variant, worst
from tests.distributed.tiny import begun, gathered_below, quiet, tiny_engine, tiny_plan, train

pytestmark = pytest.mark.distributed

SAVED_AT, STEPS = 4, 4
ROWS = 10  # of a global batch: they divide by 1 and 2 ranks, not by 3 and 4
FP32, BF16, BF16_STAGE_0 = 1e-5, 1e-3, 1e-2  # the design's tolerances of a relative loss


@dataclass(frozen=True)
class Layout:
    """Who trains what, and how it is cut."""

    ranks: int
    zero: int
    dtype: str = "fp32"
    offload: bool = False
    method: str = "full"

    def __str__(self) -> str:
        others = [self.method] * (self.method != "full") + [self.dtype] * (self.dtype != "fp32")
        return " ".join([f"{self.ranks}x{self.zero}", *others, *["offload"] * self.offload])


@dataclass(frozen=True)
class Load:
    """A checkpoint that another layout goes on from."""

    source: Layout
    target: Layout
    fresh: bool = False
    """Into an engine that has done nothing yet. Otherwise it has trained, and is at another step than the checkpoint:
    what ZeRO-3 keeps gathered, and any state that is not overwritten, is then out of date."""

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}{' fresh' if self.fresh else ''}"

    @property
    def tolerance(self) -> float:
        if self.source == self.target:
            return 0.0  # bit for bit
        if self.source.dtype == "fp32":
            return FP32
        return BF16 if self.source.zero and self.target.zero else BF16_STAGE_0


@dataclass(frozen=True)
class Trainee:
    """An engine with its plan, and how it is trained: losses of `count` optimizer steps from `first` on."""

    plan: Plan
    engine: Any
    saver: Saver
    train: Callable[[int, int], list[float]]


@dataclass
class Curves:
    """Losses of the steps after the save."""

    uninterrupted: dict[Layout, list[float]] = field(default_factory=dict)
    loaded: dict[Load, list[float]] = field(default_factory=dict)

    def error(self, one: Load, steps: int = STEPS) -> float:
        """Largest relative difference over the first `steps` steps."""
        return worst(self.loaded[one][:steps], self.uninterrupted[one.source][:steps])

    def check(self, loads: Iterable[Load]) -> None:
        for one in loads:
            error = self.error(one)
            print(f"{one}: {error:.1e}")
            assert error <= one.tolerance, (one, self.loaded[one], self.uninterrupted[one.source])


def store_of(root: Path, layout: Layout) -> Path:
    return root / str(layout).replace(" ", "-")


@contextlib.contextmanager
def trainee(root: Path, base: Plan | None, layout: Layout, store: FolderStore) -> Iterator[Trainee]:
    """A tiny engine, or for LoRA and QLoRA all parts of a real run, whose plan is `base`. It would save into `store`.

    Collective.
    """
    if layout.method == "full":
        plan = tiny_plan(root, layout.zero, layout.dtype, layout.offload, global_batch_size=ROWS)
        with tiny_engine(plan) as engine:
            saver = Saver(store, FIRST, plan, engine, torch.device("cpu"))
            yield Trainee(
                plan, engine, saver, lambda first, count: train(engine, plan, first, count, saver.before_update)
            )
            saver.join()
        return
    # Six seconds of imports (peft, bitsandbytes): only where they are needed.
    from launcher.train import loop
    from launcher.train.metrics import MetricsLog
    from launcher.train.run import build_parts, use_device
    from launcher.train.schedule import lr_factor

    assert base is not None
    cut = {"zero": layout.zero, "offload": layout.offload, "workers": layout.ranks}
    plan = variant(base, store.root.name, method=METHODS[layout.method], dtype=layout.dtype, **cut)
    optimizer, schedule, total = plan.trajectory.optimizer, plan.trajectory.schedule, plan.lifecycle.total_steps
    batch = batch_layout(plan.trajectory.global_batch_size, plan.layout.micro_batch_size, dist.get_world_size())
    log = MetricsLog(Path(plan.run_dir), str(FIRST), writes=False)
    with gathered_below(500):  # of adapters of 256 and of 768 values
        parts = build_parts(plan, batch, use_device(plan), log, store, FIRST, lambda: False)

    def train_parts(first: int, count: int) -> list[float]:
        losses = []
        for step in range(first, first + count):
            rate = optimizer.lr * lr_factor(schedule, step, total)
            result = loop.optimizer_step(parts, step, parts.train_data.global_batch(step), rate)
            assert result is not None
            losses.append(result.loss)
        return losses

    yield Trainee(plan, parts.engine, parts.saver, train_parts)
    parts.saver.join()
    parts.engine.destroy()


def train_and_save(root: Path, base: Plan | None, layout: Layout) -> list[float]:
    """Eight steps, saved twice after the fourth and the sixth; the losses of the last four. Collective."""
    at_once, beside = begun(store_of(root, layout) / "at-once"), begun(store_of(root, layout))
    losses: list[float] = []
    with trainee(root, base, layout, beside) as run:
        assert run.saver.background, run.saver.without_room
        run.train(0, SAVED_AT)
        for step in (SAVED_AT, SAVED_AT + 2):
            save(at_once, step, FIRST, run.engine, {"losses": losses}, run.plan)
            run.saver.begin(step, {"losses": losses})
            losses = losses + run.train(step, 2)
        run.saver.join()
        assert [(saved.step, saved.error) for saved in run.saver.finished()] == [(4, None), (6, None)]
        for step in (SAVED_AT, SAVED_AT + 2):
            manifests = [read(checkpoint_at(store.root, step)) for store in (at_once, beside)]
            assert manifests[0].files == manifests[1].files  # name, size and SHA-256 of every shard
            assert manifests[0] == manifests[1]
    return losses


@functools.cache
def whole_state(root: Path, source: Layout) -> dict[str, Tensor]:
    """`<kind>.<name>`, whole and flat, of a layout's checkpoint."""
    checkpoint = checkpoint_at(store_of(root, source), SAVED_AT)
    manifest = read(checkpoint)
    return {
        f"{kind}.{name}": tensor
        for kind in (MASTER, *KINDS)
        for name, tensor in read_whole(checkpoint, manifest, kind, list(manifest.parameters)).items()
    }


def go_on(root: Path, base: Plan | None, loads: list[Load]) -> dict[Load, list[float]]:
    """Load one after the other into an engine of the one layout that all have as target, and train. Collective."""
    curves = {}
    with trainee(root, base, loads[0].target, FolderStore(root / "nothing")) as run:
        if not loads[0].fresh:
            run.train(0, 1)
        for one in loads:
            progress = load(checkpoint_at(store_of(root, one.source), SAVED_AT), run.engine, run.plan)
            assert progress == {"losses": []}
            whole = whole_state(root, one.source)
            assert set(optimizer_steps(run.engine).values()) == {SAVED_AT}
            for name, shard in training_state(run.engine).items():
                assert torch.equal(shard.held, whole[name][shard.start : shard.start + shard.held.numel()]), (one, name)
            curves[one] = run.train(SAVED_AT, STEPS)
    return curves


def turn(root: Path, base: Plan | None, saves: list[Layout], loads: list[Load]) -> Curves:
    """What one process group does: saves, then loads. Collective."""
    quiet()
    curves = Curves()
    for layout in saves:
        curves.uninterrupted[layout] = train_and_save(root, base, layout)
    for target in dict.fromkeys(one.target for one in loads):
        if in_use := [one for one in loads if one.target == target and not one.fresh]:
            curves.loaded |= go_on(root, base, in_use)
    for one in loads:
        if one.fresh:
            curves.loaded |= go_on(root, base, [one])
    return curves


def matrix(root: Path, loads: list[Load], base: Plan | None = None) -> Curves:
    """All of `loads`, in one group for each number of ranks, save that all but the last open a second one to load."""
    sources = list(dict.fromkeys(one.source for one in loads))
    worlds = sorted({layout.ranks for one in loads for layout in (one.source, one.target)})
    curves = Curves()
    for count, may_load in [*((count, False) for count in worlds[:-1]), *((count, True) for count in reversed(worlds))]:
        saves = [layout for layout in sources if layout.ranks == count and layout not in curves.uninterrupted]
        mine = [one for one in loads if one.target.ranks == count and may_load]
        found = run_group(count, turn, root, base, saves, mine, timeout_s=1800)[0]
        curves.uninterrupted |= found.uninterrupted
        curves.loaded |= found.loaded
    return curves


def table(curves: Curves, layouts: list[Layout], fresh: bool, steps: int) -> str:
    """Errors of every pair: a row for each layout that saved, a column for each that loaded."""
    cuts = [f"{layout.ranks}x{layout.zero}" for layout in layouts]
    lines = ["saved\\loaded" + "".join(f"{cut:>8}" for cut in cuts)]
    for cut, source in zip(cuts, layouts, strict=True):
        errors = [curves.error(Load(source, target, fresh), steps) for target in layouts]
        lines.append(f"{cut:>12}" + "".join(f"{error:8.0e}" if error else "       0" for error in errors))
    return "\n".join(lines)


WORLDS = (1, 3)
"""Of the sample: three groups."""
# Source and target by (ranks, stage): each pair of numbers of ranks four times, each pair of stages once.
SAMPLE = [
    Load(Layout(saved_on, zero), Layout(loaded_on, (zero + shift) % 4))
    for shift, (saved_on, loaded_on) in enumerate([(3, 3), (1, 3), (3, 1), (1, 1)])
    for zero in range(4)
]
FRESH = [replace(SAMPLE[0], fresh=True), replace(SAMPLE[5], fresh=True), replace(SAMPLE[10], fresh=True)]


def there_and_back(
    ranks: int, other_ranks: int, dtype: str = "fp32", offload: bool = False, method: str = "full"
) -> list[Load]:
    """From stage 0 on `ranks` to stage 3 on the others, and from there to stage 2 on `ranks`."""

    def layout(count: int, zero: int) -> Layout:
        return Layout(count, zero, dtype, offload and zero > 0, method)  # at stage 0 nothing is offloaded

    away = layout(other_ranks, 3)
    return [Load(layout(ranks, 0), away), Load(away, layout(ranks, 2))]


BF16_SAMPLE = [*there_and_back(*WORLDS, "bf16"), Load(Layout(3, 3, "bf16"), Layout(3, 1, "bf16"))]
OFFLOADED = [
    Load(Layout(1, 2, offload=True), Layout(3, 3, offload=True)),
    Load(Layout(3, 3, offload=True), Layout(1, 0)),
    Load(Layout(3, 2), Layout(3, 1, offload=True)),
]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Curves:
    return matrix(tmp_path_factory.mktemp("sample"), SAMPLE + FRESH + BF16_SAMPLE + OFFLOADED)


def test_the_sample_has_every_pair_of_stages_and_of_numbers_of_ranks() -> None:
    assert len(SAMPLE) == 16
    assert {(one.source.zero, one.target.zero) for one in SAMPLE} == {(a, b) for a in range(4) for b in range(4)}
    assert {(one.source.ranks, one.target.ranks) for one in SAMPLE} == {(a, b) for a in WORLDS for b in WORLDS}


def test_a_run_goes_on_at_any_stage_on_any_ranks(sample: Curves) -> None:
    sample.check(SAMPLE)


def test_a_fresh_engine_goes_on_too(sample: Curves) -> None:
    sample.check(FRESH)


def test_bf16_and_offload_go_on(sample: Curves) -> None:
    sample.check(BF16_SAMPLE + OFFLOADED)


LAYOUTS = {dtype: [Layout(n, zero, dtype) for n in (1, 2, 3, 4) for zero in range(4)] for dtype in ("fp32", "bf16")}


@pytest.mark.long
@pytest.mark.parametrize(("dtype", "fresh"), [("fp32", False), ("fp32", True), ("bf16", False)])
def test_the_whole_matrix(tmp_path: Path, dtype: str, fresh: bool) -> None:
    """256 pairs."""
    layouts = LAYOUTS[dtype]
    loads = [Load(source, target, fresh) for source in layouts for target in layouts]
    curves = matrix(tmp_path, loads)
    assert len(curves.loaded) == 256
    for steps in (1, STEPS):
        errors = [curves.error(one, steps) for one in loads]
        worst_of_all = max(zip(errors, map(str, loads), strict=True))
        print(f"\n{dtype}, {'fresh engines' if fresh else 'engines in use'}, first {steps} steps")
        print(table(curves, layouts, fresh, steps))
        print("worst:", *worst_of_all)
    curves.check(loads)


@pytest.mark.long
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_offload_and_adapters_between_two_and_four_ranks(tmp_path: Path, method: str) -> None:
    """Of LoRA and QLoRA a batch has six rows: on four ranks two of eight slots are empty."""
    base = None if method == "full" else tiny_run(tmp_path / "base")
    loads = []
    for dtype in ("fp32", "bf16"):
        loads += there_and_back(2, 4, dtype, method=method) + there_and_back(4, 2, dtype, True, method)
    matrix(tmp_path, loads, base).check(loads)
