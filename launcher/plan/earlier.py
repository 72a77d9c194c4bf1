"""Plans of earlier versions: what their plan.json does not say, and the hashes that their checkpoints name."""

from __future__ import annotations

from typing import Any

PARTS: dict[str, dict[str, Any]] = {
    "layout": {"kernels": "eager"},
    "lifecycle": {
        "audit": "strict",
        "checkpoint_within_s": None,
        "wait_s": 600.0,
        "hang_timeout_s": 600.0,
        "metric": "loss",
        "early_stopping": None,
        "slices": (),
        "retain": None,
        "guard": {"spikes": "warn", "deviations": 6.0, "window": 32, "most": 10},
        "system_every_s": 10.0,
        "trackers": (),
        "project": "slipway",
        "export_best": False,
    },
    "data": {"classes": (), "retain_documents": 0},
}
"""What a plan.json of an earlier version does not say."""
GENERATE = {"temperature": 0.0, "top_p": 1.0, "metrics": ("exact_match",), "during": False}
TRAJECTORY: dict[str, dict[str, Any]] = {
    "": {"task": "causal_lm", "label_smoothing": 0.0, "neftune_alpha": None},
    "model": {"dropout": None},
    "method": {"dora": False, "rslora": False, "init": "default", "unfreeze": [], "frozen": []},
    "data": {"replay": None, "retain": [], "slices": [], "head": None},
    "optimizer": {"momentum": 0.9, "layer_decay": 1.0, "lora_plus_ratio": 1.0},
}
"""And of its trajectory: what was trained by an earlier version goes on under the hash that it has."""


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """A plan of any version, with all that this one says. What it was trained without, it goes on without."""
    parts = {name: PARTS[name] | part for name in PARTS if isinstance(part := values.get(name), dict)}
    if "workers" in parts.get("layout", {}):
        parts["layout"] = {"min_workers": parts["layout"]["workers"]} | parts["layout"]
    if isinstance(generate := parts.get("lifecycle", {}).get("generate"), dict):
        parts["lifecycle"]["generate"] = GENERATE | generate
    if isinstance(trajectory := values.get("trajectory"), dict):
        sections = {name: added | trajectory.get(name, {}) for name, added in TRAJECTORY.items() if name}
        parts["trajectory"] = TRAJECTORY[""] | trajectory | sections
    return values | parts


def without_what_came_since(trajectory: dict[str, Any]) -> dict[str, Any]:
    """A trajectory as the first version would have written it, where it uses nothing that came since."""
    for name, added in TRAJECTORY.items():
        section = trajectory[name] if name else trajectory
        for key in [key for key, value in added.items() if key in section and section[key] == value]:
            del section[key]
    return trajectory
