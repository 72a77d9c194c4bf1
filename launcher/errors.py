"""Everything Slipway raises on purpose, and the exit code each ends a command with.

    SlipwayError
    ├── UserError            2   something the user can mend: every one carries a hint
    │   ├── RecipeError      2   all problems of a recipe at once, each with file and line
    │   ├── DataError        2   a file or row of the training data
    │   ├── ModelError       2   a model folder, hub id, tokenizer or method that cannot be used
    │   ├── AuditError       2   what the audit found before the first step
    │   ├── ClusterError     2   what the cluster has does not fit what the run asks for
    │   │   └── HostsError   2   all findings on a cluster's hosts at once, each with its host or file and line
    │   └── RunFolderError   2   a run's folder: missing, held by another launcher, full, read-only
    ├── RunFailed            1   a run that started and could not finish; names its root cause
    ├── CheckpointError      1   a checkpoint that cannot be written, or does not fit the run
    │   ├── DamagedCheckpoint 1  one that is not as it was committed: the run goes on from an older one
    │   └── Superseded       1   a launcher or workers that later ones have replaced: they save no more
    └── Interrupted        130   stopped by Ctrl-C (or 143 by SIGTERM) after saving

Only `cli/app.py` turns them into an exit code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


class SlipwayError(Exception):
    """Base of every error raised on purpose. `hint` says what to do about it, without a final period."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[SlipwayError], tuple[str, str | None]]:
        # Exceptions cross process borders (Ray, multiprocessing); the default would lose the hint.
        return (type(self), (self.message, self.hint))


class UserError(SlipwayError):
    """A mistake of the user's, found before it costs anything."""

    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One mistake of several: `where` is `file:line`, the command line's own words, or a host's name."""

    where: str
    key: str
    message: str
    hint: str | None = None

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.key, self.message) if part)


class RecipeError(UserError):
    """Every problem found in a recipe, in the order of the file."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type[RecipeError], tuple[tuple[Problem, ...]]]:  # type: ignore[override]
        return (type(self), (self.problems,))


class DataError(UserError):
    """A training file or one of its rows cannot be used."""


class ModelError(UserError):
    """A model, tokenizer or fine-tuning method cannot be used as asked."""


class AuditError(UserError):
    """A run's own model and data would train wrong without a word; found on all ranks alike."""


class ClusterError(UserError):
    """The cluster cannot hold the run, or cannot be reached."""


class HostsError(ClusterError):
    """Every problem found in a hostfile or on its hosts, in the order of the file."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        super().__init__("\n".join(str(problem) for problem in problems))
        self.problems = tuple(problems)

    def __reduce__(self) -> tuple[type[HostsError], tuple[tuple[Problem, ...]]]:  # type: ignore[override]
        return (type(self), (self.problems,))


class RunFolderError(UserError):
    """A run's folder is missing, taken, full or read-only."""


class RunFailed(SlipwayError):
    """A run that started could not finish. The message begins with the root cause."""


class CheckpointError(SlipwayError):
    """A checkpoint is damaged, incomplete or of another run."""


class Superseded(CheckpointError):
    """A later launcher or worker group has taken the run over; whoever meets this must save nothing more."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint is not as it was committed; an older one may be."""


class Interrupted(SlipwayError):
    """The run was told to stop, saved, and can be resumed."""

    exit_code = 130

    def __init__(self, message: str, hint: str | None = None, exit_code: int = 130) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code
