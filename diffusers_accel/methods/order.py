"""The order stage: in which order do tokens lie, so that a block of them is a compact neighbourhood?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from diffusers_accel.layout import TokenLayout


class Order(ABC):
    """How the tokens of a call are sorted before blocks are cut. Members are frozen dataclasses, each in a file of `orders/`."""

    @property
    def identity(self) -> bool:
        """Whether it is the order in which models flatten their tokens."""
        return False

    @property
    def frame_major(self) -> bool:
        """Whether the tokens of a frame stay together, so that the first frame comes first."""
        return False

    @property
    def storable(self) -> bool:
        """Whether a search may store masks in it."""
        return False

    @property
    def representative(self) -> Order:
        """An order of the same kind that costs as much: into which one tokens are sorted makes no difference in time."""
        return self

    @property
    @abstractmethod
    def label(self) -> str:
        """As plans and tables spell it; `parse` reads it again."""

    @abstractmethod
    def index(self, layout: TokenLayout) -> Tensor:
        """int64 [S]: which token of the model's order stands at each place of this order (`x[:, index]` sorts x). Tokens
        that are not keys stay at the end."""

    @staticmethod
    @abstractmethod
    def parse(text: str) -> Order | None:
        """The order of a label; None where it is none of this kind.

        Raises:
            ValueError: it is one of this kind, but a number in it is out of range.
        """


def around_text(layout: TokenLayout, sort: Callable[[Tensor], Tensor]) -> Tensor:
    """The index of a whole sequence whose video tokens [frames, height, width] are sorted into [tokens]."""
    index = torch.arange(layout.tokens)
    start, stop = layout.video_start, layout.video_start + layout.video_tokens
    index[start:stop] = sort(index[start:stop].view(layout.frames, layout.height, layout.width))
    return index
