"""Variations of training rows. Each is drawn from a hash of the row, the seed and the copy, and of nothing else: the
same row is varied in the same way in every process, on every machine and whatever rows stand around it.

In this order: the user's function, another wording, a cut after an earlier answer, no system prompt. Plain text is
never varied.
"""

from __future__ import annotations

import random
from dataclasses import replace
from difflib import get_close_matches
from hashlib import blake2b
from string import Formatter

from launcher.data.conversation import SYSTEM_ROLES, Conversation
from launcher.data.formats.shapes import joined
from launcher.data.user_function import UserFunction
from launcher.errors import DataError
from launcher.plan.plan import AugmentPlan
from launcher.recipe.schema_data import WORDING_PARTS


class Augment:
    """Varies training rows as `plan` says. Picklable. Raises DataError for a wording or a function that cannot be."""

    def __init__(self, plan: AugmentPlan, seed: int) -> None:
        self._seed = seed
        self._wordings = [(_named_in(wording), wording) for wording in plan.wordings]
        self._truncate_turns, self._drop_system = plan.truncate_turns, plan.drop_system
        self._function: UserFunction | None = None
        if plan.function_file is not None and plan.function_name is not None:
            self._function = UserFunction(plan.function_file, plan.function_name)
        self.fingerprint = self._function.fingerprint if self._function else None
        """SHA-256 of the user's file: the plan names it, and what stands in it decides the rows."""
        self.active = bool(self._function or self._wordings or self._truncate_turns or self._drop_system)
        """Whether any row is varied at all."""

    def __call__(self, conversation: Conversation, copy: int = 0) -> Conversation | None:
        """The `copy`-th variation of a row: the very same object where nothing changes, None where it is left out.

        Raises DataError, beginning with the row's place, where the user's function fails.
        """
        if not self.active or conversation.text is not None:
            return conversation
        draws = _Draws(conversation.digest(), self._seed, copy)
        if self._function:
            messages = self._function(conversation.messages, draws.generator("function"), conversation.where)
            if messages is None:
                return None
            if messages != conversation.messages:
                conversation = replace(conversation, messages=messages)
        if self._wordings and conversation.parts:
            conversation = self._reworded(conversation, draws)
        if self._truncate_turns:
            conversation = self._truncated(conversation, draws)
        if self._drop_system and draws.share("system") < self._drop_system:
            conversation = _without_system(conversation)
        return conversation

    def _reworded(self, conversation: Conversation, draws: _Draws) -> Conversation:
        """The parts of the last question joined by a wording that names each of them and no other."""
        names = {name for name, _ in conversation.parts}
        fitting = [wording for named, wording in self._wordings if named == names]
        messages = list(conversation.messages)
        place = next((i for i in reversed(range(len(messages))) if messages[i].role == "user"), None)
        # The user's function may have written another question.
        if not fitting or place is None or messages[place].content != joined(conversation.parts):
            return conversation
        wording = fitting[int(draws.share("wording") * len(fitting))]
        messages[place] = messages[place]._replace(content=wording.format(**dict(conversation.parts)))
        if messages[place] == conversation.messages[place]:
            return conversation
        return replace(conversation, messages=tuple(messages))

    def _truncated(self, conversation: Conversation, draws: _Draws) -> Conversation:
        """The conversation up to one of its earlier answers.

        Only after an answer that is learned whatever `data.supervise` says, so that a cut leaves something to learn:
        one that is marked to be learned where any is, otherwise one that is not marked against it.
        """
        messages = conversation.messages
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        marked = [i for i in answers if messages[i].learn]
        ends = [i for i in marked or answers if messages[i].learn is not False and i != answers[-1]]
        if not ends or draws.share("turns") >= self._truncate_turns:
            return conversation
        end = ends[int(draws.share("end") * len(ends))]
        return replace(conversation, messages=messages[: end + 1], parts=())


def _without_system(conversation: Conversation) -> Conversation:
    """Without the system turns that it begins with; as it is where an answer would then come first."""
    messages = conversation.messages
    first = next((i for i, message in enumerate(messages) if message.role not in SYSTEM_ROLES), 0)
    if first == 0 or messages[first].role == "assistant":
        return conversation
    return replace(conversation, messages=messages[first:])


class _Draws:
    """Chances of one copy of one row, each of its own name: to ask for one more changes none of the others."""

    def __init__(self, digest: bytes, seed: int, copy: int) -> None:
        self._key = b"%b %d %d " % (digest, seed, copy)

    def share(self, name: str) -> float:
        """At least 0, less than 1."""
        return (self._number(name) >> 11) * 2.0**-53

    def generator(self, name: str) -> random.Random:
        return random.Random(self._number(name))

    def _number(self, name: str) -> int:
        return int.from_bytes(blake2b(self._key + name.encode(), digest_size=8).digest(), "little")


def _named_in(wording: str) -> set[str]:
    """The parts that a wording names. Raises DataError where it names none, or anything else."""
    place, hint = f"data.augment.wordings: {wording!r}", "name {instruction} and {input}; write {{ for a brace"
    try:
        fields = [field for field in Formatter().parse(wording) if field[1] is not None]
    except ValueError as error:
        raise DataError(f"{place}: {error}", hint) from error
    for _, name, spec, conversion in fields:
        if name not in WORDING_PARTS:
            near = get_close_matches(str(name), WORDING_PARTS, n=1)
            raise DataError(f"{place}: unknown name {name!r}", f"did you mean {{{near[0]}}}?" if near else hint)
        if spec or conversion:
            raise DataError(f"{place}: a part is put in as it is", hint)
    if not fields:
        raise DataError(f"{place}: it names no part of a row", hint)
    return {str(name) for _, name, _, _ in fields}
