"""`slipway cluster`: Ray on the user's own machines, from a hostfile."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from launcher.cli import render
from launcher.cli.arguments import Hostfile, SshConfig
from launcher.cli.cluster_render import render as render_
from launcher.cluster.keeper import DASHBOARD_PORT, PORT


def up(
    hostfile: Hostfile = Path("hostfile"),
    ssh_config: SshConfig = None,
    python: Annotated[
        str | None, typer.Option("--python", help="Python on the hosts; otherwise --install's, or this one's own path")
    ] = None,
    install: Annotated[
        bool, typer.Option("--install", help="Install Slipway in ~/.slipway/venv on hosts that do not have it there")
    ] = False,
    wheel: Annotated[
        Path | None, typer.Option("--wheel", help="The wheel to install; otherwise one is built of this checkout")
    ] = None,
    allow_missing: Annotated[
        bool, typer.Option("--allow-missing", help="Go on without hosts that cannot be used; never without the first")
    ] = False,
    shared: Annotated[
        str | None, typer.Option("--shared", help="A folder that all hosts must see, such as /mnt/runs; it is checked")
    ] = None,
    port: Annotated[int, typer.Option("--port", min=1024, max=65535, help="Ray's port on the head")] = PORT,
    dashboard_host: Annotated[
        str, typer.Option("--dashboard-host", help="Address of the head that Ray's dashboard listens on")
    ] = "127.0.0.1",
    dashboard_port: Annotated[
        int, typer.Option("--dashboard-port", min=1024, max=65535, help="Port of Ray's dashboard")
    ] = DASHBOARD_PORT,
    wait_s: Annotated[
        int, typer.Option("--wait", min=1, metavar="SECONDS", help="How long hosts may take to join")
    ] = 120,
) -> None:
    """Check every host, start Ray on all, wait until all have joined. Again: brings back hosts that were lost."""
    from launcher.cluster.host_check import Wanted
    from launcher.cluster.hostfile import read_hostfile
    from launcher.cluster.ssh import Ssh
    from launcher.cluster.up import up
    from launcher.driver.signals import ends_on_signals
    from launcher.units import format_bytes

    hosts = read_hostfile(hostfile)
    hint = f"the same command goes on; slipway cluster down --hostfile {shlex.quote(str(hostfile))} undoes it"
    stopped = ends_on_signals("stopped before all hosts were up", hint)
    with stopped, Ssh(ssh_config) as ssh, render.err().status("") as status:
        if install or wheel:
            from launcher.cluster.install import install as install_

            install_(ssh, hosts, wheel, python, allow_missing, status.update)
            python = None
        wanted = Wanted(python, port, dashboard_port, shared)
        cluster = up(ssh, hosts, wanted, dashboard_host, wait_s, allow_missing, status.update)
    for problem in cluster.missing:
        render.note(f"without {problem}")
    rows = [
        (node["name"], node["address"], str(node["cpus"]), str(node["gpus"]), format_bytes(node["memory"]))
        for node in cluster.nodes
    ]
    render.print_table(("host", "address", "CPUs", "GPUs", "memory"), rows, "llrrr")
    head = cluster.head
    ssh_line = ["ssh", *(["-F", str(ssh_config)] if ssh_config else []), *(["-p", str(head.port)] if head.port else [])]
    same = ["--ssh-config", str(ssh_config)] if ssh_config else []
    print()
    print(f"on the head:  {shlex.join([*ssh_line, head.destination])}, then slipway run RECIPE --address auto")
    print(f"from here:    slipway submit RECIPE {shlex.join(['--address', head.url, *same])}")
    print(f"the end:      slipway cluster down {shlex.join(['--hostfile', str(hostfile), *same])}")


def down(hostfile: Hostfile = Path("hostfile"), ssh_config: SshConfig = None) -> None:
    """Stop Ray on every host and leave nothing of it behind."""
    from launcher.cluster.hostfile import read_hostfile
    from launcher.cluster.ssh import Ssh
    from launcher.cluster.up import down
    from launcher.driver.signals import ends_on_signals

    hosts = read_hostfile(hostfile)
    ended = ends_on_signals("stopped before all hosts were down", "the same command goes on")
    with ended, Ssh(ssh_config) as ssh, render.err().status(f"stopping Ray on {len(hosts)} hosts"):
        stopped = down(ssh, hosts)
    print(f"down: Ray ran on {stopped} of {len(hosts)} host{'s' * (len(hosts) != 1)}")


commands = {"up": up, "down": down, "render": render_}
