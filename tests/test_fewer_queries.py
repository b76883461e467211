"""Fewer queries than keys, and heads that share keys: a call with a history is what it is head by head over the blocks read."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_accel.attach import processor
from diffusers_accel.attach.site import AttachedModel, Rows, Site
from diffusers_accel.call import AttentionCall
from diffusers_accel.families.cogvideox import COGVIDEOX
from diffusers_accel.kernels.pool import pool
from diffusers_accel.layout import Segment, TokenLayout
from diffusers_accel.methods import (
    BLOCK,
    DENSE,
    AxisOrder,
    Band,
    Draft,
    Kept,
    Method,
    Patches,
    Pooled,
    Skip,
    Stored,
    Stripe,
)
from diffusers_accel.methods.arrangement import arrangement
from diffusers_accel.methods.order import exact_tokens
from diffusers_accel.methods.select import Inputs
from diffusers_accel.methods.selects import SubBlock
from diffusers_accel.methods.selects.stored import packed
from diffusers_accel.plan import Plan, Span
from diffusers_accel.run.engine import PlanEngine
from diffusers_accel.run.launch import Output, run
from diffusers_accel.run.memory import CacheManager, LayerCache
from diffusers_accel.run.partition import Partitions, partition
from diffusers_accel.search.gates import Watch
from diffusers_accel.search.measure import SampledHeads, deviations, head_grams, layer_energy
from diffusers_accel.search.probe import RunProbe
from diffusers_accel.search.row import Chunk, RowProbe
from diffusers_accel.search.running import SiteEngine
from diffusers_accel.search.schedule import ProbeSettings
from diffusers_accel.search.selections import Selections
from diffusers_accel.shape import ModelShape

CPU = torch.device("cpu")
HEADS, HEAD_DIM = 4, 16
GRID = (3, 16, 20)
VIDEO = Segment.video(GRID)


def alone(kind: str, tokens: int, valid: int | None = None) -> Segment:
    """Keys without queries."""
    return Segment(kind, tokens, valid=valid, queries=False)  # type: ignore[arg-type]


LAYOUTS = {
    "history of whole blocks": TokenLayout.of(alone("history", 256), VIDEO),
    "history of any length": TokenLayout.of(alone("history", 200), VIDEO),
    "short history, text": TokenLayout.of(alone("history", 50), VIDEO, Segment("text", 30)),
    "text of keys alone": TokenLayout.of(alone("text", 77), VIDEO),
    "history, text in front": TokenLayout.of(alone("history", 300), Segment("text", 45), VIDEO),
    "behind": TokenLayout.of(VIDEO, Segment("text", 20), alone("reference", 140)),
    "both sides": TokenLayout.of(alone("history", 90), VIDEO, alone("reference", 140, valid=60)),
    "padded": TokenLayout.of(alone("history", 90), VIDEO, Segment("text", 140, valid=13)),
    "pieces": TokenLayout.of(
        alone("history", 150),
        Segment.video(GRID, 400),
        Segment("audio", 30),
        Segment.video(GRID, 560),
        Segment("text", 9),
    ),
}
METHODS = {
    "band": Method(select=Band(0.4)),
    "band hwf": Method(AxisOrder("hwf"), Band(0.3, first_frame=False)),
    "stripe": Method(select=Stripe(0.4)),
    "draft": Method(Patches(), Draft(0.25)),
    "draft, bare": Method(Patches(4, 4), Draft(0.25, min_blocks=0, diagonal=False, first_frame=False)),
    "draft whf top-p": Method(AxisOrder("whf"), Draft(None, 0.5)),
    "draft by rows": Method(select=Draft(0.25, per="row")),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
grouped = pytest.mark.parametrize("key_heads", [4, 2, 1])


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), enable_gqa=k.shape[2] != q.shape[2]
    ).transpose(1, 2)


def inputs(layout: TokenLayout, key_heads: int = HEADS, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q of the tokens that query, k and v of those that exist."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, layout.queries, HEADS, HEAD_DIM, generator=generator)
    k, v = (torch.randn(1, layout.tokens, key_heads, HEAD_DIM, generator=generator)[:, : layout.keys] for _ in range(2))
    return q, k, v


def repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A head of keys and values for each head."""
    return q, *(x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))  # type: ignore[return-value]


