"""Gates for the heads of a plan that reuse: when each of them has to refresh what it keeps.

FlashBlock (arXiv 2602.05305) calibrates a gate per layer, head and step. As there, a dense run is watched: what is measured
of a head then depends on no error of another, nor on the intervals or the gate that the plan had. At each step the part that a
head leaves unread (attention over the complement of what it selected when it refreshed last) is compared with what that head
would have kept. A head that drifted too far refreshes there and then, its selection too, as it does when the plan is at work.

What is ours: what is kept is of the complement of a selection and not a history, and a sample of the queries is watched. So
a calibration needs a little memory where the cache of a plan at work takes gigabytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.block_external.drift import Calibration
from diffusers_accel.call import AttentionCall
from diffusers_accel.files import quoted
from diffusers_accel.kernels.attention import attention
from diffusers_accel.kernels.grouped import key_heads
from diffusers_accel.kernels.kept import kept
from diffusers_accel.kernels.pattern import BlockPattern, head_index
from diffusers_accel.kernels.pool import pool
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, Method, Order
from diffusers_accel.methods.arrangement import arrangement
from diffusers_accel.methods.orders import AxisOrder
from diffusers_accel.methods.rests.kept import gate_name
from diffusers_accel.methods.select import Inputs
from diffusers_accel.methods.steps import mixed
from diffusers_accel.methods.uses import Tensors
from diffusers_accel.plan import Plan
from diffusers_accel.run.engine import running_span
from diffusers_accel.search.arguments import check_call, check_pipeline, check_prompts
from diffusers_accel.search.checks import whole_number
from diffusers_accel.search.running import Prompt, now, prompt_label, run_pipeline
from diffusers_accel.search.screen import Screen
from diffusers_accel.support.identity import plain
from diffusers_accel.support.interrupted import Interrupted

MODEL_ORDER = AxisOrder()
WATCHED = 32  # query blocks of a call, evenly spread: means over 4,096 queries


def calibrate_gates(
    pipe: Any,
    plan: Plan,
    prompts: Sequence[Prompt],
    *,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    gamma: float | Sequence[float] = 0.85,
    max_lse_change: float = 0.05,
    progress: bool = True,
) -> Plan:
    """Runs each prompt once, densely, and returns the plan with a gate in place of every interval of refreshes.

    The pipeline is used as it is (LoRA, offload, quantisation, attention backend) and left as it was, also after Ctrl-C.
    All branches of guidance and all prompts count as samples, by their mean. A head refreshes at the first step of each span of
    the plan, because other heads may share its method there, and wherever nothing was compared: a transformer that did not
    run at a step, a head that reuses nothing at it.

    Args:
        pipe: a loaded diffusers video pipeline.
        plan: some of its heads reuse; a gate that it has is calibrated anew.
        prompts: calibration prompts, one generation each; a mapping gives other arguments, such as prompt_embeds.
        call: all further arguments of `pipe(...)`: size, frames, steps, guidance; None: the pipeline's own. The gate gets a
            segment for each step of it, and a call of another number of steps refreshes at the same shares of the schedule.
        seed: of the noise of prompt i (seed + i).
        gamma: smallest mean cosine, between what is kept and what it stands for, at which a head reuses, in -1..1, or one for
            each step of the call. The paper's 0.85.
        max_lse_change: largest mean change of its log-sum-exp at which a head reuses, 0 or more. The paper's 0.05.
        progress: show progress on stderr.

    Returns:
        The plan, its reusing methods gated, with the tensors "refresh/<transformer>" and what `summary` tells in its provenance.

    Raises:
        TypeError, ValueError: an argument is wrong, the plan does not fit the pipeline, or none of its heads can reuse; the
            message says what to do.
        Interrupted: a KeyboardInterrupt; nothing is kept.
    """
    found = check_pipeline(pipe)
    prompts = check_prompts(pipe, prompts)
    arguments = check_call(pipe, {} if call is None else call)
    seed = whole_number("seed", seed, 0)
    check_gated(plan, gamma, max_lse_change)
    shapes = {name: family.shape(module) for name, (module, family) in found.items()}
    plan.check(shapes, family=next(iter(found.values()))[1].name)
    watch = Watch(plan, gamma, max_lse_change)
    try:
        with Screen(progress).bar("gates", 100 * len(prompts)) as advance:
            for number, prompt in enumerate(prompts):
                watch.begin(partial(_advance, advance, number))
                run_pipeline(pipe, lambda site: watch, prompt, arguments, seed + number)
                _advance(advance, number, 1.0)
    except KeyboardInterrupt as error:
        kept = "nothing is kept, as a calibration takes all prompts in one go"
        raise Interrupted(kept, "Call calibrate_gates again with the same arguments; it begins anew") from error
    gates = {name: watch.gate(name) for name in plan.models if _reusing(plan, name)}
    counts = _counts(plan, gates, watch)
    _check_compared(counts, watch.compared)
    return replace(
        plan,
        methods={symbol: _gated(method) for symbol, method in plan.methods.items()},
        provenance={
            **plan.provenance,
            "gates": {
                "prompts": [prompt_label(prompt) for prompt in prompts],
                "call": plain(arguments),
                "seed": seed,
                "gamma": gamma if isinstance(gamma, (int, float)) else list(gamma),
                "max_lse_change": max_lse_change,
                **counts,
            },
        },
        tensors={**plan.tensors, **{gate_name(name): gate for name, gate in gates.items()}},
    )


def check_gated(plan: Plan, gamma: float | Sequence[float], max_lse_change: float) -> None:
    """Refuses a plan without heads that reuse, and thresholds that are none; needs no pipeline."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan: expected a Plan (Plan.load reads one), found {quoted(plan)}")
    Calibration(1 if isinstance(gamma, (int, float)) else len(gamma), 1, 1, gamma=gamma, max_lse_change=max_lse_change)
    if math.isinf(max_lse_change):
        raise ValueError(
            "max_lse_change must be finite, to be kept in a plan: 1e9 leaves the decision to gamma, found inf"
        )
    if not any(_reusing(plan, name) for name in plan.models):
        labels = ", ".join(repr(method.label) for method in plan.methods.values())
        raise ValueError(
            f"a gate is for heads that reuse, found a plan with {labels}: search with the method set cached among others, or "
            "make a plan of methods with the rest Kept()"
        )


