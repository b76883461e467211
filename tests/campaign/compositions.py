"""Plans drawn at random, and what each of their heads should give: attention over the blocks it reads, all scores at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.attach.site import Engine
from diffusers_accel.call import AttentionCall
from diffusers_accel.kernels.pool import pool
from diffusers_accel.methods import (
    BLOCK,
    DENSE,
    AxisOrder,
    Band,
    Draft,
    Drop,
    Kept,
    Method,
    Patches,
    Pooled,
    Recipe,
    Skip,
    Stored,
    Stripe,
)
from diffusers_accel.methods.blocks import segment_of
from diffusers_accel.methods.select import Inputs
from diffusers_accel.methods.selects.stored import packed
from diffusers_accel.plan import Plan, Span
from diffusers_accel.shape import ModelShape
from tests.tiny import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    TEXT_DIM,
    tiny_cogvideox,
    tiny_cogvideox_call,
    tiny_hunyuan,
    tiny_hunyuan_call,
    tiny_wan,
    tiny_wan_call,
)

AXES = ("fhw", "fwh", "hfw", "hwf", "wfh", "whf")
SYMBOLS = "abcdefgh"


@dataclass(frozen=True)
class Composition:
    """A pipeline, a plan for it and a call."""

    pipe: Any
    plan: Plan
    call: dict[str, Any]


@dataclass(frozen=True)
class Head:
    """One head at one step: what it gave and what it should have given, [B, S, D]."""

    what: str
    method: Method
    found: Tensor
    expected: Tensor


# What is drawn


def composition(random: Random) -> Composition:
    kind = random.choice(("wan", "wan", "two experts", "hunyuan_video", "cogvideox"))
    steps, seed, rows = random.randrange(2, 8), random.randrange(1000), random.choice((1, 1, 2))
    guidance = random.random() < 0.5
    usual = {"num_inference_steps": steps, "output_type": "latent"}
    generator = torch.Generator().manual_seed(seed)
    text = {
        "prompt_embeds": torch.randn(rows, 8, TEXT_DIM, generator=generator),
        "negative_prompt_embeds": torch.zeros(rows, 8, TEXT_DIM),
    }
    if kind == "hunyuan_video":
        lengths = tuple(random.randrange(1, 20) for _ in range(rows))
        call = tiny_hunyuan_call(seed, lengths, guidance, **usual)
        return Composition(tiny_hunyuan(), plan(random, "hunyuan_video", ("transformer",), 7), call)
    if kind == "cogvideox":
        call = tiny_cogvideox_call(seed, guidance_scale=3.0 if guidance else 1.0, **usual)
        return Composition(tiny_cogvideox(), plan(random, "cogvideox", ("transformer",), 7), call)
    experts = 2 if kind == "two experts" else 1
    names = ("transformer", "transformer_2")[:experts]
    call = tiny_wan_call(seed, guidance_scale=3.0 if guidance else 1.0, **text, **usual)
    return Composition(tiny_wan(experts), plan(random, "wan", names, 6), call)


def plan(random: Random, family: str, names: tuple[str, ...], blocks: int) -> Plan:
    """Any heads, or one recipe for all; for sequences of so many blocks."""
    models = {name: ModelShape(LAYERS, HEADS, HEAD_DIM) for name in names}
    if random.random() < 0.25:
        heads = tuple(dict.fromkeys(method(random, plain=True) for _ in range(random.randrange(1, 4))))
        recipe = Recipe(heads=heads, dense_steps=random.choice((0, 0.25, 0.5)), dense_layers=random.randrange(3))
        return Plan.uniform(recipe, family, models)
    used = [DENSE, Method(select=Skip()), *(method(random) for _ in range(random.randrange(1, 6)))]
    methods = dict(zip(SYMBOLS, dict.fromkeys(used)))
    borders = sorted(random.sample((0.1, 0.3, 0.5, 0.6, 0.9), random.randrange(3)))
    edges = (0.0, *borders, 1.0)

    def rows() -> tuple[str, ...]:
        return tuple("".join(random.choice(list(methods)) for _ in range(HEADS)) for _ in range(LAYERS))

    spans = []
    for start, stop in zip(edges, edges[1:]):
        same = spans and random.random() < 0.3
        spans.append(Span(start, stop, spans[-1].heads if same else {name: rows() for name in names}))
    generator = torch.Generator().manual_seed(random.randrange(1000))
    return Plan(family, models, methods, tuple(spans), tensors=tensors(generator, names, blocks))


def method(random: Random, plain: bool = False) -> Method:
    """Any method that means something; `plain`: that needs no tensors."""
    while True:
        share = random.choice((0.1, 0.25, 0.4, 0.7, 1.0))
        order = random.choice((AxisOrder(random.choice(AXES)), AxisOrder(), Patches(), Patches(4, 4), Patches(3, 5)))
        select = random.choice(
            (
                Band(share, random.random() < 0.5),
                Stripe(share, False, random.random() < 0.5) if plain else Stripe(share, random.random() < 0.5),
                Draft(share, per=random.choice(("head", "row")), min_blocks=random.randrange(3)),
                Draft(None, share, diagonal=random.random() < 0.5),
                Draft(share, reselect_every=random.randrange(1, 4)),
                Band(share) if plain else Stored(0.5),
            )
        )
        precision = random.choice(("input", "input", "input", "int8"))
        kept = Kept(random.randrange(2, 5)), Drop() if plain else Kept(gated=True)
        rest = random.choice((Drop(), Drop(), Pooled(), *kept))
        try:
            return Method(order, select, precision, rest)
        except ValueError:
            continue


def tensors(generator: torch.Generator, names: tuple[str, ...], blocks: int) -> dict[str, Tensor]:
    """What calibrated methods read: masks that change along the schedule, gates and masses."""
    found: dict[str, Tensor] = {}
    for name in names:
        found[f"refresh/{name}"] = (torch.rand(3, LAYERS, HEADS, generator=generator) < 0.4).to(torch.uint8)
        found[f"stripe_mass/{name}"] = torch.rand(LAYERS, HEADS, 3, 16, generator=generator)
        for axes in AXES:
            masks = torch.rand(LAYERS * HEADS, 3, blocks, blocks, generator=generator) < 0.4
            masks |= torch.eye(blocks, dtype=torch.bool)
            bits, heads = Stored(0.5).names(AxisOrder(axes), name)
            found[bits] = packed(masks)
            found[heads] = torch.arange(LAYERS * HEADS, dtype=torch.int32).reshape(LAYERS, HEADS)
    return found


# What they should give


@dataclass
class Remembered:
    """What a head keeps: the mask that it read, when it chose and refreshed it, and the rest of attention then."""

    step: int
    selected: int
    refreshed: int
    mask: Tensor
    rest: tuple[Tensor, Tensor] | None


class Oracle:
    """Works out, head by head, what a plan should give, from q, k and v alone."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._kept: dict[Any, Remembered] = {}

    def heads(self, call: AttentionCall, engine: Any, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> list[Head]:
        now = call.now
        assert now is not None
        span = self.plan.span_at(*now)
        row = self.plan.spans[span].heads[call.transformer][call.layer]
        # A gate that is always open makes a head dense, and its neighbours are then a group of their own.
        methods = engine._mixes[span].methods
        found = []
        for head, symbol in enumerate(row):
            method = self.plan.methods[symbol]
            group = method, tuple(each for each, other in enumerate(methods) if other == method)
            own = q[:, :, head], k[:, :, head], v[:, :, head]
            key = call.transformer, call.layer, call.branch, call.rows, head, group
            expected = self._head(methods[head], call.of((head,)), own, key)
            what = f"step {now[0]} of {now[1]}, {call.transformer} layer {call.layer} head {head}, {method.label}, {call.branch}"
            found.append(Head(what, method, out[:, :, head], expected))
        return found

    def _head(self, method: Method, call: AttentionCall, qkv: tuple[Tensor, Tensor, Tensor], key: Any) -> Tensor:
        if method.skips:
            return torch.zeros_like(qkv[0])
        assert call.now is not None
        order = method.order.index(call.layout)
        q, k, v = qkv[0][:, order], qkv[1][:, order[: call.layout.keys]], qkv[2][:, order[: call.layout.keys]]
        step = call.now[0]
        kept = self._kept.get(key)
        if kept is not None and kept.step != step - 1:
            kept = None  # nothing is kept over a gap, or from another generation
        selects = kept is None or not method.timed
        if kept is not None and isinstance(method.rest, Kept):
            selects = self._due(method.rest, call, kept.refreshed)
        elif kept is not None and isinstance(method.select, Draft):
            selects = step - kept.selected >= method.select.reselect_every
        mask = self._token_mask(method, call, q, k) if selects or kept is None else kept.mask
        out, lse = attend(q, k, v, mask)
        rest = None
        if isinstance(method.rest, Pooled):
            out = merged((out, lse), attend_to_means(q, k, v, mask))
        if isinstance(method.rest, Kept):
            rest = attend(q, k, v, ~mask) if selects or kept is None else kept.rest
            assert rest is not None
            out = merged((out, lse), rest)
        if method.timed:
            last = kept or Remembered(step, step, step, mask, rest)
            self._kept[key] = Remembered(
                step, step if selects else last.selected, step if selects else last.refreshed, mask, rest
            )
        result = torch.empty_like(out)
        result[:, order] = out
        return result

    def _due(self, rest: Kept, call: AttentionCall, refreshed: int) -> bool:
        assert call.now is not None
        step, steps = call.now
        gate = rest.gate(call.place, call.heads, self.plan.tensors)
        if gate is None:
            return step - refreshed >= rest.refresh_every
        begun = range(segment_of((step - 1, steps), len(gate)) + 1, segment_of(call.now, len(gate)) + 1)
        return bool(gate[list(begun)].any())

    def _token_mask(self, method: Method, call: AttentionCall, q: Tensor, k: Tensor) -> Tensor:
        """bool [1 or B, S, keys], in the method's order."""
        if not method.select.wants:
            inputs = Inputs(q.device)
        else:
            inputs = Inputs(q.device, (pool(q[:, :, None], BLOCK), pool(k[:, :, None], BLOCK)))
        return method.select.pattern(call, method.order, self.plan.tensors, inputs).token_mask()[:, 0]


def attend_to_means(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the mean key and value of each block that a mask leaves out, as if all its keys were equal, and its
    log-sum-exp."""
    means = [torch.stack([block.double().mean(1) for block in x.split(BLOCK, 1)], 1) for x in (k, v)]
    sizes = torch.tensor([block.shape[1] for block in k.split(BLOCK, 1)])
    scores = (q.double() @ means[0].transpose(1, 2)) * q.shape[-1] ** -0.5 + sizes.log()
    scores = scores.masked_fill(mask[..., ::BLOCK], -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ means[1], scores.logsumexp(-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention over a mask in fp64, and its log-sum-exp; 0 and -inf where nothing is read."""
    scores = (q.double() @ k.double().transpose(1, 2)) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v.double(), scores.logsumexp(-1)


def merged(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
    total = torch.logaddexp(a[1], b[1])
    return sum(out * (lse - total).exp()[..., None].nan_to_num(0.0) for out, lse in (a, b))  # type: ignore[return-value]


class Watching:
    """Stands in for an engine and hands every head to the oracle."""

    def __init__(self, engine: Engine, oracle: Oracle, tell: Callable[[Head], None]) -> None:
        self.engine, self.oracle, self.tell = engine, oracle, tell

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        before = [x.clone() for x in (q, k, v)]
        out = self.engine.attend(call, q, k, v)
        assert all(map(torch.equal, before, (q, k, v))), "attention changes its inputs"
        for head in self.oracle.heads(call, self.engine, q, k, v, out):
            self.tell(head)
        return out


def difference(head: Head) -> float:
    """How far a head is from what it should be, in units of what is allowed."""
    error = (head.found.double() - head.expected.double()).abs().max().item()
    size = head.expected.abs().max().item()
    if head.method.precision == "input":
        return error / (2e-5 * max(size, 1.0))
    return error / (0.05 * max(size, 0.1))
