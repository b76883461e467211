"""Blocks: how large they are, which share of them is read, and into which part of the schedule a step falls."""

from __future__ import annotations

from diffusers_accel.files import quoted

BLOCK = 128  # tokens of a query block and of a key block
FOREVER = 1 << 30  # steps: never again


def check_density(density: float) -> None:
    if isinstance(density, bool) or not (isinstance(density, (int, float)) and 0 < density <= 1):
        raise ValueError(
            f"density is the share of the video's key blocks that is read, expected in (0, 1], found {quoted(density)}"
        )


def part_of(now: tuple[int, int], parts: int) -> int:
    """Which of `parts` equal parts of the schedule the step belongs to."""
    step, steps = now
    return min(step * parts // steps, parts - 1)
