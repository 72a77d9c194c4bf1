"""What will run, all of it decided: no `auto`, no default left. Saved as plan.json beside every run.

Two parts that a resume treats differently, each with a hash:
the **trajectory** decides the numbers (model, data, seed, global batch, optimizer, schedule) and must match;
the **layout** decides where they are computed (ranks, ZeRO stage, micro batch) and may change.
The rest (`lifecycle`) may change too: when to evaluate, save, log, and how long to go on.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from launcher.plan.earlier import completed, without_what_came_since
from launcher.recipe.schema_data import SourceFormat

Dtype = Literal["fp32", "bf16"]
SourceKind = Literal["local", "url", "hub"]
Stage = Annotated[int, Field(ge=0, le=3)]


class Part(BaseModel):
    """Base of every part of a Plan: frozen and closed, so that nothing below can slip in a default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    def hash(self) -> str:
        """First 16 hex digits of the SHA-256 of the canonical JSON."""
        return _hash(self.model_dump(mode="json"))


def _hash(values: dict[str, Any]) -> str:
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class ModelPlan(Part):
    """Which weights the run starts from and how they are attended."""

    source: Literal["hub", "folder", "scratch"]
    """`scratch` is turned into a folder, `<run>/base`, before the first worker starts."""
    path: str
    """Hub id, absolute folder, or the absolute `<run>/base` of a scratch model."""
    revision: str | None
    """Commit of a hub id."""
    scratch: dict[str, Any] | None
    """The transformers configuration of a scratch model."""
    tokenizer: str | None
    """Absolute folder or hub id of the tokenizer; None: the model's own, or trained on the data for a scratch model."""
    chat_template: str | None
    """The Jinja text that replaces the tokenizer's own."""
    template_kwargs: dict[str, Any]
    """Variables for the chat template."""
    add_tokens: tuple[str, ...]
    """Control tokens added to the tokenizer; their embedding and head rows are trained whatever the method."""
    dropout: float | None
    """Of every dropout in the model's configuration; None: as the model has it."""
    trust_remote_code: bool
    fingerprint: str | None
    """SHA-256 over the weights of a folder or a scratch model, see `model.fingerprint`. None for a hub id, which its
    commit names, and until the model has been made ready."""


class UnfreezePlan(Part):
    at: float
    """Below 1 a share of all steps, otherwise a number of steps."""
    last_layers: int | None
    """None: everything."""


class MethodPlan(Part):
    """What is trained; fields that a method does not use are None."""

    kind: Literal["full", "lora", "qlora", "freeze"]
    rank: int | None
    alpha: float | None
    dropout: float | None
    targets: Literal["all-linear"] | tuple[str, ...] | None
    train_last_layers: int | None
    dora: bool
    rslora: bool
    init: Literal["default", "pissa"]
    unfreeze: tuple[UnfreezePlan, ...]
    """In the order of their steps."""
    frozen: tuple[str, ...]
    """Regular expressions, found in the names of parameters that are never trained."""


class SourcePlan(Part):
    """Rows of one kind."""

    kind: SourceKind
    """`local`: an absolute file, folder or glob; `url`: of a file system that fsspec knows; `hub`: a hub id."""
    path: str
    format: SourceFormat
    """`auto` is decided by the rows themselves, when they are read; what was found is in the data's facts."""
    columns: dict[str, str]
    """{name in the format: name in the file}."""
    split: str | None
    subset: str | None
    revision: str | None
    """Commit of a hub id."""
    limit: int | None
    weight: float
    system: str | None
    instruction: str | None
    labels: tuple[str, ...]


class HeldOutPlan(Part):
    """Rows that are never trained on."""

    split: float | None
    rows: int | None
    sources: tuple[SourcePlan, ...]


class CleanPlan(Part):
    """Which training rows are left out; see the recipe's keys of the same names."""

    duplicates: Literal["drop", "keep"]
    near_duplicates: float | None
    overlap: Literal["drop", "keep", "stop"]
    contamination: tuple[SourcePlan, ...]
    min_tokens: int | None
    max_chars: int | None
    languages: tuple[str, ...]
    include: str | None
    exclude: tuple[str, ...]
    mend_encoding: bool


