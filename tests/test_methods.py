"""Stages and methods: what each mask keeps, and that wrong ones cannot be made."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_accel.files import FileError
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.pool import pool
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import (
    AUTO,
    BLOCK,
    DENSE,
    NAMED,
    All,
    AxisOrder,
    Band,
    ChunkOnly,
    Draft,
    Drop,
    Kept,
    Method,
    Order,
    Patches,
    Pooled,
    Recipe,
    Skip,
    Stored,
    Stripe,
    TopHistory,
)
from diffusers_accel.methods.blocks import segment_of
from diffusers_accel.methods.orders import parse_order
from diffusers_accel.methods.rest import CacheEntry
from diffusers_accel.methods.select import StaticSelect
from diffusers_accel.methods.selects.stored import packed
from tests.stages import call_of, mask_of, pattern_of

WAN_480P = TokenLayout(21, 30, 52)
RAGGED = TokenLayout(5, 9, 13)
TEXT_END = TokenLayout(9, 16, 16, text_tokens=226, text_at="end")
TEXT_START = TokenLayout(9, 16, 16, text_tokens=226, text_at="start")
LAYOUTS = [WAN_480P, RAGGED, TEXT_END, TEXT_START, TokenLayout(1, 4, 4)]
HWF = AxisOrder("hwf")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("axes", ["".join(axes) for axes in itertools.permutations("fhw")])
def test_order_is_a_permutation_that_sorts_by_its_axes(layout: TokenLayout, axes: str) -> None:
    index = AxisOrder(axes).index(layout)
    assert torch.equal(index.sort().values, torch.arange(layout.tokens))
    video = torch.arange(layout.video_tokens)
    place = {
        "f": video // (layout.height * layout.width),
        "h": video // layout.width % layout.height,
        "w": video % layout.width,
    }
    span = slice(layout.video_start, layout.video_start + layout.video_tokens)
    sorted_video = index[span] - layout.video_start
    key = torch.stack([place[axis][sorted_video] for axis in axes], dim=1).tolist()
    assert key == sorted(key)
    text = torch.ones(layout.tokens, dtype=torch.bool)
    text[span] = False
    assert torch.equal(index[text], torch.arange(layout.tokens)[text])


@pytest.mark.parametrize("select", [Band, Stripe])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("density", [0.05, 0.25, 0.5, 1.0])
def test_density_is_what_was_asked_for(select: type, layout: TokenLayout, density: float) -> None:
    mask = mask_of(Method(select=select(density, first_frame=False)), layout)[0]
    blocks = layout.blocks(BLOCK)
    rows = mask.sum(1)
    text = rows == blocks if layout.text_tokens and density < 1 else torch.zeros(blocks, dtype=torch.bool)
    video = blocks - int(text.sum())
    assert torch.all(rows[~text] == blocks - video + max(round(density * video), 1))
    assert torch.all(mask.diagonal())


@pytest.mark.parametrize("select", [Band, Stripe])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("density", [0.05, 0.25, 0.5, 1.0])
def test_density_of_version_1_counts_the_text(select: type, layout: TokenLayout, density: float) -> None:
    mask = mask_of(Method(select=select(density, first_frame=False, text_counts=True)), layout)[0]
    blocks = layout.blocks(BLOCK)
    rows = mask.sum(1)
    text = rows == blocks if layout.text_tokens and density < 1 else torch.zeros(blocks, dtype=torch.bool)
    always = int(text.sum()) + 1
    assert torch.all(
        rows[~text] == max(round(density * blocks), 1) if round(density * blocks) >= always else rows[~text] <= always
    )


@pytest.mark.parametrize("layout", [TEXT_END, TEXT_START])
@pytest.mark.parametrize("method", [Method(select=Band(0.2)), Method(HWF, Band(0.2)), Method(select=Stripe(0.2))])
def test_text_is_always_read_and_reads_everything(layout: TokenLayout, method: Method) -> None:
    mask = mask_of(method, layout)[0]
    tokens = torch.arange(layout.text_start, layout.text_start + layout.text_tokens)
    for block in (tokens // BLOCK).unique():
        assert mask[block].all() and mask[:, block].all()
    assert not mask.all()


def test_first_frame_is_read_where_frames_lie_together() -> None:
    first = -(-30 * 52 // BLOCK)
    assert mask_of(Method(select=Band(0.2)), WAN_480P)[0][:, :first].all()
    assert not mask_of(Method(select=Band(0.2, first_frame=False)), WAN_480P)[0][:, :first].all()
    assert not mask_of(Method(HWF, Band(0.2)), WAN_480P)[0][:, :first].all()


def test_band_reads_the_nearest_blocks() -> None:
    mask = mask_of(Method(select=Band(0.25, first_frame=False)), WAN_480P)[0]
    blocks = len(mask)
    for row in range(blocks):
        kept = mask[row].nonzero().flatten()
        assert kept[-1] - kept[0] + 1 == len(kept), "a band is one run of blocks"
        if kept[0] > 0 and kept[-1] < blocks - 1:
            assert abs((row - kept[0]) - (kept[-1] - row)) <= 1, "it is centred where it does not touch an end"


def test_stripe_is_the_same_columns_for_all_queries() -> None:
    mask = mask_of(Method(select=Stripe(0.3, first_frame=False)), WAN_480P)[0]
    off_diagonal = mask & ~torch.eye(len(mask), dtype=torch.bool)
    common = off_diagonal.float().mean(0) > 0.9
    assert common.sum() >= round(0.3 * len(mask)) - 2
    gaps = common.nonzero().flatten().diff()
    assert gaps.max() <= 8, "without a calibration the columns are spread evenly"


@pytest.mark.parametrize("calibrated_at", [WAN_480P, TokenLayout(11, 15, 26)])
def test_calibrated_stripe_reads_the_heaviest_rows_at_any_size(calibrated_at: TokenLayout) -> None:
    mass = torch.full((2, 3, calibrated_at.frames, calibrated_at.height), 1e-4)
    middle = calibrated_at.frames // 2
    mass[1, 2, middle] = 1.0
    stripe = Method(select=Stripe(0.1, first_frame=False, calibrated=True))
    masks = mask_of(stripe, WAN_480P, {"stripe_mass/transformer": mass}, (2, 0), layer=1)
    assert masks.shape[0] == 2
    frame = 30 * 52
    centre = (10 * frame + frame // 2) // BLOCK
    assert masks[0][:, centre].all()
    assert not masks[1][:, centre].all()


def test_calibrated_stripe_without_its_tensor_says_so() -> None:
    with pytest.raises(ValueError, match="stripe_mass/transformer"):
        mask_of(Method(select=Stripe(0.1, calibrated=True)), RAGGED)


def test_all_and_skip() -> None:
    assert mask_of(DENSE, RAGGED).all()
    assert not mask_of(Method(select=Skip()), RAGGED).any()
    assert DENSE.dense and Method(select=Skip()).skips


@pytest.mark.parametrize("select", [All(), Skip(), Stripe(0.5)])
def test_meaningless_combinations_cannot_be_made(select: object) -> None:
    with pytest.raises(ValueError, match="order"):
        Method(HWF, select)  # type: ignore[arg-type]


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, float("nan")])
def test_density_outside_its_range(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        Band(density)


def test_wrong_axes() -> None:
    with pytest.raises(ValueError, match="permutation"):
        AxisOrder("hhw")


COMBINATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "all, kept": ({"rest": Kept()}, '"all" leaves no blocks whose attention could be kept'),
    "skip, kept": ({"select": Skip(), "rest": Kept()}, '"skip" leaves no blocks'),
    "skip, quantized": ({"select": Skip(), "precision": "int8"}, "computes nothing: leave its precision out"),
    "all in patches": ({"order": Patches()}, '"all" reads the same in every order'),
    "skip in patches": ({"order": Patches(), "select": Skip()}, '"skip" reads the same in every order'),
    "stripe in patches": ({"order": Patches(), "select": Stripe(0.5)}, "a stripe is a set of frame rows"),
    "stored in patches": ({"order": Patches(), "select": Stored(0.5)}, "six axis orders, found the order 8x16"),
    "kept with a held draft": (
        {"select": Draft(reselect_every=2), "rest": Kept()},
        "leave reselect_every at 1, found 2",
    ),
    "unknown precision": (
        {"select": Draft(), "precision": "fp8"},
        "precision is one of input, int8, int8_fp8, found 'fp8'",
    ),
}


@pytest.mark.parametrize("case", COMBINATIONS)
def test_wrong_combinations_say_why(case: str) -> None:
    parts, message = COMBINATIONS[case]
    with pytest.raises(ValueError, match=message):
        Method(**parts)


SHARES = st.floats(0.01, 1.0)
AXES = st.sampled_from(["fhw", "hwf", "whf"]).map(AxisOrder)
PATCHES = st.builds(Patches, st.integers(1, 99), st.integers(1, 99))
PRECISION = st.sampled_from(["input", "int8", "int8_fp8"])
REST = st.one_of(st.just(Drop()), st.just(Pooled()), st.builds(Kept, st.integers(2, 9)), st.just(Kept(gated=True)))
FLAGS = {"min_blocks": st.integers(0, 3), "diagonal": st.booleans(), "first_frame": st.booleans()}
DRAFT = st.one_of(
    st.builds(Draft, SHARES, per=st.sampled_from(["head", "row"]), **FLAGS),
    st.builds(Draft, st.none(), SHARES, **FLAGS),
)
HELD = st.builds(Draft, SHARES, reselect_every=st.integers(1, 5))
METHODS = st.one_of(
    st.just(Method(select=Skip())),
    st.builds(Method, select=st.just(All()), precision=PRECISION),
    st.builds(
        Method, st.one_of(AXES, PATCHES), st.one_of(st.builds(Band, SHARES, st.booleans()), DRAFT), PRECISION, REST
    ),
    st.builds(Method, st.one_of(AXES, PATCHES), HELD, PRECISION),
    st.builds(Method, AXES, st.builds(Stored, SHARES), PRECISION, REST),
    st.builds(
        Method,
        select=st.builds(Stripe, SHARES, st.booleans(), st.booleans()),
        precision=PRECISION,
        rest=REST,
    ),
)


@given(METHODS)
def test_json_round_trip(method: Method) -> None:
    assert Method.from_json(method.to_json()) == method


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (3, "expected an object"),
        ({}, "'select' is missing"),
        ({"select": {"kind": "window"}}, "select.kind"),
        ({"select": {"kind": "band"}}, "'density' is missing"),
        ({"select": {"kind": "band", "density": "0.5"}}, "select.density: expected float"),
        ({"select": {"kind": "band", "density": True}}, "select.density: expected float"),
        ({"select": {"kind": "band", "density": 0.5, "width": 3}}, "unknown key 'width'"),
        (
            {"select": {"kind": "all"}, "precision": "int4"},
            "precision: expected one of input, int8, int8_fp8, found 'int4'",
        ),
        ({"select": {"kind": "all"}, "precision": "auto"}, "precision: expected one of .*found 'auto'"),
        ({"select": {"kind": "all"}, "speed": 2}, "unknown key 'speed'"),
        ({"select": {"kind": "draft", "density": None}}, "either a density or a top_p"),
        ({"select": {"kind": "draft", "reselect_every": 1.5}}, r"select\.reselect_every: expected int, found 1\.5"),
        ({"select": {"kind": "draft", "top_p": "all"}}, r"select\.top_p: expected float \| None, found 'all'"),
        ({"select": {"kind": "draft", "diagonal": 1}}, r"select\.diagonal: expected bool, found 1"),
        ({"select": {"kind": "stored"}}, "'density' is missing"),
        ({"select": {"kind": "draft"}, "order": "8x0"}, "an order is a permutation"),
        (
            {"select": {"kind": "draft"}, "rest": {"kind": "kept", "refresh_every": 1}},
            "rest: .*expected 2 or more, found 1",
        ),
        ({"select": {"kind": "draft"}, "rest": {"kind": "kept", "gated": 1}}, r"rest\.gated: expected bool, found 1"),
        ({"select": {"kind": "draft"}, "rest": {"kind": "kept", "age": 1}}, "rest 'kept': unknown key 'age'"),
        (
            {"select": {"kind": "draft"}, "rest": {"kind": "lost"}},
            r"rest\.kind: expected one of \['drop', .*found 'lost'",
        ),
        ({"select": {"kind": "draft"}, "rest": None}, r"rest\.kind: expected one of .*found None"),
        ({"select": {"kind": "draft"}, "reuse": {"every": 3}}, "unknown key 'reuse'"),
        ({"select": {"kind": "all"}, "order": 7}, "order: expected str"),
    ],
)
def test_json_that_is_wrong(data: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Method.from_json(data)


def test_recipe_deals_heads_out() -> None:
    recipe = Recipe(heads=(DENSE, Method(select=Skip())), dense_layers=1)
    assert [recipe.method(0, head).skips for head in range(4)] == [False] * 4
    assert [recipe.method(1, head).skips for head in range(4)] == [False, True, False, True]


def test_refuses_where_only_the_reference_could_run() -> None:
    reason = Method(select=Band(0.5)).refuses(64, torch.device("meta"), torch.float32)
    assert reason is not None and "cpu" in reason
    assert Method(select=Band(0.5)).refuses(64, torch.device("cpu"), torch.float32) is None


# Patches


def test_patches_are_the_reshape_of_the_paper_where_the_grid_divides() -> None:
    for frames, height, width in ((33, 48, 80), (21, 32, 48)):
        layout = TokenLayout(frames, height, width)
        index = Patches().index(layout)
        grid = torch.arange(layout.tokens).view(frames, height // 8, 8, width // 16, 16)
        assert torch.equal(index, grid.transpose(2, 3).flatten())
        for number, block in enumerate(index.split(BLOCK)):
            frame, row, column = block // (height * width), block // width % height // 8, block % width // 16
            cell = (frame * (height // 8) + row) * (width // 16) + column
            assert torch.all(cell == number), "a block is one pooled pixel"


GRIDS = [(45, 80), (30, 52), (30, 45), (48, 85), (80, 45), (52, 30), (9, 13), (3, 5)]


@pytest.mark.parametrize("grid", [*GRIDS, (48, 80), (80, 48)])
@pytest.mark.parametrize("text", [{}, {"text_tokens": 226, "text_at": "start"}, {"text_tokens": 20, "text_at": "end"}])
def test_patches_are_a_permutation_that_leaves_text_alone(grid: tuple[int, int], text: dict[str, Any]) -> None:
    layout = TokenLayout(3, *grid, **text)
    index = Patches(text_last=False).index(layout)
    moved = Patches().index(layout)
    assert torch.equal(moved.sort().values, torch.arange(layout.tokens))
    assert torch.equal(index.sort().values, torch.arange(layout.tokens))
    outside = torch.ones(layout.tokens, dtype=torch.bool)
    outside[layout.video_start : layout.video_start + layout.video_tokens] = False
    assert torch.equal(index[outside], torch.arange(layout.tokens)[outside])
    for order, video in ((Patches(text_last=False), index[~outside]), (Patches(), moved[: layout.video_tokens])):
        plain = order.index(TokenLayout(3, *grid))
        assert torch.equal(video, plain + layout.video_start), "text moves the video along, and changes nothing in it"


@pytest.mark.parametrize("grid", GRIDS)
def test_version_1_goes_through_ragged_grids_from_patch_to_patch(grid: tuple[int, int]) -> None:
    height, width = grid
    high, wide = (8, 16) if width >= height else (16, 8)
    index = Patches(text_last=False).index(TokenLayout(4, height, width))
    cells = torch.stack([index // (height * width), index // width % height // high, index % width // wide], dim=1)
    path = torch.unique_consecutive(cells, dim=0)
    assert len(path) == 4 * -(-height // high) * -(-width // wide), "each patch is visited once, as a whole"
    assert torch.all(path.diff(dim=0).abs().sum(1) == 1), "one patch on, in one direction"


@pytest.mark.parametrize("grid", GRIDS)
def test_on_ragged_grids_a_block_is_some_columns_of_a_band(grid: tuple[int, int]) -> None:
    height, width = grid
    index = Patches().index(TokenLayout(4, height, width))
    frame, across, along = index // (height * width), index // width % height, index % width
    if height > width:
        across, along = along, across
    bands = max(1, round(min(grid) / 8))
    band = torch.cat([torch.full_like(x, i) for i, x in enumerate(torch.arange(min(grid)).tensor_split(bands))])[across]
    column = torch.stack([frame, band, along], 1)
    assert torch.all(column.diff(dim=0).abs().sum(1) <= 1), (
        "always on to the next column, the next band or the next frame"
    )
    assert len(torch.unique_consecutive(column, dim=0)) == 4 * bands * max(grid), "each column once, as a whole"
    widest = -(-BLOCK // (min(grid) // bands)) + 1
    wraps = [block for block in column.split(BLOCK) if len(block[:, :2].unique(dim=0)) > 1]
    assert all(len(block.unique(dim=0)) <= widest for block in column.split(BLOCK)) and len(wraps) < 4 * bands


def test_patches_lie_down_in_portrait() -> None:
    layout = TokenLayout(1, 80, 48)
    grid = torch.arange(layout.tokens).view(5, 16, 6, 8)
    assert torch.equal(Patches().index(layout), grid.transpose(1, 2).flatten())
    square = TokenLayout(1, 16, 16)
    assert torch.equal(Patches().index(square), torch.arange(256)), "two patches of 8 x 16, one above the other"


def test_orders_come_back_from_their_labels() -> None:
    orders: list[Order] = [Patches(), Patches(4, 32, text_last=False), AxisOrder(), AxisOrder("whf")]
    for order in orders:
        assert parse_order(order.label) == order
    assert [order.frame_major for order in orders] == [True, True, True, False]
    for wrong in ("8x", "x16", "0x16", "8x16x2", "hwfx", "8 x 16", "8x16 text", "wide"):
        with pytest.raises(ValueError, match="an? (axis )?order is a permutation"):
            parse_order(wrong)
    for size in (0, -8, 1.5, True, "8"):
        with pytest.raises(ValueError, match=r"Patches\.height is a number of tokens, expected 1 to 65,536"):
            Patches(size)  # type: ignore[arg-type]


# Draft


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"density": None}, "either a density or a top_p, found density None and top_p None"),
        ({"top_p": 0.5}, "either a density or a top_p, found density 0.25 and top_p 0.5"),
        ({"density": 0.0}, r"density .*\(0, 1\], found 0"),
        ({"density": 1.5}, r"density .*\(0, 1\], found 1.5"),
        ({"density": None, "top_p": 0}, r"top_p .*\(0, 1\], found 0"),
        ({"density": None, "top_p": 1.01}, r"top_p .*\(0, 1\], found 1.01"),
        ({"density": None, "top_p": float("nan")}, r"top_p .*\(0, 1\], found nan"),
        ({"per": "best"}, '"head" or "row", found \'best\''),
        ({"density": None, "top_p": 0.5, "per": "row"}, "a top_p decides row by row"),
        ({"min_blocks": -1}, "min_blocks >= 0 and reselect_every >= 1, found -1 and 1"),
        ({"reselect_every": 0}, "min_blocks >= 0 and reselect_every >= 1, found 1 and 0"),
    ],
)
def test_drafts_that_mean_nothing(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Draft(**arguments)


def test_a_draft_has_no_mask_of_its_own() -> None:
    assert Draft.wants == "means" and not issubclass(Draft, StaticSelect)
    with pytest.raises(AssertionError):
        mask_of(Method(select=Draft()), RAGGED)


def noise(
    layout: TokenLayout, heads: int = 1, dim: int = 16, seed: int = 0, keys: int | None = None
) -> list[torch.Tensor]:
    """q and k [1, S, heads, dim] whose blocks have means of their own."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(2, layout.blocks(BLOCK), heads, dim, generator=generator).repeat_interleave(BLOCK, 1)
    q, k = means[:, : layout.tokens] + torch.randn(2, layout.tokens, heads, dim, generator=generator)
    return [q[None], k[None, :keys]]


