"""Numbers that a user gives, numpy's too, as plain ones."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

from diffusers_accel.files import quoted


def real_number(name: str, value: Any) -> float:
    """`value` as a float, which may be infinite or NaN.

    Raises:
        TypeError: it is no number, or a boolean.
        ValueError: it is too large for a float.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a number, found {quoted(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float holds, found {quoted(value)}") from None


def whole_number(name: str, value: Any, least: int, most: int = 2**62) -> int:
    """`value` as an int.

    Raises:
        TypeError: it is no whole number, or a boolean.
        ValueError: it is not in `least` to `most`.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None:
        raise TypeError(f"{name}: expected a whole number of {least} or more, found {quoted(value)}")
    if not least <= number <= most:
        raise ValueError(f"{name}: expected a whole number in {least} to {most:,}, found {quoted(number)}")
    return number