class ReplayPlan(Part):
    """Rows of what the model learned earlier."""

    sources: tuple[SourcePlan, ...]
    share: float
    """Of all training rows of an epoch."""


class AugmentPlan(Part):
    """Variations of training rows."""

    function_file: str | None
    """Absolute."""
    function_name: str | None
    wordings: tuple[str, ...]
    truncate_turns: float
    drop_system: float


class DataPlan(Part):
    """Everything that decides which tokens exist and which are supervised."""

    train: tuple[SourcePlan, ...]
    eval: HeldOutPlan
    test: HeldOutPlan
    label: str | None
    group: str | None
    stratify: bool
    balance: Literal["none", "weights", "oversample", "undersample"]
    replay: ReplayPlan | None
    retain: tuple[SourcePlan, ...]
    """Rows whose loss shows what is forgotten; see `RetainPlan`."""
    slices: tuple[str, ...]
    """Columns whose values held-out rows keep."""
    clean: CleanPlan
    augment: AugmentPlan
    max_length: int
    packing: bool
    too_long: Literal["drop", "truncate_end", "truncate_start", "split", "stop"]
    on_bad_row: Literal["stop", "drop"]
    supervise: Literal["all", "last", "marked"]
    special_tokens: Literal["text", "strip"]
    system_turns: Literal["keep", "merge", "drop"]
    head: tuple[str, ...] | None
    """Of a sequence classification: the classes that the model's own head tells apart, in the order of its outputs; ()
    where it has none. None in other tasks."""

    @property
    def sources(self) -> tuple[SourcePlan, ...]:
        """All that are read, in order: training, replay, evaluation, test, retained."""
        replay = self.replay.sources if self.replay else ()
        return (*self.train, *replay, *self.eval.sources, *self.test.sources, *self.retain)


class DataFacts(Part):
    """What preparation found: counted from the tokens, not estimated."""

    folder: str
    """Absolute folder of the prepared Arrow files and the tokenizer."""
    content_hash: str
    """Of the prepared tokens, masks and packs; part of the trajectory."""
    train_rows: int
    """Rows of a global batch's unit: packs where packing is on, documents otherwise."""
    train_documents: int
    train_tokens: int
    train_supervised_tokens: int
    eval_documents: int
    eval_supervised_tokens: int
    test_documents: int
    dropped: dict[str, int]
    """Documents left out, by reason; each is listed in dropped.jsonl."""
    vocab_size: int
    formats: dict[str, str]
    """Format taken for each source path."""
    classes: tuple[str, ...]
    """Of a sequence classification, in the order of the head's outputs; empty otherwise."""
    retain_documents: int


class OptimizerPlan(Part):
    """See the recipe's keys of the same names; what an optimizer does not use means nothing."""

    name: Literal["adamw", "adamw_8bit", "lion", "sgd", "adafactor"]
    lr: float
    betas: tuple[float, float]
    eps: float
    momentum: float
    weight_decay: float
    max_grad_norm: float
    layer_decay: float
    lora_plus_ratio: float


class SchedulePlan(Part):
    """Shape of the learning rate; its length is `Lifecycle.total_steps`."""

    kind: Literal["cosine", "linear", "constant"]
    warmup: float
    """Below 1 a share of all steps, otherwise a number of steps."""
    min_lr_ratio: float


class Trajectory(Part):
    """Decides every number of the run; must match on resume."""

    task: Literal["causal_lm", "sequence_classification"]
    model: ModelPlan
    method: MethodPlan
    data: DataPlan
    data_content_hash: str
    seed: int
    dtype: Dtype
    global_batch_size: int
    label_smoothing: float
    neftune_alpha: float | None
    optimizer: OptimizerPlan
    schedule: SchedulePlan

    def hash(self) -> str:
        """As of any part, but of what is trained on and not of where it lies: a run that was moved keeps its hash.

        The fingerprint stands for the model's folder, the hash of the prepared data for the files of its sources.
        """
        values = self.model_dump(mode="json")
        if self.model.fingerprint is not None:
            del values["model"]["path"]
        data = values["data"]
        held_out = (*data["eval"]["sources"], *data["test"]["sources"], *data["clean"]["contamination"])
        replayed = data["replay"]["sources"] if data["replay"] else ()
        for source in (*data["train"], *held_out, *replayed):
            del source["path"]
        del data["retain"], data["slices"]  # they measure, and change no number
        del data["augment"]["function_file"]
        return _hash(without_what_came_since(values))