FAITHFUL = {"min_blocks": 0, "diagonal": False, "first_frame": False}


@pytest.mark.parametrize(
    ("layout", "density", "count"),
    [
        (TokenLayout(33, 48, 80), 0.4, 392_041),
        (TokenLayout(33, 48, 80), 0.2, 196_021),
        (TokenLayout(33, 48, 80), 0.1, 98_011),
        (TokenLayout(21, 48, 80), 0.25, 99_226),
        (TokenLayout(21, 32, 48), 0.25, 15_877),
    ],
)
def test_the_faithful_draft_keeps_as_many_blocks_as_the_official_code(
    layout: TokenLayout, density: float, count: int
) -> None:
    q, k = noise(layout, dim=8)
    pattern = pattern_of(Method(Patches(), Draft(density, **FAITHFUL)), layout, q, k)
    assert pattern.computed_blocks == count


def test_the_faithful_draft_starves_rows_and_a_floor_feeds_them() -> None:
    layout = TokenLayout(21, 32, 48)
    q, k = noise(layout, heads=2)
    q[:, : 8 * BLOCK] *= 0.01  # rows whose attention is spread over all blocks
    bare = pattern_of(Method(Patches(), Draft(0.05, **FAITHFUL)), layout, q, k)
    fed = pattern_of(Method(Patches(), Draft(0.05, min_blocks=2, diagonal=False, first_frame=False)), layout, q, k)
    share = Draft(0.05, **FAITHFUL).starved(bare, Patches(), layout)
    assert share is not None and float(share) == float((bare.counts == 0).double().mean()) > 0
    assert int(fed.counts.min()) >= 2 and Draft(0.05, min_blocks=2).starved(fed, Patches(), layout) is None
    assert torch.all(fed.mask() | ~bare.mask()), "min_blocks adds blocks and takes none away"


