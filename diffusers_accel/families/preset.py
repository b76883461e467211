"""What stays dense in a family when `patch(pipe)` is told nothing."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """What published methods keep dense in a model, from which `patch(pipe)` starts. The default suits Wan and its relatives, and
    lies in the middle of what is published for others.

    Args:
        dense_steps: share of the schedule that stays dense at its start, in [0, 1).
        dense_layers: number of first layers that stay dense, 0 or more.
        source: whose values these are, for the docs.
    """

    dense_steps: float = 0.25
    dense_layers: int = 1
    source: str = "Wan: SVG 20 %, Radial 24 % and DraftAttention 30 % of the steps, and a layer each"

    def __post_init__(self) -> None:
        if not 0 <= self.dense_steps < 1:
            raise ValueError(f"dense_steps is a share of the schedule, expected in [0, 1), found {self.dense_steps!r}")
        if not isinstance(self.dense_layers, int) or self.dense_layers < 0:
            raise ValueError(f"dense_layers is a number of layers, expected 0 or more, found {self.dense_layers!r}")
