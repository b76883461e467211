"""For which size of video a plan was made, and whether a call is of it."""

from __future__ import annotations

from diffusers_accel.files import FileError
from diffusers_accel.layout import TokenLayout
from diffusers_accel.plan import Plan, PlanError
from diffusers_accel.plan_uses import told_layouts, uses


def planned_size(plan: Plan) -> str:
    """Such as "21 x 30 x 52 tokens", frames x rows x columns, as the plan's search says; "" where it says nothing."""
    layouts = told_layouts(plan.provenance)
    return f"{layouts[0].frames} x {layouts[0].height} x {layouts[0].width} tokens" if layouts else ""


def check_size(plan: Plan, transformer: str, layout: TokenLayout) -> None:
    """Refuses a call for which what the plan's methods read was not made.

    Raises:
        PlanError: with the size that was planned, the size of the call, and what to do.
    """
    layouts = told_layouts(plan.provenance)
    for each in uses(plan, transformer, layouts):
        method = plan.methods[each.symbol]
        try:
            method.select.check_layout(method.order, each, plan.tensors, layout)
        except FileError as error:
            raise PlanError(str(error)) from error
