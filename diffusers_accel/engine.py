"""A plan at work at one site: heads dealt to methods once per span and layout, and attended in as few launches as can be."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from diffusers_accel.kernels.attention import attention, choices
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, DENSE, AxisOrder, Context, Method
from diffusers_accel.plan import Plan
from diffusers_accel.site import DenseAttention, Site


@dataclass
class Tally:
    """What a site has done since it was patched or cleared."""

    calls: int = 0
    density: float = 0.0  # summed over calls
    heads: Counter[str] = field(default_factory=Counter)  # label -> heads x calls
    kernels: Counter[str] = field(default_factory=Counter)  # kernel -> calls
    notes: Counter[str] = field(default_factory=Counter)  # reason -> calls


@dataclass(frozen=True)
class Launch:
    """The heads of a layer, dealt out for one layout on one device: dense heads, sparse heads, and the rest, which are 0.

    Args:
        dense: heads that attend densely.
        sparse: heads of the one block-sparse launch.
        orders: int64 [distinct orders, S], the token orders that the sparse heads use.
        order_of: int64 [sparse heads], which of these orders each sparse head uses.
        pattern: what each sparse head reads, in its order; None without sparse heads.
    """

    methods: tuple[Method, ...]
    dense: tuple[int, ...]
    sparse: tuple[int, ...]
    orders: Tensor
    order_of: Tensor
    pattern: BlockPattern | None

    @cached_property
    def density(self) -> float:
        sparse = self.pattern.density * len(self.sparse) if self.pattern else 0.0
        return (len(self.dense) + sparse) / len(self.methods)

    @cached_property
    def whole(self) -> bool:
        """Whether all heads are sparse in the model's own order, so that nothing needs to be moved."""
        own = torch.arange(self.orders.shape[1], device=self.orders.device)
        return len(self.sparse) == len(self.methods) and len(self.orders) == 1 and torch.equal(self.orders[0], own)

    @cached_property
    def dense_index(self) -> Tensor:
        return torch.tensor(self.dense, device=self.orders.device)

    @cached_property
    def sparse_index(self) -> Tensor:
        return torch.tensor(self.sparse, device=self.orders.device)

    def rows(self) -> Tensor:
        """int64 [S * sparse heads]: where each row of the launch stands in the model's [S * H] rows."""
        return (self.orders[self.order_of] * len(self.methods) + self.sparse_index[:, None]).T.flatten()


def deal(methods: tuple[Method, ...], ctx: Context, device: torch.device) -> Launch:
    """Deals the heads of a layer out to a launch; `ctx.heads` is ignored."""
    dense = tuple(head for head, method in enumerate(methods) if method.dense)
    sparse = tuple(head for head, method in enumerate(methods) if not method.dense and not method.skips)
    used: list[AxisOrder] = list(dict.fromkeys(methods[head].order for head in sparse)) or [AxisOrder()]
    pattern = None
    if sparse:
        masks = torch.stack([_mask(methods[head], replace(ctx, heads=(head,))) for head in sparse], dim=1)
        pattern = BlockPattern.from_mask(masks, ctx.layout.tokens, ctx.layout.tokens, BLOCK, BLOCK).to(device)
    return Launch(
        methods=methods,
        dense=dense,
        sparse=sparse,
        orders=torch.stack([order.index(ctx.layout) for order in used]).to(device),
        order_of=torch.tensor([used.index(methods[head].order) for head in sparse], dtype=torch.int64, device=device),
        pattern=pattern,
    )


Launches = dict[tuple[tuple[Method, ...], TokenLayout, torch.device, object], Launch]
MAX_LAYOUTS = 4  # block lists of more layouts than these are dropped and built again


def _mask(method: Method, ctx: Context) -> Tensor:
    return method.mask(ctx) if method.calibrated else _layout_mask(method, ctx.layout)


@lru_cache(maxsize=256)
def _layout_mask(method: Method, layout: TokenLayout) -> Tensor:
    """The mask of a method that knows no layers: one for all heads and layers that take it."""
    return method.mask(Context(layout, transformer="", layer=0, heads=(0,)))