def summary(plan: Plan) -> str:
    """How often the heads of a calibrated plan refresh, and how often they did by their intervals."""
    found = plan.provenance["gates"]

    def share(name: str) -> str:
        return f"{found[name] / found['heads']:.1f} refreshes per head ({found[name] / found['head_steps']:.0%})"

    return (
        f"{found['heads']:,} heads reuse, in {found['head_steps'] / found['heads']:.1f} of {found['steps']} steps each: "
        f"{share('refreshes')} by the gate, {share('by_interval')} by the interval"
    )


@dataclass(frozen=True)
class Members:
    """The heads of one layer that share a method in one span of the plan."""

    transformer: str
    layer: int
    span: int
    method: Method
    heads: tuple[int, ...]


class Watch:
    """What generations show of what heads leave unread: the engine of all their sites.

    Args:
        plan: fits the pipeline that runs.
        gamma, max_lse_change: of `Calibration`.
    """

    def __init__(self, plan: Plan, gamma: float | Sequence[float], max_lse_change: float) -> None:
        self.plan = plan
        self.steps = 0  # of the schedule; 0 before the first call
        self.spans: dict[int, int] = {}  # step -> the span of the plan that it falls into
        self.ran: dict[str, set[int]] = {name: set() for name in plan.models}
        self._thresholds: dict[str, Any] = {"gamma": gamma, "max_lse_change": max_lse_change}
        self._calibrations: dict[Members, Calibration] = {}
        self._unread: dict[tuple[Members, str, tuple[int, int], TokenLayout], BlockPattern] = {}
        self._at: tuple[str, int] | None = None  # the transformer and the span that run
        self._on_share: Callable[[float], None] = lambda share: None

    def begin(self, on_share: Callable[[float], None] = lambda share: None) -> None:
        """Called before each generation; `on_share` hears the share of its steps that is done."""
        self._on_share = on_share
        self._forget()

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The dense result; watches all heads that reuse at this step."""
        step, steps = now(call)
        if steps != (self.steps or steps):
            raise RuntimeError(f"expected {self.steps} steps as in the first call of the pipeline, found {steps}")
        self.steps = steps
        span = self.spans[step] = running_span(self.plan, call)
        if self._at != (call.transformer, span):
            self._forget()
            self._at = call.transformer, span
        self.ran[call.transformer].add(step)
        if call.layer == 0:
            self._on_share(step / steps)
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            for members in self._members(call, span):
                self._watch(members, call, q, k, v)
        assert call.dense is not None
        return call.dense(q, k, v)

    @property
    def compared(self) -> bool:
        """Whether what some head leaves unread was there at two steps in turn."""
        return any(bool(calibration.seen.any()) for calibration in self._calibrations.values())

    def gate(self, transformer: str) -> Tensor:
        """uint8 [steps, layers, heads], 1 where a head has to refresh."""
        shape = self.plan.models[transformer]
        flags = torch.ones(self.steps, shape.layers, shape.heads, dtype=torch.bool)
        for members, calibration in self._calibrations.items():
            if members.transformer == transformer:  # steps of other spans were never compared, which leaves their flags
                flags[:, members.layer, list(members.heads)] &= calibration.flags()[:, 0]
        return flags.byte()

    def _members(self, call: AttentionCall, span: int) -> list[Members]:
        found: dict[Method, list[int]] = {}
        for head in call.heads:
            method = self.plan.method(span, *call.place, head)
            if method.rest.with_gate is not None and not method.select.reads_all_in(method.order, call.layout):
                found.setdefault(method, []).append(head)
        return [Members(*call.place, span, method, tuple(heads)) for method, heads in found.items()]

    def _watch(self, members: Members, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> None:
        step, _ = now(call)
        watched = _Unread(members.method, call.of(members.heads), self.plan.tensors, q, k, v)
        branch, place = f"{call.branch} {call.rows}", (members, call.branch, call.rows, call.layout)
        if members not in self._calibrations:
            self._calibrations[members] = Calibration(self.steps, 1, len(members.heads), **self._thresholds)
        calibration, held = self._calibrations[members], self._unread.get(place)
        unread = watched.select() if held is None else held
        # A step that does not follow the last one, such as the first of another chunk, begins a sample: all heads select anew.
        failed = calibration.observe(0, step, *watched.attend(unread), branch=branch)
        if held is not None and failed.any() and watched.changes:
            fresh = watched.select()
            heads = failed.nonzero()[:, 0].tolist()
            calibration.renew(0, heads, *watched.attend(fresh, heads), branch=branch)
            unread = mixed(fresh, held, failed.tolist())
        self._unread[place] = unread

    def _forget(self) -> None:
        """Of what runs no more, keeps only the means."""
        self._at = None
        self._unread.clear()
        for calibration in self._calibrations.values():
            calibration.forget()


class _Unread:
    """What the heads of `call` leave unread; q [B, queries, H, D], k and v [B, keys, H_k, D] are the model's."""

    def __init__(self, method: Method, call: AttentionCall, tensors: Tensors, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._method = method
        self._call = call
        self._tensors = tensors
        keys, self._queries = _sequences(method.order, call.layout, q.device)
        self._heads = head_index(call.heads, q.device)
        self._blocks = watched_blocks(call.layout, method.order).to(q.device)
        tokens = self._blocks[:, None] * BLOCK + torch.arange(BLOCK, device=q.device)
        self._tokens = tokens[tokens < call.layout.queries]
        self._all_q = q
        self._q = q[:, self._queries[self._tokens, None], self._heads]
        read = head_index(key_heads(call.heads, q.shape[2], k.shape[2]), q.device)
        self._k, self._v = (x[:, keys[: x.shape[1], None], read] for x in (k, v))

    @property
    def changes(self) -> bool:
        """Whether a refresh may select other blocks."""
        method = self._method
        return method.select.changes(method.order, self._call.transformer, self._tensors)

    def select(self) -> BlockPattern:
        """Per head, the key blocks that the watched queries leave out by a selection that is made now."""
        method, layout = self._method, self._call.layout
        read = method.select.pattern(self._call, method.order, self._tensors, self._inputs()).mask()
        return BlockPattern.from_mask(~read[:, :, self._blocks], len(self._tokens), layout.keys, BLOCK, BLOCK)

    def _inputs(self) -> Inputs:
        if not self._method.select.wants:
            return Inputs(self._all_q.device)
        q = self._all_q[:, self._queries[:, None], self._heads]
        means = (pool(q, BLOCK), pool(self._k, BLOCK)) if self._method.select.wants == "means" else None
        return Inputs(q.device, means, (q, self._k))

    def attend(self, unread: BlockPattern, heads: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Attention of the watched queries over the blocks of `unread`, (out, lse), of some of its heads if given."""
        q, k, v = self._q, self._k, self._v
        if heads is not None:
            index = head_index(tuple(heads), q.device)
            q, k, v = (x.index_select(2, index) for x in (q, k, v))
            unread = unread.take(heads)
        return attention(q, k, v, unread, precision=self._method.precision)


def watched_blocks(layout: TokenLayout, order: Order = MODEL_ORDER) -> Tensor:
    """int64: which query blocks are watched, ascending: up to `WATCHED` of those without text, which leave nothing unread."""
    first, stop = arrangement(order, layout).video_queries
    if first == stop:
        first, stop = 0, layout.query_blocks(BLOCK)
    count = min(WATCHED, stop - first)
    return first + torch.arange(count) * (stop - first) // count


@kept(16)
def _sequences(order: Order, layout: TokenLayout, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which token, and which row of q, stands at each place."""
    return order.index(layout).to(device), order.query_index(layout).to(device)


def _gated(method: Method) -> Method:
    gated = method.rest.with_gate
    return method if gated is None else replace(method, rest=gated)


def _reusing(plan: Plan, transformer: str) -> set[tuple[int, int, int]]:
    """(span, layer, head) of those that reuse."""
    return {
        (number, layer, head)
        for number, span in enumerate(plan.spans)
        for layer, row in enumerate(span.heads[transformer])
        for head, symbol in enumerate(row)
        if plan.methods[symbol].rest.with_gate is not None
    }


def _counts(plan: Plan, gates: Mapping[str, Tensor], watch: Watch) -> dict[str, int]:
    """Over all heads that reuse: how many there are, at how many steps they may, at how many of these they refresh, and at how
    many their interval would (for a method that has a gate already, the usual interval)."""
    heads: set[tuple[str, int, int]] = set()
    head_steps = refreshes = by_interval = 0
    for name, gate in gates.items():
        steps: dict[int, list[int]] = {}
        for step in watch.ran[name]:
            steps.setdefault(watch.spans[step], []).append(step)
        for span, layer, head in _reusing(plan, name):
            if span in steps:
                period = plan.method(span, name, layer, head).rest.period
                assert period is not None
                heads.add((name, layer, head))
                head_steps += len(steps[span])
                refreshes += int(gate[steps[span], layer, head].sum())
                by_interval += -(-len(steps[span]) // period)
    found = {"heads": len(heads), "head_steps": head_steps, "refreshes": refreshes, "by_interval": by_interval}
    return {"steps": watch.steps, **found}


def _check_compared(counts: Mapping[str, int], compared: bool) -> None:
    if not compared:  # every head-step is the first of its span, or nothing was left unread
        raise ValueError(
            f"in a call of {counts['steps']} steps no head of this plan reuses at two steps of one span, so that nothing "
            "could be compared: calibrate with more steps, with a plan of longer spans or, where it keeps the history of chunks, "
            "with a call of several chunks"
        )


def _advance(advance: Callable[[int], None], before: int, share: float) -> None:
    advance(round(100 * (before + share)))