@pytest.mark.parametrize("select", [Draft(0.1), Draft(0.1, per="row"), Draft(None, 0.2), Draft(0.1, **FAITHFUL)])
@pytest.mark.parametrize(
    "layout",
    [
        TEXT_END,
        TEXT_START,
        TokenLayout(9, 16, 16, 256, "end"),
        TokenLayout(9, 16, 16, 226, "end", text_valid=7),
        TokenLayout(9, 16, 16, 226, "end", text_valid=0),
    ],
)
def test_drafts_read_text_whole(select: Draft, layout: TokenLayout) -> None:
    q, k = noise(layout, heads=2, keys=layout.keys)
    mask = pattern_of(Method(Patches(), select), layout, q, k).mask()[0]
    assert mask.shape[1:] == (layout.blocks(BLOCK), layout.key_blocks(BLOCK))
    text = torch.arange(layout.video_tokens, layout.tokens).div(BLOCK, rounding_mode="floor")  # patches have it last
    rows = torch.zeros(layout.blocks(BLOCK), dtype=torch.bool)
    rows[text] = True
    assert mask[:, rows].all() and mask[:, :, rows[: mask.shape[2]]].all()
    assert not mask[:, ~rows].all()


def test_forced_blocks_are_read_and_count_towards_the_density() -> None:
    layout = TokenLayout(21, 32, 48)
    blocks, first = layout.blocks(BLOCK), 32 * 48 // BLOCK
    q, k = noise(layout)
    mask = pattern_of(Method(Patches(), Draft(0.25)), layout, q, k).mask()[0, 0]
    assert mask.diagonal().all() and mask[:, :first].all()
    assert mask.float().mean() == pytest.approx(0.25, abs=2 / blocks)
    across = pattern_of(Method(AxisOrder("hwf"), Draft(0.25)), layout, q, k).mask()[0, 0]
    assert across.diagonal().all() and not across[:, :first].all(), "no first frame where frames do not lie together"


