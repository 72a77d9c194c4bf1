"""Is a model ready to be trained? A scratch model is written, packing is refused where it would leak, weights get their
fingerprint.

Runs in a process of its own, beside Ray's start: it needs torch and transformers, which the launcher does without.
`python -m launcher.model.ready` reads a Request as JSON from stdin and prints {"notes", "fingerprint"} or
{"error", "hint"}.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import BaseModel

from launcher.errors import ModelError
from launcher.model.fingerprint import fingerprint
from launcher.plan.plan import ModelPlan


class Request(BaseModel):
    """What is to be made ready."""

    model: ModelPlan
    tokenizer_folder: Path
    seed: int
    packing: bool
    classes: tuple[str, ...] = ()
    """Of a sequence classification."""
    stamps: Path | None
    """Where `fingerprint` keeps its stamps; the folder is there."""


@dataclass(frozen=True)
class Ready:
    """A model that can be trained."""

    notes: list[str]
    """What the user should know of it, a sentence each."""
    fingerprint: str | None
    """Of its weights; None for a hub id, which its commit names."""


def make_ready(request: Request) -> Ready:
    """Write a scratch model's folder, check the packing, and hash the weights.

    Raises:
        ModelError: the configuration is wrong or has no dropout to set, packed documents would see each other, or
            the model cannot tell classes apart, or there are no weights.
    """
    from launcher.model.added_tokens import notes
    from launcher.model.load import check_classifier, check_packing, load_config
    from launcher.model.regularize import set_dropout
    from launcher.model.scratch import create_scratch

    if request.model.source == "scratch":
        base = Path(request.model.path)
        create_scratch(request.model, request.tokenizer_folder, request.seed, base, request.classes)
    if request.classes:
        said = check_classifier(request.model, request.classes)
    else:
        check_packing(request.model, request.packing)
        said = notes(request.model, request.tokenizer_folder)
    if request.model.dropout is not None:
        set_dropout(load_config(request.model), request.model.dropout)
    hub = request.model.source == "hub"
    return Ready(said, None if hub else fingerprint(Path(request.model.path), request.stamps))


def main() -> int:
    """Answer one request."""
    try:
        ready = make_ready(Request.model_validate_json(sys.stdin.read()))
    except ModelError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}))
        return error.exit_code
    print(json.dumps(asdict(ready)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
