"""`diffusers-accel plan merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusers_accel.cli.options import PlanOut


def plan_merge(
    first: Annotated[Path, typer.Argument(metavar="A", help="The plan whose step cache is taken.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="The plan whose heads are taken.")],
    out: PlanOut,
    until: Annotated[
        float | None,
        typer.Option(
            "--until", help="Heads are those of A up to this share of the steps, or down to this sigma, then of B."
        ),
    ] = None,
    forwards: Annotated[
        str, typer.Option("--forwards", metavar="[A|B]", help="Whose step cache is taken, if it has one.")
    ] = "A",
) -> None:
    """Write a plan with the step cache of A and the heads of B; with --until, the heads of A first.

    Plans of another model or for another call are refused. Nobody has searched or measured the result: `report` does.
    """
    from diffusers_accel.cli.arguments import check_finite, check_out
    from diffusers_accel.cli.output import show_plan
    from diffusers_accel.cli.plans import read_plan
    from diffusers_accel.files import prepare_file, quoted
    from diffusers_accel.plan.merge import Which, merge_plans

    check_out(out)
    check_finite("--until", until)
    if until is not None and not 0 < until < 1:
        raise ValueError(f"--until: expected a share of the steps, or a sigma, between 0 and 1, found {until}")
    if forwards not in ("A", "B"):
        raise ValueError(f"--forwards: expected A or B, found {quoted(forwards)}")
    which: Which = "first" if forwards == "A" else "second"
    names = first.name, second.name
    merged = merge_plans(read_plan(first), read_plan(second), forwards=which, until=until, labels=names)
    prepare_file(out)
    merged.save(out)
    show_plan(out, merged)
