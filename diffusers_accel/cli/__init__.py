"""The command `diffusers-accel`. Each of its commands is a file: one call of the library, which is imported only when it runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any

import typer

from diffusers_accel import __version__
from diffusers_accel.cli import (
    bench,
    calibrate,
    doctor,
    metrics_fetch,
    metrics_show,
    plan_card,
    plan_diff,
    plan_merge,
    plan_schema,
    plan_show,
    report,
    search,
    vbench_run,
    vbench_setup,
    vbench_show,
)
from diffusers_accel.cli.invoke import invoke
from diffusers_accel.cli.output import PROGRAM
from diffusers_accel.support.terminal import run_command

app = typer.Typer(
    help="Sparse attention for diffusers' video pipelines: search a plan, report what it wins and costs. "
    "With --debug anywhere, errors show their traceback.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables cut words at 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},  # of all commands
)
plan_app = typer.Typer(help="Look at plan files, compare and merge them.")
app.add_typer(plan_app, name="plan")
metrics_app = typer.Typer(help="What reports measure quality by.")
app.add_typer(metrics_app, name="metrics")
vbench_app = typer.Typer(help="Measure films by VBench, in an environment of its own.")
app.add_typer(vbench_app, name="vbench")


def _add(group: typer.Typer, name: str, command: Callable[..., None], **settings: Any) -> None:
    """With the first paragraph of its help in the list of commands, which is cut there where it is not given."""
    first = " ".join((command.__doc__ or "").split("\n\n")[0].split())
    group.command(name, short_help=first, **settings)(command)


# In the order of --help.
_add(app, "doctor", doctor.doctor)
_add(app, "search", search.search)
_add(app, "calibrate", calibrate.calibrate)
_add(app, "report", report.report)
_add(app, "bench", bench.bench, **bench.SETTINGS)
_add(plan_app, "show", plan_show.plan_show)
_add(plan_app, "diff", plan_diff.plan_diff)
_add(plan_app, "merge", plan_merge.plan_merge)
_add(plan_app, "card", plan_card.plan_card)
_add(plan_app, "schema", plan_schema.plan_schema)
_add(metrics_app, "show", metrics_show.metrics_show)
_add(metrics_app, "fetch", metrics_fetch.metrics_fetch)
_add(vbench_app, "setup", vbench_setup.vbench_setup)
_add(vbench_app, "run", vbench_run.vbench_run)
_add(vbench_app, "show", vbench_show.vbench_show)


def _say_version(wanted: bool) -> None:
    if wanted:
        print(f"{PROGRAM} {__version__}")
        raise typer.Exit


@app.callback()
def _before(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """What stands before a command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits, as `terminal.run_command` says."""
    run_command(PROGRAM, sys.argv[1:] if arguments is None else arguments, partial(invoke, app))
