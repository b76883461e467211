"""All candidates in one batch row of a measured call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.kernels.merge import merge
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.methods import Method, Order
from diffusers_accel.methods.rest import Read, RefreshDecision
from diffusers_accel.methods.steps import decide, read_blocks
from diffusers_accel.search.measure import SampledHeads, deviations, mean_errors
from diffusers_accel.search.scores import DENSE, Array
from diffusers_accel.search.selections import KeptRows, RowBlocks, RowReader, Selections, as_partial


@dataclass(frozen=True)
class Chunk:
    """Some heads of a measured row.

    Args:
        call: which heads, where and when.
        sampled: their q, k, v and sampled rows.
        dense: fp32 [heads, rows, D], their dense output, which the first candidate fills in.
        grams: fp32 [heads, D, D], of the output projection.
    """

    call: AttentionCall
    sampled: SampledHeads
    dense: Tensor
    grams: Tensor

    def take(self, where: Array) -> Chunk:
        """Some of these heads, by their places; itself when they are all."""
        if len(where) == len(self.call.heads):
            return self
        local = torch.from_numpy(where).to(self.dense.device)
        call = self.call.of(tuple(self.call.heads[place] for place in where))
        return Chunk(call, self.sampled.take(local), self.dense[local], self.grams[local])


class RowProbe:
    """What is found in one row, [heads, candidates] each: felt and mse as in `Deviations`, density, samples (0 or 1); and
    mean_error fp32 [heads, candidates, D], over the rows of the video.

    Args:
        kept: what candidates have kept for this row. One that keeps an output and is missing is not measured.
        ages: of each candidate, the steps since then, by which what is found is divided; 1 for those that keep nothing.
        heads: of the whole row.
        dim: D.
    """

    def __init__(
        self,
        candidates: Sequence[Method],
        selections: Selections,
        kept: Mapping[int, KeptRows],
        ages: Sequence[int],
        heads: int,
        dim: int,
    ) -> None:
        self.felt, self.mse, self.density = (np.zeros((heads, len(candidates))) for _ in range(3))
        self.samples = np.zeros((heads, len(candidates)), "i8")
        self.mean_error = np.zeros((heads, len(candidates), dim), "f4")
        self._candidates = candidates
        self._selections = selections
        self._kept = kept
        self._ages = ages

    def add(self, chunk: Chunk) -> None:
        """Measures some of the heads."""
        for (order, precision), members in grouped(self._candidates, range(len(self._candidates))).items():
            self._add_group(chunk, order, precision, members)

    def _add_group(self, chunk: Chunk, order: Order, precision: str, members: list[int]) -> None:
        """Candidates of one order and precision. An order that only some heads may take is looked at in those only."""
        owners = self._owners(chunk.call, members)
        where = np.flatnonzero(np.any(list(owners.values()), axis=0))
        if not len(where):
            return
        chunk = chunk.take(where)
        reader = RowReader(chunk.sampled, order, precision)
        found = [self._read(index, chunk) for index in owners]
        out, lse = reader.partials.merge(torch.stack([pattern.mask()[0] for _, pattern, _ in found]))
        for place, (index, (decision, pattern, _)) in enumerate(zip(owners, found, strict=True)):
            if index == DENSE:
                chunk.dense.copy_(out[:, place])
            unread, _ = self._candidates[index].rest.unread(Read(pattern, shared=False), decision, reader)
            if unread is not None:
                merged, _ = merge([as_partial(out[:, place], lse[:, place]), unread])
                out[:, place] = merged[0].transpose(0, 1)
        off = deviations(out, chunk.dense, chunk.grams)
        mean = mean_errors(out, chunk.dense, chunk.sampled)
        for place, (index, own) in enumerate(owners.items()):
            here = own[where]
            heads = np.array(chunk.call.heads)[here]
            self.felt[heads, index] = off.felt[here, place] / self._ages[index]
            self.mse[heads, index] = off.mse[here, place] / self._ages[index]
            self.density[heads, index] = found[place][2].numpy()[here]
            self.samples[heads, index] = 1
            self.mean_error[heads, index] = mean[here, place]

    def _owners(self, call: AttentionCall, members: list[int]) -> dict[int, Array]:
        """Of each candidate that can be measured here, bool [heads]: the heads that may take it."""
        ready = (index for index in members if index in self._kept or not self._candidates[index].rest.remembers)
        found = {index: self._selections.owned(self._candidates[index], call).numpy() for index in ready}
        return {index: own for index, own in found.items() if own.any()}

    def _read(self, index: int, chunk: Chunk) -> tuple[RefreshDecision, BlockPattern, Tensor]:
        """What a candidate does at this step, the blocks that its rows read, and its density, fp64 [heads]."""
        method, call = self._candidates[index], chunk.call
        assert call.now is not None
        kept = self._kept[index].take(call.heads, chunk.dense.device) if index in self._kept else None
        decision = decide(method, len(call.heads), kept.held if kept else None, call.now, None, None)
        fresh: list[RowBlocks] = []

        def select() -> BlockPattern:
            fresh.append(self._selections.rows(method, call, chunk.sampled))
            return fresh[0].pattern

        pattern = read_blocks(method, decision, select)
        if fresh:
            return decision, pattern, fresh[0].density
        assert kept is not None
        return decision, pattern, kept.density


def keep(
    method: Method, call: AttentionCall, sampled: SampledHeads, reader: RowReader, selections: Selections
) -> KeptRows:
    """What a candidate that begins now, or refreshes, keeps of the rows of a later step."""
    assert call.now is not None
    decision = decide(method, len(call.heads), None, call.now, None, None)
    rows = selections.rows(method, call, sampled)
    _, held = method.rest.unread(Read(rows.pattern, shared=False), decision, reader)
    return KeptRows.of(held, rows.density, sampled.q.dtype)


def grouped(candidates: Sequence[Method], members: Iterable[int]) -> dict[tuple[Order, str], list[int]]:
    """Candidates by order and precision; dense, the first candidate, is in the first group."""
    groups: dict[tuple[Order, str], list[int]] = {}
    for index in members:
        groups.setdefault((candidates[index].order, candidates[index].precision), []).append(index)
    return groups
