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
    ragged edge patches are smaller (nothing is padded) and blocks reach into the next patch. So there every second row of
    patches runs backwards, counted through all frames, and every second frame bottom up: the next patch is always a neighbour.

    Args:
        height: token rows of a patch in a landscape frame; in a portrait frame height and width change places.
        width: token columns of a patch.
        text_last: what stands in front of the video, such as text, comes behind it. False leaves it there, as version 1 of
            plans means it.
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
        high, wide = (self.height, self.width) if layout.width >= layout.height else (self.width, self.height)
        even = layout.height % high == 0 and layout.width % wide == 0

        def sort(grid: Tensor) -> Tensor:
            return torch.cat([_patched(frame, high, wide, None if even else i) for i, frame in enumerate(grid)])

        return arranged(layout, sort, video_first=self.text_last)

    @staticmethod
    def parse(text: str) -> Patches | None:
        match = re.fullmatch(rf"([1-9][0-9]{{0,8}})x([1-9][0-9]{{0,8}})({TEXT_FIRST})?", text)
        return Patches(int(match[1]), int(match[2]), text_last=not match[3]) if match else None


def of_version_1(label: object) -> object:
    """What an order of version 1 of plans is called now: patches stood behind leading text there."""
    return f"{label}{TEXT_FIRST}" if isinstance(label, str) and re.fullmatch(r"[0-9]+x[0-9]+", label) else label


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
