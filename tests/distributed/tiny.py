"""A Plan and an engine small enough to build a dozen of in one process, and steps on made-up data."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM

from launcher.checkpoint.lease import begin
from launcher.plan.batch import batch_layout
from launcher.plan.deepspeed import deepspeed_config
from launcher.plan.plan import Plan
from launcher.store.folder import FolderStore
from launcher.train.engine import build_engine, optimizer_step
from tests.checkpoints import FIRST
from tests.plans import (
    data_facts,
    data_plan,
    layout_plan,
    lifecycle,
    model_plan,
    optimizer_plan,
    source_plan,
    trajectory,
    whole_plan,
)

GLOBAL_BATCH, TOKENS, VOCABULARY = 6, 12, 127  # six rows for 1, 2 or 3 ranks; odd sizes, so that partitions cut rows


def tiny_plan(
    run_dir: Path,
    zero: int,
    dtype: Any = "fp32",
    offload: bool = False,
    seed: int = 0,
    global_batch_size: int = GLOBAL_BATCH,
) -> Plan:
    """A whole Plan; only what the engine and the checkpoint look at means anything."""
    source = source_plan(run_dir / "rows.jsonl")
    return whole_plan(
        run_dir,
        name="tiny",
        trajectory=trajectory(
            model_plan(run_dir / "base", source="scratch", scratch={}),
            data_plan(source, max_length=TOKENS, packing=False),
            seed=seed,
            dtype=dtype,
            global_batch_size=global_batch_size,
            optimizer=optimizer_plan(lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1),
        ),
        layout=layout_plan(workers=2, min_workers=2, zero=zero, offload=offload, micro_batch_size=global_batch_size),
        lifecycle=lifecycle(8, eval_every_steps=100, checkpoint_every_steps=4),
        data=data_facts(folder=str(run_dir / "data"), vocab_size=VOCABULARY),
    )


@contextlib.contextmanager
def tiny_engine(plan: Plan, freeze_first: bool = False) -> Iterator[Any]:
    """A DeepSpeed engine over a two-layer Llama of one seed; every rank of the open group calls it.

    Under ZeRO-3 norms and the small projections stay gathered between steps and the larger matrices do not, as in a
    model of real size.
    """
    torch.manual_seed(plan.trajectory.seed)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=67,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=TOKENS,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16 if plan.trajectory.dtype == "bf16" else torch.float32)
    if freeze_first:
        model.model.embed_tokens.requires_grad_(False)
        model.model.layers[0].requires_grad_(False)

    rows = plan.trajectory.global_batch_size
    with gathered_below(1000):
        engine = build_engine(model, plan, batch_layout(rows, rows, dist.get_world_size()))
    try:
        yield engine
    finally:
        engine.destroy()


@contextlib.contextmanager
def gathered_below(numel: int) -> Iterator[None]:
    """Engines built in the block keep parameters of fewer values than `numel` gathered between steps under ZeRO-3, and
    no others. DeepSpeed's own threshold is above any parameter of a tiny model."""

    def with_threshold(*args: Any) -> dict[str, Any]:
        written = deepspeed_config(*args)
        written["zero_optimization"]["stage3_param_persistence_threshold"] = numel
        return written

    with mock.patch("launcher.train.engine.deepspeed_config", with_threshold):
        yield


def train(
    engine: Any, plan: Plan, first: int, count: int, before_update: Callable[[], None] = lambda: None
) -> list[float]:
    """Losses of the optimizer steps first .. first + count - 1, each over the same global batch for any world size.

    Where the rows do not divide, the first ranks have one more.
    """
    losses, size, world_size = [], plan.trajectory.global_batch_size, dist.get_world_size()
    for step in range(first, first + count):
        rows = torch.randint(0, VOCABULARY, (size, TOKENS), generator=torch.Generator().manual_seed(step))
        mine = rows.tensor_split(world_size)[dist.get_rank()]
        loss = engine(input_ids=mine, labels=mine).loss * (len(mine) * world_size / size)
        engine.backward(loss)
        before_update()
        optimizer_step(engine, plan)
        total = loss.detach().double()
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
    return losses


def begun(root: Path) -> FolderStore:
    """A run's folder as a store, in which the attempt FIRST has begun. Collective."""
    if dist.get_rank() == 0:
        root.mkdir(parents=True, exist_ok=True)
        assert begin(FolderStore(root), 0) == FIRST
    dist.barrier()
    return FolderStore(root)


def quiet() -> None:
    """DeepSpeed's start-up messages are no part of a test's output."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
