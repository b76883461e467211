"""The heads of a layer, dealt out to as few kernel launches as can be, and what runs them."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_accel.kernels.attention import attention, chosen, quantized_attention
from diffusers_accel.kernels.kept import kept
from diffusers_accel.kernels.merge import merge
from diffusers_accel.kernels.pattern import BlockPattern, head_flags, head_index
from diffusers_accel.kernels.pool import pool
from diffusers_accel.kernels.prep import Prepared, prep
from diffusers_accel.kernels.quantize import Quantized
from diffusers_accel.layout import TokenLayout
from diffusers_accel.memory import Held, Memory, mixed
from diffusers_accel.methods import BLOCK, Context, Draft, Method, Order
from diffusers_accel.methods.reuse import refreshes
from diffusers_accel.site import DenseAttention


@dataclass(frozen=True, eq=False)
class Group:
    """The heads of a launch that share a method.

    Args:
        heads: their numbers in the model.
        start: place of the first one in the launch.
        pattern: what they read; None where that is selected at run time.
        gate: bool [parts, heads] on the CPU, when they refresh; None without a gate.
    """

    method: Method
    heads: tuple[int, ...]
    start: int
    pattern: BlockPattern | None
    gate: Tensor | None

    @property
    def place(self) -> slice:
        return slice(self.start, self.start + len(self.heads))

    @property
    def key(self) -> Hashable:
        """By which a memory knows it."""
        return self.method, self.heads


@dataclass(frozen=True, eq=False)
class Launch:
    """Heads that one block-sparse launch computes, in one precision.

    Args:
        groups: of these heads, by method.
        orders: int64 [distinct orders, S], the token orders that the heads use.
        order_of: int64 [heads], which of these orders each head uses.
        model_heads: number of heads of the model.
    """

    precision: str
    groups: tuple[Group, ...]
    orders: Tensor
    order_of: Tensor
    model_heads: int

    @cached_property
    def heads(self) -> tuple[int, ...]:
        """Numbers in the model, in the launch's order."""
        return tuple(head for group in self.groups for head in group.heads)

    @cached_property
    def pattern(self) -> BlockPattern | None:
        """What all heads read, where none selects at run time."""
        patterns = [group.pattern for group in self.groups if group.pattern is not None]
        return BlockPattern.cat(patterns) if len(patterns) == len(self.groups) else None

    @cached_property
    def whole(self) -> bool:
        """Whether these are all heads in the model's own order, so that nothing needs to be moved."""
        own_order = all(group.method.order.identity for group in self.groups)
        return own_order and self.heads == tuple(range(self.model_heads))

    def rows(self, tokens: int) -> Tensor:
        """int64 [tokens * heads]: where each row of the launch's first tokens stands in the model's [S * H] rows."""
        orders = self.orders[self.order_of, :tokens]
        return (orders * self.model_heads + head_index(self.heads, orders.device)[:, None]).T.flatten()


@dataclass(frozen=True, eq=False)
class Deal:
    """The heads of a layer: dense ones, launches, and the rest, whose output is 0."""

    methods: tuple[Method, ...]
    layout: TokenLayout
    dense: tuple[int, ...]
    launches: tuple[Launch, ...]

    @cached_property
    def skipped(self) -> int:
        return len(self.methods) - len(self.dense) - sum(len(launch.heads) for launch in self.launches)

    @cached_property
    def remembering(self) -> frozenset[Hashable]:
        """The keys of the groups that use something of an earlier step."""
        return frozenset(group.key for launch in self.launches for group in launch.groups if group.method.timed)


class Turn(NamedTuple):
    """A group at one step: what it has held since an earlier one, which of its heads refresh their kept part (empty without
    reuse), and whether it selects anew."""

    held: Held | None
    refresh: list[bool]
    selects: bool


Reads = tuple[tuple[Method, int, float | Tensor], ...]


class Ran(NamedTuple):
    """What a layer, or one launch of it, has done.

    Args:
        out: [B, S, H, D].
        density: the share of block pairs that was computed; a 0-d tensor where only the device knows it.
        reused: how many heads reused a kept part.
        kernels: names of what ran, such as "portable int8".
        read: (method, heads, density) of the groups that computed just what their method selects.
    """

    out: Tensor
    density: float | Tensor
    reused: int
    kernels: tuple[str, ...] = ()
    read: Reads = ()


def deal(methods: tuple[Method, ...], ctx: Context, device: torch.device) -> Deal:
    """Deals the heads of a layer out; `ctx.heads` is ignored."""
    groups: dict[str, dict[Method, list[int]]] = {}
    for head, method in enumerate(methods):
        if not method.dense and not method.skips:
            groups.setdefault(method.precision, {}).setdefault(method, []).append(head)
    return Deal(
        methods=methods,
        layout=ctx.layout,
        dense=tuple(head for head, method in enumerate(methods) if method.dense),
        launches=tuple(_launch(precision, some, ctx, len(methods), device) for precision, some in groups.items()),
    )


