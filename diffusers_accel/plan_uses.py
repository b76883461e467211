"""What the methods of a plan are told of it: which heads take them, and for which layout it was made."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from diffusers_accel.layout import Segment, TokenLayout
from diffusers_accel.methods.uses import Uses

if TYPE_CHECKING:
    from diffusers_accel.plan import Plan

SIZES = ("frames", "height", "width", "text_tokens")


def uses(plan: Plan, transformer: str, layouts: tuple[TokenLayout, ...]) -> Iterator[Uses]:
    """Of each method that some head of a transformer takes, by its symbol."""
    heads: dict[str, dict[tuple[int, int], None]] = {}
    for span in plan.spans:
        for layer, row in enumerate(span.heads[transformer]):
            for head, symbol in enumerate(row):
                heads.setdefault(symbol, {})[layer, head] = None
    for symbol in sorted(heads):
        yield Uses(
            transformer, plan.models[transformer], symbol, plan.methods[symbol].label, tuple(heads[symbol]), layouts
        )


def told_layouts(provenance: Mapping[str, Any]) -> tuple[TokenLayout, ...]:
    """The layout that a plan was made for, once for each end at which text may be; empty where it is not told."""
    told = provenance.get("layout") if isinstance(provenance, Mapping) else None
    if not isinstance(told, Mapping) or any(type(told.get(name)) is not int for name in SIZES):
        return ()
    frames, height, width, text = (told[name] for name in SIZES)
    if min(frames, height, width) < 1 or text < 0:
        return ()
    if "segments" in told:
        return _segmented(told["segments"])
    if not text:
        return (TokenLayout(frames, height, width),)
    return tuple(TokenLayout(frames, height, width, text, place) for place in ("end", "start"))


def _segmented(told: object) -> tuple[TokenLayout, ...]:
    """The layout of segments that a search has written; empty where it is not told."""
    try:
        assert isinstance(told, list)
        segments = [Segment(**{**each, "grid": None if each["grid"] is None else tuple(each["grid"])}) for each in told]
        return (TokenLayout.of(*segments),)
    except (AssertionError, KeyError, TypeError, ValueError):
        return ()
