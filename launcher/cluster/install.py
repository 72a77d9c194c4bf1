"""Slipway in an environment of its own on every host, `~/.slipway/venv`, from one wheel that is sent over ssh."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import launcher
from launcher.cluster.host_check import LIKE_HEAD
from launcher.cluster.hostfile import Host
from launcher.cluster.ssh import Ssh, problems_of
from launcher.errors import ClusterError, HostsError

INSTALL_TIMEOUT_S = 1800
"""torch alone is 2 GB or more with what it needs for GPUs."""
SOURCES = ("launcher", "kernels/launcher_kernels", "recipes")
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
_INSTALL = """
set -e
wheel=$1 hash=$2 python=$3
shift 3
mkdir -p .slipway
exec 9>.slipway/install.lock  # hosts may share HOME: one installs, the others find it done
flock 9 2>/dev/null || true
if [ "$(cat .slipway/venv/wheel 2>/dev/null)" = "$hash" ]; then cat >/dev/null; echo same; exit; fi
command -v "$python" >/dev/null || { echo "no $python, which the environment is to be made with" >&2; exit 3; }
folder=$(mktemp -d .slipway/wheel.XXXXXXXX)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/$wheel"
printf '%s\\n' "$@" >"$folder/constraints.txt"
.slipway/venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .slipway/venv
pip="env PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1 .slipway/venv/bin/python -m pip install --quiet"
$pip --constraint "$folder/constraints.txt" "$folder/$wheel" >&2
# Once more for a wheel of other code and the same version, which pip takes for the one that is there.
$pip --force-reinstall --no-deps "$folder/$wheel" >&2
echo "$hash" >.slipway/venv/wheel
echo installed
"""


def install(
    ssh: Ssh,
    hosts: Sequence[Host],
    wheel: Path | None,
    python: str | None,
    allow_missing: bool,
    say: Callable[[str], None],
) -> None:
    """Put the wheel on every host that does not have it; `python` is what environments are made with.

    With `allow_missing` hosts that fail are left for the check to name.

    Raises:
        ClusterError: there is no wheel and none can be built.
        HostsError: hosts where it failed, each with the last words of what failed.
    """
    with tempfile.TemporaryDirectory(prefix="slipway-wheel-") as scratch:
        if wheel is None:
            say("building a wheel of this checkout")
            wheel = build_wheel(Path(scratch))
        elif not (wheel.suffix == ".whl" and wheel.is_file()):
            raise ClusterError(f"{wheel}: no wheel", hint="`pip wheel --no-deps .` in a checkout makes one")
        content = wheel.read_bytes()
    python = python or f"python{sys.version_info[0]}.{sys.version_info[1]}"
    arguments = [wheel.name, hashlib.sha256(content).hexdigest(), python, *constraints()]

    def one(host: Host) -> None:
        done = ssh.run(host, ["sh", "-c", _INSTALL, "sh", *arguments], content, INSTALL_TIMEOUT_S)
        if done.code != 0:
            said = (done.err.strip() or done.out.strip() or f"it ended with {done.code}").splitlines()[-1]
            raise ClusterError(
                f"{host.name}: Slipway could not be installed: {said}",
                hint="--python names a Python of this one's version, with venv, to make environments with",
            )

    say(f"installing Slipway on {len(hosts)} host{'s' * (len(hosts) != 1)}")
    problems = problems_of(ssh.everywhere(hosts, one))
    if problems and not allow_missing:
        raise HostsError(problems)


def constraints() -> list[str]:
    """The versions that hosts must share with each other and with this one."""
    found = []
    for name in ("ray", *LIKE_HEAD):
        try:
            found.append(f"{name}=={version(name).partition('+')[0]}")
        except PackageNotFoundError:
            continue
    return found


def build_wheel(out: Path) -> Path:
    """A wheel of the checkout that this code runs from, built in a copy of it, in `out`. Raises ClusterError."""
    root = Path(launcher.__file__).parents[1]
    if not all((root / name).exists() for name in (*SOURCES, *FILES)):
        raise ClusterError(
            "--install has nothing to install: this Slipway runs from no source checkout",
            hint="--wheel FILE names a wheel of it",
        )
    copy = out / "source"
    for folder in SOURCES:
        shutil.copytree(root / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(root / file, copy / file)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(copy)]
    # The same code makes the same wheel, byte for byte, so that hosts which have it are left alone.
    env = os.environ | {"SOURCE_DATE_EPOCH": "315532800"}
    done = subprocess.run([*command, *_with_own_setuptools()], capture_output=True, text=True, env=env)
    if done.returncode != 0:
        said = (done.stderr.strip() or f"pip ended with {done.returncode}").splitlines()[-1]
        raise ClusterError(f"no wheel could be built: {said}", hint="--wheel FILE names one that was built elsewhere")
    return next(out.glob("*.whl"))


def _with_own_setuptools() -> list[str]:
    """Build with this environment's setuptools where it is new enough, so that no network is needed."""
    try:
        return ["--no-build-isolation"] if int(version("setuptools").partition(".")[0]) >= 77 else []
    except (PackageNotFoundError, ValueError):
        return []
