"""The recipes that come with Slipway, by name: `quickstart`, `llama-3.1/8b-qlora`."""

from __future__ import annotations

from pathlib import Path

import launcher


def folder() -> Path:
    """`launcher/recipes` of an installed package; `recipes` beside `launcher` in a checkout."""
    package = Path(launcher.__file__).parent
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def names() -> list[str]:
    """Every recipe meant to be run, sorted. Those that others extend (`base/`, `_*.yaml`) are left out."""
    root = folder()
    paths = (path.relative_to(root).with_suffix("") for path in root.rglob("*.yaml"))
    return sorted(path.as_posix() for path in paths if "base" not in path.parts and not path.name.startswith("_"))


def find(name: str) -> Path | None:
    """The file of a packaged recipe, also of one that is not listed; None where there is none of that name."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        return None
    # Not with_suffix: the 1 of llama-3.1 is no suffix.
    file = folder() / (name if path.suffix == ".yaml" else f"{name}.yaml")
    return file if file.is_file() else None