@pytest.mark.parametrize("per", ["head", "row"])
@pytest.mark.parametrize("grid", [(45, 80), (30, 52), (30, 45), (48, 85), (85, 48)])
def test_density_1_keeps_every_block_of_a_ragged_grid(per: str, grid: tuple[int, int]) -> None:
    layout = TokenLayout(2, *grid)
    q, k = noise(layout)
    assert pattern_of(Method(Patches(), Draft(1.0, per=per)), layout, q, k).density == 1
    assert pattern_of(Method(Patches(), Draft(None, 1.0)), layout, q, k).density == 1


def test_a_floor_above_the_number_of_blocks_reads_them_all() -> None:
    layout = TokenLayout(2, 16, 16)
    q, k = noise(layout)
    assert pattern_of(Method(Patches(), Draft(0.25, min_blocks=99)), layout, q, k).density == 1


def test_a_video_without_a_block_of_its_own_is_read_whole() -> None:
    layout = TokenLayout(1, 8, 8, 20, "end", text_valid=7)
    q, k = noise(layout, heads=2, keys=layout.keys)
    assert pattern_of(Method(Patches(), Draft(0.25)), layout, q, k).mask().all()


def test_pooled_scores_are_block_means_of_the_scores() -> None:
    """An identity that the draft rests on, ragged last block included."""
    layout = TokenLayout(3, 13, 17)
    q, k = (x[:, Patches().index(layout)].double() for x in noise(layout, heads=2))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    means = torch.stack([rows.mean(2) for rows in scores.split(BLOCK, dim=2)], dim=2)
    means = torch.stack([columns.mean(3) for columns in means.split(BLOCK, dim=3)], dim=3)
    pooled = torch.einsum("bqhd,bkhd->bhqk", pool(q.float(), BLOCK), pool(k.float(), BLOCK))
    assert torch.allclose(pooled, means.float(), atol=1e-4)


