"""Runs the app, whose errors and Ctrl-C are left to `terminal.run_command`."""

from __future__ import annotations

from typing import Any

import typer

from diffusers_accel.cli.output import PROGRAM

# The class of what typer says about options; it brings click along in some versions, and needs it in others.
UsageError: Any = typer.BadParameter.__base__


def invoke(app: typer.Typer, arguments: list[str]) -> int:
    """As `app()`, which would answer for errors and Ctrl-C itself."""
    command = typer.main.get_command(app)
    try:
        with command.make_context(PROGRAM, arguments or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return ended.exit_code
    except UsageError as error:
        raise ValueError(_usage(error)) from error
    return 0


def _usage(error: Any) -> str:
    """What typer says about an option, with what was meant."""
    from diffusers_accel.support.suggest import did_you_mean

    text = error.format_message().strip().rstrip(".")
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    context = error.ctx
    if context is None:
        return text
    if option := getattr(error, "option_name", None):
        known = [each for parameter in context.command.params for each in parameter.opts]
        if option not in known:
            return f"{context.command_path}: there is no option {option[:100]}{did_you_mean(option, known)}"
    return text if text.endswith("?") else f"{text}; {context.command_path} --help lists all"
