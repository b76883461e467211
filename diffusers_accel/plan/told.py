"""What a plan tells of where it comes from. Anybody may have written that: a fact of another kind counts as not told."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from diffusers_accel.plan.data import PlanData
from diffusers_accel.plan.uses import made_for


def told(plan: PlanData, *path: str) -> Any:
    """The entry of its provenance at a path of keys; None where there is none."""
    found: Any = plan.provenance
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def told_text(plan: PlanData, *path: str) -> str:
    """The same, "" where it is no text."""
    found = told(plan, *path)
    return found if isinstance(found, str) else ""


def told_number(plan: PlanData, *path: str) -> float | None:
    """The same, None where it is no finite number."""
    found = told(plan, *path)
    return found if type(found) in (int, float) and math.isfinite(found) else None


def heads_density(plan: PlanData, span: int) -> float | None:
    """The share of the blocks that the heads read in a span, 0..1, in the mean over all of them, in steps that are computed. None
    where a method does not tell it ahead."""
    rows = [row for rows in plan.spans[span].heads.values() for row in rows]
    counts, layout, total = Counter(symbol for row in rows for symbol in row), made_for(plan.provenance), 0.0
    for symbol, count in counts.items():
        density = plan.methods[symbol].expected_density(layout)
        if density is None:
            return None
        total += count * density
    return total / counts.total()


def mean_density(plan: PlanData) -> float | None:
    """The same over all spans, by their lengths."""
    found = [(span.length, heads_density(plan, index)) for index, span in enumerate(plan.spans)]
    known = [length * density for length, density in found if density is not None]
    return sum(known) if len(known) == len(found) else None
