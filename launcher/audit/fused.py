"""E9: the fused model computes what the eager one does, on two of the run's own documents.

The embedding, the first two decoder layers and the head are computed three times: in a wider dtype (the truth),
eagerly, and fused. The logits, the loss and each gradient of the fused copy may be twice as far from the truth as the
eager one's, plus one unit in the last place of the largest value. Two things are allowed for, or chance would stop
sound runs:

- a tensor of few values can be closer to the truth than its like by luck: the eager copy's error counts as no less than
  the median of all tensors' errors, each relative to its largest value. For the loss, one number and a sum
  of S, it counts as no less than S errors that add up at random: sqrt(S) times the largest of the logits', or the last
  place of the sum itself;
- a gradient that is nothing but rounding even in the eager copy (the biases of keys: softmax does not see them) says
  nothing and is passed over.

Peak memory: before the engine exists, gradients, masters and moments do not either, nor a micro batch's activations.
`needed_bytes` counts what the check takes and `growth_bytes` what the run is about to take anyway, both on this rank.
The first of SIZES is taken for which the former fits into the latter, or into what no process notices, on all ranks:
fewer tokens, or no gradients of large weights, which plain linear layers make and, of ours, only the head. Where none
fits, the check is left out and says so. For a llama of 8B, checkpointed, of 8,192 tokens in a micro batch, in GiB:

                              needed, 512 tokens    without large gradients    the run adds
    LoRA, one GPU                          1.3                        1.3             3.6
    full, ZeRO-3, 8 GPUs                  12.8                        4.0            18.0
    full, ZeRO-3, 64 GPUs                 12.8                        4.0             4.9
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from launcher.audit.finding import Checked, Finding
from launcher.audit.sample import MAX_TOKENS
from launcher.audit.small import (
    PIECE,
    WIDER,
    bare,
    causal_lm,
    first_layers,
    is_frozen,
    reference_attention,
    vocabulary,
    widen,
    widens_by_itself,
)
from launcher.data.loader import MicroBatch
from launcher.model.adapters import decoder_layers
from launcher.model.fuse import fuse
from launcher.plan.plan import Plan
from launcher.units import format_bytes
from launcher_kernels.reference import ulp

LAYERS = 2
UNNOTICED = 64 << 20
"""Bytes; importing torch and opening a process group take several times as many."""
SIZES = tuple((tokens, large) for large in (True, False) for tokens in (MAX_TOKENS, 256, 128, 64))
"""Tokens in all, and whether gradients of LARGE weights are compared; the first that there is room for is taken."""
HINT = "set model.kernels to eager, and please report the model's family with this message"
SHOWN = 3


class Loss(Protocol):
    """`train.loss.SupervisedLoss`, which comes after this part."""

    def __call__(self, batch: MicroBatch) -> tuple[Tensor, Tensor]: ...
    def logits(self, batch: MicroBatch) -> Tensor: ...


LossOf = Callable[[nn.Module, nn.Module], Loss]
"""The run's loss through a network, given too the transformers model inside it."""


@dataclass(frozen=True)
class Computed:
    """What a copy made of the batch: "the logits", "the loss", and gradients, of what was embedded and of each trained
    weight by its name."""

    tensors: dict[str, Tensor]
    num_targets: int


