"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
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
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run, as `slipway run` printed it", show_default=False)
]
Address = Annotated[
    str | None,
    typer.Option("--address", help="Ray cluster to join; RAY_ADDRESS otherwise, or Ray on this machine"),
]
