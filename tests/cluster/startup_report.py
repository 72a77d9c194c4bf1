"""`python -m tests.cluster.startup_report [HOSTS]`: `launcher.bench.startup` on hosts of their own, a worker each."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from tests.cluster.hosts import Hosts


def main(count: int) -> None:
    with Hosts(count) as hosts, tempfile.TemporaryDirectory(prefix="slipway-startup-") as shared:
        files = ["--hostfile", hosts.hostfile(), "--ssh-config", hosts.ssh_config]
        up = [sys.executable, "-m", "launcher", "cluster", "up", *map(str, files)]
        subprocess.run(up, check=True, stdout=sys.stderr, env=os.environ | {"NO_COLOR": "1"})
        bench = f"python -m launcher.bench.startup --address auto --workers {count} --folder {shared}"
        done = hosts[1].run(bench, timeout_s=1200)
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
