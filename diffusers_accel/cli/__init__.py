"""The command `diffusers-accel`. Each of its commands is a file: one call of the library, which is imported only when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import typer

from diffusers_accel import __version__
from diffusers_accel.cli import (
    bench,
    calibrate,
    doctor,
    metrics_fetch,
    metrics_show,
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
    context_settings={"help_option_names": ["-h", "--help"]},  # of all commands
)
plan_app = typer.Typer(help="Look at plan files.")
app.add_typer(plan_app, name="plan")
metrics_app = typer.Typer(help="What reports measure quality by.")
app.add_typer(metrics_app, name="metrics")
vbench_app = typer.Typer(help="Measure films by VBench, in an environment of its own.")
app.add_typer(vbench_app, name="vbench")

# In the order of --help.
app.command("doctor")(doctor.doctor)
app.command("search")(search.search)
app.command("calibrate")(calibrate.calibrate)
app.command("report")(report.report)
app.command("bench", **bench.SETTINGS)(bench.bench)
plan_app.command("show")(plan_show.plan_show)
plan_app.command("schema")(plan_schema.plan_schema)
metrics_app.command("show")(metrics_show.metrics_show)
metrics_app.command("fetch")(metrics_fetch.metrics_fetch)
vbench_app.command("setup")(vbench_setup.vbench_setup)
vbench_app.command("run")(vbench_run.vbench_run)
vbench_app.command("show")(vbench_show.vbench_show)


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