@pytest.mark.parametrize(
    "select", [Draft(0.3, **FAITHFUL), Draft(0.3, per="row", **FAITHFUL), Draft(None, 0.6, **FAITHFUL)]
)
def test_where_patches_are_constant_the_map_is_attention_itself(select: Draft) -> None:
    """Then the blocks that are read are those with most attention of the whole, unpooled map."""
    layout = TokenLayout(3, 16, 32)
    blocks = layout.blocks(BLOCK)
    order = Patches().index(layout)
    values = torch.randn(2, blocks, 8, generator=torch.Generator().manual_seed(1)).repeat_interleave(BLOCK, 1)
    model = torch.empty_like(values)
    model[:, order] = values  # constant in each patch of the frames, as the model has them
    q, k = model[:, order][:, None].transpose(1, 2).unbind(0)
    whole = torch.softmax(q[:, 0] @ k[:, 0].T * 8**-0.5, dim=-1)
    mass = whole.view(blocks, BLOCK, blocks, BLOCK).sum(3).mean(1)
    mask = pattern_of(Method(Patches(), select), layout, q[None], k[None]).mask()[0, 0]
    if select.top_p is not None:
        ranked = mass.sort(1, descending=True)
        needed = (ranked.values.cumsum(1) - ranked.values < select.top_p).sum(1)
        assert torch.equal(mask.sum(1), needed)
    worst_read = mass.masked_fill(~mask, torch.inf)
    best_unread = mass.masked_fill(mask, -torch.inf)
    if select.per == "row" or select.top_p is not None:
        assert torch.all(worst_read.amin(1) >= best_unread.amax(1) - 1e-6)
    else:
        assert worst_read.min() >= best_unread.max() - 1e-6


# Stored


