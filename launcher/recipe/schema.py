"""What a user may write in a recipe: every key, its unit, its default and its effect.

Frozen and closed: an unknown key is an error. `auto` stays `auto` here; `plan.resolve` decides it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveInt

from launcher.recipe.schema_data import Data
from launcher.recipe.schema_evaluate import Evaluate
from launcher.recipe.schema_train import Guard, Method, Optimizer, Schedule, Train
from launcher.recipe.section import Auto, Section


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
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Probability of every dropout that the model's configuration names, of embeddings, attention and layers. Left out:
    as the model has it."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose code you have read."""


class Parallel(Section):
    """How the model's state is spread over the ranks."""

    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """DeepSpeed ZeRO stage. 0: replicated; 1: optimizer state; 2: and gradients; 3: and parameters."""
    offload: Literal["auto", "none", "cpu"] = "auto"
    """Keep the optimizer's state, and at stage 3 the parameters, in host memory."""


Audit = Literal["strict", "warn", "off"]


class Checkpoint(Section):
    """When the run is saved and what is kept."""

    every_steps: PositiveInt | None = None
    """Left out: ten times a run, and every 30 minutes. The end, Ctrl-C and SIGTERM always save."""
    keep_last: PositiveInt = 2
    """How many of the newest are kept."""
    keep_best: Annotated[int, Field(ge=0)] = 1
    """How many of the best by `evaluate.metric` are kept beside them."""
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
    system_every_s: Annotated[float, Field(ge=1)] | None = 10
    """Use of CPUs, GPUs, memory and energy every so many seconds. `null`: never."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    """Where the numbers of metrics.jsonl go as well; each needs the extra of its name."""
    project: str | None = None
    """W&B's project, MLflow's experiment; `slipway` where left out."""


class Export(Section):
    """The Hugging Face folder at the end."""

    enabled: bool = True
    """Write `model/` in the run's folder when the run ends."""
    checkpoint: Literal["auto", "last", "best"] = "auto"
    """Which one becomes the model: the last, or the best by `evaluate.metric`. `auto`: the best where the run may stop
    early, otherwise the last."""
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
    task: Literal["causal_lm", "sequence_classification"] = "causal_lm"
    """`causal_lm`: the model learns to say what follows. `sequence_classification`: a head on it, on a GPT-style model
    or an encoder such as BERT, learns the class of each row: its label, or the word that answers its prompt."""
    model: Model = Model()
    method: Method = Method()
    data: Data = Data()
    train: Train = Train()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    guard: Guard = Guard()
    parallel: Parallel = Parallel()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    cluster: Cluster = Cluster()
    logging: Logging = Logging()
    export: Export = Export()
