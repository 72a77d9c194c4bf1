"""`slipway resume`: go on from a run's newest sound checkpoint."""

from __future__ import annotations

from launcher.cli.arguments import Address, Overrides, RunFolder


def command(run: RunFolder, overrides: Overrides = None, address: Address = None) -> None:
    """Go on with a run, longer or on another cluster if asked; its model, data, seed and batch stay."""
    from launcher.cli.launch import go_on
    from launcher.driver.resume import existing_plan, refuse_trajectory_keys, resumed_plan
    from launcher.driver.signals import ends_on_signals
    from launcher.train import startup

    startup.begin()
    startup.ended("command")
    with ends_on_signals("stopped before training went on", hint=f"slipway resume {run}"):
        plan = existing_plan(run)
        refuse_trajectory_keys(overrides or [], plan.location)
        go_on(plan, address, lambda ready, cluster: resumed_plan(ready.location, overrides or [], cluster))
