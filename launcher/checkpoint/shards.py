"""The bridge between ZeRO's flat partitions and DCP: what this rank holds, as ranges of flattened parameters.

Every stage of ZeRO cuts the flattened parameters differently, and DeepSpeed keeps the pieces in a different class for
each. In a checkpoint there is only `<kind>.<parameter's name>`, a flat tensor of the whole parameter, with kind
`master` (fp32) or one of `moments`; DCP stores ranges of it and re-cuts them for whoever loads.

    stage  dtype  engine.optimizer            masters
    0      fp32   the AdamW itself            the parameters
    0      bf16   FP16_UnfusedOptimizer       fp32_groups, one tensor a parameter, on every rank
    1      bf16   BF16_Optimizer              one flat partition a group, with `_hp_mapping` on each parameter
    1, 2          DeepSpeedZeroOptimizer      the same
    3             ..._Stage3                  fp32_partitioned_groups_flat, each parameter cut evenly over the ranks
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from launcher.checkpoint.moments import allocated, factors, in_blocks, like_master
from launcher.errors import CheckpointError

MASTER = "master"


class FlatShard(torch.Tensor):
    """The range [start, start + numel) of a flattened parameter of `full_numel` values; shares `held`'s storage.

    A tensor, because DCP handles nothing else, with the hooks by which DCP asks a tensor for its place in the whole.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    held: torch.Tensor
    start: int
    full_numel: int
    replicated: bool
    """Every rank holds the same range, so each writes only its `share`."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, start: int, full_numel: int, replicated: bool = False) -> FlatShard:
        held = held.detach().view(-1)
        shard = torch.Tensor._make_subclass(cls, held)
        shard.held, shard.start, shard.full_numel, shard.replicated = held, start, full_numel, replicated
        return shard

    def share(self, rank: int, world_size: int) -> FlatShard:
        """The part that `rank` writes: an equal part of a replicated shard, all of another."""
        if not self.replicated:
            return self
        first, last = (self.held.numel() * edge // world_size for edge in (rank, rank + 1))
        return FlatShard(self.held[first:last], self.start + first, self.full_numel)

    def size(self, *_: Any) -> torch.Size:  # type: ignore[override]
        """Of the whole: DCP compares it with what is stored."""
        return torch.Size([self.full_numel])

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        if self.held.numel() == 0:
            return []
        return [ChunkStorageMetadata(torch.Size([self.start]), torch.Size([self.held.numel()]))]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.held)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, _: MetadataIndex) -> torch.Tensor:
        return self.held


@dataclass(frozen=True)
class _Fragment:
    """Where this rank keeps [start, start + numel) of a flattened parameter."""

    name: str
    master: torch.Tensor
    """The tensor AdamW updates, and the key of its state; may hold many parameters."""
    offset: int
    """Of the fragment within the flattened master and its moments."""
    numel: int
    start: int
    full_numel: int
    replicated: bool = False


def trainable_parameters(engine: Any) -> dict[str, Any]:
    """The parameters a checkpoint holds, by the model's own names. Under ZeRO-3 they may be empty at this moment."""
    return {
        name: parameter
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad and getattr(parameter, "ds_numel", parameter.numel())
    }


def parameter_shapes(engine: Any, phase: int | None = None) -> dict[str, tuple[int, ...]]:
    """Whole shape of every trainable parameter; of those trained up to `phase`, where one is given."""
    named = trainable_parameters(engine).items()
    return {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named if phase is None or phase_of(p) <= phase}


@dataclass(frozen=True)
class _Group:
    """Parameters of the model that one of the optimizer's groups updates; they have one count of steps."""

    phase: int
    """Of gradual unfreezing: the first in which they are trained."""
    parameters: list[Any]
    masters: list[torch.Tensor]
    """Every tensor AdamW updates for them on this rank, also those that are all padding."""


def phase_of(parameter: Any) -> int:
    """Of gradual unfreezing: the first in which a parameter is trained, as `model.adapters.unfreeze_to` has told it."""
    return int(getattr(parameter, "phase", 0))


def training_state(engine: Any, phase: int | None = None) -> dict[str, FlatShard]:
    """`<kind>.<name>` of everything this rank holds of the training state, to be written or overwritten in place; of
    what was trained up to `phase`, where one is given.

    Shapes: flat ranges of the flattened parameters. Optimizer state that does not exist yet (before the first step) is
    created, all zeros. Raises CheckpointError for an optimizer whose state cannot be saved.
    """
    groups = _groups(engine)
    states = allocated(engine, [master for group in groups for master in group.masters])
    known = {id(p) for group in groups if phase is None or group.phase <= phase for p in group.parameters}
    named = trainable_parameters(engine)
    shards = {}
    for fragment in _fragments(engine):
        if id(named[fragment.name]) not in known:
            continue
        for kind, tensor in {MASTER: fragment.master, **like_master(states[fragment.master])}.items():
            held = tensor.detach().view(-1).narrow(0, fragment.offset, fragment.numel)
            shards[f"{kind}.{fragment.name}"] = FlatShard(
                held, fragment.start, fragment.full_numel, fragment.replicated
            )
        for kind, tensor in factors(states[fragment.master]).items():
            shards[f"{kind}.{fragment.name}"] = FlatShard(tensor, 0, tensor.numel(), fragment.replicated)
    # Blocks of a rank's own masters are named by rank; at stage 0 all have the same.
    replicated = engine.zero_optimization_stage() == 0
    owner = "all" if replicated else f"rank{dist.get_rank():05d}"
    # Groups are in the order of their phases: what is trained later does not change the number of what was before.
    masters = [master for group in groups if phase is None or group.phase <= phase for master in group.masters]
    for index, master in enumerate(masters):
        for kind, tensor in in_blocks(states[master]).items():
            shards[f"{kind}.{owner}.{index}"] = FlatShard(tensor, 0, tensor.numel(), replicated)
    return shards


