"""The order stage: in which order do tokens lie, so that a block of them is a compact neighbourhood?"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.stage import Stage


class Order(Stage, ABC):
    """How the tokens of a call are sorted before blocks are cut. Members are frozen dataclasses, each in a file of `orders/`."""

    given_as: ClassVar[str] = "Method(order=..., select=...)"

    @property
    def identity(self) -> bool:
        """Whether the video's tokens lie as models flatten them."""
        return False

    def moves(self, layout: TokenLayout) -> bool:
        """Whether tokens of this layout lie in another order than the model's."""
        return not self.identity or layout.interleaved

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
        """int64 [tokens]: which token of the model's sequence stands at each place of this order (`x[:, index]` sorts x).
        Tokens that are not keys stay at the end."""

    def query_index(self, layout: TokenLayout) -> Tensor:
        """int64 [queries]: which row of q stands at each place of this order."""
        rows = self.index(layout) - layout.query_start
        return rows[(rows >= 0) & (rows < layout.queries)]

    @staticmethod
    @abstractmethod
    def parse(text: str) -> Order | None:
        """The order of a label; None where it is none of this kind.

        Raises:
            ValueError: it is one of this kind, but a number in it is out of range.
        """


def arranged(layout: TokenLayout, sort: Callable[[Tensor], Tensor], video_first: bool = False) -> Tensor:
    """The index of a whole sequence whose video tokens [frames, height, width] are sorted into [tokens].

    All other tokens stay where they are, or come behind the video, in the model's order: with `video_first`, and where they
    stand between pieces of the video, as else every block would hold some of them and be read by everybody.
    """
    video = video_places(layout)
    ordered = video[sort(torch.arange(layout.video_tokens).view(layout.grid))]
    if video_first or layout.interleaved:
        return torch.cat([ordered, exact_tokens(layout).nonzero()[:, 0]])
    index = torch.arange(layout.tokens)
    index[video] = ordered
    return index


def video_places(layout: TokenLayout) -> Tensor:
    """int64 [video tokens]: where in the sequence the tokens of the video stand, in the order of its grid."""
    return torch.cat([torch.arange(run.start, run.stop) for run in layout.video_runs])


def exact_tokens(layout: TokenLayout) -> Tensor:
    """bool [tokens]: which tokens of the sequence are exact, all but the video's."""
    exact = torch.ones(layout.tokens, dtype=torch.bool)
    exact[video_places(layout)] = False
    return exact
