"""What a user may write about learning: what is trained, how long, by which optimizer, and what guards it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from launcher.recipe.section import Auto, Fraction, Section


class Unfreeze(Section):
    """From when on more is trained."""

    at: Annotated[float, Field(gt=0)]
    """Below 1 a share of all steps, otherwise a number of steps."""
    last_layers: PositiveInt | Literal["all"]
    """So many of the last layers from then on; `all`: everything, the embedding too."""


class Method(Section):
    """What is trained."""

    kind: Literal["full", "lora", "qlora", "freeze"] = "full"
    """`full`: every weight. `lora`: low-rank adapters. `qlora`: adapters over a 4-bit NF4 base. `freeze`: last
    layers."""
    rank: PositiveInt = 16
    """Rank of the adapters (lora, qlora)."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Adapters are scaled by alpha / rank; with `rslora` by alpha / sqrt(rank)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an adapter's input."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an adapter; `all-linear` is every one but the head."""
    dora: bool = False
    """DoRA: the length of each weight's rows, one an output, is learned apart from their direction (Liu et al.,
    2024)."""
    rslora: bool = False
    """Scale adapters by alpha / sqrt(rank) instead (Kalajdzievski, 2023)."""
    init: Literal["default", "pissa"] = "default"
    """`pissa`: adapters start as the weights' principal singular vectors, the base keeps the rest (Meng et al., 2024);
    exported, they are of rank 2r over the base as it was. Otherwise they start as nothing."""
    train_last_layers: PositiveInt = 2
    """With `freeze`: how many of the last layers are trained, with the final norm and an untied head."""
    unfreeze: tuple[Unfreeze, ...] = ()
    """With `freeze`: when more layers are trained, such as `[{at: 0.3, last_layers: 4}, {at: 0.6, last_layers: all}]`.
    What was trained before keeps its optimizer state."""
    frozen: tuple[str, ...] = ()
    """Parameters that are never trained: regular expressions, found in their names, such as `embed_tokens`. Adapters
    have names with `lora_A` and `lora_B` behind the layer's own. Rows of `model.add_tokens` stay trained."""


class Train(Section):
    """How long, how large, how precise."""

    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the data; 1 where neither this nor `max_steps` is given."""
    max_steps: PositiveInt | None = None
    """Optimizer steps, at most. The schedule ends at whichever of `epochs` and `max_steps` comes first."""
    max_time: str | None = None
    """Wall-clock limit such as `90s`, `30m` or `2h`: then the run evaluates, saves and ends. The schedule is not
    bent."""
    global_batch_size: PositiveInt = 32
    """Rows in an optimizer step over all ranks; packed rows where `data.packing` is on."""
    micro_batch_size: PositiveInt | Auto = "auto"
    """Rows in one forward and backward on one rank."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 17
    """Seeds the order of the data, the adapters, scratch weights and dropout."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of weights and activations; masters stay fp32. `auto`: bf16 on GPUs, fp32 on CPUs."""
    gradient_checkpointing: bool | Auto = "auto"
    """Recompute activations in the backward pass: less memory, about a third more compute. `auto`: on GPUs, for
    models of
    1B parameters or more."""
    max_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Clip the global gradient norm; 0 switches it off."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """This share of each target is spread over all tokens or classes alike (Szegedy et al., 2016). The training loss is
    the smoothed one; what is measured on held-out rows is not."""
    neftune_alpha: Annotated[float, Field(gt=0)] | None = None
    """Noise on the embeddings while training, uniform within alpha / sqrt(tokens of the document x hidden size)
    (NEFTune; Jain et al., 2023); 5 is usual. Left out: none."""


class Optimizer(Section):
    """What turns gradients into updates."""

    name: Literal["adamw", "adamw_8bit", "lion", "sgd", "adafactor"] = "adamw"
    """`adamw`: decoupled weight decay (Loshchilov and Hutter, 2019). `adamw_8bit`: its moments in 8 bits (bitsandbytes;
    Dettmers et al., 2022), a quarter of the memory. They fit one cut only: a run resumes at the ZeRO stage and on the
    number of ranks that it was saved with. `lion`: signs of one moment (Chen et al., 2023); its rate is usually a third
    to a tenth of adamw's. `sgd`: with Nesterov's momentum. `adafactor`: factored moments (Shazeer and Stern, 2018), not
    relative to the size of the weights, at ZeRO 0 only."""
    lr: Annotated[float, Field(gt=0)] = 2.0e-5
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] | None = None
    """Decay of the first and second moment (adamw); of lion, whose one moment it is twice: in the update, and from step
    to step. Left out: 0.9 and 0.999, of lion 0.9 and 0.99."""
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    """Added to the root of the second moment (adamw)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of sgd; 0: none."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Share of a weight that it loses at each step, times the learning rate; sgd adds it to the gradient, and so to its
    momentum. Not applied to norms, biases and other one-dimensional weights."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Each layer below the last learns with this share of the rate of the one above it, embeddings as one more layer
    (Howard and Ruder, 2018). The final norm and a head of its own learn as the last."""
    lora_plus_ratio: Annotated[float, Field(ge=1)] = 1.0
    """Adapters' B learns at so many times the rate, A at the rate itself (LoRA+; Hayou et al., 2024); 16 is usual."""


class Schedule(Section):
    """The learning rate over the steps."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Below 1 a share of all steps, otherwise a number of steps."""
    min_lr_ratio: Fraction = 0.0
    """Where cosine and linear end, as a share of the peak."""


class Guard(Section):
    """What happens when training goes wrong."""

    spikes: Literal["stop", "warn", "skip", "rollback"] = "warn"
    """When the loss of a step is far above those before it, or is no number. `warn`: it is said; no number ends the
    run. `skip`: the step leaves the weights as they are. `rollback`: the run goes on from its last checkpoint without
    the batches since then, and skips where there is none yet. `stop`: the run ends before the update."""
    deviations: Annotated[float, Field(gt=0)] = 6.0
    """How far is far: so many standard deviations above the mean of the last `window` steps; one is at least a
    hundredth of that mean."""
    window: Annotated[int, Field(ge=4)] = 32
    """Steps looked back on; before there are so many, only a loss that is no number counts."""
    most: PositiveInt = 10
    """With `skip` and `rollback`: how often that is done; the next spike ends the run."""
