"""The model that a run starts from: pinned to a commit, its settings read, made ready by a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from launcher.errors import ModelError
from launcher.plan.plan import ModelPlan


def pinned(model: ModelPlan) -> ModelPlan:
    """A hub id with its branch or tag resolved to a commit, so that every node and every resume reads the same weights.

    Raises:
        ModelError: the hub does not answer and the cache does not have it, or the model is gated.
    """
    if model.source != "hub":
        return model
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = snapshot_download(model.path, revision=model.revision, allow_patterns=["config.json"])
    except GatedRepoError as error:
        raise ModelError(
            f"{model.path} is gated", hint="accept its terms on the model's page and set HF_TOKEN"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{model.path} is neither a folder here nor a model on the hub",
            hint="check the path or id; set HF_TOKEN for private models",
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"{model.path} is no folder here, and the hub cannot be reached: {str(error).strip().splitlines()[0]}",
            hint="check the path; offline, download the model first and set HF_HUB_OFFLINE=1",
        ) from error
    return model.model_copy(update={"revision": Path(folder).name})


def model_settings(model: ModelPlan) -> dict[str, Any]:
    """The model's config.json, without importing transformers.

    Raises:
        ModelError: the folder has none, or it does not say which model it is of.
    """
    if model.source == "scratch":
        assert model.scratch is not None
        return model.scratch
    if model.source == "hub":
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(model.path, "config.json", revision=model.revision))
    else:
        path = Path(model.path) / "config.json"
    if not path.is_file():
        raise ModelError(
            f"{model.path} has no config.json", hint="give a folder that save_pretrained wrote, or a hub id"
        )
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not settings.keys() & {"model_type", "auto_map"}:  # as the first BERTs were published
        raise ModelError(
            f"{model.path}: its config.json has no model_type",
            hint='write it into the config.json of a folder with the model, such as "model_type": "bert"',
        )
    return settings


class BaseModelProcess:
    """`launcher.model.ready` in a process of its own: started early, waited for before the first worker."""

    def __init__(
        self,
        model: ModelPlan,
        tokenizer_folder: Path,
        seed: int,
        packing: bool,
        classes: tuple[str, ...] = (),
        stamps: Path | None = None,
    ) -> None:
        """`classes`: of a sequence classification; `stamps`: where the hashes of the base's files are kept, see
        `launcher.model.fingerprint`."""
        request = {
            "model": model.model_dump(mode="json"),
            "tokenizer_folder": str(tokenizer_folder),
            "seed": seed,
            "packing": packing,
            "classes": classes,
            "stamps": str(stamps) if stamps is not None else None,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "launcher.model.ready"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request))
        self.process.stdin.flush()

    def wait(self) -> tuple[list[str], str | None]:
        """Until the model is there: what the user should know of it, a sentence each, and its fingerprint.

        Raises:
            ModelError: as the process said, or with its last line where it ended without a word.
        """
        out, err = self.process.communicate()
        lines = out.splitlines()
        answer: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {"error": None}
        if "error" in answer:
            last = err.strip().splitlines()[-1:] or ["no output"]
            raise ModelError(
                answer["error"] or f"the model cannot be made ready: {last[0]}",
                answer.get("hint") or "check model in the recipe",
            )
        return list(answer["notes"]), answer["fingerprint"]

    def close(self) -> None:
        """Stop it if it still runs."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