def _launch(
    precision: str, members: dict[Method, list[int]], ctx: Context, model_heads: int, device: torch.device
) -> Launch:
    used: list[Order] = list(dict.fromkeys(method.order for method in members))
    groups: list[Group] = []
    for method, heads in members.items():
        here = replace(ctx, heads=tuple(heads))
        start = sum(len(group.heads) for group in groups)
        gate = method.reuse.gate(here) if method.reuse else None
        groups.append(Group(method, tuple(heads), start, _static_pattern(method, here, device), gate))
    order_of = [used.index(group.method.order) for group in groups for _ in group.heads]
    return Launch(
        precision=precision,
        groups=tuple(groups),
        orders=torch.stack([order.index(ctx.layout) for order in used]).to(device),
        order_of=torch.tensor(order_of, dtype=torch.int64, device=device),
        model_heads=model_heads,
    )


def _static_pattern(method: Method, ctx: Context, device: torch.device) -> BlockPattern | None:
    if method.dynamic:
        return None
    mask = method.mask(ctx) if method.calibrated else _layout_mask(method, ctx.layout)
    # One byte a block pair is moved, and counted where that is fast.
    mask = mask[..., : ctx.layout.key_blocks(BLOCK)].to(device).expand(len(ctx.heads), -1, -1)
    return BlockPattern.from_mask(mask[None], ctx.layout.tokens, ctx.layout.keys, BLOCK, BLOCK)


@kept(256)
def _layout_mask(method: Method, layout: TokenLayout) -> Tensor:
    """The mask of a method that knows no layers: one for all heads and layers that take it."""
    return method.mask(Context(layout, transformer="", layer=0, heads=(0,)))


def run(
    deal: Deal,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dense: DenseAttention,
    memory: Memory | None = None,
    now: tuple[int, int] = (0, 1),
) -> Ran:
    """Attention of one layer.

    Args:
        q: [B, S, H, D]; k, v: [B, keys, H, D].
        dense: the attention of dense heads.
        memory: of this layer and branch; None remembers nothing, so that what could be reused is computed.
        now: (step, steps) of the running call.
    """
    memory = memory or Memory()
    if deal.remembering:
        memory.begin(now, q, k, deal.remembering)
    if len(deal.launches) == 1 and deal.launches[0].whole:
        return _attend(deal.launches[0], q, k, v, None, deal.layout, memory, now)
    out = v.new_zeros(q.shape) if deal.skipped else v.new_empty(q.shape)
    density: float | Tensor = float(len(deal.dense))
    kernels: tuple[str, ...] = ("dense",) if deal.dense else ()
    read: Reads = ()
    reused = 0
    if deal.dense:
        index = head_index(deal.dense, q.device)
        out.index_copy_(2, index, dense(*(x.index_select(2, index) for x in (q, k, v))))
    for launch in deal.launches:
        rows = launch.rows(q.shape[1])
        ran = _attend(launch, q, k, v, rows, deal.layout, memory, now)
        out.view(out.shape[0], -1, out.shape[-1]).index_copy_(1, rows, ran.out.flatten(1, 2))
        density, reused = density + ran.density * len(launch.heads), reused + ran.reused
        kernels, read = kernels + ran.kernels, read + ran.read
    return Ran(out, density / len(deal.methods), reused, kernels, read)


def _attend(
    launch: Launch,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor | None,
    layout: TokenLayout,
    memory: Memory,
    now: tuple[int, int],
) -> Ran:
    """One launch on the model's q, k, v; the output has its heads, each in its own order. rows: as of `Launch.rows`, or None
    where the launch is `whole`."""
    turns = [_turn(group, memory, now) for group in launch.groups]
    pooled = any(turn.selects and group.pattern is None for group, turn in zip(launch.groups, turns, strict=True))
    prepared = _prepare(launch, q, k, v, rows, pooled)
    reads = [_read(group, turn, prepared.means, layout) for group, turn in zip(launch.groups, turns, strict=True)]
    together = _together(launch, reads)
    kernel = chosen(q.device, q.dtype, q.shape[3], (BLOCK, BLOCK), launch.precision)
    if isinstance(prepared.operands, Quantized):
        out, lse = quantized_attention(prepared.operands, together, impl=kernel)
    else:
        out, lse = attention(*prepared.operands, together, precision=launch.precision, impl=kernel)
    density: float | Tensor = 0.0
    read: Reads = ()
    reused = 0
    for group, turn, own in zip(launch.groups, turns, reads, strict=True):
        share = _density(own, turn.refresh)
        density = density + share * len(group.heads)
        if not any(turn.refresh):
            read += ((group.method, len(group.heads), share),)
        if not group.method.timed:
            continue
        place = group.place
        held = _remember(group, turn, own, prepared.operands, launch.precision, kernel, now[0])
        if held.out is not None and held.lse is not None:
            out[:, :, place] = merge([(out[:, :, place], lse[:, place]), (held.out, held.lse)])[0]
        memory.held[group.key] = held
        reused += len(turn.refresh) - sum(turn.refresh)
    return Ran(out, density / len(launch.heads), reused, (_named(kernel, launch.precision, q.device),), read)


