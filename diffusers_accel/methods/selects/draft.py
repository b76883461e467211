"""DraftAttention's selection (arXiv 2505.14708): a low-resolution attention map says which blocks are worth computing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from diffusers_accel.call import AttentionCall
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.select import select
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.ranked import RankedSelect
from diffusers_accel.methods.select import Inputs, Wants
from diffusers_accel.methods.uses import Tensors


@dataclass(frozen=True)
class Draft(RankedSelect):
    """Blocks are averaged, their softmax map stands for the full one, and the best block pairs are read.

    The paper keeps the best share of a head's whole map (per "head"), whose rows may be empty, forces nothing but text
    and selects anew at every call. That is `Draft(density, min_blocks=0, diagonal=False, first_frame=False)` in patches of
    8 x 16. By default rows here read at least one block, and the diagonal and the first frame are always read, within the
    density. Its arguments are those of `RankedSelect`.
    """

    kind: ClassVar[str] = "draft"
    wants: ClassVar[Wants] = "means"

    def pattern(self, call: AttentionCall, order: Order, tensors: Tensors, inputs: Inputs) -> BlockPattern:
        assert inputs.means is not None
        return self.best(partial(select, *inputs.means), call, order, inputs.device)
