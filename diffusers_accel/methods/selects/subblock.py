"""A block pair's score from the means of its parts, as in SGLang's SubBlock: an estimate of the attention that it holds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.files import quoted
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.pool import pool
from diffusers_accel.kernels.select import select_by_scores
from diffusers_accel.methods.blocks import BLOCK
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.ranked import RankedSelect
from diffusers_accel.methods.select import Inputs, Wants
from diffusers_accel.methods.uses import Tensors

MAP_BYTES = 256 * 2**20  # of scores between parts that are held at once; those of one head always are


@dataclass(frozen=True)
class SubBlock(RankedSelect):
    """Blocks are cut into parts, and a pair scores the log-sum-exp of the scores between the means of its parts.

        score(i, j) = log sum over parts a of block i, b of block j of exp(mean(q_a) . mean(k_b) / sqrt(head dim))

    One mean a block, as in `Draft`, hides that some of its queries want some of its keys; this looks for such pairs of parts.
    With `parts=1` it is `Draft`. A part without a token, at the end of the sequence, is left out; one with fewer tokens than
    others counts as a whole one, as a block does in `Draft`. The other arguments are those of `RankedSelect`.

    Args:
        parts: into how many parts a block is cut, for q and for k; it divides 128. The map has parts^2 as many entries.
        normalize: take the softmax of each part of the queries over all keys first, so that all parts count alike. Without
            it, as published, the part whose scores are largest decides for its block.
    """

    parts: int = 4
    normalize: bool = False
    kind: ClassVar[str] = "subblock"
    wants: ClassVar[Wants] = "tokens"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.parts, bool) or not isinstance(self.parts, int) or self.parts < 1 or BLOCK % self.parts:
            raise ValueError(
                f"parts says into how many a block of {BLOCK} tokens is cut, expected a divisor of {BLOCK}, "
                f"found {quoted(self.parts)}"
            )

    @property
    def name(self) -> str:
        words = (self.kind, f"of {self.parts}" if self.parts != 4 else "", "normalized" if self.normalize else "")
        return " ".join(word for word in words if word)

    def pattern(self, call: AttentionCall, order: Order, tensors: Tensors, inputs: Inputs) -> BlockPattern:
        assert inputs.tokens is not None
        q, k = (pool(x, BLOCK // self.parts) for x in inputs.tokens)
        return self.best(
            partial(select_by_scores, pair_scores(q, k, self.parts, self.normalize)), call, order, inputs.device
        )


def pair_scores(q: Tensor, k: Tensor, parts: int, normalize: bool = False) -> Tensor:
    """fp32 [B, H, query blocks, key blocks], of the means of parts, fp32 [B, query parts, H, D] and [B, key parts, H, D]."""
    at_once = max(1, MAP_BYTES // (4 * q.shape[0] * q.shape[1] * k.shape[1]))
    some = zip(q.split(at_once, 2), k.split(at_once, 2))
    return torch.cat([_pair_scores(*heads, parts, normalize) for heads in some], 1)


def _pair_scores(q: Tensor, k: Tensor, parts: int, normalize: bool) -> Tensor:
    scores = q.shape[3] ** -0.5 * torch.einsum("bqhd,bkhd->bhqk", q, k)
    if normalize:
        scores = scores.log_softmax(-1)
    missing = [-scores.shape[dim] % parts for dim in (3, 2)]  # of the last block
    scores = torch.nn.functional.pad(scores, (0, missing[0], 0, missing[1]), value=-torch.inf)
    return scores.unflatten(3, (-1, parts)).unflatten(2, (-1, parts)).logsumexp((3, 5))
