"""Arguments and options that several verbs share."""

from __future__ import annotations

from enum import StrEnum
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
# Text and no Path, which would make s3:/bucket of s3://bucket.
RunFolder = Annotated[
    str, typer.Argument(metavar="RUN", help="A run's folder or URL, as `slipway run` printed it", show_default=False)
]
Address = Annotated[
    str | None,
    typer.Option("--address", help="Ray cluster to join; RAY_ADDRESS otherwise, or Ray on this machine"),
]
RunOrJob = Annotated[
    str,
    typer.Argument(metavar="RUN|JOB", help="A run's folder or URL, or with --address a job's name", show_default=False),
]
JobsAddress = Annotated[
    str, typer.Option("--address", help="ssh://[user@]HEAD[:port], or http://HEAD:8265", show_default=False)
]
JobsAddressOrNone = Annotated[
    str | None,
    typer.Option("--address", help="Of the job's cluster: ssh://[user@]HEAD[:port], or http://HEAD:8265"),
]
Hostfile = Annotated[
    Path,
    typer.Option("--hostfile", help="The machines: a line each, such as worker-1 slots=8", show_default=False),
]
SshConfig = Annotated[
    Path | None,
    typer.Option("--ssh-config", help="A config file for ssh instead of ~/.ssh/config", show_default=False),
]


class Resume(StrEnum):
    """Whether `slipway run` may go on with a run instead of beginning one."""

    AUTO = "auto"
    NEVER = "never"