class PlanEngine:
    """Attends as the plan says.

    Args:
        site: where.
        plan: what; it must fit the site's model.
        launches: shared by the sites of one patch, so that layers with equal heads share their block lists.
        min_tokens: shorter sequences stay dense (and a note says so); 0 for a plan or method that was asked for.
    """

    def __init__(self, site: Site, plan: Plan, launches: Launches, min_tokens: int) -> None:
        self.site = site
        self.plan = plan
        self.clear()
        self._launches = launches
        self._min_tokens = min_tokens
        heads = range(site.model.shape.heads)
        self._methods = [
            tuple(plan.method(span, site.transformer, site.layer, head) for head in heads)
            for span in range(len(plan.spans))
        ]
        self._all_dense = tuple(DENSE for _ in heads)

    def clear(self) -> None:
        """Starts the tally anew."""
        self.tally = Tally()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
        methods = self._methods_now(q)
        if all(method.dense for method in methods):
            self._count(methods, 1.0, "dense")
            return dense(q, k, v)
        launch = self._launch(methods, self.site.layout(), q.device)
        self._count(methods, launch.density, _kernels(launch, q))
        return run(launch, q, k, v, dense)

    def _methods_now(self, q: Tensor) -> tuple[Method, ...]:
        if q.shape[1] < self._min_tokens:
            self.tally.notes[f"{q.shape[1]:,} tokens: below {self._min_tokens:,} dense attention is faster"] += 1
            return self._all_dense
        if len(self._methods) == 1:
            return self._methods[0]
        now = self.site.clock.now()
        if now is None:
            raise RuntimeError(
                "the plan has several spans, but neither the pipeline nor the model says which step runs: call "
                "Patch.step(i, steps) before each step of your own loop, or patch the pipeline instead of the transformer"
            )
        return self._methods[self.plan.span_at(*now)]

    def _launch(self, methods: tuple[Method, ...], layout: TokenLayout, device: torch.device) -> Launch:
        by_layer = any(method.calibrated for method in methods)
        key = (methods, layout, device, (self.site.transformer, self.site.layer) if by_layer else None)
        if key not in self._launches:
            layouts = {other for _, other, *_ in self._launches}
            if layout not in layouts and len(layouts) == MAX_LAYOUTS:
                self._launches.clear()
            ctx = Context(layout, self.site.transformer, self.site.layer, (), self.plan.tensors)
            self._launches[key] = deal(methods, ctx, device)
        return self._launches[key]

    def _count(self, methods: tuple[Method, ...], density: float, kernel: str) -> None:
        self.tally.calls += 1
        self.tally.density += density
        self.tally.kernels[kernel] += 1
        self.tally.heads.update(method.label for method in methods)


def run(launch: Launch, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
    """Attention of one layer: q, k, v [B, S, H, D] -> [B, S, H, D]."""
    if launch.whole:
        return attention(q, k, v, launch.pattern)[0]
    skipped = len(launch.methods) - len(launch.dense) - len(launch.sparse)
    out = v.new_zeros(v.shape) if skipped else v.new_empty(v.shape)
    if launch.dense:
        index = launch.dense_index
        out.index_copy_(2, index, dense(*(x.index_select(2, index) for x in (q, k, v))))
    if launch.sparse:
        rows = launch.rows()
        q, k, v = (x.flatten(1, 2).index_select(1, rows).unflatten(1, (-1, len(launch.sparse))) for x in (q, k, v))
        result, _ = attention(q, k, v, launch.pattern)
        out.view(out.shape[0], -1, out.shape[-1]).index_copy_(1, rows, result.flatten(1, 2))
    return out


def _kernels(launch: Launch, q: Tensor) -> str:
    used = ["dense"] if launch.dense else []
    if launch.sparse:
        used += [option.name for option in choices(q.device, q.dtype, q.shape[-1]) if option.reason is None][:1]
    return " + ".join(used) or "none"
