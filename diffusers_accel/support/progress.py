"""How far a long work is, in lines now and then: for where there is no terminal to draw a bar on, such as a log."""

from __future__ import annotations

import time
from collections.abc import Callable

EVERY = 30.0  # seconds between two lines, at least


class ProgressLines:
    """Says a line at the start, at the end, and in between where the last one is `EVERY` seconds old.

    Args:
        total: of what is counted, above 0.
        say: prints a line.
    """

    def __init__(self, total: int, say: Callable[[str], None]) -> None:
        self._total, self._say = total, say
        self._begun = time.monotonic()
        self._said: float | None = None

    def tell(self, done: int, what: str = "") -> None:
        """Called as often as anything is done: `done` of the total are, and `what` runs."""
        now = time.monotonic()
        if self._said is not None and now - self._said < EVERY and done < self._total:
            return
        self._said = now
        self._say(f"{100 * done // self._total} %{self._left(done, now - self._begun)}{f': {what}' if what else ''}")

    def _left(self, done: int, seconds: float) -> str:
        if not done:
            return ""
        left = "" if done >= self._total else f", about {clock(seconds * (self._total - done) / done)} left"
        return f" in {clock(seconds)}{left}"


def clock(seconds: float) -> str:
    """ "1 h 05 min", "2 min 03 s" or "7 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
