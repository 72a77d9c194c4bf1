"""Where the numbers are computed: workers, ZeRO stage, micro batch. Simple rules, each with its reason."""

from __future__ import annotations

import importlib.util
from typing import Literal

from launcher.errors import ClusterError
from launcher.plan.facts import ClusterFacts, shortage
from launcher.plan.plan import Dtype, LayoutPlan
from launcher.recipe.schema import Recipe, Workers

LARGE = 2_000_000_000
"""Parameters from which full training's state (16 bytes each) is spread over the ranks with the parameters
themselves."""
TOKENS_PER_MICRO_BATCH = {"cpu": 4096, "cuda": 8192}
"""Enough tokens to fill the device's matrix units, few enough for the logits of a large vocabulary to fit."""


def choose_device(cluster: ClusterFacts) -> str:
    """GPUs where there are any, also while others use them: a run that waits for one must not end up on CPUs."""
    return "cuda" if cluster.has_gpus else "cpu"


def choose_dtype(recipe: Recipe, device: str) -> tuple[Dtype, str | None]:
    """The training dtype, and the planner's reason where the recipe says auto."""
    if recipe.train.dtype != "auto":
        return recipe.train.dtype, None
    return ("bf16", "bf16 on GPUs") if device == "cuda" else ("fp32", "fp32 on CPUs")


