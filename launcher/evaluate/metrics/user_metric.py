"""A metric of the user's own: `file.py:name`, from answers and references to a number or several by name."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence

from launcher.data.user_code import UserCode
from launcher.errors import DataError

_EXAMPLE = "def brevity(answers, references): return sum(map(len, references)) / sum(map(len, answers))"


class UserMetric(UserCode):
    """What `evaluate.generate.metrics` names; raises DataError where it cannot be loaded."""

    def __init__(self, file: str, name: str) -> None:
        super().__init__(file, name, "evaluate.generate.metrics", _EXAMPLE)

    def __call__(self, answers: Sequence[str], references: Sequence[str]) -> float | dict[str, float]:
        """Raises DataError for whatever it raises, and for whatever it returns that is no number."""
        hint = "mend the function; it is called with a list of answers and a list of references"
        found = self.run(list(answers), list(references), before="", hint=hint)
        if isinstance(found, Mapping) and found and all(isinstance(name, str) for name in found):
            return {name: self._number(value, f"{name}: ") for name, value in found.items()}
        return self._number(found, "")

    def _number(self, value: object, of: str) -> float:
        number = math.nan
        if not isinstance(value, bool | str):
            # Whatever NumPy or torch say of several, and Python of an integer that is no float.
            with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
                number = float(value)  # type: ignore[arg-type]
        if math.isfinite(number):
            return number
        shown = repr(value) if isinstance(value, float | str | bool) or value is None else type(value).__name__
        raise DataError(
            f"{self.name} of {self.file} returned {of}{shown[:60]}, which is no number",
            hint="return a finite number, or a dictionary of them by name",
        )
