"""Any legal composition of stages on any layout: exact where it must be, and nothing leaks from one head, row, branch or step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_accel import patch
from diffusers_accel.layout import Segment, TokenLayout
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
    Rest,
    Skip,
    Stored,
    Stripe,
)
from diffusers_accel.methods.selects.stored import packed
from diffusers_accel.run import launch as launch_module
from diffusers_accel.run.launch import Output
from diffusers_accel.run.memory import LayerCache
from tests.stages import attend, mask_of, partition_of, pattern_of, sdpa
from tests.tiny import TEXT_DIM, tiny_wan_transformer

HEAD_DIM = 16
PARTS = 3  # of the schedule, in the stored masks and in the gate
STEPS = 7
NOW = (0, STEPS)
AXES = ("fhw", "fwh", "hfw", "hwf", "wfh", "whf")
LAYOUTS = (
    TokenLayout(2, 16, 20),
    TokenLayout(3, 9, 13),
    TokenLayout(2, 12, 20, 20, "start"),
    TokenLayout(2, 12, 20, 140, "start"),
    TokenLayout(2, 12, 20, 20, "end"),
    TokenLayout(2, 12, 20, 140, "end", text_valid=3),
    TokenLayout(2, 20, 12, 140, "end", text_valid=0),
    TokenLayout(2, 16, 16, 20, "end", text_valid=20),
)


# What is drawn


ORDERS = st.one_of(st.sampled_from(AXES).map(AxisOrder), st.sampled_from([Patches(), Patches(4, 4), Patches(3, 5)]))
SHARES = st.sampled_from([0.1, 0.25, 0.4, 0.7, 1.0])
DRAFT_FLAGS = {"min_blocks": st.integers(0, 3), "diagonal": st.booleans(), "first_frame": st.booleans()}
DRAFTS = st.one_of(
    st.builds(Draft, SHARES, per=st.sampled_from(["head", "row"]), **DRAFT_FLAGS),
    st.builds(Draft, st.none(), SHARES, **DRAFT_FLAGS),
)
KEPT = st.one_of(st.builds(Kept, st.integers(2, 4)), st.just(Kept(gated=True)))


def methods(rest: st.SearchStrategy[Rest], precision: str = "input") -> st.SearchStrategy[Method]:
    """Sparse methods of every kind."""
    axes, computed = st.sampled_from(AXES).map(AxisOrder), st.just(precision)
    return st.one_of(
        st.builds(Method, ORDERS, st.builds(Band, SHARES, st.booleans()), computed, rest),
        st.builds(
            Method, st.just(AxisOrder()), st.builds(Stripe, SHARES, st.booleans(), st.booleans()), computed, rest
        ),
        st.builds(Method, ORDERS, DRAFTS, computed, rest),
        st.builds(Method, axes, st.just(Stored(0.5)), computed, rest),
    )


ONCE, KEEPING, POOLED = methods(st.just(Drop())), methods(KEPT), methods(st.just(Pooled()))
ANY = st.one_of(
    ONCE,
    KEEPING,
    POOLED,
    methods(st.sampled_from([Drop(), Pooled()]), "int8"),
    st.builds(Method, ORDERS, st.builds(Draft, SHARES, reselect_every=st.integers(2, 3))),
    st.sampled_from([DENSE, Method(select=Skip()), Method(precision="int8")]),
)
EVERYTHING = st.one_of(
    st.builds(Method, ORDERS, st.builds(Band, st.just(1.0), st.booleans()), rest=st.sampled_from([Drop(), Pooled()])),
    st.builds(Method, select=st.builds(Stripe, st.just(1.0), st.booleans(), st.booleans())),
    st.builds(Method, ORDERS, st.builds(Draft, st.just(1.0), **DRAFT_FLAGS)),
    st.builds(Method, ORDERS, st.builds(Draft, st.none(), st.just(1.0), **DRAFT_FLAGS)),
    st.just(DENSE),
)
few = settings(max_examples=15, deadline=None, derandomize=True)


def plan_tensors(layout: TokenLayout, heads: int) -> dict[str, Tensor]:
    """What calibrated methods read: masks of random density that change along the schedule, a gate, a mass; one layer."""
    generator = torch.Generator().manual_seed(5)
    blocks = layout.blocks(BLOCK)
    tensors = {
        "refresh/transformer": torch.rand(PARTS, 1, heads, generator=generator) < 0.4,
        "stripe_mass/transformer": torch.rand(1, heads, layout.frames, layout.height, generator=generator),
    }
    for axes in AXES:
        density = 0.2 + 0.8 * torch.rand(heads, PARTS, 1, 1, generator=generator)
        masks = torch.rand(heads, PARTS, blocks, blocks, generator=generator) < density
        bits, index = Stored(0.5).names(AxisOrder(axes), "transformer")
        tensors |= {bits: packed(masks), index: torch.arange(heads, dtype=torch.int32)[None]}
    return tensors


def only(tensors: dict[str, Tensor], head: int) -> dict[str, Tensor]:
    """The plan's tensors as if this head were the only one."""
    return {
        name: tensor[head : head + 1]
        if name.startswith("stored_bits")
        else torch.zeros(1, 1, dtype=torch.int32)
        if name.startswith("stored_heads")
        else tensor[:, :, head : head + 1]
        if name.startswith("refresh")
        else tensor[:, head : head + 1]
        for name, tensor in tensors.items()
    }


