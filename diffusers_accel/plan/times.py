"""How long a head takes with each method of a plan, as the search that made it has timed them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class HeadTime(NamedTuple):
    """Milliseconds of one head and call: of a usual one, and of one that makes anew what it keeps."""

    usual: float
    refresh: float


def head_times(provenance: Mapping[str, Any], transformer: str) -> dict[str, HeadTime]:
    """Symbol of a method -> its time in a transformer; without what a plan does not tell, or tells otherwise than a search."""
    told: Any = provenance
    for name in ("cost", "ms", transformer):
        told = told.get(name) if isinstance(told, Mapping) else None
    if not isinstance(told, Mapping):
        return {}
    return {symbol: HeadTime(*each) for symbol, each in told.items() if _is_time(each)}


def _is_time(told: object) -> bool:
    """A plan is a file that anybody may have written."""
    if not isinstance(told, (list, tuple)) or len(told) != 2:
        return False
    return all(type(each) in (int, float) and math.isfinite(each) and each >= 0 for each in told)
