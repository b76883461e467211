"""A plan at work at one site: heads dealt to methods once per span and layout, and attended in as few launches as can be."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusers_accel.host_caches import caches_on
from diffusers_accel.launch import Deal, Ran, deal, run
from diffusers_accel.layout import TokenLayout
from diffusers_accel.memory import Branch, Layer, Memories
from diffusers_accel.methods import BLOCK, DENSE, Context, Method, Reuse, Stored
from diffusers_accel.plan import Plan
from diffusers_accel.remarks import Remarks
from diffusers_accel.site import DenseAttention, Site

# The last entry: the layer, where its own tensors are read, and the part of the schedule that each stored mask is of.
DealKey = tuple[tuple[Method, ...], TokenLayout, torch.device, tuple[Layer | None, tuple[int, ...]]]
Deals = dict[DealKey, Deal]
MAX_LAYOUTS = 4  # block lists of more layouts than these are dropped and built again


@dataclass
class Tally:
    """What a site has done since it was patched or cleared."""

    calls: int = 0
    density: float | Tensor = 0.0  # summed over calls
    heads: Counter[str] = field(default_factory=Counter)  # label -> heads x calls
    kernels: Counter[str] = field(default_factory=Counter)  # kernel -> calls
    notes: Counter[str] = field(default_factory=Counter)  # reason -> calls
    reused: int = 0  # heads x calls that merged a kept part
    cache_bytes: int = 0  # most that was kept at once
    reads: dict[Method, tuple[int, float | Tensor]] = field(
        default_factory=dict
    )  # heads x calls, density summed over them
    tokens: int = 0  # of the last call


class PlanEngine:
    """Attends as the plan says.

    Args:
        site: where.
        plan: what; it must fit the site's model.
        deals: shared by the sites of one patch, so that layers with equal heads share their block lists.
        min_tokens: shorter sequences stay dense (and a note says so); 0 for a plan or method that was asked for.
        memories: what is kept for later steps, shared by the sites of one patch.
        remarks: where to say what holds for the whole patch.
        few_tokens: below so many tokens a remark says that the plan's methods lose too much; 0 for never.
    """

    def __init__(
        self,
        site: Site,
        plan: Plan,
        deals: Deals,
        min_tokens: int,
        memories: Memories,
        remarks: Remarks | None = None,
        few_tokens: int = 0,
    ) -> None:
        self.site = site
        self.plan = plan
        self.clear()
        self._span: int | None = None  # of the last call
        self._deals = deals
        self._min_tokens = min_tokens
        self._memories = memories
        self._remarks = remarks or Remarks()
        self._few_tokens = few_tokens
        self._layer: Layer = (site.transformer, site.layer)
        heads = range(site.model.shape.heads)
        self._methods = [tuple(self._method(span, head) for head in heads) for span in range(len(plan.spans))]
        savings = [
            [self._saving(method, span, head) for head, method in enumerate(methods) if method.reuse]
            for span, methods in enumerate(self._methods)
        ]
        if most := max(savings, key=len):
            memories.budget.enter(self._layer, len(most), sum(most) / len(most))

    def clear(self) -> None:
        """Starts the tally anew."""
        self.tally = Tally()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
        now = self.site.clock.now()
        if now is not None:
            self._memories.at(self.site.transformer, now)
        self.tally.tokens = q.shape[1]
        if self.site.layer == 0:
            self._look_around(now)
        methods = self._uncached(self._methods_now(q, now), q)
        if all(method.dense for method in methods):
            self._count(methods, Ran(q, 1.0, 0, ("dense",)))
            return dense(q, k, v)
        if q.shape[1] < self._few_tokens:
            self._remarks.say(_too_few(next(m.label for m in methods if not m.dense), q.shape[1], self._few_tokens))
        dealt = self._deal(methods, q.device, now)
        memory = self._memories.of(self._layer, self._branch()) if dealt.remembering else None
        ran = run(dealt, q, k, v, dense, memory, now or (0, 1))
        self._count(methods, ran)
        if q.device.type == "cpu" and any(launch.precision != "input" for launch in dealt.launches):
            self.tally.notes["quantized products are simulated on a CPU: their numbers, not their speed"] += 1
        if memory is not None and now is not None:
            self.tally.cache_bytes = max(self.tally.cache_bytes, self._memories.bytes(self._layer))
            if now[0] == now[1] - 1:
                memory.clear()
        return ran.out

    def _look_around(self, now: tuple[int, int] | None) -> None:
        """Says what of this call keeps the plan from doing what was asked for."""
        if getattr(self.site.model.module, "is_cache_enabled", False):
            for remark in caches_on(self.site.model.module):
                self._remarks.say(remark)
        if now is not None and len(self._methods) > 1 and now[0] == 0:
            ran = {self.plan.span_at(step, now[1]) for step in range(now[1])}
            sparse = {span for span in range(len(self.plan.spans)) if self._sparse(span)}
            if sparse and not ran & sparse:
                start = self.plan.spans[min(sparse)].start
                self._remarks.say(
                    f"all {now[1]} steps of this call are dense: the plan is sparse from {start:.0%} of the schedule on, "
                    "which no step reaches. Give dense_steps a smaller share, or run more steps"
                )

    def _sparse(self, span: int) -> bool:
        """Whether any head of any layer of this transformer is not dense in a span."""
        rows = self.plan.spans[span].heads[self.site.transformer]
        return any(not self.plan.methods[symbol].dense for symbol in set("".join(rows)))

    def _method(self, span: int, head: int) -> Method:
        """The method of a head; one that a gate refreshes at every step of the span is dense."""
        method = self.plan.method(span, self.site.transformer, self.site.layer, head)
        return DENSE if method.reuse and self._refreshed(method.reuse, span, head) == 1 else method

    def _refreshed(self, reuse: Reuse, span: int, head: int) -> float:
        """At what share of a span's steps a head refreshes."""
        if not reuse.gated:
            return 1 / reuse.every
        gate = self.plan.tensors[f"refresh/{self.site.transformer}"][:, self.site.layer, head].tolist()
        inside = [flag for part, flag in enumerate(gate) if self.plan.span_at(part, len(gate)) == span]
        return sum(inside) / len(inside) if inside else 0.0  # a short span may hold no part: nothing is due in it

    def _saving(self, method: Method, span: int, head: int) -> float:
        """What share of a head's dense attention its reuse saves in a span."""
        density = getattr(method.select, "density", None) or 0.5  # a mass has no density that is known ahead
        return (1 - density) * (1 - self._refreshed(method.reuse, span, head)) if method.reuse else 0.0

    def _methods_now(self, q: Tensor, now: tuple[int, int] | None) -> tuple[Method, ...]:
        if q.shape[1] < self._min_tokens:
            self.tally.notes[f"{q.shape[1]:,} tokens: below {self._min_tokens:,} dense attention is faster"] += 1
            return (DENSE,) * q.shape[2]
        if now is None and len(self._methods) > 1:
            raise _no_clock("the plan has several spans")
        span = self.plan.span_at(*now) if now else 0
        if span != self._span:
            self._span = span
            self._drop_parts(())
        methods = self._methods[span]
        if now is None and any(method.timed for method in methods):
            raise _no_clock("a selection or a part of an earlier step is reused")
        return methods

    def _uncached(self, methods: tuple[Method, ...], q: Tensor) -> tuple[Method, ...]:
        """Heads that reuse are dense where their parts do not fit into memory."""
        if not any(method.reuse for method in methods):
            return methods
        budget = self._memories.budget
        if budget.admits(self._layer, self._branch(), q):
            return methods
        self.tally.notes[f"its cache does not fit into {budget.share:.0%} of the free memory: dense"] += 1
        return tuple(DENSE if method.reuse else method for method in methods)

    def _branch(self) -> Branch:
        """Of which pass and batch rows the running call is: what is kept is theirs alone."""
        return self.site.branch, self.site.rows

    def _deal(self, methods: tuple[Method, ...], device: torch.device, now: tuple[int, int] | None) -> Deal:
        layout = self.site.layout()
        ctx = Context(layout, self.site.transformer, self.site.layer, (), self.plan.tensors, now)
        where = (self.site.transformer, self.site.layer) if any(_by_layer(method) for method in methods) else None
        parts = tuple(m.select.part(ctx, m.order) for m in methods if isinstance(m.select, Stored))
        key = (methods, layout, device, (where, parts))
        if key not in self._deals:
            if parts:
                self._drop_parts(parts)
            layouts = {other for _, other, *_ in self._deals}
            if layout not in layouts and len(layouts) == MAX_LAYOUTS:
                self._deals.clear()
            self._deals[key] = deal(methods, ctx, device)
        return self._deals[key]

    def _drop_parts(self, running: tuple[int, ...]) -> None:
        """Drops the block lists of stored masks that are not of the running part or expert: a large model's are gigabytes."""
        for key in list(self._deals):
            of, parts = key[3]
            if of and parts and (of[0] != self.site.transformer or (of == self._layer and parts != running)):
                del self._deals[key]

    def _count(self, methods: tuple[Method, ...], ran: Ran) -> None:
        tally = self.tally
        tally.calls += 1
        tally.density = tally.density + ran.density
        tally.kernels[" + ".join(ran.kernels) or "none"] += 1
        tally.heads.update(method.label for method in methods)
        tally.reused += ran.reused
        for method, heads, density in ran.read:
            before, summed = tally.reads.get(method, (0, 0.0))
            tally.reads[method] = before + heads, summed + density * heads


def _by_layer(method: Method) -> bool:
    return method.calibrated or (method.reuse is not None and method.reuse.gated)


def _too_few(label: str, tokens: int, few: int) -> str:
    return (
        f"{label}: {tokens:,} tokens are {-(-tokens // BLOCK)} blocks of {BLOCK}, too few to leave any out without harm: below "
        f'{few:,} tokens expect another clip and no speed-up. Generate more frames or a larger picture, or take "dense"'
    )


def _no_clock(why: str) -> RuntimeError:
    return RuntimeError(
        f"{why}, but neither the pipeline nor the model says which step runs: call Patch.step(i, steps) before each step "
        "of your own loop, or patch the pipeline instead of the transformer"
    )
