"""What is made anew at every n-th step and used again in between: when it is due, how old it is, how often it is made."""

from __future__ import annotations


def due(age: int, every: int) -> bool:
    """Whether it is made anew, once it is so many steps old."""
    return age >= every


def ages(every: int, steps: int) -> list[int]:
    """How old it is at each of `steps` steps, the first of which makes it; 0 where it is made."""
    return [step % every for step in range(steps)]


def mean_age(every: int, steps: int) -> float:
    """Of these; 0 where there are no steps."""
    return sum(ages(every, steps)) / steps if steps else 0.0


def refresh_share(every: int, steps: int | None = None) -> float:
    """At what share of so many steps it is made, the first included, or in the long run; 0 where there are no steps."""
    if steps is None:
        return 1 / every
    return ages(every, steps).count(0) / steps if steps else 0.0