def stored(
    layout: TokenLayout, masks: torch.Tensor, heads: list[list[int]], order: str = "hwf"
) -> dict[str, torch.Tensor]:
    """The plan's tensors of bool masks [masks, parts, Q, K]; heads [layers][heads]."""
    names = Stored(0.5).names(AxisOrder(order), "transformer")
    assert names == (f"stored_bits/{order}/0.5/transformer", f"stored_heads/{order}/0.5/transformer")
    return dict(zip(names, (packed(masks), torch.tensor(heads, dtype=torch.int32)), strict=True))


def random_masks(layout: TokenLayout, *leading: int) -> torch.Tensor:
    blocks = layout.blocks(BLOCK)
    return torch.rand(*leading, blocks, blocks, generator=torch.Generator().manual_seed(0)) < 0.5


STORED = Method(AxisOrder("hwf"), Stored(0.5))


@pytest.mark.parametrize("layout", [WAN_480P, RAGGED])
def test_stored_masks_come_back_bit_for_bit(layout: TokenLayout) -> None:
    masks = random_masks(layout, 3, 1)
    tensors = stored(layout, masks, [[-1, -1, -1], [2, 0, 2]])
    assert tensors[STORED.select.names(STORED.order, "transformer")[0]].dtype == torch.uint8  # type: ignore[union-attr]
    found = mask_of(STORED, layout, tensors, (1, 2, 0), layer=1)
    assert torch.equal(found, masks[[0, 2, 2], 0])


def test_stored_masks_follow_the_schedule() -> None:
    masks = random_masks(RAGGED, 1, 4)
    tensors = stored(RAGGED, masks, [[0]])

    def at(step: int, steps: int) -> torch.Tensor:
        return mask_of(STORED, RAGGED, tensors, now=(step, steps))[0]

    assert [int(torch.tensor([torch.equal(at(s, 10), masks[0, p]) for p in range(4)]).nonzero()) for s in range(10)] == [
        0, 0, 0, 1, 1, 2, 2, 2, 3, 3,
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match=r"Patch\.step\(i, steps\)"):
        mask_of(STORED, RAGGED, tensors)


@pytest.mark.parametrize("layout", [TEXT_END, TEXT_START])
def test_stored_masks_never_leave_text_out(layout: TokenLayout) -> None:
    blocks = layout.blocks(BLOCK)
    tensors = stored(layout, torch.zeros(1, 1, blocks, blocks, dtype=torch.bool), [[0]])
    mask = mask_of(STORED, layout, tensors)[0]
    text = torch.arange(layout.text_start, layout.text_start + layout.text_tokens).div(BLOCK, rounding_mode="floor")
    assert mask[text].all() and mask[:, text].all() and not mask.all()


def test_stored_masks_that_do_not_fit_are_refused() -> None:
    tensors = stored(RAGGED, random_masks(RAGGED, 1, 1), [[0, -1]])
    with pytest.raises(ValueError, match="for 5 blocks of 128 tokens, this call has 256: .*search a plan for this one"):
        mask_of(STORED, WAN_480P, tensors)
    with pytest.raises(ValueError, match="no mask for head 1 of layer 0: search the plan again"):
        mask_of(STORED, RAGGED, tensors, 2)
    with pytest.raises(
        ValueError, match=r"needs the tensor 'stored_bits/hwf/0\.5/transformer' of a searched plan, found \[\]"
    ):
        mask_of(STORED, RAGGED)
    with pytest.raises(ValueError, match="density"):
        Stored(0)


# Kept


@pytest.mark.parametrize("refresh_every", [1, 0, -3, 2.0, True, "3"])
def test_what_is_never_used_again_is_not_kept(refresh_every: Any) -> None:
    with pytest.raises(ValueError, match=r"refresh_every is a number of steps, expected 2 or more, found"):
        Kept(refresh_every)


def test_a_gate_takes_no_interval() -> None:
    with pytest.raises(ValueError, match="take their refresh steps from the plan: leave refresh_every out, found 4"):
        Kept(4, gated=True)


def held(refreshed: list[int]) -> CacheEntry:
    """Of heads that refreshed last at these steps."""
    return CacheEntry(BlockPattern.full(len(refreshed), BLOCK, BLOCK), min(refreshed), refreshed)


def due(gate: torch.Tensor, now: tuple[int, int]) -> list[bool]:
    """Which heads refresh at a step whose gate, bool [parts, heads], is this."""
    return Kept(gated=True).due(held([0] * gate.shape[1]), now, gate, None)


def test_refreshes_are_counted_from_the_last_one() -> None:
    assert Kept(3).due(held([1, 2, 3, 0]), (4, 9), None, None) == [True, False, False, True]
    assert Kept(2).due(held([1, 2, 3, 0]), (4, 9), None, 1) == [True, True, False, True], "whenever it attended last"


def test_a_gate_is_read_by_the_part_of_the_schedule() -> None:
    gate = torch.zeros(3, 2, 4, dtype=torch.uint8)
    gate[1, 1] = torch.tensor([1, 0, 0, 1])
    tensors = {"refresh/transformer": gate}
    rows = Kept(gated=True).gate(("transformer", 1), (3, 1), tensors)
    assert rows is not None and rows.tolist() == [[False, False], [True, False], [False, False]]
    assert [due(rows, (step, 7))[0] for step in range(7)] == [False] * 3 + [True] + [False] * 3, (
        "the middle part is steps 3 and 4, and refreshes once"
    )
    assert Kept().gate(("transformer", 1), (3, 1), tensors) is None
    with pytest.raises(ValueError, match=r"needs the tensor 'refresh/transformer' of a searched plan, found \[\]"):
        Kept(gated=True).gate(("transformer", 0), (0,), {})


