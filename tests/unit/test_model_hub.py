"""A hub id, offline: a cache laid out as the hub client leaves it, read through the client itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.driver.base_model import model_settings, pinned
from launcher.errors import ModelError
from launcher.plan.plan import ModelPlan
from tests.plans import model_plan

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_model(path: str, revision: str | None = None) -> ModelPlan:
    return model_plan(path, source="hub", revision=revision)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """HF_HUB_CACHE with one model in it, and HF_HUB_OFFLINE, as the client read them when it was imported."""
    from huggingface_hub import constants, file_download

    repository = tmp_path / "models--somebody--tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert file_download.constants is constants
    return tmp_path


def test_a_branch_is_pinned_to_its_commit() -> None:
    model = pinned(hub_model("somebody/tiny"))
    assert model.revision == COMMIT
    assert model_settings(model)["hidden_size"] == 64
    assert pinned(hub_model("somebody/tiny", COMMIT)) == model


def test_a_configuration_that_names_no_model_is_refused(cache: Path) -> None:
    """As those of the first BERTs on the hub; transformers no longer guesses from the name."""
    next(cache.rglob("config.json")).write_text('{"hidden_size": 64}')
    with pytest.raises(ModelError, match="somebody/tiny: its config.json has no model_type") as caught:
        model_settings(pinned(hub_model("somebody/tiny")))
    assert '"model_type": "bert"' in str(caught.value.hint)


def test_offline_without_the_model_says_so() -> None:
    with pytest.raises(ModelError, match="nobody/nothing is no folder here") as caught:
        pinned(hub_model("nobody/nothing"))
    assert "HF_HUB_OFFLINE" in str(caught.value.hint)
