"""`diffusers-accel plan show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan_show(file: Annotated[Path, typer.Argument(help="A plan file.")]) -> None:
    """Print a plan: its methods and a row of symbols per layer and span."""
    from diffusers_accel.cli.plans import read_plan

    print(read_plan(file).show())
