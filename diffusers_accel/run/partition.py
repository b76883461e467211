"""The heads of a layer, partitioned into as few kernel launches as can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.kernels.grouped import key_heads
from diffusers_accel.kernels.pattern import BlockPattern, head_index
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import Method, Order
from diffusers_accel.methods.select import Inputs
from diffusers_accel.methods.uses import Tensors

MAX_LAYOUTS = 4


@dataclass(frozen=True, eq=False)
class Group:
    """The heads of a launch that share a method.

    Args:
        heads: their numbers in the model.
        places: where they stand among the heads of q.
        start: place of the first one in the launch.
        pattern: what they read; None where that is selected at run time.
        gate: bool [segments, heads] on the CPU, when they refresh; None without a gate.
    """

    method: Method
    heads: tuple[int, ...]
    places: tuple[int, ...]
    start: int
    pattern: BlockPattern | None
    gate: Tensor | None

    @property
    def place(self) -> slice:
        return slice(self.start, self.start + len(self.heads))

    @property
    def key(self) -> Hashable:
        """What the entries of a cache are found by."""
        return self.method, self.heads


@dataclass(frozen=True, eq=False)
class Launch:
    """Heads that one block-sparse launch computes, in one precision.

    Args:
        groups: of these heads, by method.
        orders: int32 [distinct orders, tokens], the token orders that the heads use.
        query_orders: int32 [distinct orders, queries], which row of q stands at each place of these; `orders` itself where
            every token queries.
        order_of: int64 [heads], which of these orders each head uses.
        all_heads: number of heads of q.
        moves: whether some of these orders is not the model's own.
    """

    precision: str
    groups: tuple[Group, ...]
    orders: Tensor
    query_orders: Tensor
    order_of: Tensor
    all_heads: int
    moves: bool
    _key_rows: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False)

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Where its heads stand among those of q, in the launch's order."""
        return tuple(place for group in self.groups for place in group.places)

    @cached_property
    def pattern(self) -> BlockPattern | None:
        """What all heads read, where none selects at run time."""
        patterns = [group.pattern for group in self.groups if group.pattern is not None]
        return BlockPattern.cat(patterns) if len(patterns) == len(self.groups) else None

    @cached_property
    def whole(self) -> bool:
        """Whether these are all heads in the model's own order, so that nothing needs to be moved."""
        return not self.moves and self.places == tuple(range(self.all_heads))

    @cached_property
    def takes_tensors(self) -> bool:
        """Whether some stage looks at q, k and v themselves, whose codes would not do."""
        return any(group.method.rest.reads or group.method.select.wants == "tokens" for group in self.groups)

    @cached_property
    def rows(self) -> Tensor:
        """int32 [queries * heads]: where each of the launch's queries stands in the [queries * H] rows of q. Kept with the
        launch, as its block lists are, which are about as large."""
        return _rows(self.query_orders[self.order_of], self.places, self.all_heads)

    def key_rows(self, keys: int, heads: int) -> Tensor | None:
        """int32 [keys * heads of the launch]: where each of the launch's keys stands in the [keys * heads] rows of k; None
        where that follows from `rows`, as every token queries."""
        if self.query_orders is self.orders:
            return None
        if (keys, heads) not in self._key_rows:
            of = key_heads(self.places, self.all_heads, heads)
            self._key_rows[keys, heads] = _rows(self.orders[self.order_of, :keys], of, heads)
        return self._key_rows[keys, heads]


@dataclass(frozen=True, eq=False)
class Partition:
    """The heads of a layer: dense ones, launches, and the rest, whose output is 0.

    Args:
        dense: where these stand among the heads of q.
        tensors: of the plan, for what is selected at run time.
    """

    methods: tuple[Method, ...]
    layout: TokenLayout
    dense: tuple[int, ...]
    launches: tuple[Launch, ...]
    tensors: Tensors

    @cached_property
    def skipped(self) -> int:
        return len(self.methods) - len(self.dense) - sum(len(launch.places) for launch in self.launches)

    @cached_property
    def remembering(self) -> frozenset[Hashable]:
        """The keys of the groups that use something of an earlier step."""
        return frozenset(group.key for launch in self.launches for group in launch.groups if group.method.timed)


@dataclass(frozen=True, eq=False)
class Mix:
    """Which method each head of a layer takes, in one span of a plan. Made by `Partitions.mix`, which gives equal heads one."""

    methods: tuple[Method, ...]

    @cached_property
    def distinct(self) -> tuple[Method, ...]:
        return tuple(dict.fromkeys(self.methods))

    @cached_property
    def dense(self) -> bool:
        return all(method.dense for method in self.distinct)

    @cached_property
    def timed(self) -> bool:
        """Whether some head uses something of an earlier step."""
        return any(method.timed for method in self.distinct)

    @cached_property
    def remembers(self) -> bool:
        """Whether some head keeps an output from step to step."""
        return any(method.rest.remembers for method in self.distinct)

    @cached_property
    def needs_history(self) -> bool:
        """Whether some head tells the keys of earlier chunks from the others."""
        return any(method.select.needs_history for method in self.distinct)

    @cached_property
    def labels(self) -> Counter[str]:
        """Label -> heads."""
        return Counter(method.label for method in self.methods)


