"""What several rules share: checks of their numbers, and how few steps they can compute."""

from __future__ import annotations

import math
from typing import Any

from diffusers_accel.files import quoted

TOO_FEW = "the first step and the last one compute in any case: run 3 steps or more"


def is_number(value: Any) -> bool:
    """Whether it is a finite number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_threshold(value: Any) -> None:
    """Raises ValueError where it is no finite number of 0 or more."""
    if not (is_number(value) and value >= 0):
        raise ValueError(f"threshold is a relative change, expected 0 or more and finite, found {quoted(value)}")


def check_count(name: str, value: Any, least: int) -> None:
    """Raises ValueError where it is no number of steps of `least` or more."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} is a number of steps, expected an integer of {least} or more, found {quoted(value)}")


def check_share(name: str, value: Any) -> None:
    """Raises ValueError where it is no share of the schedule."""
    if not (is_number(value) and 0 <= value <= 1):
        raise ValueError(f"{name} is a share of the schedule, expected in [0, 1], found {quoted(value)}")


def fewest(steps: int, first: int, every: int) -> int:
    """How many steps of a schedule are computed where the `first` ones are, one in `every` after them, and the last."""
    between = max(steps - first - 1, 0)
    return min(steps, first + between // every + 1)
