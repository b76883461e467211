"""Sequences of segments: what stands where, and that all but the video stays exact in every order and method."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.kernels.pool import pool
from diffusers_accel.layout import Segment, TokenLayout
from diffusers_accel.methods import BLOCK, AxisOrder, Band, Draft, Kept, Method, Order, Patches, Pooled, Stored, Stripe
from diffusers_accel.methods.arrangement import arrangement
from diffusers_accel.methods.order import exact_tokens, video_places
from diffusers_accel.methods.select import Inputs
from diffusers_accel.methods.selects.stored import packed
from diffusers_accel.run.launch import Output, run
from diffusers_accel.run.memory import LayerCache
from diffusers_accel.run.partition import partition

CPU = torch.device("cpu")
HEAD_DIM = 16
GRID = (3, 16, 20)
VIDEO = Segment.video(GRID)


def pieces(*sizes: int) -> list[Segment]:
    return [Segment.video(GRID, size) for size in sizes]


def interleaved(*sizes: int) -> TokenLayout:
    """Pieces of the video with short runs of other tokens between them, as packed models have them."""
    kinds = ("text", "condition", "audio", "text")
    segments = [Segment("text", 9)]
    for number, piece in enumerate(pieces(*sizes)):
        segments += [piece, Segment(kinds[number % 4], 3 + number)]  # type: ignore[arg-type]
    return TokenLayout.of(*segments)


ARRANGEMENTS = {
    "text in front": TokenLayout(*GRID, 140, "start"),
    "both ends": TokenLayout.of(Segment("reference", 70), VIDEO, Segment("text", 30)),
    "much in front": TokenLayout.of(Segment("text", 33), Segment("image", 100), Segment("audio", 5), VIDEO),
    "behind, padded": TokenLayout.of(VIDEO, Segment("audio", 50), Segment("text", 140, valid=3)),
    "exact video": TokenLayout.of(Segment("video", 64, (1, 8, 8)), VIDEO, Segment("reference", 12)),
    "interleaved": interleaved(320, 320, 320),
    "many pieces": interleaved(*[64] * 15),
    "ragged pieces": interleaved(7, 500, 1, 452),
    "pieces, padded": TokenLayout.of(*pieces(300), Segment("audio", 40), *pieces(660), Segment("text", 50, valid=13)),
}
METHODS = {
    "band": Method(select=Band(0.3)),
    "band hwf": Method(AxisOrder("hwf"), Band(0.3, first_frame=False)),
    "stripe": Method(select=Stripe(0.3)),
    "stripe calibrated": Method(select=Stripe(0.3, first_frame=False, calibrated=True)),
    "draft": Method(Patches(), Draft(0.25)),
    "draft, bare": Method(Patches(4, 4), Draft(0.25, min_blocks=0, diagonal=False, first_frame=False)),
    "draft whf by rows": Method(AxisOrder("whf"), Draft(0.25, per="row")),
    "draft pooled": Method(Patches(), Draft(0.25), rest=Pooled()),
    "stored": Method(AxisOrder("hfw"), Stored(0.5)),
}
every_arrangement = pytest.mark.parametrize("layout", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def plan_tensors(layout: TokenLayout, heads: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    blocks = layout.blocks(BLOCK)
    tensors = {"stripe_mass/transformer": torch.rand(1, heads, *GRID[:2], generator=generator)}
    masks = torch.rand(heads, 1, blocks, blocks, generator=generator) < 0.4
    bits, index = Stored(0.5).names(AxisOrder("hfw"), "transformer")
    return {**tensors, bits: packed(masks), index: torch.arange(heads, dtype=torch.int32)[None]}


def inputs(layout: TokenLayout, heads: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q of all tokens, k and v of those that exist."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(1, layout.tokens, heads, HEAD_DIM, generator=generator) for _ in range(3))
    return q, k[:, : layout.keys], v[:, : layout.keys]


def attend(
    methods: tuple[Method, ...], layout: TokenLayout, qkv: Any, memory: LayerCache | None = None, step: int = 0
) -> Output:
    heads = tuple(range(len(methods)))
    call = AttentionCall(layout, "transformer", 0, heads, now=(step, 9), dense=sdpa)
    return run(partition(methods, call, plan_tensors(layout, len(heads)), CPU), call, *qkv, memory)


def mask_of(method: Method, layout: TokenLayout, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """bool [B, heads, queries, keys] in the model's order: which token pairs are read, by the method's own stages."""
    q, k, _ = qkv
    order = method.order.index(layout)
    asking, keys = method.order.query_index(layout), order[: layout.keys]
    qs, ks = q[:, asking], k[:, keys]
    call = AttentionCall(layout, "transformer", 0, tuple(range(q.shape[2])), now=(0, 9))
    tensors = plan_tensors(layout, q.shape[2])
    inputs = Inputs(CPU, (pool(qs, BLOCK), pool(ks, BLOCK)), (qs, ks))
    pattern = method.select.pattern(call, method.order, tensors, inputs)
    pattern.check()
    read = pattern.token_mask().expand(len(q), -1, -1, -1)
    mask = torch.zeros_like(read)
    mask[:, :, asking[:, None], keys] = read
    return mask


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Head by head in fp64."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * q.shape[3] ** -0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
    return torch.einsum("bhqk,bkhd->bqhd", weights, v.double()).float()


# The layout itself


def test_the_short_way_is_a_layout_of_segments() -> None:
    assert TokenLayout(*GRID) == TokenLayout.of(VIDEO)
    front = TokenLayout.of(Segment("text", 7), VIDEO)
    assert front == TokenLayout(*GRID, 7, "start") and front.short == (*GRID, 7, "start", None)
    padded = TokenLayout.of(VIDEO, Segment("text", 7, valid=2))
    assert padded == TokenLayout(*GRID, 7, "end", 2) and hash(padded) == hash(TokenLayout(*GRID, 7, "end", 2))
    assert padded != TokenLayout(*GRID, 7, "end") == padded.whole == padded.with_text(None)
    assert padded.with_text(5) == TokenLayout(*GRID, 7, "end", 5)
    assert eval(repr(padded)) == padded
    assert ARRANGEMENTS["both ends"].short is None
    assert eval(repr(ARRANGEMENTS["both ends"])) == ARRANGEMENTS["both ends"]


@every_arrangement
def test_sizes_add_up(layout: TokenLayout) -> None:
    assert layout.grid == GRID == (layout.frames, layout.height, layout.width)
    assert layout.tokens == sum(each.tokens for each in layout.segments) == layout.queries and layout.query_start == 0
    assert layout.video_tokens == 960 == len(video_places(layout)) == int((~exact_tokens(layout)).sum())
    assert layout.text_tokens == sum(each.tokens for each in layout.segments if each.kind == "text")
    assert layout.blocks(BLOCK) == layout.query_blocks(BLOCK) == -(-layout.tokens // BLOCK)
    assert layout.key_blocks(BLOCK) == -(-layout.keys // BLOCK) <= layout.blocks(BLOCK)
    assert video_places(layout)[0] == layout.video_start and bool((video_places(layout).diff() > 0).all())


def test_padding_is_the_end_of_the_keys() -> None:
    layout = ARRANGEMENTS["behind, padded"]
    assert (layout.tokens, layout.keys, layout.text_valid, layout.existing_queries) == (1150, 1013, 3, 1013)


@every_arrangement
def test_a_copy_is_the_same_layout(layout: TokenLayout) -> None:
    for other in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))):
        assert other == layout and hash(other) == hash(layout) and "_hash" not in other.__reduce__()[1]


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment("text", 5)], "one sparse video, found 0 grids"),
        ([VIDEO, Segment.video((1, 8, 8))], "one sparse video, found 2 grids"),
        ([VIDEO, VIDEO], "expected the 960 tokens of a video of 3 x 16 x 20.*found 1,920"),
        ([Segment.video(GRID, 100), Segment("text", 5)], "expected the 960 tokens.*found 100"),
        ([Segment("text", 5, valid=2), VIDEO], "only the last segment may have padding"),
        (
            [Segment("text", 5), Segment("history", 5, queries=False), VIDEO],
            "segments with queries stand together",
        ),
    ],
)
def test_what_is_no_layout_is_refused(segments: list[Segment], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenLayout.of(*segments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "sound", "tokens": 5}, "kind: expected one of video, text.*found 'sound'"),
        ({"kind": "text", "tokens": 0}, "at least one token"),
        ({"kind": "text", "tokens": 5, "valid": 6}, r"valid counts .* expected in 0\.\.5"),
        ({"kind": "text", "tokens": 5, "exact": False}, "only video .* can be sparse"),
        ({"kind": "video", "tokens": 5, "exact": False}, "only video with a grid"),
        ({"kind": "video", "tokens": 8, "grid": (2, 2, 2), "exact": False, "queries": False}, "with queries"),
        ({"kind": "video", "tokens": 8, "grid": (2, 0, 2)}, "grid is"),
    ],
)
def test_what_is_no_segment_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Segment(**arguments)


# Orders


ORDERS = (AxisOrder(), AxisOrder("hwf"), AxisOrder("wfh"), Patches(), Patches(3, 5))


@every_arrangement
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.label)
def test_an_order_sorts_the_video_and_keeps_the_others_among_themselves(order: Order, layout: TokenLayout) -> None:
    index = order.index(layout)
    assert torch.equal(index.sort().values, torch.arange(layout.tokens))
    exact = exact_tokens(layout)
    assert torch.equal(index[exact[index]], exact.nonzero()[:, 0]), "others keep their sequence"
    rank = torch.full((layout.tokens,), -1)
    rank[video_places(layout)] = torch.arange(layout.video_tokens)
    assert torch.equal(rank[index[~exact[index]]], order.index(TokenLayout(*GRID))), "as a video alone is sorted"
    assert torch.equal(index[layout.keys :], torch.arange(layout.keys, layout.tokens)), "padding stays at the end"
    video = (~exact[index]).nonzero()[:, 0]
    assert int(video[-1] - video[0]) + 1 == layout.video_tokens, "the video is in one piece"
    assert order.moves(layout) == (not torch.equal(index, torch.arange(layout.tokens)))


@every_arrangement
@pytest.mark.parametrize("order", ORDERS, ids=lambda order: order.label)
def test_blocks_are_exact_where_they_hold_an_exact_token(order: Order, layout: TokenLayout) -> None:
    places, index, exact = arrangement(order, layout), order.index(layout), exact_tokens(layout)
    for block, tokens in enumerate(index.split(BLOCK)):
        assert bool(places.exact_keys[block]) == bool(places.exact_queries[block]) == bool(exact[tokens].any())
        first = bool(torch.isin(tokens, video_places(layout)[: GRID[1] * GRID[2]]).any())
        assert bool(places.first_frame[block]) == (first and order.frame_major)
    assert torch.equal(places.own, torch.eye(layout.blocks(BLOCK), dtype=torch.bool))
    inside = torch.zeros_like(places.exact_keys)
    inside[slice(*places.video_keys)] = True
    assert torch.equal(inside, ~places.exact_keys) and places.video_keys == places.video_queries


def test_interleaved_video_is_as_sparse_as_any() -> None:
    """Left in place, fifteen runs of other tokens would make every block exact."""
    layout = ARRANGEMENTS["many pieces"]
    held = exact_tokens(layout)
    assert all(bool(block.any()) for block in held.split(BLOCK))
    for method in (METHODS["band"], METHODS["draft"]):
        exact_blocks = int(arrangement(method.order, layout).exact_keys.sum())
        assert exact_blocks == layout.blocks(BLOCK) - 960 // BLOCK
        assert float(attend((method,), layout, inputs(layout, 1)).density) < 0.85


# Exactness


@every_method
@every_arrangement
def test_exact_queries_read_everything(layout: TokenLayout, method: Method) -> None:
    qkv = inputs(layout, 2)
    exact = exact_tokens(layout)
    out = attend((method, method), layout, qkv).out
    torch.testing.assert_close(out[:, exact], sdpa(*qkv)[:, exact], rtol=1e-5, atol=1e-5)


@every_method
@every_arrangement
def test_exact_keys_are_read_by_every_query(layout: TokenLayout, method: Method) -> None:
    """One value at a time, of every exact segment, is made huge: each output must follow by that key's own weight."""
    q, k, v = inputs(layout, 1)
    k[...] = 0  # all keys weigh alike, and every draft block too
    base = attend((method,), layout, (q, k, v)).out
    assert bool((base.abs() < 1).all())
    for start, stop, segment in layout.runs:
        if segment.exact and start < layout.keys:
            changed = v.clone()
            changed[:, (start + min(stop, layout.keys)) // 2] += 1e6
            moved = attend((method,), layout, (q, k, changed)).out - base
            assert bool((moved > 1e6 / layout.keys - 1).all()), segment


@every_method
@every_arrangement
def test_heads_read_exactly_their_blocks(layout: TokenLayout, method: Method) -> None:
    if isinstance(method.rest, Pooled):
        method = replace(method, rest=Method().rest)
    qkv = inputs(layout, 2)
    ran = attend((method, method), layout, qkv)
    mask = mask_of(method, layout, qkv)
    torch.testing.assert_close(ran.out, masked(*qkv, mask), rtol=1e-5, atol=1e-5)
    assert layout.blocks(BLOCK) < 8 or float(ran.density) < 1


@every_arrangement
def test_kept_parts_make_up_the_whole(layout: TokenLayout) -> None:
    methods = (Method(Patches(), Draft(0.25), rest=Kept(3)), Method(AxisOrder("hwf"), Band(0.3), rest=Kept(2)))
    qkv, memory = inputs(layout, 2), LayerCache()
    reused = 0
    for step in range(5):
        ran = attend(methods, layout, qkv, memory, step)
        reused += ran.reused
        torch.testing.assert_close(ran.out, sdpa(*qkv), rtol=1e-5, atol=1e-5)
    assert reused == 5  # of 5 steps each, refreshed at 0, 3 and at 0, 2, 4


@every_arrangement
@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
def test_quantized_launches_are_arranged_alike(layout: TokenLayout, precision: str) -> None:
    methods = tuple(Method(order, Band(0.4), precision) for order in (AxisOrder(), Patches()))
    qkv = inputs(layout, 2)
    found = attend(methods, layout, qkv).out
    exact = attend(tuple(replace(each, precision="input") for each in methods), layout, qkv).out
    assert float(torch.cosine_similarity(found, exact, dim=-1).min()) > 0.99


@pytest.mark.parametrize("frames", [1, 2])
def test_a_frame_alone_has_no_first_frame_that_all_read(frames: int) -> None:
    """Else a model that attends within each frame could leave nothing out."""
    always = arrangement(AxisOrder("fhw"), TokenLayout(frames, 32, 32)).always(first_frame=True)
    assert always.float().mean() == (0.0 if frames == 1 else 0.5)
