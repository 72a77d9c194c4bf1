"""A model folder in memory, to be used and no longer trained: whole, or adapters over their base."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from launcher.errors import ModelError
from launcher.export.verify import adapted_model, auto_class

ADAPTERS = "adapter_config.json"


def device_here() -> torch.device:
    """A GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_folder(folder: Path, device: torch.device) -> tuple[Any, Any]:
    """Model, in evaluation mode on `device`, and tokenizer.

    Raises ModelError where transformers or peft cannot load it.
    """
    import transformers
    from transformers import AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # which kernels it misses is no concern here
    adapted = (folder / ADAPTERS).exists()
    with readable(folder):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder(folder))
        model = adapted_model(folder) if adapted else auto_class(folder).from_pretrained(folder, dtype="auto")
    return model.to(device).eval(), tokenizer


def tokenizer_folder(folder: Path) -> str:
    """Where the tokenizer is: beside the model, or with the base of adapters that have none of their own."""
    return str(folder) if (folder / "tokenizer_config.json").exists() else base_of(folder)


def base_of(folder: Path) -> str:
    """Folder or hub id of the whole model: the base of adapters, any other folder itself."""
    if not (folder / ADAPTERS).exists():
        return str(folder)
    return str(json.loads((folder / ADAPTERS).read_text(encoding="utf-8"))["base_model_name_or_path"])


def positions(folder: Path) -> int | None:
    """Tokens of a text that the whole model was made for, by its configuration. Raises ModelError."""
    from transformers import AutoConfig

    with readable(folder):
        config = AutoConfig.from_pretrained(base_of(folder)).get_text_config(decoder=True)
    return getattr(config, "max_position_embeddings", None)


@contextlib.contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turn what transformers and peft raise of `folder` into a ModelError that says what to do."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        hint = "give a run, or a folder that save_pretrained wrote"
        raise ModelError(f"{folder} cannot be loaded: {said}", hint) from error
