"""Runs the heads of a layer as they were partitioned: each launch once through its stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.kernels.attention import attention, chosen, quantized_attention
from diffusers_accel.kernels.grouped import each_query_head, of_heads
from diffusers_accel.kernels.pattern import BlockPattern, head_flags, head_index
from diffusers_accel.kernels.pool import pool
from diffusers_accel.kernels.pooled import pooled
from diffusers_accel.kernels.prep import Prepared, prep
from diffusers_accel.kernels.quantize import Quantized
from diffusers_accel.methods import BLOCK, Method
from diffusers_accel.methods.rest import Partial, Read, RefreshDecision
from diffusers_accel.methods.select import Inputs
from diffusers_accel.methods.steps import decide, read_blocks, selects
from diffusers_accel.methods.uses import Tensors
from diffusers_accel.run.memory import LayerCache
from diffusers_accel.run.partition import Group, Launch, Partition


class GroupRead(NamedTuple):
    """What a group of heads has read at a step. Numbers are 0-d tensors where only the device knows them.

    Args:
        density: share of the block pairs.
        starved: see `Select.starved`; None where that cannot be.
    """

    method: Method
    heads: int
    density: float | Tensor
    starved: Tensor | None


class Output(NamedTuple):
    """What a layer, or one launch of it, has done.

    Args:
        out: [B, queries, H, D].
        density: the share of block pairs that was computed; a 0-d tensor where only the device knows it.
        reused: how many heads reused what they keep.
        kernels: names of what ran, such as "portable int8".
        read: of the groups that computed just what their method selects.
    """

    out: Tensor
    density: float | Tensor
    reused: int
    kernels: tuple[str, ...] = ()
    read: tuple[GroupRead, ...] = ()


def run(
    partition: Partition, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, cache: LayerCache | None = None
) -> Output:
    """Attention of one layer.

    Args:
        call: of which all heads have been partitioned; q holds these.
        q: [B, queries, H, D]; k, v: [B, keys, H_k, D], in which several heads may share one.
        cache: of this layer and branch; None remembers nothing, so that what could be reused is computed.
    """
    cache = cache or LayerCache()
    if partition.remembering:
        cache.begin(call.now or (0, 1), q, k, partition.remembering)
    if len(partition.launches) == 1 and partition.launches[0].whole:
        if len(partition.launches[0].groups) > 1:  # whose heads may share one of the keys
            k, v = (each_query_head(x, q.shape[2]) for x in (k, v))
        return _attend(partition.launches[0], partition.tensors, call, q, k, v, None, cache)
    out = v.new_zeros(q.shape) if partition.skipped else v.new_empty(q.shape)
    density: float | Tensor = float(len(partition.dense))
    kernels: tuple[str, ...] = ("dense",) if partition.dense else ()
    read: tuple[GroupRead, ...] = ()
    reused = 0
    if partition.dense:
        assert call.dense is not None
        index = head_index(partition.dense, q.device)
        own = q.index_select(2, index), *(of_heads(x, partition.dense, q.shape[2]) for x in (k, v))
        out.index_copy_(2, index, call.dense(*own))
    for launch in partition.launches:
        output = _attend(launch, partition.tensors, call, q, k, v, out, cache)
        density, reused = density + output.density * len(launch.places), reused + output.reused
        kernels, read = kernels + output.kernels, read + output.read
    return Output(out, density / len(partition.methods), reused, kernels, read)


def _attend(
    launch: Launch,
    tensors: Tensors,
    call: AttentionCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    into: Tensor | None,
    cache: LayerCache,
) -> Output:
    """One launch on the model's q, k, v. Its heads go to their rows of `into` [B, queries, H, D]; None: it is `whole`."""
    now = call.now or (0, 1)
    decisions = [
        decide(group.method, len(group.heads), cache.held.get(group.key), now, group.gate, cache.before)
        for group in launch.groups
    ]
    both = list(zip(launch.groups, decisions, strict=True))
    means = any(group.method.select.wants == "means" and selects(group.method, decision) for group, decision in both)
    rows = None if into is None else launch.rows
    prepared = _prepare(launch, q, k, v, rows, means)
    patterns = [_pattern(group, decision, tensors, call, prepared) for group, decision in both]
    kernel = chosen(q.device, q.dtype, q.shape[3], (BLOCK, BLOCK), launch.precision)
    density: float | Tensor = 0.0
    read: tuple[GroupRead, ...] = ()
    reused = 0
    partials: list[Partial | None] = []
    for group, decision, pattern in zip(launch.groups, decisions, patterns, strict=True):
        share = _density(pattern, decision.refresh)
        density = density + share * len(group.heads)
        if not any(decision.refresh):
            starved = group.method.select.starved(pattern, group.method.order, call.layout)
            read += (GroupRead(group.method, len(group.heads), share, starved),)
        if group.method.rest.changes_nothing and not group.method.timed:
            partials.append(None)
            continue  # at every call of most layers: nothing is made for it
        k_means = prepared.means[1][:, :, group.place] if prepared.means else None
        reader = _Kernels(prepared.operands, group.place, launch.precision, kernel, k_means)
        part, held = group.method.rest.unread(Read(pattern, pattern is group.pattern), decision, reader)
        partials.append(part)
        if group.method.timed:
            cache.held[group.key] = held
        reused += len(decision.refresh) - sum(decision.refresh)
    together, unread = _together(launch, patterns), _side_by_side(launch, partials)
    if isinstance(prepared.operands, Quantized):
        out, _ = quantized_attention(prepared.operands, together, impl=kernel, merged_with=unread, out=into, rows=rows)
    else:
        out, _ = attention(
            *prepared.operands,
            together,
            precision=launch.precision,
            impl=kernel,
            merged_with=unread,
            out=into,
            rows=rows,
        )
    return Output(out, density / len(launch.places), reused, (_named(kernel, launch.precision, q.device),), read)


