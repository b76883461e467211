"""The command `diffusers-accel`. Each of its commands is a file: one call of the library, which is imported only when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial

import typer

from diffusers_accel.cli import bench, calibrate, doctor, plan_schema, plan_show, report, search
from diffusers_accel.cli.invoke import invoke
from diffusers_accel.cli.output import PROGRAM
from diffusers_accel.support.terminal import run_command

app = typer.Typer(
    help="Sparse attention for diffusers' video pipelines: search a plan, report what it wins and costs. "
    "With --debug anywhere, errors show their traceback.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
plan_app = typer.Typer(help="Look at plan files.")
app.add_typer(plan_app, name="plan")

# In the order of --help.
app.command("doctor")(doctor.doctor)
app.command("search")(search.search)
app.command("calibrate")(calibrate.calibrate)
app.command("report")(report.report)
app.command("bench", **bench.SETTINGS)(bench.bench)
plan_app.command("show")(plan_show.plan_show)
plan_app.command("schema")(plan_schema.plan_schema)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command and exits, as `terminal.run_command` says."""
    run_command(PROGRAM, sys.argv[1:] if arguments is None else arguments, partial(invoke, app))
