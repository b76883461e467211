"""`diffusers-accel vbench show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusers_accel.cli.output import show
from diffusers_accel.cli.vbench_setup import EnvFlag


def vbench_show(
    result: Annotated[
        Path | None,
        typer.Argument(help="The folder of a run, or the vbench.json in it; without it, what can be measured."),
    ] = None,
    env: EnvFlag = None,
) -> None:
    """Print the scores of a run and VBench's summary of them; without RESULT what each dimension lacks, and where it must go."""
    from diffusers_accel.evals.vbench import environment
    from diffusers_accel.evals.vbench.results import load_result
    from diffusers_accel.evals.vbench.show import readiness, table, without_environment
    from diffusers_accel.files import FileError

    if result is None:
        try:
            place = environment.find(env)
        except FileError as error:  # that is an answer too, where nobody has named a place
            if env is not None:
                raise
            show(without_environment(str(error)))
        else:
            show(readiness(place))
        return
    if env is not None:
        raise ValueError("--env: expected without RESULT, found beside it; leave it out")
    show(table(load_result(result)))