def inputs(layout: TokenLayout, heads: int, seed: int = 0, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q of all tokens and k, v of those that exist, as parts of longer tensors whose padding is NaN."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(batch, layout.tokens, heads, HEAD_DIM, generator=generator) for _ in range(3))
    for x in (k, v):
        x[:, layout.keys :] = torch.nan
    return q, k[:, : layout.keys], v[:, : layout.keys]


def steps_of(
    heads: tuple[Method, ...],
    layout: TokenLayout,
    tensors: dict[str, Tensor],
    calls: list[tuple[Tensor, Tensor, Tensor]],
) -> list[Output]:
    """What comes out step by step; as in an engine, the heads are partitioned anew where stored masks change."""
    memory = LayerCache()
    return [attend(heads, layout, qkv, tensors, memory, now=(step, len(calls))) for step, qkv in enumerate(calls)]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return torch.allclose(a, b, atol=tolerance, rtol=tolerance)


# Exactness


@few
@given(st.lists(EVERYTHING, min_size=1, max_size=3), st.sampled_from(LAYOUTS))
def test_density_1_is_dense_attention_in_any_order(heads: list[Method], layout: TokenLayout) -> None:
    q, k, v = inputs(layout, len(heads))
    ran = attend(heads, layout, (q, k, v), plan_tensors(layout, len(heads)), now=NOW)
    assert close(ran.out, sdpa(q, k, v))
    assert float(ran.density) == 1 and ran.reused == 0


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("select", [Band(1.0), Draft(1.0)])
def test_dense_attention_does_not_see_the_order(select: Any, layout: TokenLayout) -> None:
    """Each head in an order of its own: queries, keys and outputs must be moved alike."""
    heads = tuple(Method(order, select) for order in (*map(AxisOrder, AXES), Patches(), Patches(4, 4)))
    q, k, v = inputs(layout, len(heads))
    assert close(attend(heads, layout, (q, k, v)).out, sdpa(q, k, v))


@few
@given(ONCE, st.sampled_from(LAYOUTS), st.integers(0, PARTS - 1))
def test_a_selection_and_its_complement_are_all_keys_once(method: Method, layout: TokenLayout, part: int) -> None:
    tensors = plan_tensors(layout, 2)
    q, k, _ = inputs(layout, 2)
    order = method.order.index(layout)
    sorted_qk = q[:, order], k[:, order[: layout.keys]]
    pattern = pattern_of(method, layout, *sorted_qk, tensors, now=(part, PARTS))
    (launch,) = partition_of((method,) * 2, layout, tensors, (part, PARTS)).launches
    if method.select.wants:
        assert launch.pattern is None
    else:
        assert launch.pattern is not None and torch.equal(launch.pattern.mask(), pattern.mask())
    rest = pattern.complement()
    pattern.check()
    rest.check()
    assert torch.equal(rest.mask(), ~pattern.mask())
    both = pattern.token_mask().int() + rest.token_mask().int()
    assert both.shape[2:] == (layout.tokens, layout.keys) and torch.all(both == 1)


@pytest.mark.parametrize("grid", [(45, 80), (30, 52), (30, 45), (48, 85), (85, 48)])
@pytest.mark.parametrize("select", [Draft(1.0), Draft(None, 1.0), Band(1.0)])
def test_ragged_edges_weigh_nothing(select: Any, grid: tuple[int, int]) -> None:
    """Nothing is padded at the edges of real grids, in patches or in axis orders."""
    layout = TokenLayout(1, *grid, 20, "end", text_valid=7)
    heads = (Method(Patches(), select), Method(AxisOrder("whf"), select))
    q, k, v = inputs(layout, 2, batch=1)
    assert close(attend(heads, layout, (q, k, v)).out, sdpa(q, k, v))


@few
@given(st.one_of(ONCE, POOLED), st.sampled_from([layout for layout in LAYOUTS if layout.text_tokens]))
def test_text_queries_are_dense(method: Method, layout: TokenLayout) -> None:
    q, k, v = inputs(layout, 2)
    out = attend((method,) * 2, layout, (q, k, v), plan_tensors(layout, 2), now=NOW).out
    text = slice(layout.text_start, layout.text_start + layout.text_tokens)
    assert close(out[:, text], sdpa(q, k, v)[:, text])


@few
@given(st.lists(st.one_of(ONCE, POOLED), min_size=2, max_size=4), st.sampled_from(LAYOUTS))
def test_a_head_among_others_is_what_it_is_alone(heads: list[Method], layout: TokenLayout) -> None:
    heads = [*heads, DENSE, Method(select=Skip()), replace(heads[0], precision="int8")]
    tensors = plan_tensors(layout, len(heads))
    q, k, v = inputs(layout, len(heads))
    together = attend(heads, layout, (q, k, v), tensors, now=NOW)
    densities = []
    for head, method in enumerate(heads):
        one = slice(head, head + 1)
        own = q[:, :, one], k[:, :, one], v[:, :, one]
        alone = attend((method,), layout, own, only(tensors, head), now=NOW)
        assert close(together.out[:, :, one], alone.out, 2e-6)
        densities.append(float(alone.density))
    assert float(together.density) == pytest.approx(sum(densities) / len(heads), abs=1e-6)


@few
@given(ONCE, st.sampled_from(LAYOUTS))
def test_heads_read_exactly_the_pattern(method: Method, layout: TokenLayout) -> None:
    """Against masked attention of the same blocks; queries without any key give 0."""
    heads = 2
    tensors = plan_tensors(layout, heads)
    q, k, v = inputs(layout, heads)
    ran = attend((method,) * heads, layout, (q, k, v), tensors, now=NOW)
    order = method.order.index(layout)
    qs, ks, vs = q[:, order], k[:, order[: layout.keys]], v[:, order[: layout.keys]]
    mask = pattern_of(method, layout, qs, ks, tensors, now=NOW).token_mask()
    if not method.select.wants:
        blocks = mask_of(method, layout, tensors, heads, now=NOW)
        wide = blocks.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[None, :, : layout.tokens, : layout.keys]
        assert torch.equal(mask, wide)
    scores = torch.einsum("bqhd,bkhd->bhqk", qs, ks) * HEAD_DIM**-0.5
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
    assert close(ran.out[:, order], torch.einsum("bhqk,bkhd->bqhd", weights, vs))


@few
@given(methods(st.just(Drop())), st.sampled_from(LAYOUTS))
def test_int8_stays_close_on_smooth_inputs(method: Method, layout: TokenLayout) -> None:
    """A draft selects from what was not quantized yet, so both read the same blocks."""
    q, k, v = inputs(layout, 2)
    smooth = smoothed(q, layout), smoothed(k, layout), smoothed(v, layout)
    tensors = plan_tensors(layout, 2)
    exact, rounded = (
        attend((replace(method, precision=precision),) * 2, layout, smooth, tensors, now=NOW)
        for precision in ("input", "int8")
    )
    assert float(exact.density) == float(rounded.density)
    read = exact.out.abs().sum(-1) > 0
    cosine = torch.cosine_similarity(exact.out, rounded.out, dim=-1)[read]
    assert read.any() and cosine.mean() >= 0.999 and cosine.min() >= 0.99
    assert torch.equal(rounded.out.abs().sum(-1) > 0, read)


def smoothed(x: Tensor, layout: TokenLayout) -> Tensor:
    """Values that change slowly over the video, with a mean of their own in each channel, as keys have."""
    video = slice(layout.video_start, layout.video_start + layout.video_tokens)
    grid = x[:, video].movedim(1, -1).unflatten(-1, (layout.frames, layout.height, layout.width)).flatten(1, 2)
    coarse = F.interpolate(grid[..., ::4, ::4], size=grid.shape[2:], mode="trilinear")
    out = x.clone()
    out[:, video] = coarse.flatten(2).unflatten(1, x.shape[2:]).movedim(-1, 1)
    return out + 2 * torch.randn(x.shape[2:], generator=torch.Generator().manual_seed(9))


# Kept


@few
@given(st.lists(KEEPING, min_size=1, max_size=3), st.sampled_from(LAYOUTS))
def test_a_refresh_is_dense_for_any_selection(heads: list[Method], layout: TokenLayout) -> None:
    q, k, v = inputs(layout, len(heads))
    (ran,) = steps_of(tuple(heads), layout, plan_tensors(layout, len(heads)), [(q, k, v)])
    assert close(ran.out, sdpa(q, k, v))
    assert float(ran.density) == 1 and ran.reused == 0


@few
@given(st.lists(KEEPING, min_size=1, max_size=3), st.sampled_from(LAYOUTS))
def test_reuse_is_dense_while_nothing_changes(heads: list[Method], layout: TokenLayout) -> None:
    """Whatever refreshes when, and although stored masks change along the schedule: the parts make up the whole."""
    call = inputs(layout, len(heads))
    ran = steps_of(tuple(heads), layout, plan_tensors(layout, len(heads)), [call] * STEPS)
    for each in ran:
        assert close(each.out, sdpa(*call))
    assert all(each.reused == 0 for each in ran[:1])
    intervals = [
        method.rest.refresh_every for method in heads if isinstance(method.rest, Kept) and not method.rest.gated
    ]
    gated = len(heads) - len(intervals)
    expected = sum(STEPS - len(range(0, STEPS, every)) for every in intervals)
    assert expected <= sum(each.reused for each in ran) <= expected + gated * (STEPS - 1)


def test_between_refreshes_selected_blocks_are_new_and_the_rest_is_kept() -> None:
    """By hand: attention over the blocks that are read, of this step, merged with the rest, of the step that refreshed."""
    layout = LAYOUTS[0]
    method = Method(AxisOrder("hwf"), Band(0.4), rest=Kept(3))
    calls = [inputs(layout, 1, seed) for seed in range(4)]
    ran = steps_of((method,), layout, {}, calls)
    order = method.order.index(layout)
    blocks = mask_of(method, layout)
    mask = blocks.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[None, :, : layout.tokens, : layout.tokens]

    def weights(call: tuple[Tensor, Tensor, Tensor], reads: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x[:, order] for x in call)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(HEAD_DIM**-0.5).masked_fill(~reads, -torch.inf).exp()
        return torch.einsum("bhqk,bkhd->bqhd", scores, v), scores.sum(-1).transpose(1, 2)[..., None]

    rest, rest_sum = weights(calls[0], ~mask)
    for step in (1, 2):
        new, new_sum = weights(calls[step], mask)
        assert close(ran[step].out[:, order], (new + rest) / (new_sum + rest_sum))
        assert ran[step].reused == 1 and float(ran[step].density) == pytest.approx(blocks.float().mean().item())
        assert not close(ran[step].out, sdpa(*calls[step]), 1e-3), "the rest is really of another step"
    assert close(ran[3].out, sdpa(*calls[3])) and ran[3].reused == 0


@few
@given(st.lists(methods(st.just(Kept(gated=True))), min_size=1, max_size=2), st.sampled_from(LAYOUTS))
def test_a_gate_by_head_is_a_loop_over_heads(kinds: list[Method], layout: TokenLayout) -> None:
    """Some heads of a group refresh while others keep what they have, while q, k, v and stored masks change."""
    heads = tuple(kinds[head % len(kinds)] for head in range(4))
    tensors = plan_tensors(layout, len(heads))
    calls = [inputs(layout, len(heads), seed) for seed in range(STEPS)]
    together = steps_of(heads, layout, tensors, calls)
    alone = []
    for head, method in enumerate(heads):
        one = slice(head, head + 1)
        own = [(q[:, :, one], k[:, :, one], v[:, :, one]) for q, k, v in calls]
        alone.append(steps_of((method,), layout, only(tensors, head), own))
        for ran, by_itself in zip(together, alone[-1], strict=True):
            assert close(ran.out[:, :, one], by_itself.out, 2e-6)
    for step, ran in enumerate(together):
        assert ran.reused == sum(each[step].reused for each in alone)
        assert float(ran.density) == pytest.approx(
            sum(float(each[step].density) for each in alone) / len(heads), abs=1e-6
        )
    gate = tensors["refresh/transformer"][:, 0]
    assert gate.any(1).any() and not gate.all(1).all(), "some refresh and some do not"


def test_heads_of_a_group_refresh_apart() -> None:
    """The gate of one part refreshes head 0 only, that of the next head 1 only."""
    layout = LAYOUTS[0]
    gate = torch.tensor([[[0, 0]], [[1, 0]], [[0, 1]]], dtype=torch.uint8)
    method = Method(Patches(), Draft(0.4), rest=Kept(gated=True))
    calls = [inputs(layout, 2, seed) for seed in range(3)]
    ran = steps_of((method,) * 2, layout, {"refresh/transformer": gate}, calls)
    for step, exact in enumerate(([True, True], [True, False], [False, True])):
        error = (ran[step].out - sdpa(*calls[step])).abs().amax((0, 1, 3))
        assert (error < 1e-5).tolist() == exact
        assert ran[step].reused == 2 - sum(exact)


def test_a_mask_that_changes_waits_for_a_refresh() -> None:
    """What is kept is the rest of the mask at the last refresh: under another one, blocks would be counted twice or never."""
    layout = LAYOUTS[0]
    blocks = layout.blocks(BLOCK)
    names = Stored(0.5).names(AxisOrder(), "transformer")
    masks = torch.stack([torch.eye(blocks, dtype=torch.bool), torch.ones(blocks, blocks, dtype=torch.bool).tril()])[
        None
    ]
    tensors = dict(zip(names, (packed(masks), torch.zeros(1, 1, dtype=torch.int32)), strict=True))
    method = Method(select=Stored(0.5), rest=Kept(3))
    call = inputs(layout, 1)
    ran = steps_of((method,), layout, tensors, [call] * 4)
    assert all(close(each.out, sdpa(*call)) for each in ran)
    lower = float(masks[0, 1].float().mean())
    assert [float(each.density) for each in ran] == pytest.approx([1, 1 / blocks, 1 / blocks, 1])
    ran = steps_of((method,), layout, tensors, [call] * 5)
    assert [float(each.density) for each in ran] == pytest.approx([1, 1 / blocks, 1 / blocks, 1, lower])


@few
@given(st.lists(ANY, min_size=1, max_size=4), st.sampled_from(LAYOUTS))
def test_two_runs_are_bit_equal(heads: list[Method], layout: TokenLayout) -> None:
    tensors = plan_tensors(layout, len(heads))
    calls = [inputs(layout, len(heads), seed) for seed in range(3)]
    first, second = (steps_of(tuple(heads), layout, tensors, calls) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.out, b.out) and float(a.density) == float(b.density) and a.reused == b.reused


# What must not mix


@few
@given(st.lists(ANY, min_size=1, max_size=3), st.sampled_from(LAYOUTS))
def test_batch_rows_never_mix(heads: list[Method], layout: TokenLayout) -> None:
    tensors = plan_tensors(layout, len(heads))
    calls = [inputs(layout, len(heads), seed) for seed in range(3)]
    together = steps_of(tuple(heads), layout, tensors, calls)
    for row in range(2):
        alone = steps_of(tuple(heads), layout, tensors, [tuple(x[row : row + 1] for x in call) for call in calls])  # type: ignore[misc]
        for a, b in zip(together, alone, strict=True):
            assert close(a.out[row : row + 1], b.out, 2e-6)


@few
@given(st.lists(ANY, min_size=1, max_size=3), st.sampled_from(LAYOUTS))
def test_what_comes_out_is_never_what_is_kept(heads: list[Method], layout: TokenLayout) -> None:
    """A caller that writes into the output, or into q, k and v, changes nothing of later steps."""
    tensors = plan_tensors(layout, len(heads))
    memory, spoiled = LayerCache(), LayerCache()
    for step in range(3):
        call = inputs(layout, len(heads), step)
        other = [x.clone() for x in call]
        kept = attend(heads, layout, call, tensors, memory, now=(step, 3)).out
        out = attend(heads, layout, (other[0], other[1], other[2]), tensors, spoiled, now=(step, 3)).out
        assert torch.equal(out, kept)
        for x in (out, *other):
            x.fill_(torch.nan)


def branch_inputs(seed: int, batch: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 3, 32, 32, generator=generator),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, 8, TEXT_DIM, generator=generator),
    }


