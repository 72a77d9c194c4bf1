"""No token and no secret in a command line, a rendered file or a run's folder; no word of the user's run by a shell."""

from __future__ import annotations

import json
import os
import shlex
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from launcher.cluster.auth_token import put, read, restore, write_private
from launcher.cluster.hostfile import Host, parse_host, read_hostfile
from launcher.cluster.jobs import Head, _Client
from launcher.cluster.kuberay import ray_job
from launcher.cluster.ray_yaml import cluster_file
from launcher.cluster.slurm import batch_script
from launcher.cluster.ssh import Ssh
from launcher.cluster.submit import entrypoint, prepare
from launcher.cluster.tunnel import Tunnel
from launcher.driver import secrets
from launcher.driver.start import environment
from launcher.errors import ClusterError, HostsError
from launcher.recipe.load import LoadedRecipe, load

EVIL = [
    *(
        "a b",
        "$(touch hit)",
        "`touch hit`",
        "a; touch hit",
        "a'b\"c",
        "|touch hit",
        "{a,b}",
        "~root",
        "*",
        "a\nb",
        "!!",
    ),
]
"""As values: each must arrive as it was typed."""
NO_HOSTS = [
    *("-oProxyCommand=touch hit", "-l@host", "root@-oProxyCommand=x", "-x", "host;touch hit", "$(touch hit)", "`hit`"),
    *("a|b", "a&b", "a>b", "host:22;x", "host:-1", "host:0", "[::1%$(x)]", "[-o]", "@host", "us er@host", "a\\b", "%h"),
]
SECRET = "s3cr3t-7f2b"
TOKEN = "f0" * 32


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A HOME and a working folder of the test's own, and secrets in the environment; nobody's words made `hit`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in secrets.OF_THE_USER:
        monkeypatch.setenv(name, f"{SECRET}-{name}")
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    put(TOKEN)
    yield tmp_path
    assert not list(tmp_path.rglob("hit"))


