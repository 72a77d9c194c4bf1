"""What a user may write in a recipe: every key, its unit, its default and its effect.

Frozen and closed: an unknown key is an error. `auto` stays `auto` here; `plan.resolve` decides it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from launcher.recipe.schema_data import Data
from launcher.recipe.section import Auto, Fraction, Section


class Model(Section):
    """Which model is fine-tuned."""

    path: str | None = None
    """A model folder, or a Hugging Face hub id. Give this or `scratch`."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the Plan pins it to a commit."""
    scratch: dict[str, Any] | None = None
    """A transformers configuration (`model_type`, `hidden_size`, ...) to start from random weights. `vocab_size` is
    the size of the BPE vocabulary, which is trained on the recipe's own text unless `tokenizer` is given."""
    tokenizer: str | None = None
    """Folder or hub id of a tokenizer other than the model's own."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's own."""
    template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Variables for the chat template, in training and in every answer, such as `{enable_thinking: false}`."""
    add_tokens: tuple[str, ...] = ()
    """Control tokens to add to the tokenizer, such as `<|im_start|>`. Their embedding and head rows are trained and
    exported, with adapters too."""
    attention: Literal["auto", "sdpa", "varlen", "triton", "flash"] = "auto"
    """How packed documents are attended: `sdpa` runs anywhere, `varlen` is torch's own on CUDA, `triton` is ours on
    CUDA, `flash` needs flash-attn. `auto` takes the fastest that is there."""
    kernels: Literal["auto", "fused", "eager"] = "auto"
    """`fused` puts our kernels in the place of the model's norms, rotations, gated layers and loss, wherever they
    compute the same. `auto`: on GPUs."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""


class Method(Section):
    """What is trained."""

    kind: Literal["full", "lora", "qlora", "freeze"] = "full"
    """`full`: every weight. `lora`: low-rank adapters. `qlora`: adapters over a 4-bit NF4 base. `freeze`: last
    layers."""
    rank: PositiveInt = 16
    """Rank of the adapters (lora, qlora)."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Adapters are scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an adapter's input."""
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Names of the linear layers that get an adapter; `all-linear` is every one but the head."""
    train_last_layers: PositiveInt = 2
    """With `freeze`: how many of the last layers are trained, with the final norm and an untied head."""


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


class Optimizer(Section):
    """AdamW and its numbers."""

    name: Literal["adamw", "adamw_8bit"] = "adamw"
    """Decoupled weight decay, as in Loshchilov and Hutter, 2019. `adamw_8bit`: its moments in 8 bits (bitsandbytes;
    Dettmers et al., 2022), a quarter of the memory. They fit one cut only: a run resumes at the ZeRO stage and on the
    number of ranks that it was saved with."""
    lr: Annotated[float, Field(gt=0)] = 2.0e-5
    """Peak learning rate."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: Annotated[float, Field(gt=0)] = 1.0e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Not applied to norms, biases and other one-dimensional weights."""


class Schedule(Section):
    """The learning rate over the steps."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Below 1 a share of all steps, otherwise a number of steps."""
    min_lr_ratio: Fraction = 0.0
    """Where cosine and linear end, as a share of the peak."""


class Parallel(Section):
    """How the model's state is spread over the ranks."""

    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage. 0: replicated; 1: optimizer state; 2: and gradients; 3: and parameters."""
    offload: Literal["auto", "none", "cpu"] = "auto"
    """Keep the optimizer's state, and at stage 3 the parameters, in host memory."""


class Generate(Section):
    """Answers in words on `data.test`, compared with the reference."""

    rows: PositiveInt = 200
    """How many of the test rows, the first ones."""
    max_new_tokens: PositiveInt = 64
    """Longest answer, in tokens."""
    batch_size: PositiveInt = 32
    """Prompts answered at once on one rank."""


Audit = Literal["strict", "warn", "off"]


