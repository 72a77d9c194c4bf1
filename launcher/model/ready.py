"""Is a model ready to be trained? A scratch model is written, and packing is refused where it would leak.

Runs in a process of its own, beside Ray's start: it needs torch and transformers, which the launcher does without.
`python -m launcher.model.ready` reads a Request as JSON from stdin and prints {"notes"} or {"error", "hint"}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pydantic import BaseModel

from launcher.errors import ModelError
from launcher.plan.plan import ModelPlan


class Request(BaseModel):
    """What is to be made ready."""

    model: ModelPlan
    tokenizer_folder: Path
    seed: int
    packing: bool


def make_ready(request: Request) -> list[str]:
    """Write a scratch model's folder, and check the packing; what the user should know, a sentence each.

    Raises:
        ModelError: the configuration is wrong, or packed documents would see each other.
    """
    from launcher.model.added_tokens import notes
    from launcher.model.load import check_packing
    from launcher.model.scratch import create_scratch

    if request.model.source == "scratch":
        create_scratch(request.model, request.tokenizer_folder, request.seed, Path(request.model.path))
    check_packing(request.model, request.packing)
    return notes(request.model, request.tokenizer_folder)


def main() -> int:
    """Answer one request."""
    try:
        said = make_ready(Request.model_validate_json(sys.stdin.read()))
    except ModelError as error:
        print(json.dumps({"error": error.message, "hint": error.hint}))
        return error.exit_code
    print(json.dumps({"notes": said}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