def check_fused(
    model: nn.Module,
    loss_of: LossOf,
    documents: Callable[[int], MicroBatch],
    room_bytes: int,
    largest: Callable[[int], int],
) -> Checked:
    """Compare copies of `model`, which is not fused yet. Collective.

    Args:
        model: with adapters where the run has them, before the engine is built
        loss_of: makes the run's loss for a copy
        documents: two of them, of at most so many tokens in all
        room_bytes: what this rank may take, see `growth_bytes`
        largest: of the ranks' numbers
    """
    room_bytes = max(room_bytes, UNNOTICED)
    # Models may keep some weights in fp32 beside a bf16 rest.
    dtype = torch.bfloat16 if any(w.dtype == torch.bfloat16 for w in model.parameters()) else torch.float32
    with first_layers(model, LAYERS) as copied:
        needed = [needed_bytes(copied(large), model, documents(tokens), WIDER[dtype]) for tokens, large in SIZES]
        place = largest(next((i for i, takes in enumerate(needed) if takes <= room_bytes), len(SIZES)))
        if place == len(SIZES):
            takes, has = format_bytes(needed[-1]), format_bytes(room_bytes)
            return Checked(f"fused kernels not compared: that takes {takes}, and the run only {has}", skipped=True)
        tokens, large = SIZES[place]
        batch = documents(tokens)
        exact = copied(large)
        widen(exact, WIDER[dtype])
        try:
            truth = computed(exact, loss_of, batch, exact=True)
        except Exception as error:  # an op without that dtype, or a model that wants all its layers; on all ranks alike
            why = f"{type(error).__name__}: {error}".strip().split("\n")[0]
            said = f"fused kernels not compared: the first layers cannot be computed in {WIDER[dtype]}: {why}"
            return Checked(said, skipped=True)
        del exact
        if not all(tensor.isfinite().all() for tensor in truth.tensors.values()):
            return Checked("fused kernels not compared: not all that the model computes is finite", skipped=True)
        eager = copied(large)
        reference_attention(eager)
        by_eager = errors(computed(eager, loss_of, batch), truth)
        del eager
        small = copied(large)  # with the run's own attention
        fusion = fuse(small)
        if not fusion.counts:
            return Checked("no kernel to fuse", skipped=True)
        counts = ", ".join(f"{name} {count}" for name, count in fusion.counts.items())
        try:
            by_fused = errors(computed(small, loss_of, batch), truth)
        except Exception as error:  # a GPU that a kernel cannot be built for, or that has too little shared memory
            why = f"{type(error).__name__}: {error}".strip().split("\n")[0]
            finding = Finding(f"fused kernels ({counts}) do not run here, and PyTorch's own layers do", why, HINT)
            return Checked("fused = eager", (finding,))
    wrong = beyond(by_fused, by_eager, truth, dtype)
    findings = []
    if wrong:
        shown = "; ".join(wrong[:SHOWN]) + (f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else "")
        what = f"fused kernels ({counts}) do not compute what the model does"
        findings.append(Finding(what, f"on {' and '.join(batch.where)}: {shown}", HINT))
    but = "" if large else ", without the gradients of large weights"
    return Checked(f"fused = eager ({counts}{but})", tuple(findings))


def computed(model: nn.Module, loss_of: LossOf, batch: MicroBatch, exact: bool = False) -> Computed:
    """Logits, loss and gradients; `exact`: the loss in the logits' dtype, and not in the run's fp32."""
    loss, leaves = loss_of(model, causal_lm(model)), list[Tensor]()

    def embed(module: nn.Module, given: object, found: Tensor) -> Tensor:
        if found.requires_grad:  # rows of it are trained: they have gradients of their own
            return found
        leaves.append(found.detach().requires_grad_())
        return leaves[-1]

    with torch.no_grad():
        logits = loss.logits(batch)
    hook = causal_lm(model).get_input_embeddings().register_forward_hook(embed)
    if exact:
        total = F.cross_entropy(loss.logits(batch), batch.targets.to(logits.device), reduction="sum")
    else:
        total, _ = loss(batch)
    hook.remove()
    torch.autograd.backward(total)
    found = {"the logits": logits, "the loss": total.detach()}
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    for name, leaf in [*(("what was embedded", leaf) for leaf in leaves), *trained.items()]:
        if leaf.grad is not None:
            found[f"the gradient of {name}"] = leaf.grad
            leaf.grad = None
    return Computed(found, len(batch.targets))


def errors(found: Computed, truth: Computed) -> dict[str, float]:
    """The largest distance from the truth, of each tensor; infinite where there is none, or no number."""
    largest = {}
    for name, exact in truth.tensors.items():
        mine = found.tensors.get(name)
        if mine is None:
            largest[name] = math.inf
            continue
        difference = mine.to(exact.dtype, copy=True).sub_(exact)
        error = difference.abs_().max().item()
        largest[name] = error if math.isfinite(error) else math.inf
    return largest


