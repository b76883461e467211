"""The runtime's own stages at work on sampled rows: what a candidate reads there, and what it keeps for later ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.pool import pool
from diffusers_accel.kernels.pooled import pooled
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, Method, Order, Select
from diffusers_accel.methods.rest import CacheEntry, Partial
from diffusers_accel.methods.select import Inputs
from diffusers_accel.search.measure import BlockPartials, SampledHeads


@dataclass(frozen=True)
class RowBlocks:
    """The blocks that sampled rows read.

    Args:
        pattern: of the rows, in query blocks of one.
        density: fp64 [heads] on the CPU: the share of the block pairs that all queries read.
    """

    pattern: BlockPattern
    density: Tensor


class Selections:
    """What candidates select.

    Args:
        tensors: what they read of a plan; looked at anew at each call.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self._fixed: dict[tuple[Select, Order, TokenLayout, int, torch.device], BlockPattern] = {}

    def owned(self, method: Method, call: AttentionCall) -> Tensor:
        """bool [heads]: which heads of a call may take a method."""
        owners = method.select.owners(call, method.order, self.tensors)
        return torch.ones(len(call.heads), dtype=torch.bool) if owners is None else owners

    def rows(self, method: Method, call: AttentionCall, sampled: SampledHeads) -> RowBlocks:
        """What the sampled rows of the heads of a call read, selected now."""
        pattern = self._of_owners(method, call, sampled)
        density = pattern.counts.double().sum((0, 2)).cpu() / (pattern.query_blocks * pattern.key_blocks)
        index = sampled.query_block(method.order)
        rows = replace(
            pattern,
            blocks=pattern.blocks.index_select(2, index),
            counts=pattern.counts.index_select(2, index),
            queries=len(index),
            block_q=1,
        )
        return RowBlocks(rows, density)

    def _of_owners(self, method: Method, call: AttentionCall, sampled: SampledHeads) -> BlockPattern:
        """The pattern of all heads of a call; those that may not take the method read nothing."""
        owners = self.owned(method, call)
        if bool(owners.all()):
            return self._pattern(method, call, sampled)
        own = owners.nonzero()[:, 0]
        here = call.of(tuple(call.heads[place] for place in own.tolist()))
        own = own.to(sampled.q.device)
        pattern = self._pattern(method, here, sampled.take(own) if method.select.wants else sampled)
        shape = pattern.blocks.shape
        blocks = pattern.blocks.new_zeros(shape[0], len(call.heads), *shape[2:]).index_copy_(1, own, pattern.blocks)
        counts = pattern.counts.new_zeros(shape[0], len(call.heads), shape[2]).index_copy_(1, own, pattern.counts)
        return replace(pattern, blocks=blocks, counts=counts)

    def _pattern(self, method: Method, call: AttentionCall, sampled: SampledHeads) -> BlockPattern:
        select, order, device = method.select, method.order, sampled.q.device
        if select.wants:
            means = sampled.means(order) if select.wants == "means" else None
            return select.pattern(call, order, self.tensors, Inputs(device, means, sampled.sorted(order)))
        if select.depends(call, order, self.tensors) is not None:
            return select.pattern(call, order, self.tensors, Inputs(device))
        key = select, order, call.layout, len(call.heads), device
        if key not in self._fixed:
            self._fixed[key] = select.pattern(call, order, self.tensors, Inputs(device))
        return self._fixed[key]


class RowReader:
    """What attends for the sampled rows of some heads, in an order and a precision."""

    def __init__(self, sampled: SampledHeads, order: Order, precision: str) -> None:
        self.partials: BlockPartials = sampled.partials(order, precision)
        self._sampled = sampled
        self._order = order

    def attend(self, pattern: BlockPattern, heads: Sequence[int] | None = None) -> Partial:
        partials = self.partials if heads is None else self.partials.take(heads)
        out, lse = partials.merge(pattern.mask()[0][None])
        return as_partial(out[:, 0], lse[:, 0])

    def pooled(self, pattern: BlockPattern) -> Partial:
        _, k = self._sampled.sorted(self._order)
        q, v = self._sampled.q[self._sampled.rows][None], self._sampled.sorted_values(self._order)
        out, lse = pooled(q.float(), pool(k, BLOCK), pool(v, BLOCK), pattern)
        return out, lse


def as_partial(out: Tensor, lse: Tensor) -> Partial:
    """Out [heads, rows, D] and LSE [heads, rows] as the stages have them."""
    return out.transpose(0, 1)[None], lse[None]


@dataclass(frozen=True)
class KeptRows:
    """What a candidate holds of an earlier call for sampled rows of a later one, on the CPU, outputs in the model's type.

    Args:
        density: fp64 [heads], of the blocks that were selected.
    """

    held: CacheEntry
    density: Tensor

    @classmethod
    def of(cls, held: CacheEntry, density: Tensor, dtype: torch.dtype) -> KeptRows:
        moved = replace(held, pattern=held.pattern.to("cpu"))
        if held.out is not None and held.lse is not None:
            moved = replace(moved, out=held.out.to(dtype).cpu(), lse=held.lse.cpu())
        return cls(moved, density)

    @classmethod
    def cat(cls, some: Sequence[KeptRows]) -> KeptRows:
        """Of several groups of heads."""
        held = [each.held for each in some]
        outs = [each.out for each in held if each.out is not None]
        lses = [each.lse for each in held if each.lse is not None]
        whole = CacheEntry(
            BlockPattern.cat([each.pattern for each in held]),
            held[0].selected,
            [step for each in held for step in each.refreshed],
            torch.cat(outs, 2) if outs else None,
            torch.cat(lses, 1) if lses else None,
        )
        return cls(whole, torch.cat([each.density for each in some]))

    def take(self, heads: Sequence[int], device: torch.device) -> KeptRows:
        """Of some heads, on a device, in fp32."""
        some, held = list(heads), self.held
        taken = CacheEntry(
            held.pattern.take(some).to(device),
            held.selected,
            [held.refreshed[head] for head in some] if held.refreshed else [],
            None if held.out is None else held.out[:, :, some].float().to(device),
            None if held.lse is None else held.lse[:, some].to(device),
        )
        return KeptRows(taken, self.density[some])
