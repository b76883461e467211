"""What commands print when they are done."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from diffusers_accel.cli.options import Setup
from diffusers_accel.support.terminal import safe

PROGRAM = "diffusers-accel"


def show_written(out: Path, what: str, setup: Setup) -> None:
    """A plan file that was written, and the commands that go on with it."""
    look = shlex.join([PROGRAM, "plan", "show", str(out)])
    measure = shlex.join([PROGRAM, "report", setup.pipe, "--plan", str(out), *setup.flags()])
    show(f"{out}: {what}\nlook at it:  {look}\nmeasure it:  {measure}")


def show(what: Any) -> None:
    """On stdout; a text without what would steer a terminal."""
    from rich.console import Console

    if isinstance(what, str):
        what = safe(what)
    Console(soft_wrap=isinstance(what, str), highlight=False, markup=False, emoji=False).print(what)
