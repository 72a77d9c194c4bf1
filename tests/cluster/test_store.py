"""A run whose only lasting place is an object store: a real S3 server, and machines that share nothing but it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.checkpoint.layout import newest_committed
from launcher.store.location import local_folder
from launcher.store.objects import ObjectStore
from tests.cluster.command import Command, losses
from tests.unit.s3_server import environment, s3_server

pytestmark = [pytest.mark.cluster, pytest.mark.long]
URL = "s3://bucket/runs/first"


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Places for spools; the environment means the first of them. The server ends with the test."""
    with s3_server() as address:
        for name, value in environment(address).items():
            monkeypatch.setenv(name, value)
        places = [tmp_path / name for name in ("first", "second", "third")]
        monkeypatch.setenv("SLIPWAY_SPOOL", str(places[0]))
        yield places


def test_killed_with_its_machine_and_gone_on_with_on_another(
    uninterrupted: tuple[Path, str, str], folder: Path, machines: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Command(folder, "run", "tiny.yaml", "--run-dir", URL) as command:
        command.wait_for(f"store: {URL}")
        command.wait_for("step 8:")
        command.kill_tree()
    store = ObjectStore(URL)
    saved = newest_committed(store)
    assert saved is not None
    assert saved.step == 5
    spool = local_folder(URL)
    assert (spool / "data").is_symlink()
    assert {"plan.json", "recipe.yaml", "base.json", "metrics.jsonl"} <= set(store.names())
    assert "facts.json" in store.names("data")
    with Command(folder, "run", "tiny.yaml", "--run-dir", URL) as command:
        code, _, err = command.end()
    assert code == 2
    assert f"error: {URL} already holds a run\nhint: go on with it: slipway resume {URL}" in err
    shutil.rmtree(machines[0])

    monkeypatch.setenv("SLIPWAY_SPOOL", str(machines[1]))
    with Command(folder, "run", "tiny.yaml", "--run-dir", URL, "--resume", "auto") as command:
        code, out, err = command.end()
    assert code == 0, err
    assert f"going on with {URL}" in err
    assert "going on from the checkpoint of step 5" in err
    assert f"model: {URL}/model\ntalk to it: slipway chat {URL}\n" in out
    found = losses(local_folder(URL))
    assert {step: found[step] for step in range(6, 25)} == {
        step: loss for step, loss in losses(uninterrupted[0]).items() if step > 5
    }
    assert found == losses(uninterrupted[0]), "the first machine's lines went up with the checkpoint"
    assert not (local_folder(URL) / "data").is_symlink()

    monkeypatch.setenv("SLIPWAY_SPOOL", str(machines[2]))
    for arguments, words in (
        (["run", "tiny.yaml", "--run-dir", URL, "--resume", "auto"], f"model: {URL}/model\n"),
        (["verify", URL], "checkpoints are sound"),
        (["runs", "s3://bucket/runs"], "24/24"),
        (["chat", URL, "say 3 please", "--max-new-tokens", "3"], "yes"),
        (["export", URL, "--out", "again"], "checked: plain transformers gives the trained model's logits"),
    ):
        with Command(folder, *arguments) as command:
            code, out, err = command.end()
        assert code == 0, err
        assert words in out, arguments
    first, again = uninterrupted[0] / "model" / "model.safetensors", folder / "again" / "model.safetensors"
    assert again.read_bytes() == first.read_bytes()
    assert json.loads(store.read("verdict.json"))["kind"] == "finished"


def test_without_credentials_nothing_is_begun(
    folder: Path, machines: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with Command(folder, "run", "tiny.yaml", "--run-dir", URL) as command:
        code, out, err = command.end()
    assert (code, out) == (2, "")
    assert "hint: set AWS_ACCESS_KEY_ID" in err
    assert not machines[0].exists()