MIXED = Recipe(
    (
        Method(Patches(), Draft(0.34), rest=Kept(3)),
        Method(AxisOrder("hwf"), Draft(0.34, reselect_every=3)),
        Method(AxisOrder("hwf"), Band(0.34), rest=Kept(2)),
        Method(AxisOrder("whf"), Draft(0.5), "int8", Kept(2)),
    )
)


@pytest.mark.parametrize("named", [True, False])
def test_cond_and_uncond_never_mix(named: bool) -> None:
    """Interleaved passes equal each alone, told apart by the pipeline's names or by their text embeddings."""
    transformer = tiny_wan_transformer()
    text = {name: branch_inputs(90 + i)["encoder_hidden_states"] for i, name in enumerate(("cond", "uncond"))}

    def passes(names: tuple[str, ...]) -> dict[str, list[Tensor]]:
        out: dict[str, list[Tensor]] = {name: [] for name in names}
        with patch(transformer, MIXED) as done, torch.no_grad():
            for step in range(5):
                done.step(step, 5)
                for name in names:
                    call = {**branch_inputs(10 * step + len(name)), "encoder_hidden_states": text[name]}
                    with transformer.cache_context(name if named else ""):
                        out[name].append(transformer(**call).sample)
            assert {row["reused"] for row in done.report().rows} == {(3 + 2 + 2) * len(names)}
        return out

    both = passes(("cond", "uncond"))
    for name in ("cond", "uncond"):
        for a, b in zip(both[name], passes((name,))[name], strict=True):
            assert torch.equal(a, b)