def attend(
    methods: tuple[Method, ...],
    layout: TokenLayout,
    qkv: tuple[Tensor, Tensor, Tensor],
    memory: LayerCache | None = None,
    step: int = 0,
) -> Output:
    call = AttentionCall(layout, "transformer", 0, tuple(range(HEADS)), now=(step, 9), dense=sdpa)
    return run(partition(methods, call, {}, CPU), call, *qkv, memory)


def mask_of(method: Method, layout: TokenLayout, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """bool [1, heads, queries, keys] in the model's order: which token pairs a method's own stages read."""
    q, k, _ = repeated(*qkv)
    asking, keys = method.order.query_index(layout), method.order.index(layout)[: layout.keys]
    call = AttentionCall(layout, "transformer", 0, tuple(range(HEADS)), now=(0, 9))
    means = pool(q[:, asking], BLOCK), pool(k[:, keys], BLOCK)
    pattern = method.select.pattern(call, method.order, {}, Inputs(CPU, means))
    pattern.check()
    read = pattern.token_mask().expand(1, HEADS, -1, -1)
    mask = torch.zeros_like(read)
    mask[:, :, asking[:, None], keys] = read
    return mask


def masked(qkv: tuple[Tensor, Tensor, Tensor], mask: Tensor) -> Tensor:
    """Head by head in fp64."""
    q, k, v = (x.double() for x in repeated(*qkv))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * HEAD_DIM**-0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).float()


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Where queries and keys lie


