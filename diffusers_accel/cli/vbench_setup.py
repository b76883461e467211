"""`diffusers-accel vbench setup`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffusers_accel.cli.output import show

EnvFlag = Annotated[
    Path | None, typer.Option("--env", help="The folder of VBench's environment. (default: in the user's cache)")
]


def vbench_setup(
    full: Annotated[
        bool, typer.Option("--full", help="The packages of all dimensions; without it, of those that need few.")
    ] = False,
    build: Annotated[
        str | None,
        typer.Option("--build", metavar="[cpu|cuda]", help="Of PyTorch. (default: cuda if there is a GPU)"),
    ] = None,
    python: Annotated[
        str | None, typer.Option("--python", help="A Python 3.11, by path or name. (default: this one, or python3.11)")
    ] = None,
    env: EnvFlag = None,
) -> None:
    """Make the environment that VBench runs in, from pinned versions with hashes, and say which dimensions lack weights."""
    import torch

    from diffusers_accel.evals.vbench import environment
    from diffusers_accel.evals.vbench.show import readiness
    from diffusers_accel.files import quoted

    if build not in (None, "cpu", "cuda"):
        raise ValueError(f"--build: expected cpu or cuda, found {quoted(build)}")
    chosen: environment.Build = "cuda" if build == "cuda" or (not build and torch.version.cuda) else "cpu"
    made = environment.setup(env, "full" if full else "light", chosen, python)
    show(readiness(made))
