"""`diffusers-accel doctor`."""

from __future__ import annotations

from typing import Annotated

import typer

from diffusers_accel.cli.options import Setup, takes_setup
from diffusers_accel.cli.output import show
from diffusers_accel.cli.toy import by_present_name


@takes_setup
def doctor(
    pipe: Annotated[
        str | None,
        typer.Argument(help="As for search; without it only the machine is looked at.", callback=by_present_name),
    ] = None,
    density: Annotated[
        list[float] | None, typer.Option("--density", help="To work out. May be given several times.")
    ] = None,
    *,
    setup: Setup,
) -> None:
    """Say what can run here and, with PIPE, what a sparse call could win: runs two denoising steps, no video."""
    from diffusers_accel.doctor import DENSITIES, check_densities, diagnose

    densities = density or DENSITIES
    check_densities(densities)
    if pipe is None:
        if flags := setup.flags():
            raise ValueError(f"doctor: expected a pipeline beside {flags[0]}, found none; without one leave it out")
        show(diagnose(densities=densities))
        return
    show(diagnose(setup.check().load(), setup.call(), densities=densities))
