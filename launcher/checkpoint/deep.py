"""`slipway verify --deep`: a checkpoint that is as it was written, can a run go on from it?

Everything is read as a resume reads it, by DCP through `ShardReader`, but piece by piece and without an engine.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from launcher.checkpoint.layout import Checkpoint
from launcher.checkpoint.manifest import Manifest, damaged, folder_of, read
from launcher.checkpoint.moments import FACTORS, KINDS, state_shapes
from launcher.checkpoint.shards import MASTER, FlatShard, phase_of
from launcher.checkpoint.storage import Range, ShardReader, ranges_of, uneven
from launcher.checkpoint.together import explained
from launcher.errors import CheckpointError
from launcher.plan.plan import OptimizerPlan, Plan

EIGHT_BIT, SCALES = "_8bit", "_absmax"
BLOCK = 256
"""Moments in 8 bits that share a scale."""
NEVER_NEGATIVE = ("exp_avg_sq", *FACTORS, *(f"{kind}{SCALES}" for kind in KINDS))
MOST_VALUES = 1 << 26
"""Read at once: 256 MiB of fp32."""
MOST_SAID = 5

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Expected:
    """What every checkpoint of a run must hold."""

    trajectory: str
    """The Plan's hash of it."""
    optimizer: OptimizerPlan
    """What there is of each beside its master."""
    shapes: Shapes
    """Whole shape of every parameter that is trained, sooner or later."""
    source: str
    """Where the shapes are from, for the user."""
    phases: Mapping[str, int] = field(default_factory=dict)
    """Of gradual unfreezing: the first phase of each parameter that is not trained from the start."""

    def shapes_in(self, phase: int) -> Shapes:
        """Of what has been trained up to a phase."""
        return {name: shape for name, shape in self.shapes.items() if self.phases.get(name, 0) <= phase}


def expected_of(plan: Plan, checkpoints: Iterable[Checkpoint]) -> Expected:
    """By the model of the Plan; where that cannot be built here, by the first of `checkpoints` that can be read, in
    each phase of the run."""
    known = plan.trajectory.hash(), plan.trajectory.optimizer
    try:
        trained = trained_parameters(plan)
        phases = {name: phase_of(parameter) for name, parameter in trained.items()}
        return Expected(*known, shapes_of(trained), "the model of the run's plan.json", phases)
    except Exception as error:  # a model may bring code of its own, which may raise anything
        reason = str(error).strip().partition("\n")[0]
    first: dict[int, Manifest] = {}
    for checkpoint in checkpoints:
        with contextlib.suppress(CheckpointError):
            first.setdefault((manifest := read(checkpoint)).phase, manifest)
    if not first:
        return Expected(*known, {}, "nothing")
    phases = {name: phase for phase in sorted(first, reverse=True) for name in first[phase].parameters}
    named = ", ".join(Checkpoint(checkpoint.store, first[phase].step).name for phase in sorted(first))
    source = f"{named}, as the model cannot be built here: {reason}"
    return Expected(*known, first[max(first)].parameters, source, phases)