Needs = tuple[tuple[Method, Hashable], ...]  # on what the blocks of some methods depend beside the layout
Key = tuple[Mix, TokenLayout, torch.device, Needs, tuple[int, ...]]  # the last: numbers of the heads


class Partitions:
    """How the layers under one patch are partitioned: layers with equal heads share their block lists.

    Block lists of more than `MAX_LAYOUTS` layouts, and those of one layer that are not of the running transformer and segment of
    the schedule, are dropped and built again: a large model's are gigabytes.

    Args:
        tensors: of the plan.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._mixes: dict[tuple[Method, ...], Mix] = {}
        self._found: dict[Key, Partition] = {}
        self._places: dict[Key, tuple[str, int]] = {}  # of those that are one layer's own

    def mix(self, methods: Iterable[Method]) -> Mix:
        """Equal methods have one."""
        found = tuple(methods)
        return self._mixes.setdefault(found, Mix(found))

    def find(self, mix: Mix, call: AttentionCall, device: torch.device) -> Partition:
        """How the heads of a call are partitioned."""
        key: Key = mix, call.layout, device, self._needs(mix, call), call.heads
        if key not in self._found:
            self._make_room(key, call)
            self._found[key] = partition(mix.methods, call, self._tensors, device)
            if key[3]:
                self._places[key] = call.place
        return self._found[key]

    def leave(self, place: tuple[str, int]) -> None:
        """Another span of the plan begins: drops what is this layer's own."""
        self._drop(key for key, of in self._places.items() if of == place)

    def clear(self) -> None:
        self._found.clear()
        self._places.clear()

    def all(self) -> list[Partition]:
        """Those that are there now."""
        return list(self._found.values())

    def _needs(self, mix: Mix, call: AttentionCall) -> Needs:
        return tuple(
            (method, need)
            for method in mix.distinct
            for need in (method.select.depends(call, method.order, self._tensors), method.rest.depends(call))
            if need is not None
        )

    def _make_room(self, key: Key, call: AttentionCall) -> None:
        layouts = {layout for _, layout, *_ in self._found}
        if key[1] not in layouts and len(layouts) == MAX_LAYOUTS:
            self.clear()
        if key[3]:
            needs = dict(key[3])
            self._drop(
                other
                for other, place in self._places.items()
                if place[0] != call.transformer
                or (place == call.place and any(needs.get(method, need) != need for method, need in other[3]))
            )

    def _drop(self, keys: Iterable[Key]) -> None:
        for key in list(keys):
            del self._found[key], self._places[key]


def _rows(orders: Tensor, heads: tuple[int, ...], of: int) -> Tensor:
    """Of orders [heads, places], the rows place by place, in [S * of] rows: 2^31 of them would be 256 GiB of q alone."""
    return (orders * of + head_index(heads, orders.device).int()[:, None]).T.flatten()


def partition(methods: tuple[Method, ...], call: AttentionCall, tensors: Tensors, device: torch.device) -> Partition:
    """Partitions the heads of a call, of which each has its method; `tensors` are the plan's."""
    precisions: dict[str, dict[Method, list[int]]] = {}
    for place, method in enumerate(methods):
        if not method.dense and not method.skips:
            precisions.setdefault(method.precision, {}).setdefault(method, []).append(place)
    return Partition(
        methods=methods,
        layout=call.layout,
        dense=tuple(place for place, method in enumerate(methods) if method.dense),
        launches=tuple(_launch(precision, some, call, tensors, device) for precision, some in precisions.items()),
        tensors=tensors,
    )


def _launch(
    precision: str, members: dict[Method, list[int]], call: AttentionCall, tensors: Tensors, device: torch.device
) -> Launch:
    used: list[Order] = list(dict.fromkeys(method.order for method in members))
    groups: list[Group] = []
    for method, places in members.items():
        here = call.of(tuple(call.heads[place] for place in places))
        start = sum(len(group.heads) for group in groups)
        static = not method.select.wants
        pattern = method.select.pattern(here, method.order, tensors, Inputs(device)) if static else None
        gate = method.rest.gate(call.place, here.heads, tensors)
        groups.append(Group(method, here.heads, tuple(places), start, pattern, gate))
    order_of = [used.index(group.method.order) for group in groups for _ in group.heads]
    orders = torch.stack([order.index(call.layout) for order in used]).to(device, torch.int32)
    query_orders = orders
    if call.layout.queries != call.layout.tokens:
        query_orders = torch.stack([order.query_index(call.layout) for order in used]).to(device, torch.int32)
    return Launch(
        precision=precision,
        groups=tuple(groups),
        orders=orders,
        query_orders=query_orders,
        order_of=torch.tensor(order_of, dtype=torch.int64, device=device),
        all_heads=len(call.heads),
        moves=any(order.moves(call.layout) for order in used),
    )
