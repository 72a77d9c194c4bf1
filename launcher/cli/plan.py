"""`slipway plan`: the Plan of a recipe on this machine, or on the cluster that is named, with the reason of each
value."""

from __future__ import annotations

from launcher.cli import render
from launcher.cli.arguments import Address, Json, Overrides, RecipeName
from launcher.plan.plan import LayoutPlan


def command(recipe: RecipeName, overrides: Overrides = None, address: Address = None, as_json: Json = False) -> None:
    """Show what would run, every value decided and why; prepares the data and trains nothing."""
    from launcher.cli.progress import preparing
    from launcher.driver.connect import cluster_address, connected
    from launcher.driver.start import decide, new_run_folder, planned
    from launcher.plan.facts import this_machine
    from launcher.recipe.load import load

    loaded = load(recipe, overrides or ())
    with preparing(render.err()) as report:
        decided = decide(loaded, new_run_folder(loaded, None), report)
    if cluster_address(address) is None:
        plan = planned(decided, this_machine())
    else:
        with connected(address) as cluster:
            plan = planned(decided, cluster)
    if as_json:
        render.print_json(plan.model_dump(mode="json"))
        return
    layout, life, data = plan.layout, plan.lifecycle, plan.data
    render.print_columns(
        [
            ("model", plan.trajectory.model.path, f"about {decided.parameters / 1e6:.1f}M parameters"),
            ("method", plan.trajectory.method.kind, plan.trajectory.dtype),
            ("data", f"{data.train_documents} documents", f"{data.train_tokens} tokens in {data.train_rows} rows"),
            ("supervised", f"{data.train_supervised_tokens} tokens", f"{data.eval_documents} documents held out"),
            ("steps", str(life.total_steps), f"{plan.trajectory.global_batch_size} rows each"),
            ("workers", _sizes(layout), f"{layout.device}, {layout.cpus_per_worker} CPUs each"),
            ("ZeRO", str(layout.zero), "offloaded to host memory" if layout.offload else "nothing offloaded"),
            ("micro batch", str(layout.micro_batch_size), "rows of a forward and backward on one worker"),
            ("trajectory", plan.trajectory.hash(), "must match on resume"),
            ("layout", layout.hash(), "may change on resume"),
        ]
    )
    decided_here = {key: reason for key, reason in plan.origins.items() if reason.startswith("planner: ")}
    print()
    render.print_columns([(key, reason.removeprefix("planner: ")) for key, reason in sorted(decided_here.items())])


def _sizes(layout: LayoutPlan) -> str:
    return str(layout.workers) if layout.min_workers == layout.workers else f"{layout.min_workers} to {layout.workers}"
