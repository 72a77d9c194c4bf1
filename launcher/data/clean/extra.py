"""Libraries that only cleaning needs: they come with the extra `clean`."""

from __future__ import annotations

from importlib.util import find_spec

from launcher.errors import DataError


def require(library: str, key: str) -> None:
    """Raises DataError where the library that a key of the recipe needs is not installed."""
    if find_spec(library) is None:
        raise DataError(f"{key} needs the library {library}", hint="pip install 'slipway[clean]'")