class Evaluate(Section):
    """Measuring on held-out rows while training."""

    every_steps: PositiveInt | None = None
    """Evaluation loss and token accuracy every so many steps, and always at the end. Left out: ten times a run."""
    max_rows: PositiveInt | None = None
    """At most so many evaluation rows."""
    generate: Generate | None = None
    """Exact match of generated answers on `data.test`, before the first step and after the last."""


class Checkpoint(Section):
    """When the run is saved and what is kept."""

    every_steps: PositiveInt | None = None
    """Left out: ten times a run, and every 30 minutes. The end, Ctrl-C and SIGTERM always save."""
    keep_last: PositiveInt = 2
    """How many of the newest are kept."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """How many of those with the lowest evaluation loss are kept beside them."""
    keep_every: PositiveInt | None = None
    """Every checkpoint whose step divides by this many steps is kept for good. Left out: none."""
    background: bool = True
    """Write while training goes on: the loop waits only for a copy in host memory, as large as this rank's part of the
    checkpoint. Where a host has no room for the copies, its run says so and waits for the disk instead."""
    grace: str = "25s"
    """After SIGTERM: how long the run may take to save and end. What sends it kills what is still there after a while
    (Kubernetes and Slurm: 30 seconds unless told otherwise)."""


class Workers(Section):
    """The sizes that a run may have: it goes on with fewer where machines are lost, and with more where some join."""

    min: PositiveInt
    """The least: with room for fewer the run waits, see `wait_s`."""
    max: PositiveInt
    """The most."""


class Cluster(Section):
    """Where it runs."""

    workers: PositiveInt | Workers | Auto = "auto"
    """Training processes; `auto` is one a GPU, or one in all where there is no GPU. `{min: 2, max: 16}`: as many as
    there is room for, which may change while the run goes on. What it computes does not depend on their number."""
    cpus_per_worker: PositiveInt | Auto = "auto"
    """CPUs reserved for each; `auto` shares out what a node has."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often in a row a run may go on from its last checkpoint after a failed worker; a new checkpoint between two
    failures starts the count anew. A lost machine does not count, unless nothing was saved since the failure before."""
    wait_s: Annotated[float, Field(gt=0)] = 600
    """How long a run waits, in seconds, until a lost machine is back or another has joined; then it fails."""
    hang_timeout_s: Annotated[float, Field(ge=1)] | None = 600
    """After so many seconds in which no rank makes progress the run is looked into: stacks of all ranks go to its
    logs, the culprit is named and killed, and the run goes on from its last checkpoint. Longer than the longest micro
    batch takes, and shorter than the 1800 after which collectives give up. `null`: never."""


class Logging(Section):
    """What is written down while training."""

    every_steps: PositiveInt = 1
    """A line in metrics.jsonl every so many steps."""


class Export(Section):
    """The Hugging Face folder at the end."""

    enabled: bool = True
    """Write `model/` in the run's folder when the run ends."""
    merge: bool | Auto = "auto"
    """Fold adapters into the base. `auto`: for lora over a scratch base; qlora and lora over a file stay adapters."""
    max_shard_size: str = "5GB"
    """Size of one safetensors file, at most."""


class Recipe(Section):
    """One fine-tune, as its author wrote it."""

    extends: str | None = None
    """Another recipe, beside this one or from the catalog, whose keys this one adds to and overrides."""
    name: str | None = None
    """Name of the run's folder; the recipe's file name where left out."""
    description: str | None = None
    """One line for `slipway recipes list`."""
    runs: str = "runs"
    """Folder that gets a folder for each run, relative to the current directory."""
    audit: Audit = "strict"
    """Before the first step, on the run's own model and data: fused kernels compute what the model does, packed
    documents do not see each other, the loss is on the words that are meant. `strict`: a finding ends the run;
    `warn`: it is said; `off`: nothing is looked at."""
    model: Model = Model()
    method: Method = Method()
    data: Data = Data()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    parallel: Parallel = Parallel()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    cluster: Cluster = Cluster()
    logging: Logging = Logging()
    export: Export = Export()
