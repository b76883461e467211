"""For which size of video a plan was made, and whether a call is of it."""

from __future__ import annotations

from diffusers_accel.files import FileError
from diffusers_accel.layout import TokenLayout
from diffusers_accel.plan import Plan, PlanError
from diffusers_accel.plan.uses import told_grid, uses


def planned_size(plan: Plan) -> str:
    """Such as "21 x 30 x 52 tokens", frames x rows x columns, as the plan's search says; "" where it says nothing."""
    grid = told_grid(plan.provenance)
    return f"{' x '.join(map(str, grid))} tokens" if grid else ""


def check_size(plan: Plan, transformer: str, layout: TokenLayout) -> None:
    """Refuses a call for which what the plan's methods read was not made.

    Raises:
        PlanError: with the size that was planned, the size of the call, and what to do.
    """
    for each in uses(plan, transformer):
        method = plan.methods[each.symbol]
        try:
            method.select.check_layout(method.order, each, plan.tensors, layout)
        except FileError as error:
            raise PlanError(str(error)) from error
