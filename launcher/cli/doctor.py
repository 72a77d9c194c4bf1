"""`slipway doctor`: what this machine or a cluster has and lacks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from launcher.cli import render
from launcher.cli.arguments import Json, SshConfig
from launcher.errors import UserError

if TYPE_CHECKING:
    from launcher.cluster.doctor import Finding

STYLES = {"ok": "green", "warning": "yellow", "wrong": "bold red"}


def command(
    cluster: Annotated[bool, typer.Option("--cluster", help="Look at a cluster instead of this machine")] = False,
    hostfile: Annotated[
        Path | None,
        typer.Option("--hostfile", help="With --cluster: check its hosts over ssh, too", show_default=False),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="With --cluster, on one of its nodes: the Ray cluster; RAY_ADDRESS or auto"),
    ] = None,
    bandwidth: Annotated[
        bool, typer.Option("--bandwidth", help="With --cluster: measure all-reduce between all pairs of nodes")
    ] = False,
    python: Annotated[
        str | None, typer.Option("--python", help="Python on the hosts; otherwise this machine's own path")
    ] = None,
    ssh_config: SshConfig = None,
    as_json: Json = False,
) -> None:
    """Check this machine, or with --cluster a cluster's hosts and nodes. Exit code 2 where something is wrong."""
    from launcher.cluster.doctor import examine

    state: Any = None
    if not cluster:
        if bandwidth or hostfile or address:
            raise UserError("--hostfile, --address and --bandwidth are about a cluster", hint="add --cluster")
        with render.err().status("looking at this machine"):
            found = examine(Path("runs"))
    else:
        with render.err().status("asking the cluster") as status:
            found, state = _cluster(hostfile, address, bandwidth, python, ssh_config, status.update)
    if as_json:
        render.print_json({"findings": [asdict(each) for each in found], "cluster": state})
    else:
        _show(found)
        if state is not None and state["bandwidth"]:
            _show_pairs(state["bandwidth"])
    wrong = [each.what for each in found if each.state == "wrong"]
    if wrong:
        where = "a run on this cluster" if cluster else "`slipway run` on this machine"
        raise UserError(
            f"{where} would fail: {', '.join(dict.fromkeys(wrong))}", hint="mend what is marked wrong above"
        )


def _cluster(
    hostfile: Path | None, address: str | None, bandwidth: bool, python: str | None, ssh_config: Path | None, say: Any
) -> tuple[list[Finding], Any]:
    """Findings, and the cluster's state if it was had."""
    from launcher.cluster import cluster_doctor
    from launcher.cluster.host_check import Wanted
    from launcher.cluster.hostfile import read_hostfile
    from launcher.cluster.ssh import Ssh
    from launcher.cluster.state import ask
    from launcher.driver.connect import cluster_address

    if hostfile is not None:
        hosts = read_hostfile(hostfile)
        say(f"checking {len(hosts)} hosts{', then all-reduce between each pair' if bandwidth else ''}")
        with Ssh(ssh_config) as ssh:
            wanted = Wanted(python)
            found, state = cluster_doctor.examine_hosts(ssh, hosts, wanted, bandwidth)
    else:
        state = ask(cluster_address(address) or "auto", bandwidth, say)
        found = cluster_doctor.examine_state(state)
    if state is not None and state["bandwidth"]:
        found += cluster_doctor.examine_bandwidth(state["bandwidth"])
    return found, state


def _show(found: list[Finding]) -> None:
    width = max(len(each.what) for each in found)
    for each in found:
        line = f"{each.what.ljust(width)}  {each.says}"
        render.out().print(f"[{STYLES[each.state]}]{each.state.ljust(7)}[/]", end="  ")
        render.out().print(render.printable(line), markup=False)
        if each.hint:
            render.out().print(" " * 9 + render.printable(f"hint: {each.hint}"), markup=False, style="cyan")


def _show_pairs(measured: Any) -> None:
    rows = [
        (*pair["hosts"], "none" if pair["gb_per_s"] is None else f"{pair['gb_per_s']:.3g}", "slow" * pair["slow"])
        for pair in measured["pairs"]
    ]
    print()
    render.print_table(("from", "to", "GB/s", ""), rows, "llrl")