# Paths of their own


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[5], LAYOUTS[6]])
@pytest.mark.parametrize("precision", ["input", "int8"])
def test_heads_in_the_order_of_the_model_are_not_moved(precision: str, layout: TokenLayout) -> None:
    """One launch of all heads takes q, k and v as they are, padding cut off or not; beside a dense head it cannot."""
    method = Method(select=Band(0.4), precision=precision)
    q, k, v = inputs(layout, 3)
    alone, mixed = (partition_of(heads, layout) for heads in ((method,) * 3, (method, DENSE, method)))
    assert alone.launches[0].whole and not mixed.launches[0].whole
    assert not partition_of((Method(AxisOrder("hwf"), Band(0.4)),) * 3, layout).launches[0].whole
    a, b = (attend(each.methods, layout, (q, k, v)).out for each in (alone, mixed))
    assert close(a[:, :, ::2], b[:, :, ::2], 2e-6)
    assert close(b[:, :, 1], sdpa(q, k, v)[:, :, 1])


def test_the_rows_of_a_launch_are_numbered_once() -> None:
    heads = (Method(AxisOrder("hwf"), Band(0.4)), DENSE, Method(Patches(), Draft(0.4)))
    history = TokenLayout.of(Segment("history", 20, queries=False), Segment.video((2, 12, 20)))
    for layout in (LAYOUTS[3], history):
        (launch,) = partition_of(heads, layout).launches
        assert launch.rows is launch.rows and launch.rows.dtype == torch.int32
        expected = [heads[place].order.query_index(layout) * 3 + place for place in launch.places]
        assert torch.equal(launch.rows, torch.stack(expected, 1).flatten().int())
    keys = launch.key_rows(layout.keys, 1)
    assert keys is not None and keys.dtype == torch.int32 and launch.key_rows(layout.keys, 1) is keys
    assert torch.equal(keys, torch.stack([heads[place].order.index(layout) for place in (0, 2)], 1).flatten().int())


