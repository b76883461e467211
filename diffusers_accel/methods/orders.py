"""The order stage: in which order do tokens lie, so that a block of them is a compact neighbourhood?

The six axis orders are PAROAttention's (arXiv 2506.16054); "hwf" alone, which puts the same position of all frames side by
side, is the re-layout behind Sparse-vDiT's multi-diagonal mode (arXiv 2506.03065) and Sparse VideoGen's temporal heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_accel.layout import TokenLayout


@dataclass(frozen=True)
class AxisOrder:
    """Video tokens sorted by the given axes, slowest first; text tokens stay where they are.

    Args:
        axes: a permutation of "fhw" (frames, height, width). "fhw" is the order in which models flatten their tokens.
    """

    axes: str = "fhw"

    def __post_init__(self) -> None:
        if sorted(self.axes) != ["f", "h", "w"]:
            raise ValueError(f'an axis order is a permutation of "fhw" such as "hwf", found {self.axes!r}')

    @property
    def identity(self) -> bool:
        return self.axes == "fhw"

    def index(self, layout: TokenLayout) -> Tensor:
        """int64 [S]: which token of the model's order stands at each place of this order (`x[:, index]` sorts x)."""
        index = torch.arange(layout.tokens)
        start, stop = layout.video_start, layout.video_start + layout.video_tokens
        grid = index[start:stop].view(layout.frames, layout.height, layout.width)
        index[start:stop] = grid.permute(*("fhw".index(axis) for axis in self.axes)).flatten()
        return index
