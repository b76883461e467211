"""For which size of video a plan was made, and whether a call is of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, Stored
from diffusers_accel.methods.draft import video_blocks
from diffusers_accel.plan import Plan, PlanError

SIZES = ("frames", "height", "width")


def planned_size(plan: Plan) -> str:
    """Such as "21 x 30 x 52 tokens", frames x rows x columns, as the plan's search says; "" where it says nothing."""
    grid = _planned_grid(plan)
    return f"{' x '.join(map(str, grid))} tokens" if grid else ""


def check_size(plan: Plan, transformer: str, layout: TokenLayout) -> None:
    """Refuses a call for which the plan's stored masks were not made.

    Raises:
        PlanError: with the size that was planned, the size of the call, and what to do.
    """
    used = {symbol for span in plan.spans for row in span.heads[transformer] for symbol in row}
    for symbol in sorted(used):
        method = plan.methods[symbol]
        if not isinstance(method.select, Stored):
            continue
        bits = plan.tensors[method.select.names(method.order, transformer)[0]]
        grid, here = _planned_grid(plan), (layout.frames, layout.height, layout.width)
        if bits.shape[2] == layout.blocks(BLOCK) and grid in (None, here):
            _check_rows(plan, transformer, symbol, bits, layout)
            continue
        size = f"{planned_size(plan)}, " if grid else ""
        text = f" and {layout.text_tokens} of text" if layout.text_tokens else ""
        raise PlanError(
            f"the plan's stored masks are for {size}{bits.shape[2]} blocks of {BLOCK} tokens; this call has "
            f"{' x '.join(map(str, here))} tokens (frames x rows x columns){text}, {layout.blocks(BLOCK)} blocks. Stored masks "
            "hold for the size that was searched: generate at that size, or search a plan for this one"
        )


def _check_rows(plan: Plan, transformer: str, symbol: str, bits: Tensor, layout: TokenLayout) -> None:
    """In a plan that does not tell its layout, rows without a block may have been text; where they are video, nothing attends."""
    method = plan.methods[symbol]
    assert isinstance(method.select, Stored)
    index = plan.tensors[method.select.names(method.order, transformer)[1]]
    rows = [row for span in plan.spans for row in span.heads[transformer]]
    used = {
        int(index[place % len(index), head])
        for place, row in enumerate(rows)
        for head, each in enumerate(row)
        if each == symbol
    }
    if bool((bits[sorted(used)][:, :, slice(*video_blocks(layout))].amax(3) == 0).any()):
        raise PlanError(
            f"the plan's stored masks {method.label!r} leave rows of video without any block to read, which would be text in "
            f"another layout; this call has {layout.text_tokens} tokens of text. Search a plan for this model"
        )


def _planned_grid(plan: Plan) -> tuple[int, int, int] | None:
    found: Any = plan.provenance.get("layout")
    if not isinstance(found, Mapping) or not all(isinstance(found.get(name), int) for name in SIZES):
        return None
    frames, height, width = (found[name] for name in SIZES)
    return frames, height, width
