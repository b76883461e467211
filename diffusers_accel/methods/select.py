"""The select stage: which key blocks does a query block read?

A selection says of itself what others want to know: with which orders it goes, what it reads of q and k, which tensors of a
plan, what a search has to record for it, and how much it reads. Nobody outside its file asks for its type.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.kernels.kept import kept
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.blocks import BLOCK
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.stage import Stage
from diffusers_accel.methods.uses import Tensors, Uses

Wants = Literal["", "means", "tokens"]


@dataclass(frozen=True, eq=False)
class Inputs:
    """What a selection may look at: q and k of the heads of a call, in its order.

    Args:
        device: on which the blocks are wanted.
        means: fp32 [B, query blocks, H, D] and [B, key blocks, H, D], of blocks of `BLOCK` tokens; for those that want "means".
        tokens: [B, queries, H, D] and [B, keys, H, D]; for those that want "tokens".
    """

    device: torch.device
    means: tuple[Tensor, Tensor] | None = None
    tokens: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Select(Stage, ABC):
    """Members are frozen dataclasses, each in a file of `selects/`; their fields are what a plan file says of them.

    Class attributes:
        kind: the name in plan files.
        wants: what `pattern` looks at of q and k: "means", "tokens" or nothing.
        reads_all: every query reads every key.
        reads_nothing: no query reads anything.
        needs_history: it tells the keys of earlier chunks from the others, and is for families whose models have these.
    """

    given_as: ClassVar[str] = "Method(select=...)"
    kind: ClassVar[str]
    wants: ClassVar[Wants] = ""
    reads_all: ClassVar[bool] = False
    reads_nothing: ClassVar[bool] = False
    needs_history: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """What tables call it, without its amounts."""
        return self.kind

    @property
    def label(self) -> str:
        """Its amounts, for tables, such as "0.25"."""
        return ""

    def reads_all_in(self, order: Order, layout: TokenLayout) -> bool:
        """Whether in this layout every query reads every key."""
        return self.reads_all

    def expected_density(self, order: Order, layout: TokenLayout | None = None) -> float | None:
        """The share of the video's block pairs that it reads, as far as that is known ahead: None where only q and k tell, and
        where it follows from the layout, which is not known yet."""
        return None

    @property
    def reselect_every(self) -> int:
        """Steps for which a selection is kept."""
        return 1

    @property
    def records(self) -> str | None:
        """What a search has to record for it, a key of `search.recorders.RECORDERS`; None for nothing."""
        return None

    @property
    def representative(self) -> Select:
        """One that costs as much per call, whenever it selects anew."""
        return self

    def refuses(self, order: Order) -> str | None:
        """Why it does not go with an order, or None."""
        return None

    def depends(self, call: AttentionCall, order: Order, tensors: Tensors) -> Hashable:
        """On what its blocks depend beside the layout and q and k: calls for which this is equal share them. None: nothing."""
        return None

    def changes(self, order: Order, transformer: str, tensors: Tensors) -> bool:
        """Whether it may read other blocks at a later step."""
        return bool(self.wants)

    def owners(self, call: AttentionCall, order: Order, tensors: Tensors) -> Tensor | None:
        """bool [heads]: which heads of a call can take it; None where all can."""
        return None

    def check(self, order: Order, uses: Uses, tensors: Tensors) -> None:
        """Checks that a plan has the tensors that it reads, and that they fit the heads that take it.

        Raises:
            FileError: begins with the path of what is wrong.
        """
        return None

    def made_for(self, order: Order, transformer: str, tensors: Tensors) -> tuple[int, ...] | None:
        """The size that its tensors hold for, which is one for all methods of a plan; None where they hold for any."""
        return None

    def check_layout(self, order: Order, uses: Uses, tensors: Tensors, layout: TokenLayout) -> None:
        """Checks that its tensors hold for a call of this layout.

        Raises:
            FileError: with the size that they hold for, the size of the call, and what to do.
        """
        return None

    def starved(self, pattern: BlockPattern, order: Order, layout: TokenLayout) -> Tensor | None:
        """Which share of the video's query blocks read nothing of the video, 0-d and on the pattern's device; None where that
        cannot be."""
        return None

    @abstractmethod
    def pattern(self, call: AttentionCall, order: Order, tensors: Tensors, inputs: Inputs) -> BlockPattern:
        """The block lists of the heads of a call: [1 or B, heads, query blocks, capacity], on the device of the inputs.

        Args:
            call: where, when, and which heads.
            order: in which the blocks are cut.
            tensors: of the plan.
            inputs: what it `wants`.

        Raises:
            ValueError: a tensor of the plan is missing, or does not hold here.
        """


@dataclass(frozen=True)
class StaticSelect(Select):
    """A selection that looks at neither q nor k: a mask."""

    @abstractmethod
    def mask(self, call: AttentionCall, order: Order, tensors: Tensors) -> Tensor:
        """bool [1 or heads, query blocks, key blocks] on the CPU, in `order`, as if all text existed."""

    def pattern(self, call: AttentionCall, order: Order, tensors: Tensors, inputs: Inputs) -> BlockPattern:
        own = self.depends(call, order, tensors) is not None
        mask = self.mask(call, order, tensors) if own else mask_of_layout(self, order, call.layout)
        # One byte a block pair is moved, and counted where that is fast.
        mask = mask[..., : call.layout.key_blocks(BLOCK)].to(inputs.device).expand(len(call.heads), -1, -1)
        return BlockPattern.from_mask(mask[None], call.layout.queries, call.layout.keys, BLOCK, BLOCK)


@kept(256)
def mask_of_layout(select: StaticSelect, order: Order, layout: TokenLayout) -> Tensor:
    """One for all layers and heads that take it."""
    return select.mask(AttentionCall(layout), order, {})
