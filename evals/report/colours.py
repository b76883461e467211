"""Colours of methods: a hue per kind (Okabe and Ito's, safe for colour-blind readers), deeper for higher density."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffusers_accel.methods import Method

HUES = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
DENSE, SKIP = "#6b7280", "#ffffff"


@dataclass(frozen=True)
class Colour:
    fill: str
    ink: str  # readable on `fill`


def method_colours(methods: Mapping[str, Method]) -> dict[str, Colour]:
    """A colour for each symbol of a plan."""
    groups: dict[str, list[str]] = {}
    fills: dict[str, str] = {}
    for symbol, method in methods.items():
        if method.dense or method.skips:
            fills[symbol] = DENSE if method.dense else SKIP
        else:
            groups.setdefault(method.label.rpartition(" ")[0], []).append(symbol)
    for number, kind in enumerate(sorted(groups)):
        symbols = sorted(groups[kind], key=lambda symbol: asked_density(methods[symbol]))
        for rank, symbol in enumerate(symbols):
            fills[symbol] = _mix(HUES[number % len(HUES)], 0.4 + 0.6 * (rank + 1) / len(symbols))
    return {symbol: Colour(fill, _ink(fill)) for symbol, fill in fills.items()}


def asked_density(method: Method) -> float:
    """The density that a method asks for: 1 dense, 0 skipped."""
    return 1.0 if method.dense else 0.0 if method.skips else float(getattr(method.select, "density", 1.0))


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