def resolve_layout(
    recipe: Recipe, cluster: ClusterFacts, dtype: Dtype, parameters: int, reasons: dict[str, str]
) -> LayoutPlan:
    """Decide the layout; the reason of each `auto` goes into `reasons` under its recipe key.

    Raises:
        ClusterError: the cluster has too few CPUs or GPUs for the workers asked for.
    """
    device = choose_device(cluster)
    least, workers = _workers(recipe, cluster, device, reasons)
    cpus = _cpus_per_worker(recipe, cluster, device, (least, workers), reasons)
    _check_room(cluster, device, least, cpus)
    zero = _zero(recipe, workers, dtype, parameters, reasons)
    if recipe.parallel.offload == "auto":
        reasons["parallel.offload"] = "none unless asked for"
    per_rank = -(-recipe.train.global_batch_size // least)  # of more workers each takes less: see plan.batch
    micro = recipe.train.micro_batch_size
    if micro == "auto":
        budget = TOKENS_PER_MICRO_BATCH[device]
        micro = max(1, min(per_rank, budget // recipe.data.max_length))
        reasons["train.micro_batch_size"] = f"about {budget} tokens on a {device} rank"
    checkpointing = recipe.train.gradient_checkpointing
    if checkpointing == "auto":
        checkpointing = device == "cuda" and parameters >= 1_000_000_000
        reasons["train.gradient_checkpointing"] = "on for models of 1B parameters or more on GPUs"
    return LayoutPlan(
        workers=workers,
        min_workers=least,
        device="cuda" if device == "cuda" else "cpu",
        cpus_per_worker=cpus,
        zero=zero,
        offload=recipe.parallel.offload == "cpu",
        micro_batch_size=micro,
        gradient_checkpointing=checkpointing,
        attention=_attention(recipe, device, dtype, reasons),
        kernels=_kernels(recipe, device, reasons),
    )


def _attention(
    recipe: Recipe, device: str, dtype: Dtype, reasons: dict[str, str]
) -> Literal["sdpa", "varlen", "triton", "flash"]:
    if recipe.model.attention != "auto":
        return recipe.model.attention
    if recipe.task == "sequence_classification":
        reasons["model.attention"] = "texts are padded rows: transformers' own attention, with a padding mask"
        return "sdpa"
    if device == "cpu":
        reasons["model.attention"] = (
            "torch's SDPA document by document: the variable-length kernels are for bf16 on GPUs"
        )
        return "sdpa"
    if dtype == "fp32":
        reasons["model.attention"] = "our Triton kernels: the other variable-length kernels take 16-bit numbers only"
        return "triton"
    # What a model needs and the chosen kernel has not, such as sinks, the dispatch gives to ours: model/attention.py.
    for package, version in (("flash_attn_interface", "flash-attn 3"), ("flash_attn", "flash-attn")):
        if importlib.util.find_spec(package) is not None:
            reasons["model.attention"] = f"{version} is installed; layers with attention sinks go through our kernels"
            return "flash"
    reasons["model.attention"] = (
        "torch's own variable-length kernel, as flash-attn is not installed; soft caps and sinks go through our kernels"
    )
    return "varlen"


def _kernels(recipe: Recipe, device: str, reasons: dict[str, str]) -> Literal["fused", "eager"]:
    if recipe.model.kernels != "auto":
        return recipe.model.kernels
    if recipe.task == "sequence_classification":
        reasons["model.kernels"] = "a classifier's layers are left as transformers has them"
        return "eager"
    reasons["model.kernels"] = "our kernels run on GPUs; on CPUs PyTorch's own layers do"
    return "fused" if device == "cuda" else "eager"


def _workers(recipe: Recipe, cluster: ClusterFacts, device: str, reasons: dict[str, str]) -> tuple[int, int]:
    """The least and the most."""
    workers = recipe.cluster.workers
    if isinstance(workers, Workers):
        return workers.min, workers.max
    if workers != "auto":
        return workers, workers
    reasons["cluster.workers"] = "one a GPU" if device == "cuda" else "one process uses all CPUs of a machine best"
    number = max(cluster.gpus, 1) if device == "cuda" else 1
    return number, number


def _cpus_per_worker(
    recipe: Recipe, cluster: ClusterFacts, device: str, workers: tuple[int, int], reasons: dict[str, str]
) -> int:
    if recipe.cluster.cpus_per_worker != "auto":
        return recipe.cluster.cpus_per_worker
    if device == "cuda":
        reasons["cluster.cpus_per_worker"] = "one to feed a GPU"
        return 1
    least, most = workers
    reasons["cluster.cpus_per_worker"] = "the CPUs shared out over the workers"
    if least < most:
        reasons["cluster.cpus_per_worker"] += ", as if one ran on each machine that is here now"
    number = max(least, min(most, len(cluster.nodes)))
    # A worker never spans machines: the largest share that still lets all of them fit somewhere.
    for cpus in range(max((node.cpus for node in cluster.nodes), default=0), 0, -1):
        if cluster.room(cpus, gpu=False) >= number:
            return cpus
    return 1


def _check_room(cluster: ClusterFacts, device: str, workers: int, cpus: int) -> None:
    gpu = device == "cuda"
    room = cluster.room(cpus, gpu)
    if workers > room:
        raise ClusterError(
            f"the run needs {shortage(cluster, workers, cpus, gpu)}",
            hint=f"set cluster.workers to at most {room}" if room else "free the cluster, or add nodes to it",
        )


def _zero(recipe: Recipe, workers: int, dtype: Dtype, parameters: int, reasons: dict[str, str]) -> int:
    if recipe.parallel.zero != "auto":
        return recipe.parallel.zero
    if recipe.optimizer.name == "adafactor":
        reasons["parallel.zero"] = "adafactor keeps sums over the rows and columns of whole matrices"
        return 0
    if workers > 1 and parameters >= LARGE and recipe.method.kind in ("full", "freeze"):
        reasons["parallel.zero"] = f"about {parameters / 1e9:.1f}B parameters: their state is spread over all ranks"
        return 3
    if workers > 1 or dtype == "bf16":
        reasons["parallel.zero"] = "spreads the optimizer's state and accumulates gradients in fp32"
        return 1
    if recipe.parallel.offload == "cpu":
        reasons["parallel.zero"] = "the lowest stage that can offload"
        return 1
    reasons["parallel.zero"] = "one rank has nothing to spread"
    return 0
