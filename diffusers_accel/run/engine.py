"""A plan at work at one site: heads partitioned once per span and layout, and attended in as few launches as can be."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_accel.attach.host_caches import caches_on
from diffusers_accel.attach.site import Site
from diffusers_accel.call import AttentionCall
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, DENSE, Method
from diffusers_accel.plan import Plan
from diffusers_accel.plan.times import head_times
from diffusers_accel.plan.uses import made_for
from diffusers_accel.run.by_size import BySize
from diffusers_accel.run.launch import Output, run
from diffusers_accel.run.memory import CacheManager, Layer
from diffusers_accel.run.partition import Mix, Partitions
from diffusers_accel.run.remarks import Remarks

FEW_TOKENS = 4096  # 32 blocks: below that a method has too few blocks to leave any out


@dataclass
class ReadTotal:
    """What the heads of a method have read: heads x calls, and sums over them of their density and of their starved rows."""

    heads: int = 0
    density: float | Tensor = 0.0
    starved: float | Tensor = 0.0


@dataclass
class SiteTally:
    """What a site has done since it was patched or cleared."""

    calls: int = 0
    density: float | Tensor = 0.0  # summed over calls
    heads: Counter[str] = field(default_factory=Counter)  # label -> heads x calls
    kernels: Counter[str] = field(default_factory=Counter)  # kernel -> calls
    notes: Counter[str] = field(default_factory=Counter)  # reason -> calls
    reused: int = 0  # heads x calls that merged what they keep
    cache_bytes: int = 0  # most that was kept at once
    reads: dict[Method, ReadTotal] = field(default_factory=dict)
    layout: TokenLayout | None = None  # of the last call


class SpanMixes(NamedTuple):
    """A plan with what the heads of one layer do in each of its spans."""

    plan: Plan
    mixes: list[Mix]


class PlanEngine:
    """Attends as the plan says.

    Args:
        site: where.
        plan: what; it must fit the site's model.
        partitions: shared by the sites of one patch, so that layers with equal heads share their block lists.
        caches: what is kept for later steps, shared by the sites of one patch.
        remarks: where to say what holds for the whole patch.
        by_size: says which plan each call takes instead of `plan`, by its size; None for a plan or method that was asked for.
    """

    def __init__(
        self,
        site: Site,
        plan: Plan,
        partitions: Partitions,
        caches: CacheManager,
        remarks: Remarks | None = None,
        by_size: BySize | None = None,
    ) -> None:
        self.site = site
        self.plan = plan
        self.clear()
        self._span: int | None = None  # of the last call
        self._partitions = partitions
        self._caches = caches
        self._remarks = remarks or Remarks()
        self._by_size = by_size
        site.costs = self.costs
        self._costs: dict[tuple[int, TokenLayout], list[float]] = {}
        self._offsets: dict[Hashable, Tensor] = {}  # small: a vector a head, for each span
        self._layer: Layer = (site.transformer, site.layer)
        self._heads = tuple(range(site.model.shape.heads))
        spans = self._spans(plan)
        self._mixes = [partitions.mix(methods) for methods in spans]
        self._prepared = {id(plan): SpanMixes(plan, self._mixes)}
        self._made_for = made_for(plan.provenance)
        savings = [
            [self._saving(method, span, head) for head, method in enumerate(methods) if method.rest.remembers]
            for span, methods in enumerate(spans)
        ]
        if most := max(savings, key=len):
            caches.budget.enter(self._layer, len(most), sum(most) / len(most))

    def costs(self, call: AttentionCall) -> list[float]:
        """What each head of the model costs in the running span: its time where the plan tells those of all its heads, else its
        density, 1 where it is dense."""
        key = running_span(self.plan, call), call.layout
        if key not in self._costs:
            known = [method.expected_density(call.layout) for method in self._mixes[key[0]].methods]
            self._costs[key] = self._times(key[0]) or [0.5 if each is None else each for each in known]
        return self._costs[key]

    def _times(self, span: int) -> list[float]:
        """Milliseconds of each head in a span, refreshes spread over its calls; none where the plan does not tell them."""
        told = head_times(self.plan.provenance, self.site.transformer)
        symbols = self.plan.spans[span].heads[self.site.transformer][self.site.layer]
        if not {*symbols} <= {*told}:
            return []
        times = []
        for head, symbol in enumerate(symbols):
            share = self._refreshed(self.plan, self.plan.methods[symbol], span, head)
            times.append(told[symbol].usual + share * (told[symbol].refresh - told[symbol].usual))
        return times

    def clear(self) -> None:
        """Starts the tally anew."""
        self.tally = SiteTally()

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if call.now is not None:
            self._caches.at(call.transformer, call.now)
        self.tally.layout = call.layout
        running = self._running(call, q)
        if call.layer == 0:
            self._look_around(call.now, running)
        mix = self._uncached(self._mix(running, call), call, q)
        if mix.dense:
            assert call.dense is not None
            self._count(mix, Output(q, 1.0, 0, ("dense",)))
            return call.dense(q, k, v)
        if q.shape[1] < FEW_TOKENS and (sparse := next(filter(_leaves_out_video, mix.distinct), None)):
            self._remarks.say(_too_few(sparse.label, q.shape[1]))
        partition = self._partitions.find(mix, call, q.device)
        cache = self._caches.of(self._layer, call.stream) if partition.remembering else None
        output = run(partition, call, q, k, v, cache)
        if running.plan.correct is not None:
            self._correct(running.plan, mix, call, output.out)
        self._count(mix, output)
        if "reference" in output.kernels:
            self._say_why_reference(mix, q)
        if q.device.type == "cpu" and any(launch.precision != "input" for launch in partition.launches):
            self.tally.notes["quantized products are simulated on a CPU: their numbers, not their speed"] += 1
        if cache is not None and call.now is not None:
            self.tally.cache_bytes = max(self.tally.cache_bytes, self._caches.bytes(self._layer))
            if call.now[0] == call.now[1] - 1:
                cache.clear()
        return output.out

    def _running(self, call: AttentionCall, q: Tensor) -> SpanMixes:
        """The plan that this call takes."""
        if self._by_size is None:
            return self._prepared[id(self.plan)]
        choice = self._by_size.choose(call.layout, call.transformer, q.device.type)
        if call.layer == 0:
            self._remarks.say(choice.line, logging.WARNING if choice.dense else logging.INFO)
        if choice.dense:
            self.tally.notes[f"{call.layout.video_tokens:,} tokens: dense attention is faster"] += 1
        plan = choice.plan  # which `by_size` holds, so that its id stays its own
        if id(plan) not in self._prepared:
            self._prepared[id(plan)] = SpanMixes(plan, [self._partitions.mix(heads) for heads in self._spans(plan)])
        return self._prepared[id(plan)]

    def _look_around(self, now: tuple[int, int] | None, running: SpanMixes) -> None:
        """Says what of this call keeps the plan from doing what was asked for."""
        plan = running.plan
        if getattr(self.site.model.module, "is_cache_enabled", False):
            for remark in caches_on(self.site.model.module):
                self._remarks.say(remark)
        if now is not None and len(running.mixes) > 1 and now[0] == 0 and plan.by == "share":
            ran = {plan.span_at(step, now[1]) for step in range(now[1])}
            sparse = {span for span in range(len(plan.spans)) if self._sparse(plan, span)}
            if sparse and not ran & sparse:
                start = plan.spans[min(sparse)].start
                self._remarks.say(
                    f"all {now[1]} steps of this call are dense: the plan is sparse from {start:.0%} of the schedule on, "
                    "which no step reaches. Give dense_steps a smaller share, or run more steps"
                )

    def _say_why_reference(self, mix: Mix, q: Tensor) -> None:
        """`patch` refuses what only the reference can run; a model that changes its dtype or device later is found here."""
        for method in mix.distinct:
            if reason := method.refuses(q.shape[-1], q.device, q.dtype):
                self._remarks.say(
                    f"{method.label}: the reference runs, which computes what it then leaves out, since nothing else takes "
                    f"{q.dtype} on {q.device.type}, as the model has it now: {reason}. Set dtype and device back, or unpatch"
                )

    def _sparse(self, plan: Plan, span: int) -> bool:
        """Whether any head of any layer of this transformer is not dense in a span."""
        rows = plan.spans[span].heads[self.site.transformer]
        return any(not plan.methods[symbol].dense for row in rows for symbol in set(row))

    def _spans(self, plan: Plan) -> list[list[Method]]:
        """The methods of the heads in each span of a plan."""
        return [[self._method(plan, span, head) for head in self._heads] for span in range(len(plan.spans))]

    def _method(self, plan: Plan, span: int, head: int) -> Method:
        """The method of a head; one that refreshes at every step of the span is dense."""
        method = plan.method(span, self.site.transformer, self.site.layer, head)
        return DENSE if self._refreshed(plan, method, span, head) == 1 else method

    def _refreshed(self, plan: Plan, method: Method, span: int, head: int) -> float:
        """At what share of a span's steps a head refreshes what it keeps; which steps a window of sigma holds, only a call tells,
        so that all of its gate counts for each of them."""
        gate = method.rest.gate(self._layer, (head,), plan.tensors)
        if gate is not None and plan.by == "share":  # a short span may hold no segment: nothing is due in it
            gate = gate[[each for each in range(len(gate)) if plan.span_at(each, len(gate)) == span]]
        gate = None if gate is None else gate[:, 0]
        return method.rest.refresh_share(gate)

    def _saving(self, method: Method, span: int, head: int) -> float:
        """What share of a head's dense attention is saved in a span by what it keeps."""
        known = method.select.expected_density(method.order, self._made_for)
        density = known or 0.5  # where it is not known ahead
        return (1 - density) * (1 - self._refreshed(self.plan, method, span, head))

    def _mix(self, running: SpanMixes, call: AttentionCall) -> Mix:
        """The methods of the running span."""
        span = running_span(running.plan, call)
        if span != self._span:
            self._span = span
            self._partitions.leave(self._layer)
        mix = running.mixes[span]
        if call.heads != self._heads:  # some of the model's
            mix = self._partitions.mix(mix.methods[head] for head in call.heads)
        if call.now is None and mix.timed:
            raise _no_clock("a selection or an output of an earlier step is reused")
        return self._without_history(mix, call.layout) if mix.needs_history else mix

    def _without_history(self, mix: Mix, layout: TokenLayout) -> Mix:
        """Before there is a history, heads that leave out nothing else are dense."""
        return self._partitions.mix(DENSE if _reads_all(method, layout) else method for method in mix.methods)

    def _uncached(self, mix: Mix, call: AttentionCall, q: Tensor) -> Mix:
        """Heads that keep an output are dense where it does not fit into memory."""
        if not mix.remembers:
            return mix
        budget = self._caches.budget
        if budget.admits(self._layer, call.stream, q, len(self._heads)):
            return mix
        self.tally.notes[f"its cache does not fit into {budget.share:.0%} of the free memory: dense"] += 1
        return self._partitions.mix(DENSE if method.rest.remembers else method for method in mix.methods)

    def _correct(self, plan: Plan, mix: Mix, call: AttentionCall, out: Tensor) -> None:
        """Corrects an output [B, queries, H, D] in place, at the video's queries: the others are exact, as are dense heads."""
        assert plan.correct is not None and self._span is not None
        key = id(plan), self._span, mix, call.heads, out.device, out.dtype
        if key not in self._offsets:
            offset = plan.correct.offset(self._span, self._layer, plan.tensors)[list(call.heads)]
            dense = torch.tensor([method.dense for method in mix.methods])
            self._offsets[key] = offset.masked_fill(dense[:, None], 0).to(out)
        for video in call.layout.video_queries:
            out[:, video] += self._offsets[key]

    def _count(self, mix: Mix, output: Output) -> None:
        tally = self.tally
        tally.calls += 1
        tally.density = tally.density + output.density
        tally.kernels[" + ".join(output.kernels) or "none"] += 1
        tally.heads.update(mix.labels)
        tally.reused += output.reused
        for each in output.read:
            total = tally.reads.setdefault(each.method, ReadTotal())
            total.heads += each.heads
            total.density = total.density + each.density * each.heads
            if each.starved is not None:
                total.starved = total.starved + each.starved * each.heads


