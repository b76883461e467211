"""All candidates in one batch row of a measured call, and what those that reuse keep of an earlier one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.methods import Context, Method, Order
from diffusers_accel.search.masks import Masks, StoredChoice, owned
from diffusers_accel.search.measure import BlockParts, SampledHeads, deviations
from diffusers_accel.search.scores import DENSE, Array


@dataclass(frozen=True)
class Kept:
    """What a reusing candidate keeps of one call for the rows of a later one, on the CPU.

    Args:
        read: bool [heads, rows, key blocks], the blocks that it selected.
        density: fp64 [heads], their share in the whole mask.
        out: [heads, rows, D], attention over all other blocks, in the model's type.
        lse: fp32 [heads, rows], of the same.
    """

    read: Tensor
    density: Tensor
    out: Tensor
    lse: Tensor

    @classmethod
    def of(cls, parts: BlockParts, mask: Tensor, dtype: torch.dtype) -> Kept:
        """What is kept of the rows of `parts` under a mask [heads, query blocks, key blocks]."""
        read = mask[:, parts.query_block]
        out, lse = parts.merge(~read[None])
        return cls(read.cpu(), mask.double().mean((1, 2)).cpu(), out[:, 0].to(dtype).cpu(), lse[:, 0].cpu())

    @classmethod
    def cat(cls, some: Iterable[Kept]) -> Kept:
        """Of several groups of heads."""
        return cls(*(torch.cat(each) for each in zip(*(vars(kept).values() for kept in some))))

    def take(self, heads: Sequence[int]) -> Kept:
        """Of some heads."""
        some = list(heads)
        return Kept(self.read[some], self.density[some], self.out[some], self.lse[some])

    def joined(self, out: Tensor, lse: Tensor) -> Tensor:
        """A fresh part [heads, rows, D], with its LSE [heads, rows], merged with this one."""
        old_out, old_lse = self.out.to(out), self.lse.to(lse)
        both = torch.logaddexp(lse, old_lse)[..., None]
        return out * (lse[..., None] - both).exp() + old_out * (old_lse[..., None] - both).exp()


@dataclass(frozen=True)
class Chunk:
    """Some heads of a measured row.

    Args:
        ctx: which heads, where and when.
        sampled: their q, k, v and sampled rows.
        dense: fp32 [heads, rows, D], their dense output, which the first candidate fills in.
        grams: fp32 [heads, D, D], of the output projection.
    """

    ctx: Context
    sampled: SampledHeads
    dense: Tensor
    grams: Tensor

    def take(self, where: Array) -> Chunk:
        """Some of these heads, by their places; itself when they are all."""
        if len(where) == len(self.ctx.heads):
            return self
        local = torch.from_numpy(where).to(self.dense.device)
        ctx = replace(self.ctx, heads=tuple(self.ctx.heads[place] for place in where))
        return Chunk(ctx, self.sampled.take(local), self.dense[local], self.grams[local])


class RowProbe:
    """What is found in one row, [heads, candidates] each: felt and mse as in `Deviations`, density, samples (0 or 1).

    Args:
        kept: what each reusing candidate kept for this row; one that is missing is not measured.
        ages: of each candidate, the steps since then, by which what is found is divided; 1 for those that reuse nothing.
        heads: of the whole row.
    """

    def __init__(
        self,
        candidates: Sequence[Method],
        masks: Masks,
        stored: StoredChoice,
        kept: Mapping[int, Kept],
        ages: Sequence[int],
        heads: int,
    ) -> None:
        self.felt, self.mse, self.density = (np.zeros((heads, len(candidates))) for _ in range(3))
        self.samples = np.zeros((heads, len(candidates)), "i8")
        self._candidates = candidates
        self._masks = masks
        self._stored = stored
        self._kept = kept
        self._ages = ages

    def add(self, chunk: Chunk) -> None:
        """Measures some of the heads."""
        for (order, precision), members in grouped(self._candidates, range(len(self._candidates))).items():
            self._add_group(chunk, order, precision, members)

    def _add_group(self, chunk: Chunk, order: Order, precision: str, members: list[int]) -> None:
        """Candidates of one order and precision. An order that only stored masks have is looked at in their own heads only."""
        owners = self._owners(chunk.ctx, members)
        where = np.flatnonzero(np.any(list(owners.values()), axis=0))
        if not len(where):
            return
        chunk = chunk.take(where)
        parts = chunk.sampled.parts(order, precision)
        found = [self._read(index, chunk, parts) for index in owners]
        out, lse = parts.merge(_stacked([read for _, read in found]))
        for place, index in enumerate(owners):
            if index == DENSE:
                chunk.dense.copy_(out[:, place])
            elif index in self._kept:
                out[:, place] = self._kept[index].take(chunk.ctx.heads).joined(out[:, place], lse[:, place])
        off = deviations(out, chunk.dense, chunk.grams)
        for place, (index, own) in enumerate(owners.items()):
            here = own[where]
            heads = np.array(chunk.ctx.heads)[here]
            self.felt[heads, index] = off.felt[here, place] / self._ages[index]
            self.mse[heads, index] = off.mse[here, place] / self._ages[index]
            self.density[heads, index] = found[place][0].expand(len(where)).numpy()[here]
            self.samples[heads, index] = 1

    def _owners(self, ctx: Context, members: list[int]) -> dict[int, Array]:
        """Of each candidate that can be measured here, bool [heads]: the heads that may take it."""
        ready = (index for index in members if index in self._kept or not self._candidates[index].reuse)
        found = {index: owned(self._candidates[index], self._stored, ctx) for index in ready}
        return {index: own for index, own in found.items() if own.any()}

    def _read(self, index: int, chunk: Chunk, parts: BlockParts) -> tuple[Tensor, Tensor]:
        """Density, fp64 [1 or heads] on the CPU, and blocks, bool [1 or heads, rows, key blocks], of a candidate."""
        if index in self._kept:
            kept = self._kept[index].take(chunk.ctx.heads)
            return kept.density, kept.read.to(chunk.dense.device)
        mask = self._masks.of(self._candidates[index], chunk.ctx, chunk.sampled)
        return mask.double().mean((1, 2)).cpu(), mask[:, parts.query_block]


def grouped(candidates: Sequence[Method], members: Iterable[int]) -> dict[tuple[Order, str], list[int]]:
    """Candidates by order and precision; dense, the first candidate, is in the first group."""
    groups: dict[tuple[Order, str], list[int]] = {}
    for index in members:
        groups.setdefault((candidates[index].order, candidates[index].precision), []).append(index)
    return groups


def _stacked(reads: list[Tensor]) -> Tensor:
    """[candidates, 1 or heads, rows, key blocks] from [1 or heads, rows, key blocks] of each."""
    wide = max(len(read) for read in reads)
    return torch.stack([read.expand(wide, -1, -1) for read in reads])
