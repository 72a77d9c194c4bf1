"""The `slipway` command: its verbs, and the one place where an error becomes a message and an exit code.

A verb is a module of this folder with a function `command`, or with `commands` where it has verbs of its own. It is
imported when it is called for, so that `slipway --help` stays instant however much the others need.
"""

from __future__ import annotations

import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

import launcher
from launcher.errors import SlipwayError, UserError

VERBS = {
    "run": "Fine-tune as a recipe says and export the model",
    "resume": "Go on with a run from its newest checkpoint",
    "check": "Read a recipe and show what it sets, or its mistakes",
    "plan": "Show what would run: every value decided, and why",
    "data": "Show rows as the model will see them, supervised tokens marked",
    "chat": "Talk to a finished run or a model folder",
    "evaluate": "Measure a finished run or a model folder on held-out rows",
    "export": "Write a run's model folder again, merged or with adapters alone",
    "verify": "Check every checkpoint of a run against its hashes",
    "runs": "List runs and where they are, or a cluster's jobs",
    "report": "Write the page of a run: curves, events, answers, data",
    "diff": "Show what differs between two runs",
    "submit": "Run a recipe on a cluster from outside of it, as a Ray job",
    "logs": "Show what a run's worker or a cluster's job has printed",
    "stop": "Have a run or a cluster's job save and end",
    "cluster": "Start Ray on your own machines over ssh, and stop it",
    "doctor": "Check what this machine or a cluster has and lacks",
    "bench": "Measure tokens per second of a recipe, and where the time goes",
    "recipes": "List and show the packaged recipes and every key",
}
"""Every verb with its line in `slipway --help`, in that order. The module of the same name has the rest."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in own  # accepted anywhere: it is added to a line that has just failed
    if debug:
        arguments.remove("--debug")
    try:
        code = get_command(_root()).main(arguments, prog_name="slipway", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        return report(error)


def report(error: Exception) -> int:
    """Say on stderr what went wrong; returns the exit code."""
    from launcher.cli import render

    if isinstance(error, typer.TyperException):
        error = _usage_error(error)
    if isinstance(error, SlipwayError):
        render.failure(error)
        return error.exit_code
    with tempfile.NamedTemporaryFile("w", prefix="slipway-", suffix=".log", delete=False, encoding="utf-8") as log:
        traceback.print_exception(error, file=log)
    first_line = next(iter(str(error).splitlines()), "")
    message = f"unexpected {type(error).__name__}: {first_line}"
    render.failure(SlipwayError(message, f"this is a fault of Slipway's; its traceback is in {log.name}"))
    return 1


def _usage_error(error: typer.TyperException) -> UserError:
    """A wrong command line, worded like every other mistake."""
    message, _, guess = error.format_message().partition(" Did you mean ")
    context: typer.Context | None = getattr(error, "ctx", None)
    command = context.command_path if context else "slipway"
    hint = f"did you mean {guess}" if guess else f"`{command} --help` shows how it is used"
    return UserError(message[:1].lower() + message[1:].rstrip("."), hint)


class _Verbs(TyperGroup):
    """Shows verbs by their line in VERBS, and imports the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in VERBS:
            self.commands[args[0]] = get_command(_verb(args[0]))
        return super().resolve_command(ctx, args)


def _typer(**settings: Any) -> typer.Typer:
    # Without rich: importing it takes longer than all of `slipway --help`.
    context = {"help_option_names": ["-h", "--help"]}
    return typer.Typer(add_completion=False, rich_markup_mode=None, context_settings=context, **settings)


def _root() -> typer.Typer:
    app = _typer(cls=_Verbs)
    app.callback()(_slipway)
    for verb, line in VERBS.items():
        app.command(verb, help=line)(_not_imported)
    return app


def _verb(name: str) -> typer.Typer:
    module = import_module(f"launcher.cli.{name}")
    app = _typer(name=name)
    commands: dict[str, Callable[..., None]] | None = getattr(module, "commands", None)
    if commands is None:
        app.command(name)(module.command)
    else:
        app.callback(help=VERBS[name])(_group)
        for verb, function in commands.items():
            app.command(verb)(function)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        print(f"slipway {launcher.__version__}")
        raise typer.Exit


def _slipway(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error; with every command")] = False,
) -> None:
    """Fine-tune language models from one recipe, on a laptop or a cluster."""


def _group() -> None:
    """Stand for a verb with verbs of its own."""


def _not_imported() -> None:
    """Stand for a verb until it is called."""