def running_span(plan: Plan, call: AttentionCall) -> int:
    """The index of the span that a call falls into.

    Raises:
        RuntimeError: nobody says which step runs, or at which noise level.
    """
    if plan.by == "sigma":
        if call.sigma is None:
            raise RuntimeError(
                "the spans of the plan are windows of sigma, but nobody says the noise level of the step that runs: expected a "
                "flow-matching pipeline, whose scheduler.sigmas fall from 1 to 0. Give the plan spans by share of the steps; "
                "or, in your own loop, call Patch.step(i, steps, sigma=...) before each step"
            )
        return plan.span_at_sigma(call.sigma)
    if call.now is None and len(plan.spans) > 1:
        raise _no_clock("the plan has several spans")
    return plan.span_at(*call.now) if call.now else 0


def _reads_all(method: Method, layout: TokenLayout) -> bool:
    return method.precision == "input" and method.select.reads_all_in(method.order, layout)


def _leaves_out_video(method: Method) -> bool:
    """Whether it reads some blocks of the video and leaves out others."""
    return not (method.select.reads_all or method.skips or method.select.needs_history)


def _too_few(label: str, tokens: int) -> str:
    return (
        f"{label}: {tokens:,} tokens are {-(-tokens // BLOCK)} blocks of {BLOCK}, too few to leave any out without harm: below "
        f'{FEW_TOKENS:,} tokens expect another clip and no speed-up. Generate more frames or a larger picture, or take "dense"'
    )


def _no_clock(why: str) -> RuntimeError:
    return RuntimeError(
        f"{why}, but neither the pipeline nor the model says which step runs: call Patch.step(i, steps) before each step "
        "of your own loop, or patch the pipeline instead of the transformer"
    )