@pytest.mark.parametrize("precision", ["input", "int8"])
def test_the_kernel_merges_what_is_not_read_and_writes_the_output(
    precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch at a step that reuses, whose output is the layer's; heads without a rest are merged with nothing."""
    layout = LAYOUTS[3]
    drop = Method(AxisOrder("hwf"), Band(0.4), precision)
    kept, pooled = (replace(drop, rest=rest) for rest in (Kept(3), Pooled()))
    launched: list[dict[str, Any]] = []
    for name in ("attention", "quantized_attention"):
        real = getattr(launch_module, name)

        def spy(*args: Any, real: Any = real, **options: Any) -> Any:
            launched.append(options)
            return real(*args, **options)

        monkeypatch.setattr(launch_module, name, spy)
    for heads, empty in (((drop,) * 2, None), ((kept, drop, DENSE, pooled), [False, True, False]), ((kept,), [False])):
        memory = LayerCache()
        for step in range(2):
            launched.clear()
            out = attend(heads, layout, inputs(layout, len(heads)), memory=memory, now=(step, 9)).out
        (last,) = launched
        assert last["out"] is out and last["rows"] is not None
        if empty is None:
            assert last["merged_with"] is None
        else:
            nothing = (last["merged_with"][1] == -torch.inf).all(2)[0]
            assert nothing.tolist() == empty


@few
@given(st.lists(methods(KEPT, "int8"), min_size=1, max_size=2), st.sampled_from(LAYOUTS))
def test_quantized_parts_make_up_a_quantized_whole(heads: list[Method], layout: TokenLayout) -> None:
    """Both parts have the same key means and scales, and the log-sum-exp of the true scores: merging adds no error.

    The order is the same too, because neighbouring keys share a scale.
    """
    call = inputs(layout, len(heads))
    ran = steps_of(tuple(heads), layout, plan_tensors(layout, len(heads)), [call] * 5)
    everything = tuple(Method(method.order, Band(1.0), "int8") for method in heads)
    whole = attend(everything, layout, call).out
    for each in ran:
        assert close(each.out, whole, 2e-5)
    assert torch.cosine_similarity(whole, sdpa(*call), dim=-1).mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_log_sum_exp_in_fp32(dtype: torch.dtype) -> None:
    layout = LAYOUTS[0]
    method = Method(Patches(), Draft(0.4), rest=Kept(3))
    q, k, v = (x.to(dtype) for x in inputs(layout, 2))
    memory = LayerCache()
    ran = [attend((method,) * 2, layout, (q, k, v), memory=memory, now=(step, 3)) for step in range(3)]
    (held,) = memory.held.values()
    assert held.out is not None and held.lse is not None and held.out.dtype == dtype and held.lse.dtype == torch.float32
    assert memory.bytes == held.out.numel() * 2 + held.lse.numel() * 4
    exact = sdpa(*(x.float() for x in (q, k, v)))
    rounding = (sdpa(q, k, v).float() - exact).abs().max()
    for each in ran:
        assert each.out.dtype == dtype and (each.out.float() - exact).abs().max() <= 3 * rounding


@pytest.mark.parametrize("floor", [0, 1])
def test_rows_that_read_nothing_give_0_or_all_of_the_rest(floor: int) -> None:
    """The paper's draft leaves rows empty: alone they are 0, with what is kept the rest of them is everything."""
    layout = TokenLayout(5, 16, 16)
    q, k, v = inputs(layout, 1)
    q[:, : 3 * BLOCK] *= 0.01  # attends to all alike, so that no pair of it is among the best
    q[:, 3 * BLOCK :] *= 4
    select = Draft(0.1, min_blocks=floor, diagonal=False, first_frame=False)
    method = Method(select=select)
    out = attend((method,), layout, (q, k, v)).out
    empty = pattern_of(method, layout, q, k).counts[:, 0] == 0
    assert bool(empty.any()) == (floor == 0)
    rows = empty.repeat_interleave(BLOCK, 1)
    assert torch.equal(out[..., 0, 0] == 0, rows)
    for ran in steps_of((replace(method, rest=Kept(2)),), layout, {}, [(q, k, v)] * 4):
        assert close(ran.out, sdpa(q, k, v))