class LayoutPlan(Part):
    """Where the numbers are computed; may differ on resume."""

    workers: int
    """The most that run at once."""
    min_workers: int
    """The least; fewer than `workers` where the run may change its size."""
    device: Literal["cpu", "cuda"]
    cpus_per_worker: int
    zero: Stage
    offload: bool
    micro_batch_size: int
    gradient_checkpointing: bool
    attention: Literal["sdpa", "varlen", "triton", "flash"]
    """Which kernel attends packed documents."""
    kernels: Literal["fused", "eager"]
    """Whether our kernels take the place of the model's own layers, see `model.fuse`."""


class GeneratePlan(Part):
    rows: int
    max_new_tokens: int
    batch_size: int
    temperature: float
    top_p: float
    metrics: tuple[str, ...]
    """Names; of a function of the user's, its absolute file and its name, with a colon between."""
    during: bool


class EarlyStoppingPlan(Part):
    patience: int
    min_delta: float


class RetainPlan(Part):
    max_rows: int | None
    limit: float
    """How far the loss may rise, as a share of what it was before the first step."""
    action: Literal["warn", "stop"]


class GuardPlan(Part):
    spikes: Literal["stop", "warn", "skip", "rollback"]
    deviations: float
    window: int
    most: int


class Lifecycle(Part):
    """How long, and what happens along the way; may differ on resume."""

    epochs: float | None
    max_steps: int | None
    total_steps: int
    """Where the schedule and the run end."""
    max_time_s: float | None
    eval_every_steps: int
    eval_max_rows: int | None
    generate: GeneratePlan | None
    metric: str
    """What the best checkpoint is best by."""
    early_stopping: EarlyStoppingPlan | None
    slices: tuple[str, ...]
    """Of those that the data was prepared with."""
    retain: RetainPlan | None
    guard: GuardPlan
    checkpoint_every_steps: int
    checkpoint_within_s: float | None
    """And at the latest so long after the last one; None where the recipe names the steps."""
    keep_last: int
    keep_best: int
    keep_every: int | None
    background_saves: bool
    grace_s: float
    """Between SIGTERM and the moment by which the run has ended."""
    log_every_steps: int
    system_every_s: float | None
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...]
    project: str
    audit: Literal["strict", "warn", "off"]
    """What a finding before the first step does."""
    max_failures: int
    wait_s: float
    """How long a run waits for room for its workers, such as the return of a lost node, before it fails."""
    hang_timeout_s: float | None
    """How long no rank may make progress; None: nobody watches."""
    export: bool
    export_best: bool
    """Whether the model is made from the best checkpoint and not from the last."""
    merge: bool
    max_shard_size: str


class Plan(Part):
    """One run, decided to the last value."""

    name: str
    run_dir: str
    """Absolute folder of the run on this machine; for a run in an object store its spool."""
    location: str
    """Where the run's files are kept: its absolute folder, or the URL of an object store."""
    version: str
    """Slipway's version."""
    recipe_hash: str
    trajectory: Trajectory
    layout: LayoutPlan
    lifecycle: Lifecycle
    data: DataFacts
    origins: dict[str, str]
    """Where each decided value comes from: file:line, command line, default, or the planner's reason."""

    @model_validator(mode="before")
    @classmethod
    def _of_earlier(cls, values: Any) -> Any:
        return completed(values) if isinstance(values, dict) else values

    def save(self, path: Path) -> None:
        """Write plan.json."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read plan.json."""
        return cls.model_validate_json(path.read_text(encoding="utf-8"))
