"""A LoRA or QLoRA checkpoint written under ZeRO-3 is complete, and one process alone goes on from it.

The peers' failure: under ZeRO-3 a parameter is an empty tensor between steps, and so were the adapters that they saved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from launcher.checkpoint.load import load, load_weights, read_whole
from launcher.checkpoint.manifest import folder_of, read, verify
from launcher.checkpoint.moments import KINDS
from launcher.checkpoint.save import save
from launcher.checkpoint.shards import MASTER
from launcher.checkpoint.storage import ranges_of
from launcher.plan.plan import Plan
from tests.checkpoints import FIRST, checkpoint_at
from tests.distributed.group import run_group
from tests.distributed.runs import LLAMA, tiny_run, worst
from tests.distributed.test_matrix import BF16, FP32, Layout, store_of, trainee
from tests.distributed.tiny import begun, quiet

pytestmark = pytest.mark.distributed

SAVED_AT = 4
WRITTEN = {"lora": Layout(2, 3, method="lora"), "qlora": Layout(2, 3, "bf16", method="qlora")}
ALONE = {"lora": Layout(1, 0, method="lora"), "qlora": Layout(1, 2, "bf16", method="qlora")}
TOLERANCE = {"lora": FP32, "qlora": BF16}


@dataclass(frozen=True)
class Run:
    """What a run had in memory and how it went."""

    start: dict[str, Tensor]
    """Its adapters before the first step, whole, by the model's names."""
    at_save: dict[str, Tensor]
    """The same, as they were saved or loaded."""
    losses: list[float]
    """Of the four steps that follow."""


def adapters(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every trained parameter as the model computes with it. Collective under ZeRO-3."""
    import deepspeed

    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    with deepspeed.zero.GatheredParameters(list(trained.values())):
        return {name: parameter.detach().clone() for name, parameter in trained.items()}


def written(root: Path, base: Plan) -> dict[str, Run]:
    """Train at ZeRO-3, save, go on. Collective."""
    quiet()
    runs = {}
    for method, layout in WRITTEN.items():
        store = begun(store_of(root, layout))
        with trainee(root, base, layout, store) as run:
            start = adapters(run.engine.module)
            run.train(0, SAVED_AT)
            # Between steps the larger ones are empty here, which is what a save must see through.
            assert any(p.numel() == 0 for p in run.engine.module.parameters() if p.requires_grad)
            save(store, SAVED_AT, FIRST, run.engine, {}, run.plan)
            runs[method] = Run(start, adapters(run.engine.module), run.train(SAVED_AT, 4))
    return runs


def alone(root: Path, base: Plan) -> dict[str, Run]:
    """Load in one process and go on."""
    quiet()
    runs = {}
    for method, layout in ALONE.items():
        with trainee(root, base, layout, begun(store_of(root, layout))) as run:
            start = adapters(run.engine.module)
            load(checkpoint_at(store_of(root, WRITTEN[method]), SAVED_AT), run.engine, run.plan)
            runs[method] = Run(start, adapters(run.engine.module), run.train(SAVED_AT, 4))
    return runs


@dataclass(frozen=True)
class Both:
    """Two ranks at ZeRO-3, and one process that went on from their checkpoint."""

    root: Path
    written: dict[str, Run]
    alone: dict[str, Run]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Both:
    root = tmp_path_factory.mktemp("lora")
    base = tiny_run(root)
    first = run_group(2, written, root, base, timeout_s=600)[0]
    return Both(root, first, run_group(1, alone, root, base, timeout_s=600)[0])


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_every_adapter_is_there_whole_and_nothing_else(runs: Both, method: str) -> None:
    checkpoint = checkpoint_at(store_of(runs.root, WRITTEN[method]), SAVED_AT)
    manifest = verify(checkpoint)
    expected = {name: tuple(tensor.shape) for name, tensor in runs.alone[method].start.items()}
    assert len(expected) == 2 * 7 * LLAMA["num_hidden_layers"]  # A and B of seven linear layers
    assert manifest.parameters == expected
    assert all("lora_A" in name or "lora_B" in name for name in expected)

    # The shards themselves: each kind of each adapter, every value once.
    ranges = [
        one for file in manifest.files for one in ranges_of(checkpoint.store, folder_of(checkpoint, manifest), file)
    ]
    assert {one.file for one in ranges} == {"shard-00000.safetensors", "shard-00001.safetensors"}
    assert {one.name for one in ranges} == {f"{kind}.{name}" for name in expected for kind in (MASTER, *KINDS)}
    for name, shape in expected.items():
        for kind in (MASTER, *KINDS):
            end = 0
            for one in sorted((one for one in ranges if one.name == f"{kind}.{name}"), key=lambda one: one.start):
                assert one.start == end, one
                assert one.numel > 0, one
                end += one.numel
            assert end == math.prod(shape) > 0


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_every_adapter_is_what_was_trained(runs: Both, method: str) -> None:
    checkpoint = checkpoint_at(store_of(runs.root, WRITTEN[method]), SAVED_AT)
    manifest, run = read(checkpoint), runs.written[method]
    masters = load_weights(checkpoint)
    assert masters.keys() == run.at_save.keys()
    for name, tensor in run.at_save.items():
        assert torch.equal(masters[name].to(tensor.dtype), tensor), name
        assert not torch.equal(tensor, run.start[name]), name
        assert (run.start[name].any() == 0) == ("lora_B" in name)  # B starts at zero, and has moved
    for kind in KINDS:
        for name, moment in read_whole(checkpoint, manifest, kind, list(masters)).items():
            # Of A too: its gradient is zero in the first step only, as long as B is.
            assert moment.isfinite().all(), (kind, name)
            assert moment.count_nonzero() > 0.9 * moment.numel(), (kind, name)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_one_process_goes_on(runs: Both, method: str) -> None:
    there, here = runs.written[method], runs.alone[method]
    assert here.at_save.keys() == there.at_save.keys()
    for name, tensor in there.at_save.items():
        assert torch.equal(here.at_save[name], tensor), name  # in fp32 these are the masters
    error = worst(here.losses, there.losses)
    print(f"{WRITTEN[method]} -> {ALONE[method]}: {error:.1e}")
    assert error <= TOLERANCE[method], (here.losses, there.losses)