def _side_by_side(launch: Launch, partials: list[Partial | None]) -> Partial | None:
    """What the groups of a launch do not read as one part, which is empty for heads that have none."""
    some = next((part for part in partials if part is not None), None)
    if some is None or len(partials) == 1:
        return some
    batch, queries, _, dim = some[0].shape
    zero, nothing = some[0].new_zeros(()), some[1].new_full((), -torch.inf)
    outs, lses = zip(
        *(
            part
            or (zero.expand(batch, queries, len(group.heads), dim), nothing.expand(batch, len(group.heads), queries))
            for group, part in zip(launch.groups, partials, strict=True)
        ),
        strict=True,
    )
    return torch.cat(outs, 2), torch.cat(lses, 1)


@dataclass(frozen=True)
class _Kernels:
    """What attends for the heads of a group that stand at `place` of the launch's operands."""

    operands: tuple[Tensor, Tensor, Tensor] | Quantized
    place: slice
    precision: str
    kernel: str
    k_means: Tensor | None  # where they were needed to select

    def attend(self, pattern: BlockPattern, heads: Sequence[int] | None = None) -> Partial:
        q, k, v = self._own()
        if heads is not None:
            k, v = (of_heads(x, heads, q.shape[2]) for x in (k, v))
            q = q.index_select(2, head_index(tuple(heads), q.device))
        return attention(q, k, v, pattern, precision=self.precision, impl=self.kernel)

    def pooled(self, pattern: BlockPattern) -> Partial:
        q, k, v = self._own()
        k_means = pool(k, BLOCK) if self.k_means is None else self.k_means
        return pooled(q, k_means, pool(v, BLOCK), pattern)

    def _own(self) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(self.operands, tuple)  # codes are made only where no stage looks at more
        q, k, v = (x[:, :, self.place] for x in self.operands)
        return q, k, v


def _prepare(launch: Launch, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, means: bool) -> Prepared:
    """The launch's heads in their orders, with the means of their blocks where some group selects by them."""
    if rows is None:
        return Prepared((q, k, v), (pool(q, BLOCK), pool(k, BLOCK)) if means else None)
    precision = "input" if launch.takes_tensors else launch.precision
    key_rows = launch.key_rows(*k.shape[1:3])
    return prep(q, k, v, rows, len(launch.places), key_rows=key_rows, precision=precision, pooled=means, block=BLOCK)


def _pattern(
    group: Group, decision: RefreshDecision, tensors: Tensors, call: AttentionCall, prepared: Prepared
) -> BlockPattern:
    """What a group reads at this step."""

    def select() -> BlockPattern:
        if group.pattern is not None:
            return group.pattern
        method = group.method
        return method.select.pattern(call.of(group.heads), method.order, tensors, _inputs(prepared, group))

    return read_blocks(group.method, decision, select)


def _inputs(prepared: Prepared, group: Group) -> Inputs:
    place = group.place
    means, operands = prepared.means, prepared.operands
    tokens = None
    if group.method.select.wants == "tokens":
        assert isinstance(operands, tuple)  # see `Launch.takes_tensors`
        q, k = operands[0], each_query_head(operands[1], operands[0].shape[2])
        tokens = q[:, :, place], k[:, :, place]
    return Inputs(
        operands.q.device if isinstance(operands, Quantized) else operands[0].device,
        (means[0][:, :, place], means[1][:, :, place]) if means else None,
        tokens,
    )


def _together(launch: Launch, patterns: list[BlockPattern]) -> BlockPattern:
    """The patterns of a launch's groups as one."""
    if len(patterns) == 1:
        return patterns[0]
    own = all(pattern is group.pattern for pattern, group in zip(patterns, launch.groups, strict=True))
    return launch.pattern if own and launch.pattern is not None else BlockPattern.cat(patterns)


def _named(kernel: str, precision: str, device: torch.device) -> str:
    if precision == "input":
        return kernel
    return f"{kernel} {precision}" + (" simulated" if device.type == "cpu" else "")


def _density(pattern: BlockPattern, refresh: list[bool]) -> float | Tensor:
    """The share of the block pairs that a group computes, all of them where heads refresh; does not wait for the device."""
    if refresh and all(refresh):
        return 1.0
    if not any(refresh):
        known = pattern.device.type == "cpu" or "computed_blocks" in pattern.__dict__
        return pattern.density if known else pattern.counts.double().mean() / pattern.key_blocks
    reads = pattern.counts.double().mean((0, 2)) / pattern.key_blocks
    reads = reads.masked_fill(head_flags(tuple(refresh), reads.device), 1.0).mean()
    return float(reads) if reads.device.type == "cpu" else reads
