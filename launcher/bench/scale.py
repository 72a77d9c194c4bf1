"""What failures cost a run of 8, 104 and 1,000 GPUs: a simulation of weeks, and the formula it must agree with.

`python -m launcher.bench.scale` prints the tables of docs/decisions/0019-a-hundred-and-a-thousand-gpus.md, which says
where each figure is from. No GPU, no Ray: seconds drawn from exponential distributions, the same at every call.

A node fails by chance, the more nodes the sooner. The run loses what it has done since its newest checkpoint, notices,
and starts again: on the same nodes, or, where the failure took a node with it, as its policy says:

    wait      on as many nodes as before, once the lost one is repaired
    elastic   on those that are left at once; when the lost one is back it saves, and starts again on all
    spares    at once in full, while spare nodes last; then as `wait`
"""

from __future__ import annotations

import argparse
import heapq
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

DAY_S = 86_400.0
GPUS_PER_NODE = 8
BYTES_SAVED = 12
"""Of a trained parameter: master and both moments in fp32. Weight and gradient in bf16 make 16 in memory."""
BASE_BYTES = 2
"""Of a parameter in the base model's files, bf16."""

Policy = Literal["wait", "elastic", "spares"]


@dataclass(frozen=True)
class Setting:
    """A run and its cluster. Times in seconds."""

    nodes: int
    """That the run asks for."""
    failures_per_node_day: float
    interval_s: float
    """Training between two saves."""
    stall_s: float
    """What a save holds training up."""
    write_s: float = 0.0
    """From the end of the stall until COMMIT, beside training; a failure before loses the save too."""
    detect_s: float = 0.0
    """From a failure until the workers are being replaced."""
    restart_s: float = 0.0
    """From there to the first step; a failure meanwhile begins it anew."""
    repair_s: float = 0.0
    """Mean time until a lost node is back, exponentially distributed."""
    lost_share: float = 1.0
    """Of the failures that take a node with them."""
    policy: Policy = "wait"
    spares: int = 0
    """Nodes beyond `nodes`, idle until they are needed."""
    micro_steps: int = 8
    """Micro batches of a rank in a step at full size. They are the grain of an elastic run: see `speed`."""

    def speed(self, nodes: int) -> float:
        """Steps per second on so many nodes, 1 at full size.

        The global batch stays as it is, so a step takes as many micro batches as the busiest rank has.
        """
        return self.micro_steps / math.ceil(self.micro_steps * self.nodes / nodes)


@dataclass
class Spent:
    """Where the wall clock went, in seconds; all but `failures` add up to it."""

    useful: float = 0.0
    """As seconds of training at full size."""
    stalled: float = 0.0
    repeated: float = 0.0
    """Training that a failure, or growing again, threw away."""
    restarting: float = 0.0
    """Noticing and starting."""
    waiting: float = 0.0
    """Too few nodes."""
    smaller: float = 0.0
    """What fewer nodes took longer."""
    failures: float = 0

    def share(self, of: str) -> float:
        """Of the wall clock."""
        seconds = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "failures"}
        return float(seconds[of] / sum(seconds.values()))

    @property
    def goodput(self) -> float:
        """Useful training over what the same nodes would have done without failures and saves."""
        return self.share("useful")


def simulate(setting: Setting, wall_s: float, draw: random.Random) -> Spent:
    """One run of `wall_s` seconds that begins with its first step; what is under way at the end counts."""
    spent, now, restarting = Spent(), 0.0, False
    away: list[float] = []
    """When each lost node will be back."""
    while now < wall_s:
        while away and away[0] <= now:
            heapq.heappop(away)
        there = min(setting.nodes, setting.nodes + setting.spares - len(away))
        if there < (1 if setting.policy == "elastic" else setting.nodes):
            until = min(away[0], wall_s)
            spent.waiting += until - now
            now = until
            continue
        rate = setting.failures_per_node_day * there / DAY_S
        fails_at = now + draw.expovariate(rate) if rate else math.inf
        begins_at = now + (setting.restart_s if restarting else 0.0)
        asked_at = max(away[0], begins_at) if there < setting.nodes else math.inf
        grows_at = asked_at + setting.stall_s + setting.write_s
        until = min(fails_at, grows_at, wall_s)
        spent.restarting += min(begins_at, until) - now
        if until == grows_at:  # what was asked for is saved, and what was trained while it was written is not
            _train(setting, asked_at - begins_at, True, setting.speed(there), spent)
            spent.stalled += setting.stall_s
            spent.repeated += setting.write_s
        else:
            _train(setting, max(0.0, until - begins_at), until == wall_s, setting.speed(there), spent)
        now, restarting = until, True
        if until == fails_at:
            spent.failures += 1
            noticed = min(setting.detect_s, wall_s - now)
            spent.restarting += noticed
            now += noticed
            if draw.random() < setting.lost_share:
                heapq.heappush(away, now + (draw.expovariate(1 / setting.repair_s) if setting.repair_s else 0.0))
    return spent