@pytest.fixture
def recipe(place: Path) -> LoadedRecipe:
    place = place / "recipes"
    place.mkdir()
    (place / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n')
    (place / "recipe.yaml").write_text(
        "model: {scratch: {model_type: llama, hidden_size: 8}}\ndata: {train: [{path: rows.jsonl}]}\n"
    )
    return load(str(place / "recipe.yaml"))


def is_clean(text: str) -> bool:
    return SECRET not in text and TOKEN not in text


@pytest.mark.parametrize("word", NO_HOSTS)
def test_what_ssh_or_a_shell_could_obey_is_no_host(word: str, place: Path) -> None:
    with pytest.raises(ClusterError):
        parse_host(word)
    (place / "hostfile").write_text(f"good slots=1\n{word} slots=1\n")
    with pytest.raises(HostsError, match="hostfile:2"):
        read_hostfile(place / "hostfile")


@pytest.mark.parametrize("word", ["slots=$(touch hit)", "slots=1;touch", "slots=-1", "-oProxyCommand=x", "slots=1e3"])
def test_what_stands_behind_a_host_is_a_number(word: str, place: Path) -> None:
    (place / "hostfile").write_text(f"good {word}\n")
    with pytest.raises(HostsError, match="hostfile:1"):
        read_hostfile(place / "hostfile")


def test_a_host_is_never_an_option_and_ssh_never_asks() -> None:
    argv = Ssh(Path("/x y/config")).argv(Host("worker-1", "admin", 2222), "-L", "1:a:2")
    assert argv[-2:] == ["--", "admin@worker-1"]
    assert argv[:5] == ["ssh", "-F", "/x y/config", "-p", "2222"]
    assert "BatchMode=yes" in argv
    assert not [word for word in argv if "StrictHostKeyChecking" in word or "UserKnownHosts" in word]


def test_words_arrive_on_a_host_as_they_were_typed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ssh joins its words with blanks and sshd gives the line to a shell; here a script does the same."""
    (place / "ssh").write_text('#!/bin/sh\nfor line; do :; done\nexec sh -c "$line"\n')
    (place / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    echo = [sys.executable, "-c", "import sys, json; print(json.dumps([sys.argv[1:], sys.stdin.read()]))"]
    done = Ssh().run(Host("worker-1"), [*echo, *EVIL], stdin=SECRET.encode())
    assert json.loads(done.out) == [EVIL, SECRET]


def test_words_arrive_in_a_job_as_they_were_typed(place: Path, recipe: LoadedRecipe) -> None:
    (place / "say.py").write_text("import sys, json; print(json.dumps(sys.argv[1:]))")
    python = place / "py thon"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} say.py "$@"\n')
    python.chmod(0o755)
    overrides = tuple(f"optimizer.lr={word}" for word in EVIL)
    job = prepare(recipe, (), None, "/runs/$(touch hit) a", "na me;$(touch hit)")
    assert job.name.startswith("na-me-touch-hit")
    line = entrypoint(type(job)(**{**vars(job), "overrides": overrides}), str(python), "/dev/shm/slipway-x")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True)
    words = json.loads(done.stdout)
    assert words[:5] == ["-m", "launcher", "run", "--address", "auto"]
    assert words[words.index("--run-dir") + 1] == "/runs/$(touch hit) a"
    assert words[words.index("--") + 1 :] == ["recipe.yaml", *overrides]
    assert is_clean(line)


def test_a_cluster_file_holds_no_secret_and_runs_nobodys_words(place: Path) -> None:
    python = "/opt/a b;$(touch hit)'`touch hit`/bin/python"
    hosts = [Host("10.0.0.1", "admin", slots=2), Host("10.0.0.2", "admin", slots=4)]
    text = cluster_file(hosts, python, {"~/recipes": "/here/$(touch hit)"}, ssh_private_key="/k;touch hit")
    assert is_clean(text)
    values = yaml.safe_load(text)
    assert values["provider"] == {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2"]}
    programs = place / "programs"
    programs.mkdir()
    for program in ("ray", "setsid"):
        (programs / program).write_text('#!/bin/sh\necho "$(basename "$0")" "$@" "$RAY_AUTH_MODE" >> "$HOME/asked"\n')
        (programs / program).chmod(0o755)
    home = place / "home"
    env = {"HOME": str(home), "PATH": f"{programs}:/usr/bin:/bin", "SSH_CONNECTION": "127.0.0.9 1 10.0.0.2 22"}
    lines = [line for key in values if key.endswith("_commands") for line in values[key]]
    for line in lines:
        subprocess.run(["bash", "-c", f"{line}\nwait"], env=env, check=True, cwd=place)
    asked = (home / "asked").read_text().splitlines()
    assert asked[0].startswith("ray stop")
    assert any("--num-gpus=2" in line and "--dashboard-host=127.0.0.1" in line for line in asked)
    assert any(line.startswith("setsid ray start") and "--num-gpus=4 token" in line for line in asked)
    # What it adds to the start-up file is a line that any shell reads as one folder on PATH.
    done = subprocess.run(["bash", "-c", ". ~/.bashrc; echo $PATH"], env=env, capture_output=True, text=True, cwd=place)
    assert done.stdout.startswith("/opt/a b;$(touch hit)'`touch hit`/bin:")


@pytest.mark.parametrize("mount", ["~/a b", "~/$(touch hit)", "~/a;b", "/x`y`", "~/a'b", "~/a\nb"])
def test_a_place_that_ray_would_put_into_a_shell_unquoted_is_refused(mount: str) -> None:
    with pytest.raises(ClusterError, match="shell"):
        cluster_file([Host("127.0.0.1")], "/opt/bin/python", {mount: "/here"})


@pytest.mark.parametrize("word", EVIL)
def test_a_batch_script_holds_no_secret_and_runs_nobodys_words(word: str, recipe: LoadedRecipe) -> None:
    script = batch_script(recipe, word, f"/runs/{word}", f"name {word}", f"/opt/{word}/python", 2, 8)
    assert is_clean(script)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    directives = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert len(directives) == len([line for line in directives if len(line.split()) == 2])
    settings = script[script.index("\npython=") : script.index("\nexport PATH")]
    show = f'{settings}\nprintf "%s\\0" "$python" "$recipe" "$run_dir"'
    done = subprocess.run(["bash", "-c", show], capture_output=True, text=True, check=True)
    assert done.stdout.split("\0")[:3] == [f"/opt/{word}/python", word, f"/runs/{word}"]


def test_a_batch_jobs_token_is_never_written_into_somebody_elses_file(place: Path, recipe: LoadedRecipe) -> None:
    script = batch_script(recipe, "recipe.yaml", "/runs/a", "a", "/opt/python", 2, 8)
    node = script[script.index("\nnode='") : script.index("\nstep=")]
    (place / "ray").write_text("#!/bin/sh\nstat -c %a token; cat token\n")
    (place / "ray").chmod(0o755)
    env = {"PATH": f"{place}:/usr/bin:/bin", "RAY_AUTH_TOKEN_PATH": str(place / "token"), "SLURMD_NODENAME": "node"}
    (place / "theirs").write_text("")
    (place / "token").symlink_to(place / "theirs")
    line = f'{node}\nbash -c "$node" ray --head <<< {SECRET}'
    done = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, check=True, cwd=place)
    assert done.stdout == f"600\n{SECRET}\n"
    assert (place / "theirs").read_text() == ""
    assert not (place / "token").exists()
    # What cannot be removed, such as another user's file in a sticky folder, ends it.
    (place / "token").mkdir()
    done = subprocess.run(["bash", "-c", line], env=env, capture_output=True, text=True, cwd=place)
    assert (done.returncode, done.stdout) == (1, "")


def test_what_is_known_of_a_head_does_not_show_its_token() -> None:
    assert is_clean(repr(Head(Ssh(), Host("head"), TOKEN, "python", 8265, True)))


def test_nothing_is_asked_through_a_tunnel_that_is_closed() -> None:
    """Whoever listens at its port by then would be told the token."""
    client = _Client.__new__(_Client)
    client._tunnel = Tunnel(Ssh(), Host("head"))
    with pytest.raises(ConnectionError):
        client._do_request("GET", "/api/version")


@pytest.mark.parametrize("word", EVIL)
def test_a_ray_job_holds_no_secret_and_runs_nobodys_words(word: str, recipe: LoadedRecipe) -> None:
    text = ray_job(recipe, word, "run", "image", 2, 8, "claim")
    assert is_clean(text)
    values = yaml.safe_load(text)
    assert shlex.split(values["spec"]["entrypoint"])[-2:] == ["--", word]
    env = values["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]
    assert {one["name"] for one in env if "value" in one} == {"RAY_USAGE_STATS_ENABLED"}
    assert values["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_what_is_kept_of_the_environment_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["slipway", "run", "recipe.yaml"])
    assert is_clean(json.dumps(environment(Path.cwd())))


def test_the_token_is_the_users_alone_from_its_first_byte_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, before = place / "home" / ".ray" / "auth_token", os.umask(0)
    modes = []
    real = os.open

    def watched(path: os.PathLike[str] | str, flags: int, mode: int = 0o777, **more: int) -> int:
        if flags & os.O_CREAT:
            modes.append((oct(mode), bool(flags & os.O_EXCL)))
        return real(path, flags, mode, **more)

    monkeypatch.setattr(os, "open", watched)
    try:
        restore()
        file.parent.mkdir(exist_ok=True)
        file.parent.chmod(0o777)
        elsewhere = place / "elsewhere"
        elsewhere.write_text("mine")
        file.symlink_to(elsewhere)  # by whoever could write there
        modes.clear()
        put("ab" * 32)
        write_private(place / "other", SECRET)
    finally:
        os.umask(before)
    assert modes
    assert set(modes) == {("0o600", True)}
    assert read() == "ab" * 32
    assert not file.is_symlink()
    assert elsewhere.read_text() == "mine"
    for path, mode in ((file, 0o600), (file.parent, 0o700), (place / "other", 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    for path in (place / "home" / ".slipway").rglob("*"):
        assert path.is_dir() or stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_token_that_all_could_read_is_made_private(place: Path) -> None:
    file = place / "home" / ".ray" / "auth_token"
    file.chmod(0o644)
    put(TOKEN)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_secrets_are_collected_by_name_and_taken_in_by_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_PASSWORD", SECRET)
    assert set(secrets.collect(secrets.OF_THE_USER)) == set(secrets.OF_THE_USER)
    left = place / "left"
    left.write_text(json.dumps({"HF_TOKEN": "hf_new", "LD_PRELOAD": "/x.so", "PATH": "/x"}))
    monkeypatch.setenv(secrets.FILE, str(left))
    monkeypatch.setenv("HF_TOKEN", "old")
    path = os.environ["PATH"]
    secrets.receive()
    assert os.environ["HF_TOKEN"] == "hf_new"
    assert (os.environ["PATH"], os.environ.get("LD_PRELOAD")) == (path, None)
    assert secrets.FILE not in os.environ
    assert not left.exists()


def test_secrets_that_cannot_be_read_are_not_shown(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "left").write_text(f'{{"HF_TOKEN": "{SECRET}"')
    monkeypatch.setenv(secrets.FILE, str(place / "left"))
    secrets.receive()
    said = capsys.readouterr()
    assert "cannot be read" in said.err
    assert is_clean(said.out + said.err)
    assert not (place / "left").exists()
