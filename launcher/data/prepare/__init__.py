"""From sources to prepared data, once for every run that asks for the same: see cache.py, then build.py."""

from launcher.data.prepare.cache import prepare

__all__ = ["prepare"]