def _named(kernel: str, precision: str, device: torch.device) -> str:
    if precision == "input":
        return kernel
    return f"{kernel} {precision}" + (" simulated" if device.type == "cpu" else "")


def _prepare(launch: Launch, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None, pooled: bool) -> Prepared:
    """The launch's heads in their orders, with the means of their blocks where some group selects by them."""
    if rows is None:
        return Prepared((q, k, v), (pool(q, BLOCK), pool(k, BLOCK)) if pooled else None)
    # Parts that are kept are computed from some of the heads, which codes of all heads cannot give.
    precision = "input" if any(group.method.reuse for group in launch.groups) else launch.precision
    return prep(q, k, v, rows, len(launch.heads), precision=precision, pooled=pooled, block=BLOCK)


def _turn(group: Group, memory: Memory, now: tuple[int, int]) -> Turn:
    reuse, select = group.method.reuse, group.method.select
    held = memory.held.get(group.key)
    if held is None:
        return Turn(None, [True] * len(group.heads) if reuse else [], True)
    if reuse:
        refresh = refreshes(reuse.every, group.gate, now, held.refreshed, memory.before)
        return Turn(held, refresh, any(refresh))
    assert isinstance(select, Draft)  # nothing else remembers without a reuse
    return Turn(held, [], now[0] - held.selected >= select.hold)


def _read(group: Group, turn: Turn, means: tuple[Tensor, Tensor] | None, layout: TokenLayout) -> BlockPattern:
    """What a group reads at this step."""
    if turn.held is not None and not turn.selects:
        return (
            turn.held.pattern
        )  # also where the plan's mask has changed since: what is kept is the rest of the held one
    fresh = group.pattern
    if fresh is None:
        select = group.method.select
        assert isinstance(select, Draft) and means is not None
        q_means, k_means = (each[:, :, group.place] for each in means)
        fresh = select.pattern_of_means(q_means, k_means, layout, group.method.order)
    if turn.held is None or all(turn.refresh):
        return fresh
    return mixed(fresh, turn.held.pattern, turn.refresh)


def _together(launch: Launch, patterns: list[BlockPattern]) -> BlockPattern:
    """The patterns of a launch's groups as one."""
    if len(patterns) == 1:
        return patterns[0]
    own = all(pattern is group.pattern for pattern, group in zip(patterns, launch.groups, strict=True))
    return launch.pattern if own and launch.pattern is not None else BlockPattern.cat(patterns)


def _remember(
    group: Group,
    turn: Turn,
    pattern: BlockPattern,
    operands: tuple[Tensor, Tensor, Tensor] | Quantized,
    precision: str,
    kernel: str,
    step: int,
) -> Held:
    """What a group remembers after this step; where heads refresh, their unread blocks are computed."""
    held, refresh = turn.held, turn.refresh
    heads = [head for head, now in enumerate(refresh) if now]
    out = lse = None
    if heads:
        assert isinstance(operands, tuple)
        q, k, v = (x[:, :, group.place] for x in operands)
        if len(heads) == len(refresh):
            # A selected pattern is complemented once; lists that stay with it would only take memory.
            static = pattern is group.pattern
            unread = pattern.derived(BlockPattern.complement) if static else pattern.complement()
        else:
            index = head_index(tuple(heads), pattern.device)
            q, k, v = (x.index_select(2, index) for x in (q, k, v))
            unread = pattern.take(heads).complement()
        out, lse = attention(q, k, v, unread, precision=precision, impl=kernel)
    if held is None or len(heads) == len(refresh) > 0:
        return Held(pattern, step, [step] * len(refresh), out, lse)
    if out is not None and lse is not None:
        assert held.out is not None and held.lse is not None
        held.out.index_copy_(2, index, out)
        held.lse.index_copy_(1, index, lse)
    return Held(
        pattern,
        held.selected if pattern is held.pattern else step,
        [step if now else last for now, last in zip(refresh, held.refreshed, strict=True)],
        held.out,
        held.lse,
    )


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
