"""The Markdown page of what `gpu.py` found."""

from __future__ import annotations

from statistics import median
from typing import Any

OURS = "slipway"


def page(found: dict[str, Any]) -> str:
    machine, rates = found["machine"], found["rates"]
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in machine["packages"].items())
    driver = found["driver_before"].get("driver_version", "none")
    measured = (
        f"Measured on {found['date']}: {machine['device']}, driver {driver}, CUDA {machine.get('cuda')}, {versions}. It"
        f" took {found['took_s']:.0f} s. This machine copies {rates['copy'] / 1e12:.2f} TB/s (read plus written) and"
        f" multiplies {rates['matmul'] / 1e12:.0f} TFLOP/s in bf16, measured in the same run."
    )
    lines = [
        f"# Kernels on {machine['device']}",
        "",
        "A dry run on a CPU, which measures nothing." if found["dry"] else measured,
        "",
        f"    {found['command']}",
        "",
        "The floor of an op is the larger of the bytes and the FLOPs that it cannot do without, over what the machine"
        " copies and multiplies. bf16, random numbers, cold L2; medians (least to most). *inexact*: beyond E9, within"
        " 2% of float64.",
        "",
        "| op | part | contender | µs | ours is x times as fast | of the floor | target |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in found["results"]:
        lines += rows(result, rates, found["dry"])
    lines += [f"| {lost['op']}: {lost['name']} | | | lost: {lost['why']} | | | |" for lost in found["lost"]]
    return "\n".join(lines) + "\n"


def rows(result: dict[str, Any], rates: dict[str, float], dry: bool) -> list[str]:
    """Of one contest: a row for each part of each contender, then one for each that was not timed."""
    timed = {name: each["seconds"] for name, each in result["contenders"].items() if each.get("seconds")}
    lines = []
    for part, about in result["parts"].items():
        medians = {name: median(seconds[part]) for name, seconds in timed.items()}
        floor = max(about["work"]["bytes"] / rates["copy"], about["work"]["flops"] / rates["matmul"])
        for name, taken in medians.items():
            seconds = timed[name][part]
            state = result["contenders"][name]["state"]
            ratio = f"{taken / medians[OURS]:.2f}" if OURS in medians and name != OURS else ""
            if dry:
                numbers = ["not measured", "", "", ""]
            else:
                numbers = [
                    f"{taken * 1e6:,.1f} ({min(seconds) * 1e6:,.1f} to {max(seconds) * 1e6:,.1f})",
                    ratio,
                    f"{floor / taken:.0%}",
                    "; ".join(verdicts(about["targets"].get(name, {}), medians, name, floor)),
                ]
            cells = [
                f"{result['op']}: {result['name']}",
                part,
                name if state == "right" else f"{name} (*{state}*)",
                *numbers,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    for name, each in result["contenders"].items():
        if name not in timed:
            why = f": {each['why']}" if each.get("why") else ""
            lines.append(
                f"| {result['op']}: {result['name']} | | {name} | {each['state']}{why} | | | |".replace("\n", " ")
            )
    return lines


def verdicts(target: dict[str, Any], medians: dict[str, float], name: str, floor: float) -> list[str]:
    """Each target with whether it was met."""
    said = []
    if (fraction := target.get("floor")) is not None:
        said.append(f"{fraction:.0%} of the floor: {'met' if floor / medians[name] >= fraction else 'missed'}")
    for other, factor in target.get("over", {}).items():
        theirs = min(medians.values()) if other == "best" else medians.get(other)
        shown = f"{factor:.0%} of the best" if other == "best" else f"{factor:g} x {other}"
        met = "not measured" if theirs is None else "met" if theirs / medians[name] >= factor else "missed"
        said.append(f"{shown}: {met}")
    return said
