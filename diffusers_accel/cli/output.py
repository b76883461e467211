"""What commands print when they are done."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusers_accel.cli.options import Setup
from diffusers_accel.support.terminal import safe

if TYPE_CHECKING:
    from diffusers_accel.plan import Plan

PROGRAM = "diffusers-accel"


def show_written(out: Path, what: str, setup: Setup) -> None:
    """A plan file that was written, and the commands that go on with it."""
    look = shlex.join([PROGRAM, "plan", "show", str(out)])
    measure = shlex.join([PROGRAM, "report", setup.pipe, "--plan", str(out), *setup.flags()])
    show(f"{out}: {what}\nlook at it:  {look}\nmeasure it:  {measure}")


def show_plan(out: Path, plan: Plan) -> None:
    """A plan file that was written of others, and the command that looks at it."""
    show(f"{out}: {mix(plan)}\nlook at it:  {shlex.join([PROGRAM, 'plan', 'show', str(out)])}")


def mix(plan: Plan) -> str:
    """The step cache of a plan and the methods of its heads, in a line."""
    heads = ", ".join(f"{plan.methods[symbol].label} {share:.0%}" for symbol, share in plan.shares().items() if share)
    return f"{plan.forwards.label}; {heads}" if plan.forwards else heads


def show(what: Any) -> None:
    """On stdout; a text without what would steer a terminal."""
    from rich.console import Console

    if isinstance(what, str):
        what = safe(what)
    Console(soft_wrap=isinstance(what, str), highlight=False, markup=False, emoji=False).print(what)
