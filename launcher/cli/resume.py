"""`slipway resume`: go on from a run's newest sound checkpoint."""

from __future__ import annotations

from launcher.cli.arguments import Address, Overrides, RunFolder


def command(run: RunFolder, overrides: Overrides = None, address: Address = None) -> None:
    """Go on with a run, longer or on another cluster if asked; its model, data, seed and batch stay."""
    from launcher.cli.launch import launch
    from launcher.driver.resume import existing_plan, refuse_trajectory_keys, resumed_plan
    from launcher.plan.facts import ClusterFacts
    from launcher.plan.plan import Plan

    run_dir = run.expanduser().resolve()
    existing_plan(run_dir)
    refuse_trajectory_keys(overrides or [], run_dir)

    def make_plan(cluster: ClusterFacts) -> Plan:
        return resumed_plan(run_dir, overrides or [], cluster)

    launch(run_dir, address, make_plan)
