"""Blocks: how large they are, which share of them is read, and into which segment of the schedule a step falls."""

from __future__ import annotations

from diffusers_accel.files import quoted

BLOCK = 128  # tokens of a query block and of a key block
FOREVER = 1 << 30  # steps: never again


def check_density(density: float) -> None:
    if isinstance(density, bool) or not (isinstance(density, (int, float)) and 0 < density <= 1):
        raise ValueError(
            f"density is the share of the video's key blocks that is read, expected in (0, 1], found {quoted(density)}"
        )


def segment_of(now: tuple[int, int], segments: int) -> int:
    """Which of `segments` equal segments of the schedule the step belongs to."""
    step, steps = now
    return min(step * segments // steps, segments - 1)
