"""Colours of methods: a hue per kind (Okabe and Ito's, safe for colour-blind readers), deeper for higher density."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from diffusers_accel.methods import Method

HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
DENSE, SKIP = "#6b7280", "#ffffff"


@dataclass(frozen=True)
class Colour:
    fill: str
    ink: str  # readable on `fill`


def method_colours(methods: Iterable[Method]) -> dict[Method, Colour]:
    """A colour for each method, different ones for different methods."""
    fills: dict[Method, str] = {}
    kinds: dict[str, set[Method]] = {}
    for method in methods:
        if method.dense or method.skips:
            fills[method] = DENSE if method.dense else SKIP
        else:
            kinds.setdefault(_kind(method), set()).add(method)
    for number, kind in enumerate(sorted(kinds)):
        members = sorted(kinds[kind], key=lambda method: (method.expected_density() or 0.0, method.label))
        for rank, method in enumerate(members):
            fills[method] = _mix(_hue(number), 0.4 + 0.6 * (rank + 1) / len(members))
    return {method: Colour(fill, _ink(fill)) for method, fill in fills.items()}


def _kind(method: Method) -> str:
    """A method without its amounts: what shares a hue."""
    return f"{method.select.name} {method.order.label} {method.precision} {method.rest.kind}"


def _hue(number: int) -> str:
    """The hue of a kind; each further round through HUES is darker."""
    rounds, index = divmod(number, len(HUES))
    return "#" + "".join(f"{round(channel * 0.62**rounds):02x}" for channel in _channels(HUES[index]))


def _channels(colour: str) -> list[int]:
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def _mix(colour: str, share: float) -> str:
    """The colour on white, `share` of it."""
    return "#" + "".join(f"{round(255 + (c - 255) * share):02x}" for c in _channels(colour))


def _ink(fill: str) -> str:
    """Black or white, whichever has the higher contrast (WCAG relative luminance)."""
    linear = [(c / 255 / 12.92) if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in _channels(fill)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if (luminance + 0.05) ** 2 > 0.05 * 1.05 else "#ffffff"
