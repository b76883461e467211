"""Video tokens sorted by the axes of the grid.

The six axis orders are PAROAttention's (arXiv 2506.16054); "hwf" alone, which puts the same position of all frames side by
side, is the re-layout behind Sparse-vDiT's multi-diagonal mode (arXiv 2506.03065) and Sparse VideoGen's temporal heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffusers_accel.files import quoted
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.order import Order, arranged


@dataclass(frozen=True)
class AxisOrder(Order):
    """Video tokens sorted by the given axes, slowest first; all others are left where they are, see `arranged`.

    Args:
        axes: a permutation of "fhw" (frames, height, width). "fhw" is the order in which models flatten their tokens.
    """

    axes: str = "fhw"

    def __post_init__(self) -> None:
        if sorted(self.axes) != ["f", "h", "w"]:
            raise ValueError(f'an axis order is a permutation of "fhw" such as "hwf", found {quoted(self.axes)}')

    @property
    def identity(self) -> bool:
        return self.axes == "fhw"

    @property
    def frame_major(self) -> bool:
        return self.axes[0] == "f"

    @property
    def storable(self) -> bool:
        return True

    @property
    def representative(self) -> Order:
        return self if self.identity else AxisOrder("hwf")

    @property
    def label(self) -> str:
        return self.axes

    def index(self, layout: TokenLayout) -> Tensor:
        """int64 [tokens], see `Order.index`."""
        axes = tuple("fhw".index(axis) for axis in self.axes)
        return arranged(layout, lambda grid: grid.permute(*axes).flatten())

    @staticmethod
    def parse(text: str) -> AxisOrder | None:
        return AxisOrder(text) if sorted(text) == ["f", "h", "w"] else None