def _train(setting: Setting, seconds: float, keeps_all: bool, speed: float, spent: Spent) -> None:
    """Count a stretch of training; unless it `keeps_all`, what its last COMMIT does not cover is lost."""
    # One save is under way at a time: where writing takes longer than the interval, the next waits for it.
    cycle_s = max(setting.interval_s + setting.stall_s, setting.write_s)
    trained_s = cycle_s - setting.stall_s
    begun, rest_s = divmod(seconds, cycle_s)
    stalled_s = begun * setting.stall_s + max(0.0, rest_s - trained_s)
    kept_s = seconds - stalled_s
    if not keeps_all:
        kept_s = max(0.0, (seconds - setting.write_s) // cycle_s) * trained_s
    spent.stalled += stalled_s
    spent.repeated += seconds - stalled_s - kept_s
    spent.useful += kept_s * speed
    spent.smaller += kept_s * (1 - speed)


def expected_goodput(setting: Setting) -> float:
    """The exact mean of a long run of fixed size whose saves are whole when their stall ends.

    An interval and its save take (1/f + D) e^(f R) (e^(f (interval + stall)) - 1), with f failures a second, D until a
    restart begins and R for the restart; D = 0 gives Daly's (Future Generation Computer Systems 22, 2006).
    """
    assert setting.policy == "wait"
    assert not setting.write_s
    rate = setting.failures_per_node_day * setting.nodes / DAY_S
    down_s = setting.detect_s + setting.lost_share * setting.repair_s
    cycle_s = setting.interval_s + setting.stall_s
    return setting.interval_s / ((1 / rate + down_s) * math.exp(rate * setting.restart_s) * math.expm1(rate * cycle_s))


def best_interval(setting: Setting) -> float:
    """Training between two saves that wastes least, in seconds: sqrt(2 stall M) - stall with M seconds between failures
    (Young, CACM 17, 1974; Daly), but no less than a save takes to write."""
    mean_s = DAY_S / (setting.failures_per_node_day * setting.nodes)
    return max(math.sqrt(2 * setting.stall_s * mean_s) - setting.stall_s, setting.write_s, 1.0)


@dataclass(frozen=True)
class Model:
    """What is fine-tuned, all of its parameters."""

    name: str
    parameters: float


@dataclass(frozen=True)
class Cluster:
    """What a restart depends on; assumed, see the page."""

    nodes: int
    base_readers: int = 1
    """Under ZeRO-3 the first rank reads the base's files and the others get their parts from it; for QLoRA every node
    does."""
    storage_bytes_s: float = 10e9
    """Of the storage that all nodes share, all together, reading or writing."""
    node_bytes_s: float = 2e9
    """What one node gets of it."""
    start_s: float = 40.0
    """Ray's workers, imports from each node's own disk, engine."""
    connect_rank_s: float = 0.01
    """Opening the process groups, for each rank."""

    @property
    def gpus(self) -> int:
        return self.nodes * GPUS_PER_NODE

    def move_s(self, num_bytes: float, nodes: int) -> float:
        """Seconds to read or write so much by so many nodes together."""
        return num_bytes / min(self.storage_bytes_s, nodes * self.node_bytes_s)

    def write_s(self, model: Model) -> float:
        """Seconds to write a checkpoint."""
        return self.move_s(BYTES_SAVED * model.parameters, self.nodes)

    def restart_s(self, model: Model) -> float:
        """Seconds from the decision to the first step: start, connect, base, checkpoint verified and read."""
        return sum(self.restart_parts(model).values())

    def restart_parts(self, model: Model) -> dict[str, float]:
        """The same by what takes them."""
        return {
            "start": self.start_s,
            "connect": self.connect_rank_s * self.gpus,
            "base": self.move_s(self.base_readers * BASE_BYTES * model.parameters, self.base_readers),
            "checkpoint": 2 * self.write_s(model),
        }


MODELS = (Model("8B", 8.0e9), Model("70B", 70.6e9))
CLUSTERS = (Cluster(1), Cluster(13), Cluster(125))
RATES = {"Llama 3": 419 / 54 / 2048, "RSC-1": 6.5e-3, "RSC, 1,024 GPUs": 24 / 7.9 / 128}
"""Failures of a node in a day."""
LOST_SHARE = 0.78
STALL_S = 1.0
DETECT_S = 60.0
IMPORTS_S = 1200.0
"""1,000 ranks with 35,000 look-ups each on a disk that answers 30,000 a second."""
REPAIRS_S = {"5 min": 300.0, "4 h": 4 * 3600.0, "24 h": DAY_S}
DAYS, RUNS = 28, 200


def a_run(cluster: Cluster, model: Model, rate: float) -> Setting:
    """On that cluster, with what we measured or assume, saving at the best interval."""
    setting = Setting(
        nodes=cluster.nodes,
        failures_per_node_day=rate,
        interval_s=1.0,
        stall_s=STALL_S,
        write_s=cluster.write_s(model),
        detect_s=DETECT_S,
        restart_s=cluster.restart_s(model),
        lost_share=LOST_SHARE,
    )
    return replace(setting, interval_s=best_interval(setting))


def mean_spent(setting: Setting, days: float = DAYS, runs: int = RUNS, seed: int = 0) -> Spent:
    """The mean of so many runs; every run draws from a seed of its own."""
    all_spent = [simulate(setting, days * DAY_S, random.Random(f"{seed} {run}")) for run in range(runs)]
    return Spent(
        **{one.name: statistics.fmean(getattr(spent, one.name) for spent in all_spent) for one in fields(Spent)}
    )


def policies(setting: Setting) -> Iterator[tuple[str, Setting]]:
    """The run under each policy, and what each is called."""
    yield "fixed size, waits", setting
    for micro_steps in (2, 8, 32):
        yield f"elastic, {micro_steps} micro steps", replace(setting, policy="elastic", micro_steps=micro_steps)
    spares = max(1, math.ceil(setting.nodes * 0.02))
    yield f"{spares} spare node{'s' * (spares > 1)}", replace(setting, policy="spares", spares=spares)


def goodput_table(model: Model, rate: float, runs: int) -> Iterator[Sequence[str]]:
    """Goodput by size, policy and time until a lost node is back."""
    yield ("GPUs", "failures/day", "save every", "restart", "policy", *(f"back in {name}" for name in REPAIRS_S))
    for cluster in CLUSTERS:
        setting = a_run(cluster, model, rate)
        for name, one in policies(setting):
            if cluster.nodes == 1 and one.policy == "elastic":  # there is nothing to shrink to
                continue
            goodputs = [
                mean_spent(replace(one, repair_s=repair_s), runs=runs).goodput for repair_s in REPAIRS_S.values()
            ]
            yield (
                f"{cluster.gpus:,}",
                f"{rate * cluster.nodes:.2f}",
                f"{setting.interval_s / 60:.0f} min",
                f"{setting.restart_s / 60:.1f} min",
                name,
                *(f"{goodput:.1%}" for goodput in goodputs),
            )


def sensitivity_table(model: Model, rate: float, runs: int) -> Iterator[Sequence[str]]:
    """Goodput of the largest, elastic, lost nodes back after 4 h: as planned, and with one thing done otherwise."""
    yield ("otherwise", "goodput", "repeated", "restarting", "stalled", "smaller")
    cluster = CLUSTERS[-1]
    planned = replace(a_run(cluster, model, rate), policy="elastic", repair_s=REPAIRS_S["4 h"])
    waiting = replace(planned, stall_s=planned.write_s, write_s=0.0)
    every_node = replace(cluster, base_readers=cluster.nodes)
    for name, one in {
        "as planned": planned,
        "a save every hour": replace(planned, interval_s=3600.0),
        "ten saves in all": replace(planned, interval_s=DAYS * DAY_S / 10),
        "training waits for the disk": replace(waiting, interval_s=best_interval(waiting)),
        "a failure is noticed after 30 min": replace(planned, detect_s=1800.0),
        "every node reads the base": replace(planned, restart_s=every_node.restart_s(model)),
        f"{IMPORTS_S / 60:.0f} min of imports from one disk": replace(planned, restart_s=planned.restart_s + IMPORTS_S),
        "1 micro step": replace(planned, micro_steps=1),
        "32 micro steps": replace(planned, micro_steps=32),
    }.items():
        spent = mean_spent(one, runs=runs)
        shares = (spent.goodput, *map(spent.share, ("repeated", "restarting", "stalled", "smaller")))
        yield (name, *(f"{share:.1%}" for share in shares))


def bytes_table() -> Iterator[Sequence[str]]:
    """What a checkpoint weighs and what a restart waits for, by model and size."""
    yield ("model", "GPUs", "checkpoint", "a GPU's part", "written in", "start", "connect", "base", "checkpoint read")
    for model in MODELS:
        for cluster in CLUSTERS:
            total = BYTES_SAVED * model.parameters
            parts = cluster.restart_parts(model)
            yield (
                model.name,
                f"{cluster.gpus:,}",
                f"{total / 1e9:,.0f} GB",
                f"{total / cluster.gpus / 1e9:,.2f} GB",
                f"{cluster.write_s(model):,.0f} s",
                *(f"{seconds:,.0f} s" for seconds in parts.values()),
            )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(prog="python -m launcher.bench.scale", description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=RUNS, help=f"simulated runs of {DAYS} days for each figure")
    chosen = parser.parse_args(arguments)
    _print(bytes_table())
    for model in MODELS:
        for name, rate in RATES.items():
            print(f"\n{model.name}, {rate * 1000:.1f} failures in 1,000 node-days ({name}):\n")
            _print(goodput_table(model, rate, chosen.runs))
    print(f"\n{MODELS[-1].name}, 1,000 GPUs, elastic, back in 4 h (RSC-1):\n")
    _print(sensitivity_table(MODELS[-1], RATES["RSC-1"], chosen.runs))


def _print(rows: Iterator[Sequence[str]]) -> None:
    for number, row in enumerate(rows):
        print(f"| {' | '.join(row)} |")
        if not number:
            print("|---" * len(row) + "|")


if __name__ == "__main__":
    main()