@given(st.integers(1, 60), st.integers(1, 60))
def test_parts_of_a_schedule_are_in_order_and_equal_up_to_a_step(steps: int, parts: int) -> None:
    of = [segment_of((step, steps), parts) for step in range(steps)]
    assert of == sorted(of) and of[0] == 0 and of[-1] <= parts - 1
    if steps >= parts:
        sizes = [of.count(part) for part in range(parts)]
        assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 60), st.integers(1, 60))
def test_every_part_begins_once_and_not_before_its_time(steps: int, parts: int) -> None:
    gate = torch.eye(parts, dtype=torch.bool)  # head i refreshes when part i begins
    of = [[part for part, begins in enumerate(due(gate, (step, steps))) if begins] for step in range(steps)]
    assert [part for each in of for part in each] == list(range(segment_of((steps - 1, steps), parts) + 1))
    assert all(step / steps >= part / parts for step in range(steps) for part in of[step])
    assert all((step - 1) / steps < part / parts for step in range(1, steps) for part in of[step])


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(5, "01001"), (15, "000100000000100"), (10, "0010000010"), (3, "010"), (2, "01"), (1, "0")],
)
def test_a_gate_serves_another_number_of_steps(steps: int, expected: str) -> None:
    """A gate of 5 steps: more of them refresh once in a part, fewer as soon as one is due."""
    gate = torch.tensor([[0], [1], [0], [0], [1]]).bool()
    assert "".join(str(int(due(gate, (step, steps))[0])) for step in range(steps)) == expected


# Names


@pytest.mark.parametrize(
    ("method", "label"),
    [
        (DENSE, "dense"),
        (Method(precision="int8"), "dense int8"),
        (Method(select=Skip()), "skip"),
        (Method(HWF, Band(0.25)), "band hwf 0.25"),
        (Method(select=Stripe(0.25, calibrated=True)), "stripe calibrated 0.25"),
        (Method(Patches(), Draft()), "draft 8x16 0.25"),
        (Method(Patches(), Draft(None, 0.9), "int8"), "draft 8x16 top-p 0.9 int8"),
        (Method(Patches(), Draft(per="row", reselect_every=4)), "draft 8x16 row 0.25 reselect 4"),
        (Method(Patches(4, 32), Draft(0.125), "int8_fp8", Kept(4)), "draft 4x32 0.125 int8_fp8, cached 4"),
        (Method(HWF, Stored(0.3), rest=Kept(gated=True)), "stored hwf 0.3, cached gated"),
    ],
)
def test_labels(method: Method, label: str) -> None:
    assert method.label == label


def test_what_methods_say_of_themselves() -> None:
    draft, held, cached = (Method(Patches(), Draft(reselect_every=hold)) for hold in (1, 2, 1))
    cached = dataclasses.replace(cached, rest=Kept())
    assert [method.timed for method in (DENSE, draft, held, cached)] == [False, False, True, True]
    assert [method.select.wants for method in (DENSE, draft, STORED)] == ["", "means", ""]
    stripe, spread = Stripe(0.5, calibrated=True), Stripe(0.5)
    assert [select.records for select in (draft.select, spread, STORED.select, stripe)] == [
        None,
        None,
        "stored masks",
        "column mass",
    ]
    call, tensors = call_of(RAGGED, layer=1), stored(RAGGED, random_masks(RAGGED, 1, 1), [[0], [0]])
    assert [select.depends(call, HWF, tensors) for select in (draft.select, spread)] == [None, None]
    assert STORED.select.depends(call, HWF, tensors) == (("transformer", 1), 0)
    assert stripe.depends(call, AxisOrder(), tensors) == ("transformer", 1)
    assert DENSE.dense and not Method(precision="int8").dense, "a quantized head is not the user's own attention"