def optimizer_steps(engine: Any) -> dict[str, int]:
    """AdamW's own count of steps for every trainable parameter, the same on all ranks; 0 before the first."""
    names = {id(parameter): name for name, parameter in trainable_parameters(engine).items()}
    counts: dict[str, int] = {}
    for group in _groups(engine):
        steps = (engine.basic_optimizer.state.get(master, {}).get("step", 0) for master in group.masters)
        count = max(map(int, steps), default=0)
        counts |= {names[id(parameter)]: count for parameter in group.parameters if id(parameter) in names}
    return counts


def set_optimizer_steps(engine: Any, steps: Mapping[str, int]) -> None:
    """Overwrite AdamW's counts, which its bias correction depends on; 0 where `steps` names none."""
    names = {id(parameter): name for name, parameter in trainable_parameters(engine).items()}
    for group in _groups(engine):
        count = max(steps.get(names.get(id(parameter), ""), 0) for parameter in group.parameters)  # equal for all
        for state in allocated(engine, group.masters).values():
            if "step" in state:  # sgd and lion count nothing
                state["step"] = torch.full_like(state["step"], count) if torch.is_tensor(state["step"]) else count


def publish_masters(engine: Any) -> None:
    """Copy the masters into the parameters that the next forward pass reads. Collective; needed after every load."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        # Small parameters stay gathered between steps, and gathering skips what is there: without giving the whole
        # ones up first, the next forward would use their values from before the load.
        optimizer.checkpoint_event_prologue()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        optimizer.checkpoint_event_epilogue()
    elif stage > 0:
        optimizer.update_lp_params()
    else:
        with torch.no_grad():
            for parameter, master in _whole_masters(engine):
                if parameter is not master:
                    parameter.copy_(master)


def _fragments(engine: Any) -> Iterator[_Fragment]:
    stage = engine.zero_optimization_stage()
    named = trainable_parameters(engine)
    if stage == 0:
        masters = {id(parameter): master for parameter, master in _whole_masters(engine)}
        for name, parameter in named.items():
            numel = parameter.numel()
            yield _Fragment(name, masters[id(parameter)], 0, numel, 0, numel, replicated=True)
    elif stage == 3:
        optimizer, rank = engine.optimizer, dist.get_rank()
        for name, parameter in named.items():
            group, offset, part = optimizer.grad_position[optimizer.get_param_id(parameter)]
            start = min(rank * part, parameter.ds_numel)
            # The last ranks' parts are padded; the padding is no part of the parameter.
            numel = min(part, parameter.ds_numel - start)
            yield _Fragment(
                name, optimizer.fp32_partitioned_groups_flat[group], offset, numel, start, parameter.ds_numel
            )
    else:
        groups = engine.basic_optimizer.param_groups
        for name, parameter in named.items():
            if (mapping := parameter._hp_mapping) is not None:  # None where all of it belongs to other ranks
                (master,) = groups[mapping.param_group_index]["params"]
                here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                yield _Fragment(name, master, here.start, here.numel, there.start, parameter.numel())


def _groups(engine: Any) -> list[_Group]:
    """The optimizer's, in its order."""
    optimizer, stage, own = engine.optimizer, engine.zero_optimization_stage(), engine.basic_optimizer.param_groups
    parameters: list[list[Any]] = [[] for _ in own]
    masters: list[list[torch.Tensor]] = [[] for _ in own]
    if stage == 3:  # there the optimizer's own groups are empty between steps
        for number, of_number in optimizer.sub_group_to_group_id.items():
            parameters[of_number] += optimizer.fp16_groups[number]
            masters[of_number].append(optimizer.fp32_partitioned_groups_flat[number])
    else:
        masters = [group["params"] for group in own]
        if stage == 0:
            parameters = getattr(optimizer, "fp16_groups", masters)
        else:
            parameters = optimizer.bit16_groups if hasattr(optimizer, "bit16_groups") else optimizer.bf16_groups
    return [_Group(group["phase"], *both) for group, *both in zip(own, parameters, masters, strict=True)]


def _whole_masters(engine: Any) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Stage 0: each trainable parameter and its master, which in fp32 is the parameter itself."""
    optimizer = engine.optimizer
    if optimizer is engine.basic_optimizer:
        for group in optimizer.param_groups:
            yield from zip(group["params"], group["params"], strict=True)
    elif hasattr(optimizer, "fp32_groups"):
        for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from zip(parameters, masters, strict=True)
    else:
        raise CheckpointError(
            f"the state of {type(optimizer).__name__} cannot be saved",
            hint="use parallel.zero 1, 2 or 3, or train.dtype fp32",
        )
