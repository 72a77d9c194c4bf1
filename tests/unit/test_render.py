"""Files that `slipway cluster render` writes: what Ray, Kubernetes and bash make of them."""

from __future__ import annotations

import json
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml

from launcher.cli.app import main
from launcher.cluster.auth_token import read
from launcher.cluster.hostfile import Host
from launcher.cluster.ray_yaml import cluster_file
from launcher.errors import ClusterError

RECIPE = "model: {path: gpt2}\ndata: {train: [{path: rows/*.jsonl}]}\n"
GUIDE = Path(__file__).parents[2] / "docs" / "guide"
HOSTILE = "$(touch x); 'a\" `b` #\n&"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of its own, with a project in it: a recipe, its rows, a hostfile."""
    work = tmp_path / "work"
    (work / "recipes" / "rows").mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_COLOR", "1")
    (work / "recipes" / "mine.yaml").write_text(RECIPE)
    (work / "recipes" / "rows" / "a.jsonl").write_text("{}\n")
    (work / "hostfile").write_text("ann@10.0.0.1 slots=8\nann@10.0.0.2 slots=8\nann@10.0.0.3 slots=4\n")
    return work


def rendered(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["cluster", "render", *arguments]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["cluster", "render", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "hint: " in err
    return err


def validate(config: dict[str, Any]) -> None:
    """As `ray up` does. Raises jsonschema.ValidationError."""
    schema = Path(ray.autoscaler.__file__).with_name("ray-schema.json")
    jsonschema.validate(config, json.loads(schema.read_text()))


def test_a_cluster_file_is_what_ray_takes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = yaml.safe_load(rendered(capsys, "--recipe", "recipes/mine.yaml"))
    validate(config)
    assert config["provider"] == {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
    assert config["max_workers"] == 2
    assert config["auth"] == {"ssh_user": "ann"}
    assert config["file_mounts"] == {
        "~/.ray/auth_token": "~/.ray/auth_token",
        "~/recipes/mine.yaml": str(tmp_path / "work" / "recipes" / "mine.yaml"),
        "~/recipes/rows/a.jsonl": str(tmp_path / "work" / "recipes" / "rows" / "a.jsonl"),
    }
    head = config["head_start_ray_commands"][-1]
    for words in ("RAY_AUTH_MODE=token", "--dashboard-host=127.0.0.1", "--num-gpus=8", "--node-ip-address=10.0.0.1"):
        assert words in head
    assert head.index("RAY_enable_autoscaler_v2=0") < head.index("ray start")


def test_a_worker_is_started_with_its_own_address_and_gpus(
    capsys: pytest.CaptureFixture[str], here: Path, tmp_path: Path
) -> None:
    """Its command, run with a `ray` that tells how it was called."""
    config = yaml.safe_load(rendered(capsys, "--python", str(tmp_path / "a b" / "python")))
    fake = tmp_path / "a b" / "ray"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\necho "$@ $RAY_AUTH_MODE ${{OMP_NUM_THREADS-unset}}" > {shlex.quote(str(here))}/called\n'
    )
    fake.chmod(0o755)
    start = config["worker_start_ray_commands"][-1] + " wait"
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    for own, gpus in [("10.0.0.2", "--num-gpus=8 "), ("10.0.0.3", "--num-gpus=4 "), ("10.0.0.9", "")]:
        reached = environment | {"SSH_CONNECTION": f"10.0.0.1 40000 {own} 22"}
        subprocess.run(["bash", "-c", start], env=reached, check=True)
        called = (here / "called").read_text()
        assert called == f"start --block --address=10.0.0.1:6379 --node-ip-address={own} {gpus}token unset\n"


def test_the_token_is_made_once_and_private_and_in_no_file_but_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = rendered(capsys)
    file = tmp_path / ".ray" / "auth_token"
    token = read()
    assert token is not None
    assert len(token) == 64
    assert token not in text
    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(file.parent.stat().st_mode)) == (0o600, 0o700)
    file.chmod(0o644)
    assert main(["cluster", "render"]) == 0
    assert "made the token" not in capsys.readouterr().err
    assert read() == token
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_login_shells_get_a_line_only_where_they_find_another_python(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = yaml.safe_load(rendered(capsys, "--python", "~/it's/bin/python"))
    program = tmp_path / "it's" / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.symlink_to(sys.executable)
    (setup,) = config["head_setup_commands"]
    bashrc = tmp_path / ".bashrc"
    for _ in range(2):
        shell = ["bash", "-c", f"source ~/.bashrc; ({setup})"]
        subprocess.run(shell, env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}, capture_output=True, check=True)
        assert bashrc.read_text().count("\n") == 1
    assert bashrc.read_text().startswith('export PATH="$HOME"/')


@pytest.mark.parametrize("python", [f"/opt/{HOSTILE}/bin/python", f"~/{HOSTILE}/python"])
def test_no_value_reaches_a_shell_unquoted(here: Path, python: str, tmp_path: Path) -> None:
    """Every command of the file, run by bash in an empty folder with a `ray` and a `setsid` that do nothing."""
    text = cluster_file([Host("10.0.0.1"), Host("10.0.0.2")], python, {}, "ann", HOSTILE, file="a.yaml", job="b.py")
    config = yaml.safe_load(text)
    assert config["auth"]["ssh_private_key"] == HOSTILE
    empty = here / "empty"
    empty.mkdir()
    quiet = "ray() { :; }; setsid() { :; };"
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").touch()
    for name in ("setup", "head_setup", "head_start_ray", "worker_start_ray"):
        for command in config[f"{name}_commands"]:
            subprocess.run(["bash", "-c", f"{quiet} {command}"], cwd=empty, check=True, env={"HOME": str(tmp_path)})
    assert list(empty.iterdir()) == []


@pytest.mark.parametrize(
    ("hosts", "words"),
    [
        ([Host("10.0.0.1", port=2222, where="hostfile:1")], "hostfile:1: port 2222"),
        ([Host("no-such-host.invalid")], "no-such-host.invalid has no IPv4 address"),
        ([Host("fd00::7")], "fd00::7 has no IPv4 address"),
        ([Host("10.0.0.1", "ann"), Host("10.0.0.2", "bob")], "hosts of several users: ann, bob"),
        ([Host("localhost", where="hostfile:1"), Host("10.0.0.2")], "hostfile:1: localhost is 127.0.0.1 here"),
    ],
)
def test_hosts_that_ray_cannot_reach_are_refused(hosts: list[Host], words: str) -> None:
    with pytest.raises(ClusterError, match=words) as raised:
        cluster_file(hosts, "/usr/bin/python", {}, "ann")
    assert raised.value.hint


def test_a_name_that_ray_would_break_is_not_copied(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (here / "my rows").touch()
    assert "'~/my rows' cannot be copied" in refused(capsys, "--mount", "my rows")
    assert "--mount nowhere: not found" in refused(capsys, "--mount", "nowhere")


def test_what_is_not_below_the_folder_is_copied_only_when_asked_for(
    capsys: pytest.CaptureFixture[str], here: Path, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.touch()
    (here / "away.yaml").write_text("model: {path: gpt2}\ndata: {train: [{path: ../rows.jsonl}]}\n")
    assert main(["cluster", "render", "--recipe", "away.yaml"]) == 0
    out, err = capsys.readouterr()
    assert "not copied, since not below this folder: ../rows.jsonl" in err
    assert sorted(yaml.safe_load(out)["file_mounts"]) == ["~/.ray/auth_token", "~/away.yaml"]
    config = yaml.safe_load(rendered(capsys, "--mount", "../rows.jsonl", "--mount", "recipes/"))
    assert config["file_mounts"][str(data)] == str(data)
    assert config["file_mounts"]["~/recipes"] == str(here / "recipes")


@pytest.mark.parametrize("name", ["ray-aws.yaml", "ray-gcp.yaml"])
def test_the_examples_for_clouds_are_what_ray_takes(name: str) -> None:
    config = yaml.safe_load((GUIDE / name).read_text())
    validate(config)
    assert config["head_node_type"] in config["available_node_types"]
    assert sum(kind.get("min_workers", 0) for kind in config["available_node_types"].values()) <= config["max_workers"]
    starts = config["head_start_ray_commands"][1:] + config["worker_start_ray_commands"][1:]
    assert len(starts) == 2
    for start in starts:
        assert "RAY_AUTH_MODE=token" in start
        assert "unset OMP_NUM_THREADS" in start
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]


def test_a_ray_job_has_its_numbers_and_no_secret_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ["--workers", "3", "--gpus-per-worker", "4", "--image", "registry/slipway:1", "--claim", "disk"]
    job = yaml.safe_load(rendered(capsys, "--for", "kuberay", "--recipe", "recipes/mine.yaml", *numbers))
    assert (job["apiVersion"], job["kind"], job["metadata"]["name"]) == ("ray.io/v1", "RayJob", "mine")
    spec = job["spec"]
    run = ["python", "-m", "launcher.job", "--resume", "auto", "--run-dir", "/runs/mine", "--", "recipes/mine.yaml"]
    assert shlex.split(spec["entrypoint"]) == run
    assert spec["shutdownAfterJobFinishes"] is True
    cluster = spec["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["rayVersion"] == ray.__version__
    (group,) = cluster["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 3
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0", "no worker of a run is placed on the head"
    for template in (cluster["headGroupSpec"]["template"], group["template"]):
        pod = template["spec"]
        assert pod["terminationGracePeriodSeconds"] == 45, "checkpoint.grace of 25 s, and the rest"
        assert pod["volumes"] == [{"name": "runs", "persistentVolumeClaim": {"claimName": "disk"}}]
        (container,) = pod["containers"]
        assert container["image"] == "registry/slipway:1"
        secret = next(entry for entry in container["env"] if entry["name"] == "HF_TOKEN")
        assert secret["valueFrom"]["secretKeyRef"] == {"name": "slipway", "key": "HF_TOKEN", "optional": True}
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"


def test_a_batch_script_is_bash_and_quotes_what_it_is_given(
    capsys: pytest.CaptureFixture[str], here: Path, tmp_path: Path
) -> None:
    folder = here / HOSTILE.replace("\n", "")
    folder.mkdir()
    (folder / "mine.yaml").write_text(f"checkpoint: {{grace: 90s}}\n{RECIPE}")
    script = here / "job.sh"
    arguments = ["--recipe", str(folder / "mine.yaml"), "--workers", "3", "--gpus-per-worker", "4"]
    rendered(capsys, "--for", "slurm", *arguments, "--out", str(script))
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""
    text = script.read_text()
    for line in ("--nodes=3", "--gpus-per-node=4", "--signal=B:TERM@125", "--requeue"):
        assert f"#SBATCH {line}\n" in text
    values = text[text.index("python=") : text.index("export PATH")]
    shown = f'{values}\nprintf \'%s\\n\' "$python" "$recipe" "$run_dir"'
    said = subprocess.run(["bash", "-c", shown], capture_output=True, text=True, check=True).stdout.splitlines()
    assert said == [sys.executable, str(folder / "mine.yaml"), str(here / "runs" / "mine")]


@pytest.mark.parametrize("target", ["kuberay", "slurm"])
def test_one_run_needs_one_recipe(capsys: pytest.CaptureFixture[str], target: str) -> None:
    assert f"--for {target} writes one run" in refused(capsys, "--for", target)