@every_layout
def test_queries_are_a_part_of_the_sequence(layout: TokenLayout) -> None:
    asking = torch.cat([torch.full((each.tokens,), each.queries) for each in layout.segments])
    assert torch.equal(asking.nonzero()[:, 0], torch.arange(layout.query_start, layout.query_start + layout.queries))
    assert layout.queries < layout.tokens and layout.query_blocks(BLOCK) == -(-layout.queries // BLOCK)
    exist = torch.arange(layout.tokens) < layout.keys
    assert layout.existing_queries == int((asking & exist).sum())


@every_layout
@every_method
def test_orders_sort_queries_and_keys_alike(layout: TokenLayout, method: Method) -> None:
    index, asking = method.order.index(layout), method.order.query_index(layout)
    assert torch.equal(asking.sort().values, torch.arange(layout.queries))
    queries = set((asking + layout.query_start).tolist())
    assert (asking + layout.query_start).tolist() == [token for token in index.tolist() if token in queries]
    history = layout.segments[0]
    if history.kind == "history":
        in_front = not (layout.interleaved or isinstance(method.order, Patches))  # else it comes behind the video
        place = 0 if in_front else layout.video_tokens
        assert torch.equal(index[place : place + history.tokens], torch.arange(history.tokens))


@every_layout
@every_method
def test_the_own_blocks_follow_from_the_offset(layout: TokenLayout, method: Method) -> None:
    places = arrangement(method.order, layout)
    index, asking = method.order.index(layout).tolist(), method.order.query_index(layout) + layout.query_start
    exact = exact_tokens(layout)
    for block, tokens in enumerate(asking.split(BLOCK)):
        held = {index.index(token) // BLOCK for token in tokens.tolist()}
        assert set(places.own[block].nonzero()[:, 0].tolist()) == held
        assert bool(places.exact_queries[block]) == bool(exact[tokens].any())
        assert float(places.start[block]) == index.index(int(tokens[0])) / BLOCK
    for block, tokens in enumerate(torch.tensor(index).split(BLOCK)):
        assert bool(places.exact_keys[block]) == bool(exact[tokens].any())


def test_a_band_lies_around_the_offset() -> None:
    """A history of two blocks, then eight of video: the third query block's neighbours are around the fifth key block."""
    layout = TokenLayout.of(alone("history", 256), Segment.video((1, 32, 32)))
    call = AttentionCall(layout)
    mask = Band(0.5, first_frame=False).mask(call, AxisOrder(), {})[0]
    assert mask.shape == (8, 10)
    assert mask[2].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5]  # the history, and four around its own
    assert mask[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert mask[7].nonzero()[:, 0].tolist() == [0, 1, 6, 7, 8, 9]


# Whole calls


@every_layout
@every_method
def test_heads_read_exactly_their_blocks(layout: TokenLayout, method: Method) -> None:
    qkv = inputs(layout, key_heads=2)
    ran = attend((method,) * HEADS, layout, qkv)
    assert ran.out.shape == qkv[0].shape
    close(ran.out, masked(qkv, mask_of(method, layout, qkv)))


@every_layout
@grouped
def test_heads_of_all_kinds_together(layout: TokenLayout, key_heads: int) -> None:
    """Dense, skipped and sparse heads in orders of their own, of which several share a head of keys."""
    qkv = inputs(layout, key_heads)
    methods = (METHODS["draft"], DENSE, Method(select=Skip()), METHODS["band hwf"])
    ran = attend(methods, layout, qkv)
    for head, method in enumerate(methods):
        if method.dense:
            expected = sdpa(*qkv)
        elif method.skips:
            expected = torch.zeros_like(qkv[0])
        else:
            expected = masked(qkv, mask_of(method, layout, qkv))
        close(ran.out[:, :, head], expected[:, :, head])


@every_layout
@every_method
def test_all_keys_beside_the_video_are_read(layout: TokenLayout, method: Method) -> None:
    q, k, v = inputs(layout)
    k.zero_()
    base = attend((method,) * HEADS, layout, (q, k, v)).out
    for start, stop, segment in layout.runs:
        if segment.exact and start < layout.keys:
            changed = v.clone()
            changed[:, (start + min(stop, layout.keys)) // 2] += 1e6
            moved = attend((method,) * HEADS, layout, (q, k, changed)).out - base
            assert bool((moved > 1e6 / layout.keys - 1).all()), segment


@every_layout
@pytest.mark.parametrize(("key_heads", "precision"), [(4, "input"), (2, "int8")])
def test_kept_parts_make_up_the_whole(layout: TokenLayout, key_heads: int, precision: str) -> None:
    methods = tuple(replace(METHODS[name], rest=Kept(2), precision=precision) for name in ("band", "draft")) * 2
    qkv, memory = inputs(layout, key_heads), LayerCache()
    for step in range(3):
        ran = attend(methods, layout, qkv, memory, step)
        assert ran.reused == (HEADS if step == 1 else 0)
        tolerance = 1e-5 if precision == "input" else 3e-2
        torch.testing.assert_close(ran.out, sdpa(*qkv), rtol=tolerance, atol=tolerance)


@every_layout
def test_pooled_rests_lose_nothing_where_keys_are_alike(layout: TokenLayout) -> None:
    q, k, v = inputs(layout, key_heads=2)
    for x in (k, v):
        x[:] = x[:, :1]
    method = Method(select=Draft(0.25), rest=Pooled())
    close(attend((method,) * HEADS, layout, (q, k, v)).out, sdpa(q, k, v))
    values = torch.ones_like(v)
    close(attend((method,) * HEADS, layout, (q, torch.randn(k.shape), values)).out, torch.ones_like(q))


@grouped
@pytest.mark.parametrize(
    "layout", [TokenLayout(*GRID), TokenLayout(*GRID, 20, "end", 7), TokenLayout(*GRID, 40, "start")]
)
def test_grouped_heads_are_as_if_repeated(layout: TokenLayout, key_heads: int) -> None:
    qkv = inputs(layout, key_heads)
    some = {**METHODS, "subblock": Method(select=SubBlock(0.3)), "pooled": Method(select=Draft(0.3), rest=Pooled())}
    mixes = (("band",) * 4, ("subblock",) * 4, ("pooled",) * 4, ("draft", "band hwf", "draft by rows", "subblock"))
    for names in mixes:
        for precision in ("input", "int8"):
            methods = tuple(replace(some[name], precision=precision) for name in names)
            a, b = (attend(methods, layout, each).out for each in (qkv, repeated(*qkv)))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_stored_masks_are_refused_with_the_reason() -> None:
    layout = LAYOUTS["history of any length"]
    bits, heads = Stored(0.5).names(AxisOrder(), "transformer")
    blocks = layout.blocks(BLOCK)
    tensors = {
        bits: packed(torch.ones(HEADS, 1, blocks, blocks, dtype=torch.bool)),
        heads: torch.arange(HEADS, dtype=torch.int32)[None],
    }
    call = AttentionCall(layout, "transformer", 0, tuple(range(HEADS)), now=(0, 9))
    with pytest.raises(
        ValueError, match="every token queries, found 960 queries for 1,160 tokens.*Take another selection"
    ):
        partition((Method(select=Stored(0.5)),) * HEADS, call, tensors, CPU)


# At a site


class SyntheticModel:
    """Stands for a model whose forward has shown this layout."""

    def __init__(self, layout: TokenLayout) -> None:
        self.name, self.module = "transformer", nn.Linear(HEADS * HEAD_DIM, 8)
        self.shape = ModelShape(1, HEADS, HEAD_DIM)
        self.branch, self.sigma, self.looks_ahead = "cond", None, False
        self.clock = SimpleNamespace(now=lambda: (1, 4))
        self.family = SimpleNamespace(output_projection=lambda module, name: module)
        self._layout = layout

    def rows(self, batch: int, layer: int) -> list[Rows]:
        return [Rows(0, batch, self._layout)]

    def places(self, device: torch.device) -> None:
        """The tokens stand in the order of the layout."""


def site_of(layout: TokenLayout) -> Site:
    return Site(cast(AttachedModel, SyntheticModel(layout)), 0, "attn1", nn.Identity(), sdpa)


def whole(layout: TokenLayout, key_heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """As a model gives them: k and v with the padding, which is NaN."""
    q, k, v = inputs(layout, key_heads)
    padding = torch.full((1, layout.tokens - layout.keys, key_heads, HEAD_DIM), torch.nan)
    return q, torch.cat([k, padding], 1), torch.cat([v, padding], 1)


@every_layout
@pytest.mark.parametrize("key_heads", [4, 1])
def test_a_plan_is_at_work_on_fewer_queries(layout: TokenLayout, key_heads: int) -> None:
    methods = {"a": METHODS["draft"], "b": replace(METHODS["band"], rest=Kept(2)), "d": DENSE}
    plan = Plan(
        "wan", {"transformer": ModelShape(1, HEADS, HEAD_DIM)}, methods, (Span(0.0, 1.0, {"transformer": ("abda",)}),)
    )
    site = site_of(layout)
    site.engine = PlanEngine(site, plan, Partitions({}), CacheManager())
    out = site.attend(*whole(layout, key_heads))
    qkv = inputs(layout, key_heads)
    close(out[:, :, 1:3], sdpa(*qkv)[:, :, 1:3])  # a refresh, and dense
    close(out[:, :, ::3], masked(qkv, mask_of(methods["a"], layout, qkv))[:, :, ::3])


def test_another_number_of_queries_or_keys_is_refused() -> None:
    site = site_of(LAYOUTS["history of any length"])
    q, k, v = whole(LAYOUTS["history of any length"])
    with pytest.raises(
        RuntimeError, match="expected the 960 queries and 1,160 keys of .* found 960 queries and 1,159 keys"
    ):
        site.attend(q, k[:, 1:], v[:, 1:])
    with pytest.raises(RuntimeError, match="expected the 960 queries and 1,160 keys of .* found 1,160 tokens"):
        site.attend(torch.cat([q, q[:, :200]], 1), k, v)


class StockProcessor:
    """How models with shared keys and a history call attention."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Tensor:
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **arguments).transpose(1, 2)


def redirected(layout: TokenLayout) -> tuple[Site, Any]:
    model = SyntheticModel(layout)
    model.family = COGVIDEOX
    site = Site(cast(AttachedModel, model), 0, "attn1", nn.Identity(), sdpa)
    return site, processor.redirect(site, StockProcessor())


@grouped
def test_the_processor_takes_grouped_queries_and_a_history(key_heads: int) -> None:
    layout = LAYOUTS["history of any length"]
    site, ours = redirected(layout)
    seen: list[tuple[int, ...]] = []

    def attend_and_note(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(tuple(k.shape))
        return processor.attend_densely(ours, "F.scaled_dot_product_attention", q, k, v)

    site.engine = cast(Any, SimpleNamespace(attend=attend_and_note))
    qkv = whole(layout, key_heads)
    close(ours(*qkv, enable_gqa=key_heads != HEADS), sdpa(*qkv))
    assert seen == [(1, layout.keys, key_heads, HEAD_DIM)]


@pytest.mark.parametrize(("key_heads", "grouped_queries"), [(2, False), (3, True)])
def test_heads_that_do_not_divide_are_refused(key_heads: int, grouped_queries: bool) -> None:
    layout = LAYOUTS["history of any length"]
    _, ours = redirected(layout)
    with pytest.raises(
        ValueError, match=r"q, k and v of one shape .* with enable_gqa, a multiple of the heads.*\(1, 1160, "
    ):
        ours(*whole(layout, key_heads), enable_gqa=grouped_queries)


# In a search


@every_layout
@every_method
def test_sampled_rows_are_rows_of_the_whole_call(layout: TokenLayout, method: Method) -> None:
    q, k, v = inputs(layout)
    rows = torch.arange(0, layout.existing_queries, 7)
    call = AttentionCall(layout, "transformer", 0, tuple(range(HEADS)), now=(0, 9), dense=sdpa)
    found = RowProbe((DENSE, method), Selections({}), {}, (1, 1), HEADS, HEAD_DIM)
    grams = head_grams(torch.eye(HEADS * HEAD_DIM), HEADS)
    chunk = Chunk(call, SampledHeads(q[0], k[0], v[0], rows, layout), torch.zeros(HEADS, len(rows), HEAD_DIM), grams)
    found.add(chunk)
    close(chunk.dense, sdpa(q, k, v)[0, rows].transpose(0, 1))
    ran = attend((method,) * HEADS, layout, (q, k, v))
    off = deviations(ran.out[0, rows].transpose(0, 1)[:, None], chunk.dense, grams)
    torch.testing.assert_close(torch.from_numpy(found.mse[:, 1:]), torch.from_numpy(off.mse), rtol=1e-3, atol=1e-9)
    assert found.density[:, 1].mean() == pytest.approx(float(ran.density), abs=1e-6)
    assert layer_energy(chunk.dense, torch.eye(HEADS * HEAD_DIM)) > 0 and found.mse[:, 1].max() > 0


@every_layout
def test_a_probe_measures_grouped_queries_as_if_repeated(layout: TokenLayout) -> None:
    candidates = (
        DENSE,
        METHODS["draft"],
        replace(METHODS["band"], rest=Kept(2)),
        replace(METHODS["band"], precision="int8"),
    )
    settings = ProbeSettings(candidates, ((0.0, 1.0),), rows=32, probe_steps=1, seed=0)
    models = {"transformer": ModelShape(1, HEADS, HEAD_DIM)}

    def measured(key_heads: int, repeat: bool) -> dict[str, Any]:
        probe = RunProbe(settings, models, layout.whole, 4, {}, 1)
        site = site_of(layout)
        torch.nn.init.eye_(cast(Any, site.model.module).weight)
        for step in range(4):
            qkv = whole(layout, key_heads)
            call_now = (step, 4)
            cast(Any, site.model.clock).now = lambda call_now=call_now: call_now
            site.engine = SiteEngine(probe, site)
            site.attend(*(repeated(*qkv) if repeat else qkv))
        return probe.sums

    a, b = measured(2, False), measured(2, True)
    assert (a["samples/transformer"] > 0).all() and (a["mse/transformer"][..., 1:] > 0).all()
    for name in a:
        torch.testing.assert_close(torch.from_numpy(a[name]), torch.from_numpy(b[name]), rtol=1e-4, atol=1e-7)


@every_layout
def test_gates_are_watched_on_grouped_queries_as_if_repeated(layout: TokenLayout) -> None:
    methods = {"a": replace(METHODS["draft"], rest=Kept(3)), "b": replace(METHODS["band"], rest=Kept(2))}
    plan = Plan(
        "wan", {"transformer": ModelShape(1, HEADS, HEAD_DIM)}, methods, (Span(0.0, 1.0, {"transformer": ("abab",)}),)
    )

    def gate(repeat: bool) -> Tensor:
        watch = Watch(plan, 0.999, 0.01)
        watch.begin()
        for step in range(4):
            qkv = inputs(layout, 2, seed=step // 2)  # other ones at the third step
            call = AttentionCall(layout, "transformer", 0, tuple(range(HEADS)), now=(step, 4), dense=sdpa)
            watch.attend(call, *(repeated(*qkv) if repeat else qkv))
        return watch.gate("transformer")

    expected = torch.tensor([1, 0, 1, 0], dtype=torch.uint8)[:, None, None].expand(4, 1, HEADS)
    assert torch.equal(gate(False), expected) and torch.equal(gate(True), expected)
