"""Arguments and options that several verbs share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A recipe file, or a packaged recipe's name", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Recipe keys to set, such as optimizer.lr=1e-4", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON")]
# Text and no Path, which would make s3:/bucket of s3://bucket.
RunFolder = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder or URL, as `slipway run` printed it", show_default=False)
]
Address = Annotated[
    str | None,
    typer.Option("--address", help="Ray cluster to join; RAY_ADDRESS otherwise, or Ray on this machine"),
]


class Resume(StrEnum):
    """Whether `slipway run` may go on with a run instead of beginning one."""

    AUTO = "auto"
    NEVER = "never"
