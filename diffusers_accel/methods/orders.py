"""The order stage: in which order do tokens lie, so that a block of them is a compact neighbourhood?

The six axis orders are PAROAttention's (arXiv 2506.16054); "hwf" alone, which puts the same position of all frames side by
side, is the re-layout behind Sparse-vDiT's multi-diagonal mode (arXiv 2506.03065) and Sparse VideoGen's temporal heads.
Patches are DraftAttention's (arXiv 2505.14708).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_accel.files import quoted
from diffusers_accel.layout import TokenLayout

LONGEST_SIDE = 65_536  # tokens of a patch's side: no latent frame is longer


@dataclass(frozen=True)
class AxisOrder:
    """Video tokens sorted by the given axes, slowest first; text tokens stay where they are.

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
        """Whether the tokens of a frame stay together, so that the first frame comes first."""
        return self.axes[0] == "f"

    @property
    def label(self) -> str:
        return self.axes

    def index(self, layout: TokenLayout) -> Tensor:
        """int64 [S]: which token of the model's order stands at each place of this order (`x[:, index]` sorts x)."""
        axes = tuple("fhw".index(axis) for axis in self.axes)
        return _around_text(layout, lambda grid: grid.permute(*axes).flatten())


@dataclass(frozen=True)
class Patches:
    """Each frame cut into patches, whose tokens lie together; text tokens stay where they are.

    Where the grid divides, patches come row by row, as in the paper, and a block of `height * width` tokens is a patch. At a
    ragged edge patches are smaller (nothing is padded) and blocks reach into the next patch. So there every second row of
    patches runs backwards, counted through all frames, and every second frame bottom up: the next patch is always a neighbour.

    Args:
        height: token rows of a patch in a landscape frame; in a portrait frame height and width change places.
        width: token columns of a patch.
    """

    height: int = 8
    width: int = 16

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= LONGEST_SIDE:
                raise ValueError(
                    f"Patches.{name} is a number of tokens, expected 1 to {LONGEST_SIDE:,}, found {quoted(size)}"
                )

    @property
    def identity(self) -> bool:
        return False

    @property
    def frame_major(self) -> bool:
        return True

    @property
    def label(self) -> str:
        return f"{self.height}x{self.width}"

    def index(self, layout: TokenLayout) -> Tensor:
        """int64 [S]: which token of the model's order stands at each place of this order (`x[:, index]` sorts x)."""
        high, wide = (self.height, self.width) if layout.width >= layout.height else (self.width, self.height)
        even = layout.height % high == 0 and layout.width % wide == 0

        def sort(grid: Tensor) -> Tensor:
            return torch.cat([_patched(frame, high, wide, None if even else i) for i, frame in enumerate(grid)])

        return _around_text(layout, sort)


Order = AxisOrder | Patches


def parse_order(text: str) -> Order:
    """The order of a label such as "hwf" or "8x16"."""
    if match := re.fullmatch(r"([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", text):
        return Patches(int(match[1]), int(match[2]))
    if "x" in text:
        raise ValueError(f'an order is a permutation of "fhw" or a patch such as "8x16", found {quoted(text)}')
    return AxisOrder(text)


def _around_text(layout: TokenLayout, sort: Callable[[Tensor], Tensor]) -> Tensor:
    """The index of a whole sequence whose video tokens [frames, height, width] are sorted into [tokens]."""
    index = torch.arange(layout.tokens)
    start, stop = layout.video_start, layout.video_start + layout.video_tokens
    index[start:stop] = sort(index[start:stop].view(layout.frames, layout.height, layout.width))
    return index


def _patched(frame: Tensor, high: int, wide: int, serpentine: int | None) -> Tensor:
    """The tokens [height, width] of one frame, patch by patch; on the serpentine through all frames if given its number."""
    rows = list(frame.split(high, dim=0))
    number = serpentine or 0
    if number % 2:
        rows.reverse()
    parts = []
    for row_of_all, row in enumerate(rows, number * len(rows)):
        patches = list(row.split(wide, dim=1))
        if serpentine is not None and row_of_all % 2:
            patches.reverse()
        parts += [patch.flatten() for patch in patches]
    return torch.cat(parts)
