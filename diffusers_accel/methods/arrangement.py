"""How the blocks of a layout lie in an order: which hold exact tokens, the first frame, and a query block's own tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_accel.kernels.kept import kept
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.blocks import BLOCK
from diffusers_accel.methods.order import Order, exact_tokens, video_places

Blocks = tuple[int, int]  # first, stop


@dataclass(frozen=True, eq=False)
class Arrangement:
    """The query blocks and the key blocks of an order. All on the CPU, and of keys as if all tokens existed.

    Args:
        exact_queries: bool [query blocks], which hold exact tokens, and so read everything.
        exact_keys: bool [key blocks], which hold exact tokens, and so are read by all.
        first_frame: bool [key blocks], which hold tokens of the first frame, where the order keeps that together and others
            follow; else none.
        own: bool [query blocks, key blocks], in which key blocks the tokens of a query block lie: one, where the blocks of
            queries begin where those of keys do, else up to two.
        start: fp64 [query blocks], where the first token of a query block lies among the key blocks.
        video_queries, video_keys: the range of the blocks that hold nothing but sparse video; (0, 0) where there are none.
    """

    exact_queries: Tensor
    exact_keys: Tensor
    first_frame: Tensor
    own: Tensor
    start: Tensor
    video_queries: Blocks
    video_keys: Blocks

    def always(self, first_frame: bool) -> Tensor:
        """bool [key blocks]: which every query reads."""
        return self.exact_keys | self.first_frame if first_frame else self.exact_keys


@kept(64)
def arrangement(order: Order, layout: TokenLayout) -> Arrangement:
    """How the blocks of a layout lie in an order."""
    index = order.index(layout)
    place = torch.empty_like(index)
    place[index] = torch.arange(layout.tokens)
    asking = order.query_index(layout) + layout.query_start
    exact = exact_tokens(layout)
    first = torch.zeros(layout.tokens, dtype=torch.bool)
    if order.frame_major and layout.frames > 1:  # a frame alone is the whole video
        first[video_places(layout)[: layout.height * layout.width]] = True
    own = torch.zeros(layout.query_blocks(BLOCK), layout.blocks(BLOCK), dtype=torch.bool)
    own[torch.arange(layout.queries) // BLOCK, place[asking] // BLOCK] = True
    exact_queries, exact_keys = _hold(exact[asking]), _hold(exact[index])
    return Arrangement(
        exact_queries=exact_queries,
        exact_keys=exact_keys,
        first_frame=_hold(first[index]),
        own=own,
        start=place[asking[::BLOCK]].double() / BLOCK,
        video_queries=_range(~exact_queries),
        video_keys=_range(~exact_keys),
    )


@kept(64)
def history_keys(order: Order, layout: TokenLayout) -> Blocks:
    """The range of the key blocks that hold nothing but the history of a video that is made chunk by chunk; (0, 0) where there
    are none.

    Raises:
        ValueError: other tokens stand between two parts of the history.
    """
    history = torch.cat([torch.full((each.tokens,), each.kind == "history") for each in layout.segments])
    places = history[order.index(layout)][: layout.keys].nonzero()[:, 0]
    if not len(places):
        return 0, 0
    first, stop = int(places[0]), int(places[-1]) + 1
    if stop - first != len(places):
        raise ValueError(
            f"expected the history of a video in one place of the sequence, found other tokens between its parts in {layout}"
        )
    begin, end = -(-first // BLOCK), (-(-stop // BLOCK) if stop == layout.keys else stop // BLOCK)
    return (begin, end) if begin < end else (0, 0)


def wanted_blocks(density: float, places: Arrangement, text_counts: bool) -> int:
    """How many key blocks a row of video reads at a density: that share of the video's blocks, and all that hold exact tokens.

    Args:
        text_counts: take the share of all blocks instead, those that hold exact tokens included.
    """
    blocks, exact = len(places.exact_keys), int(places.exact_keys.sum())
    if text_counts:
        return max(1, round(density * blocks))
    return exact + max(1, round(density * (blocks - exact)))


def _hold(tokens: Tensor) -> Tensor:
    """bool [blocks]: which hold one of these tokens, bool [tokens]."""
    return torch.nn.functional.pad(tokens, (0, -len(tokens) % BLOCK)).view(-1, BLOCK).any(1)


def _range(blocks: Tensor) -> Blocks:
    """Where the one run of blocks lies."""
    places = blocks.nonzero()[:, 0].tolist()
    assert not places or places[-1] - places[0] + 1 == len(places)  # an order keeps the video together
    return (places[0], places[-1] + 1) if places else (0, 0)
