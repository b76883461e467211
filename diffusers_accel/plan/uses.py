"""What the methods of a plan are told of it: which heads take them, and for which layout it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from diffusers_accel.layout import Segment, TokenLayout
from diffusers_accel.methods.uses import Uses
from diffusers_accel.plan.data import PlanData

GRID = ("frames", "height", "width")


def uses(plan: PlanData, transformer: str) -> Iterator[Uses]:
    """Of each method that some head of a transformer takes, by its symbol."""
    heads: dict[str, dict[tuple[int, int], None]] = {}
    for span in plan.spans:
        for layer, row in enumerate(span.heads[transformer]):
            for head, symbol in enumerate(row):
                heads.setdefault(symbol, {})[layer, head] = None
    shape, grid, layouts = plan.models[transformer], told_grid(plan.provenance), _told_layouts(plan.provenance)
    for symbol in sorted(heads):
        yield Uses(transformer, shape, symbol, plan.methods[symbol].label, tuple(heads[symbol]), grid, layouts)


def told_grid(provenance: Mapping[str, Any]) -> tuple[int, int, int] | None:
    """Frames, rows and columns of the tokens for which a plan was made; None where it does not tell them."""
    told = provenance.get("layout")
    if not isinstance(told, Mapping) or any(type(told.get(name)) is not int for name in GRID):
        return None
    frames, height, width = (told[name] for name in GRID)
    return frames, height, width


def made_for(provenance: Mapping[str, Any]) -> TokenLayout | None:
    """A layout that a plan was made for, with text at its end where it does not say at which; None where it tells none."""
    return next(iter(_told_layouts(provenance)), None)


def _told_layouts(provenance: Mapping[str, Any]) -> tuple[TokenLayout, ...]:
    """The layout that a plan was made for, once for each end at which text may be; empty where it is not told whole."""
    grid = told_grid(provenance)
    text = provenance["layout"].get("text_tokens") if grid else None
    if grid is None or type(text) is not int or min(grid) < 1 or text < 0:
        return ()
    if "segments" in provenance["layout"]:
        return _segmented(provenance["layout"]["segments"])
    if not text:
        return (TokenLayout(*grid),)
    return tuple(TokenLayout(*grid, text, place) for place in ("end", "start"))


def _segmented(told: object) -> tuple[TokenLayout, ...]:
    """The layout of segments that a search has written; empty where it is not told."""
    try:
        assert isinstance(told, list)
        segments = [Segment(**{**each, "grid": None if each["grid"] is None else tuple(each["grid"])}) for each in told]
        return (TokenLayout.of(*segments),)
    except (AssertionError, KeyError, TypeError, ValueError):
        return ()
