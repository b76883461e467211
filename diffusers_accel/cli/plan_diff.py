"""`diffusers-accel plan diff`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan_diff(
    first: Annotated[Path, typer.Argument(metavar="A", help="A plan file.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
) -> None:
    """Print what two plans do otherwise: budgets, step caches, methods, densities, and which heads changed where."""
    from diffusers_accel.cli.plans import read_plan
    from diffusers_accel.plan.difference import difference

    names = (first.stem, second.stem) if first.stem != second.stem else ("A", "B")
    print(difference(read_plan(first), read_plan(second), names))
