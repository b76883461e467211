"""Each frame cut into patches whose tokens lie together: DraftAttention's order (arXiv 2505.14708)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_accel.files import quoted
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.order import Order, arranged

TEXT_FIRST = " text first"  # in labels
LONGEST_SIDE = 65_536  # tokens of a patch's side: no latent frame is longer


@dataclass(frozen=True)
class Patches(Order):
    """Each frame cut into patches, whose tokens lie together; all other tokens come behind the video.

    So blocks begin where patches begin. Behind 226 tokens of text, as CogVideoX has them in front, every block would hold parts
    of two patches.

    Where the grid divides, patches come row by row, as in the paper, and a block of `height * width` tokens is a patch. At a
    ragged edge nothing is padded, so patches could not all be blocks. There each frame is cut into bands of rows as near to
    `height` as evenly fits, and each band is read column by column: any run of 128 tokens is then about a patch, wherever it
    begins. Every second band runs backwards, counted through all frames, and every second frame bottom up: the next band
    always begins beside the end of the last. In portrait frames bands stand upright.

    Args:
        height: token rows of a patch in a landscape frame; in a portrait frame height and width change places.
        width: token columns of a patch.
        text_last: what stands in front of the video, such as text, comes behind it. False, as version 1 of plans means it,
            leaves it there, and goes through a ragged grid patch by patch, smaller ones at the edge, on the same way.
    """

    height: int = 8
    width: int = 16
    text_last: bool = True

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            size = getattr(self, name)
            if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= LONGEST_SIDE:
                raise ValueError(
                    f"Patches.{name} is a number of tokens, expected 1 to {LONGEST_SIDE:,}, found {quoted(size)}"
                )

    @property
    def frame_major(self) -> bool:
        return True

    @property
    def label(self) -> str:
        return f"{self.height}x{self.width}" + ("" if self.text_last else TEXT_FIRST)

    def index(self, layout: TokenLayout) -> Tensor:
        """int64 [tokens], see `Order.index`."""
        portrait = layout.width < layout.height
        high, wide = (self.width, self.height) if portrait else (self.height, self.width)
        even = layout.height % high == 0 and layout.width % wide == 0

        def sort(grid: Tensor) -> Tensor:
            if not even and self.text_last:
                return _banded(grid.mT if portrait else grid, self.height)
            return torch.cat([_patched(frame, high, wide, None if even else i) for i, frame in enumerate(grid)])

        return arranged(layout, sort, video_first=self.text_last)

    @staticmethod
    def parse(text: str) -> Patches | None:
        match = re.fullmatch(rf"([1-9][0-9]{{0,8}})x([1-9][0-9]{{0,8}})({TEXT_FIRST})?", text)
        return Patches(int(match[1]), int(match[2]), text_last=not match[3]) if match else None


def of_version_1(label: object) -> object:
    """What an order of version 1 of plans is called now: patches stood behind leading text there."""
    return f"{label}{TEXT_FIRST}" if isinstance(label, str) and re.fullmatch(r"[0-9]+x[0-9]+", label) else label


def _banded(grid: Tensor, high: int) -> Tensor:
    """The tokens [frames, height, width] by bands of about `high` rows, each column by column, on one way through all."""
    count = max(1, round(grid.shape[1] / high))
    parts: list[Tensor] = []
    for number, frame in enumerate(grid):
        bands = list(frame.tensor_split(count))
        if number % 2:
            bands.reverse()
        for band in bands:
            columns = band.T.flip(0) if len(parts) % 2 else band.T
            parts.append(columns.flatten())
    return torch.cat(parts)


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