def trained_shapes(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Whole shape of every parameter that the run trains, sooner or later. Raises as `trained_parameters`."""
    return shapes_of(trained_parameters(plan))


def shapes_of(parameters: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """By name."""
    return {name: tuple(parameter.shape) for name, parameter in parameters.items()}


def trained_parameters(plan: Plan) -> dict[str, Any]:
    """Every parameter that the run trains, sooner or later, under the names that `shards.parameter_shapes` gives.

    The model is built as `model.load` and `model.adapters` build it, but without memory for its weights; a 4-bit base
    has the same adapters as a plain one. Raises ModelError where its configuration cannot be had, and whatever its own
    code raises.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from launcher.model.adapters import apply_method
    from launcher.model.added_tokens import added_ids
    from launcher.model.load import run_config

    trajectory = plan.trajectory
    config, added = run_config(plan), added_ids(plan)
    kind = AutoModelForSequenceClassification if plan.data.classes else AutoModelForCausalLM
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = kind.from_config(config, trust_remote_code=trajectory.model.trust_remote_code)
        if added and added[-1] >= base.get_input_embeddings().num_embeddings:
            base.resize_token_embeddings(added[-1] + 1, mean_resizing=False)
        last = len(trajectory.method.unfreeze)
        model = apply_method(base, trajectory.method, trajectory.seed, added, last)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def check(checkpoint: Checkpoint, manifest: Manifest, expected: Expected) -> None:
    """Read all that a resume would, of a checkpoint whose files are verified to be those of `manifest`.

    Raises DamagedCheckpoint with what is wrong: in the manifest, in which values there are, in the values.
    """
    wrong = list(_in_manifest(checkpoint, manifest, expected))
    folder = folder_of(checkpoint, manifest)
    stored: dict[str, list[Range]] = {}
    for file in sorted(manifest.files):
        try:
            for one in ranges_of(checkpoint.store, folder, file):
                stored.setdefault(one.name, []).append(one)
        except (OSError, EOFError, ValueError, LookupError, TypeError) as error:
            wrong.append(f"{file}: its head cannot be read: {error}")
    numels = _numels(manifest, stored, expected.optimizer)
    wrong += [f"{key} is missing" for key in numels.keys() - stored.keys()]
    wrong += [f"{key} is no state of a parameter" for key in stored.keys() - numels.keys()]
    if expected.optimizer.name == "adamw_8bit":
        wrong += _without_scale(manifest, numels)
    uneven = {key: said for key, numel in numels.items() if (said := _uneven(key, stored.get(key, []), numel))}
    wrong += [f"{key}: {said}" for key, said in uneven.items() if key in stored]
    for pieces in _portions({key: numel for key, numel in numels.items() if key not in uneven}):
        reader = ShardReader(checkpoint.store, folder, [one for key in pieces for one in stored[key]])
        wrong += _in_values(pieces, reader, f"reading {checkpoint}")
        pieces.clear()  # before the next are made
    if wrong:
        more = [f"and {len(wrong) - MOST_SAID} more"] if len(wrong) > MOST_SAID else []
        raise damaged(checkpoint, wrong[:MOST_SAID] + more)


def _in_manifest(checkpoint: Checkpoint, manifest: Manifest, expected: Expected) -> Iterator[str]:
    if manifest.progress.get("step") != checkpoint.step:
        yield f"its progress is of step {manifest.progress.get('step')}"
    if manifest.trajectory != expected.trajectory:
        yield "it belongs to another trajectory (model, data, seed, batch, optimizer or schedule differ)"
    shapes = expected.shapes_in(manifest.phase)
    for name in sorted(manifest.parameters.keys() | shapes.keys()):
        found, trained = manifest.parameters.get(name), shapes.get(name)
        if found is None:
            yield f"{name} is not in it"
        elif trained is None:
            yield f"{name} is not trained by the run"
        elif found != trained:
            yield f"{name} has the shape {found}, not {trained}"


def _numels(manifest: Manifest, stored: Mapping[str, list[Range]], optimizer: OptimizerPlan) -> dict[str, int]:
    """How many values each flat tensor must have. Of blocks nobody but the file knows how many there are."""
    numels, eight_bit = {}, optimizer.name == "adamw_8bit"
    for name, shape in manifest.parameters.items():
        kept = state_shapes(optimizer.name, optimizer.momentum, torch.Size(shape))
        for kind, of_kind in {MASTER: torch.Size(shape), **kept}.items():
            if not eight_bit or kind == MASTER or f"{kind}.{name}" in stored:
                numels[f"{kind}.{name}"] = math.prod(of_kind)
    if eight_bit:
        blocks = {key: places for key, places in stored.items() if _kind(key).endswith((EIGHT_BIT, SCALES))}
        numels |= {key: max(one.start + one.numel for one in places) for key, places in blocks.items()}
    return numels


def _without_scale(manifest: Manifest, numels: Mapping[str, int]) -> Iterator[str]:
    for kind in KINDS:
        needed = sum(math.prod(shape) for name, shape in manifest.parameters.items() if f"{kind}.{name}" not in numels)
        values = sum(numel for key, numel in numels.items() if _kind(key) == f"{kind}{EIGHT_BIT}")
        scales = sum(numel for key, numel in numels.items() if _kind(key) == f"{kind}{SCALES}")
        if needed > values:
            yield f"{kind}: {needed} values are in 8 bits, and only {values} codes are there"
        if values > BLOCK * scales:
            yield f"{kind}: {values} values in 8 bits have only {scales} scales"


def _uneven(key: str, places: Sequence[Range], numel: int) -> str | None:
    """How the stored ranges fail to cover [0, numel) exactly once; None where they do."""
    dtype = "U8" if _kind(key).endswith(EIGHT_BIT) else "F32"
    if other := sorted({one.dtype for one in places} - {dtype}):
        return f"stored as {', '.join(other)}, not {dtype}"
    return uneven(places, numel)


def _portions(numels: Mapping[str, int]) -> Iterator[dict[str, FlatShard]]:
    """Unread pieces of all these flat tensors, MOST_VALUES at a time."""
    pieces: dict[str, FlatShard] = {}
    room = MOST_VALUES
    for key, numel in numels.items():
        start = 0
        while start < numel:
            count = min(room, numel - start)
            # A value that stays unread is not finite, and so is seen.
            fill = (0, torch.uint8) if _kind(key).endswith(EIGHT_BIT) else (math.nan, torch.float32)
            pieces[key] = FlatShard(torch.full((count,), fill[0], dtype=fill[1]), start, numel)
            start, room = start + count, room - count
            if not room:
                yield pieces
                pieces, room = {}, MOST_VALUES
    if pieces:
        yield pieces


def _in_values(pieces: dict[str, FlatShard], reader: ShardReader, doing: str) -> Iterator[str]:
    state: dict[str, Any] = dict(pieces)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # as we asked
            dcp_load(state, storage_reader=reader, no_dist=True)
    except (Exception, CheckpointException) as error:  # DCP's own is a BaseException
        yield explained(doing, error).message
        return
    for key, piece in pieces.items():
        values = piece.held
        if not values.is_floating_point():
            continue
        lowest, highest = torch.aminmax(values)  # one pass; both are nan where any value is
        if not (lowest.isfinite() and highest.isfinite()):
            yield f"{key}: {values.numel() - int(values.isfinite().sum())} values are not finite"
        elif lowest < 0 and _kind(key) in NEVER_NEGATIVE:
            yield f"{key}: {int((values < 0).sum())} values are negative"


def _kind(key: str) -> str:
    return key.partition(".")[0]