def beyond(by_fused: dict[str, float], by_eager: dict[str, float], truth: Computed, dtype: torch.dtype) -> list[str]:
    """What is further from the truth than it may be, the worst first, in words."""
    scales = {name: exact.abs().max().item() for name, exact in truth.tensors.items()}
    relative = sorted(by_eager[name] / scales[name] for name in scales if scales[name] > 0)
    usual = relative[len(relative) // 2] if relative else 0.0
    wrong = []
    for name, scale in scales.items():
        eager = by_eager[name]
        if name == "the loss":
            each = max(by_eager["the logits"], ulp(scale, torch.float32))
            floor = math.sqrt(truth.num_targets) * each
        elif eager >= scale / 4 and by_fused[name] < math.inf:
            continue
        else:
            floor = usual * scale
        bound = 2 * max(eager, floor) + ulp(scale, dtype if name != "the loss" else torch.float32)
        if not by_fused[name] <= bound:
            said = f"{name} is {by_fused[name]:.2e} off, {bound:.2e} allowed (eager {eager:.2e})"
            wrong.append((by_fused[name] / bound, said))
    return [said for _, said in sorted(wrong, reverse=True)]


def needed_bytes(small: nn.Module, model: nn.Module, batch: MicroBatch, wide: torch.dtype) -> int:
    """What the check takes at most, beside the model.

    Trained weights in the wide dtype with a gradient, and a second gradient in their own; other weights in the wide
    dtype, of frozen linear layers only a piece at a time; logits and what cross entropy keeps of them; activations of
    two layers, taken as 40 hidden states each; under ZeRO-3 the gathered weights.
    """
    size, kept, widest = wide.itemsize, 0, 0
    for module in small.modules():
        weights = [weight for weight in module.parameters(recurse=False) if weight.is_floating_point()]
        if widens_by_itself(module) or is_frozen(module, nn.Linear):
            values = getattr(module, "in_features", 0) * getattr(module, "out_features", 0)
            widest = max(widest, values if widens_by_itself(module) else min(values, PIECE))
        elif not is_frozen(module, nn.Embedding):
            kept += sum(w.numel() * (2 * size + w.itemsize if w.requires_grad else size) for w in weights)
    hidden = bare(causal_lm(small).get_input_embeddings()).weight.shape[-1]
    rows = 4 * len(batch.targets) * vocabulary(causal_lm(small)) + 40 * LAYERS * batch.num_tokens * hidden
    partitioned = any(hasattr(weight, "ds_id") for weight in model.parameters())
    gathered = sum(weight.nbytes for weight in small.parameters()) if partitioned else 0
    return kept + (2 * widest + rows) * size + gathered


def growth_bytes(plan: Plan, model: nn.Module, world_size: int) -> int:
    """What training is about to take on this rank at least, beside the model as it is now.

    Gradients, masters and moments of trained weights, 12 bytes a value in fp32 and 16 in bf16 (the gradient alone where
    the optimizer is offloaded), over the ranks from ZeRO-1 on; and one micro batch's activations: 16 hidden states a
    layer (a llama's with an intermediate size of 3.5: 20), or one, and 16 once, where they are computed again.
    """
    layout, data = plan.layout, plan.data
    trained = sum(getattr(w, "ds_numel", w.numel()) for w in model.parameters() if w.requires_grad)
    bf16 = plan.trajectory.dtype == "bf16"
    state = trained * (2 if layout.offload else 16 if bf16 else 12) // (world_size if layout.zero else 1)
    tokens = data.train_tokens / max(1, data.train_rows) * layout.micro_batch_size
    network = causal_lm(model)
    hidden = network.config.get_text_config().hidden_size
    layers = len(decoder_layers(model))
    states = layers + 16 if layout.gradient_checkpointing else layers * 16
    return state + int(tokens * hidden * states * (2 if bf16 else 4))