RECIPES: dict[str, tuple[Recipe, dict[str, Any], Recipe]] = {
    "dense": (Recipe((DENSE,)), {"precision": "int8"}, Recipe((Method(precision="int8"),))),
    "pattern": (
        Recipe((Method(select=Band(0.5)), Method(HWF, Band(0.5))), dense_steps=0.2),
        {"density": 0.3, "dense_steps": 0.1, "dense_layers": 2, "precision": "int8", "rest": "pooled"},
        Recipe((Method(AxisOrder(), Band(0.3), "int8", Pooled()), Method(HWF, Band(0.3), "int8", Pooled())), 0.1, 2),
    ),
    "draft": (
        Recipe((Method(Patches(), Draft(0.25)),), dense_steps=0.25, dense_layers=1),
        {
            "top_p": 0.9,
            "patch": (4, 32),
            "min_blocks": 0,
            "diagonal": False,
            "first_frame": False,
            "reselect_every": 2,
            "dense_steps": 0.3,
            "dense_layers": 2,
            "precision": "int8_fp8",
            "rest": "pooled",
        },
        Recipe((Method(Patches(4, 32), Draft(None, 0.9, reselect_every=2, **FAITHFUL), "int8_fp8", Pooled()),), 0.3, 2),
    ),
    "cached": (
        Recipe((Method(Patches(), Draft(0.25), rest=Kept(3)),)),
        {"density": 0.3, "refresh_every": 4, "dense_steps": 0.1, "dense_layers": 1, "precision": "int8"},
        Recipe((Method(Patches(), Draft(0.3), "int8", Kept(4)),), 0.1, 1),
    ),
    "history": (
        Recipe((Method(select=ChunkOnly(), rest=Kept(None)),)),
        {"density": 0.3, "refresh_every": 4, "dense_steps": 0.1, "dense_layers": 1, "precision": "int8"},
        Recipe((Method(select=TopHistory(0.3), precision="int8", rest=Kept(4)),), 0.1, 1),
    ),
    "reordered": (
        Recipe((Method(HWF, Draft(0.5), AUTO),)),
        {"density": 0.3, "axes": "whf", "dense_steps": 0.1, "dense_layers": 1, "precision": "int8", "rest": "pooled"},
        Recipe((Method(AxisOrder("whf"), Draft(0.3), "int8", Pooled()),), 0.1, 1),
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_named_recipes_and_all_their_parameters(name: str) -> None:
    plain, parameters, expected = RECIPES[name]
    assert NAMED[name]() == plain
    assert NAMED[name](**parameters) == expected
    known = set(inspect.signature(NAMED[name]).parameters)
    assert set(parameters) == known - ({"density", "per"} if name == "draft" else set())
    assert set(RECIPES) == set(NAMED)


@pytest.mark.parametrize("name", ["pattern", "draft", "reordered"])
def test_what_is_kept_has_a_recipe_of_its_own(name: str) -> None:
    assert NAMED[name](rest="drop") == NAMED[name]()
    for wrong in ("kept", "pool"):
        with pytest.raises(ValueError, match=f"rest: expected one of drop, pooled, found '{wrong}'"):
            NAMED[name](rest=wrong)


def test_a_draft_recipe_by_rows() -> None:
    (method,) = NAMED["draft"](density=0.3, per="row").heads
    assert method.select == Draft(0.3, per="row")
    with pytest.raises(ValueError, match="either a density or a top_p"):
        NAMED["draft"](density=0.3, top_p=0.9)


@pytest.mark.parametrize(
    "arguments",
    [{"heads": ()}, {"heads": (DENSE,), "dense_steps": 1.1}, {"heads": (DENSE,), "dense_layers": -1}],
)
def test_wrong_recipes(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected|at least one"):
        Recipe(**arguments)


@pytest.mark.parametrize(
    ("precision", "head_dim", "dtype", "reason"),
    [
        ("input", 264, torch.bfloat16, "head dims up to 256 in multiples of 8, found 264"),
        ("int8", 20, torch.bfloat16, "head dims up to 256 in multiples of 8, found 20"),
        ("int8", 64, torch.float32, "int8 takes float16 and bfloat16, found torch.float32"),
        ("int8", 64, torch.bfloat16, None),
        ("input", 256, torch.bfloat16, None),
        ("int8_fp8", 64, torch.bfloat16, None),
    ],
)
def test_a_gpu_refuses_what_its_kernel_does_not_take(
    precision: str, head_dim: int, dtype: torch.dtype, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="without Triton no kernel of a GPU says anything")
    monkeypatch.setattr("diffusers_accel.kernels.hardware.capability", lambda device: 90)
    found = Method(select=Band(0.5), precision=precision).refuses(head_dim, torch.device("cuda", 63), dtype)
    assert (found is None) == (reason is None)
    assert reason is None or reason in str(found)


FORMER = {"mass": "top_p", "floor": "min_blocks", "rule": "per", "hold": "reselect_every", "every": "refresh_every"}


@pytest.mark.parametrize(
    ("stage", "former", "made"),
    [
        (
            "select",
            {"kind": "draft", "density": None, "mass": 0.6, "rule": "quantile", "floor": 2, "hold": 3},
            Draft(None, 0.6, min_blocks=2, reselect_every=3),
        ),
        ("select", {"kind": "draft", "rule": "row"}, Draft(per="row")),
        ("rest", {"kind": "kept", "every": 4}, Kept(4)),
    ],
)
def test_former_names_in_files_are_understood_with_a_warning(stage: str, former: dict[str, Any], made: Any) -> None:
    data = {"select": {"kind": "draft"}, stage: former}
    with pytest.warns(FutureWarning) as said:
        found = Method.from_json(data)
    assert getattr(found, stage) == made
    assert {str(each.message) for each in said} == {
        f"{stage}: {key!r} is now called {FORMER[key]!r}; write that instead" for key in former if key in FORMER
    }
    assert Method.from_json(found.to_json()) == found and not set(found.to_json()[stage]) & set(FORMER)


def test_a_name_and_its_former_name_are_refused_together() -> None:
    with pytest.raises(
        FileError, match="select: 'hold' is the former name of 'reselect_every', found both: leave 'hold' out"
    ):
        Method.from_json({"select": {"kind": "draft", "hold": 2, "reselect_every": 2}})
    with pytest.raises(FileError, match="select 'band': unknown key 'hold'"):
        Method.from_json({"select": {"kind": "band", "density": 0.3, "hold": 2}})


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rest": "pooled"}, r"rest: expected a rest such as Drop\(\), .* found 'pooled'"),
        ({"rest": None}, "rest: expected a rest such as .* found None"),
        ({"rest": Kept}, "rest: expected a rest"),
        ({"order": "8x16"}, "order: expected an order such as .* found '8x16'"),
        ({"order": Draft(0.2)}, r"order: expected an order .*Method\(order=..., select=..., precision=..., rest=...\)"),
        ({"select": "draft"}, "select: expected a selection such as .* found 'draft'"),
    ],
)
def test_what_is_no_stage_is_told_as_such(given: dict[str, Any], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        Method(**{"select": Band(0.2), **given})


@pytest.mark.parametrize("heads", [Method(select=Band(0.2)), ("draft",), [Method(select=Band(0.2))]])
def test_a_recipe_is_of_methods(heads: Any) -> None:
    with pytest.raises(TypeError, match="heads: expected a tuple of methods"):
        Recipe(heads=heads)
