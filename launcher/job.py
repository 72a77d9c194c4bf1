"""The script for `ray submit`: `ray submit cluster.yaml launcher/job.py RECIPE [key=value ...] [--expect HASH]`.

`ray submit` copies it alone to the head and runs `python ~/job.py ...` there, in a terminal of its own. It is
`slipway run RECIPE ... --address auto`, which says the recipe's hash first: the one that `slipway check RECIPE ...`
prints where the recipe is edited. With `--expect`, another hash ends it with exit code 2; `ray submit` makes 1 of any
code but 0. `python -m launcher.job` is the same where no copy is needed.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one recipe on the cluster that this machine belongs to; returns the exit code."""
    from launcher.cli import app
    from launcher.errors import UserError

    words = list(sys.argv[1:] if arguments is None else arguments)
    if broken := damaged(words):
        hint = "send it with `slipway submit RECIPE ...`, or quote such a word twice: \"'key=a value'\""
        what = f"{broken!r} did not arrive as it was typed: ray submit puts its arguments unquoted into a shell line"
        return app.report(UserError(what, hint))
    return app.main(["run", "--address", "auto", "--say-hash", *words])


def damaged(words: Sequence[str]) -> str | None:
    """The first word after the recipe that a shell seems to have split or expanded; None where all look whole."""
    seen = set()
    values = [word for before, word in itertools.pairwise(["", *words]) if not before.startswith("-")]
    for word in [word for word in values if not word.startswith("-")][1:]:
        key, equals, value = word.partition("=")
        # `key={a,b}` arrives as `key=a key=b`.
        if not equals or key in seen or any(value.count(a) != value.count(b) for a, b in ("{}", "[]")):
            return word
        seen.add(key)
    return None


def alone() -> None:
    """Undo what a copy in the home folder meets there.

    The home folder is first on sys.path: a file of the user's could take the place of any module. Ray has exported
    OMP_NUM_THREADS=1. And when the connection breaks, the terminal is gone: save and end, as with SIGTERM.
    """
    sys.path.pop(0)
    os.environ.pop("OMP_NUM_THREADS", None)
    signal.signal(signal.SIGHUP, _hung_up)


def _hung_up(number: int, frame: FrameType | None) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    if not __package__:
        alone()
    sys.exit(main())
