"""Stages and methods: what each mask keeps, and that wrong ones cannot be made."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, DENSE, NAMED, All, AxisOrder, Band, Context, Method, Recipe, Skip, Stripe

WAN_480P = TokenLayout(21, 30, 52)
RAGGED = TokenLayout(5, 9, 13)
TEXT_END = TokenLayout(9, 16, 16, text_tokens=226, text_at="end")
TEXT_START = TokenLayout(9, 16, 16, text_tokens=226, text_at="start")
LAYOUTS = [WAN_480P, RAGGED, TEXT_END, TEXT_START, TokenLayout(1, 4, 4)]
HWF = AxisOrder("hwf")


def mask_of(method: Method, layout: TokenLayout, **tensors: torch.Tensor) -> torch.Tensor:
    return method.mask(Context(layout, "transformer", 0, (0,), tensors))[0]


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
    mask = mask_of(Method(select=select(density, first_frame=False)), layout)
    blocks = layout.blocks(BLOCK)
    rows = mask.sum(1)
    text = rows == blocks if layout.text_tokens and density < 1 else torch.zeros(blocks, dtype=torch.bool)
    always = int(text.sum()) + 1
    assert torch.all(
        rows[~text] == max(round(density * blocks), 1) if round(density * blocks) >= always else rows[~text] <= always
    )
    assert torch.all(mask.diagonal())


@pytest.mark.parametrize("layout", [TEXT_END, TEXT_START])
@pytest.mark.parametrize("method", [Method(select=Band(0.2)), Method(HWF, Band(0.2)), Method(select=Stripe(0.2))])
def test_text_is_always_read_and_reads_everything(layout: TokenLayout, method: Method) -> None:
    mask = mask_of(method, layout)
    tokens = torch.arange(layout.text_start, layout.text_start + layout.text_tokens)
    for block in (tokens // BLOCK).unique():
        assert mask[block].all() and mask[:, block].all()
    assert not mask.all()


def test_first_frame_is_read_where_frames_lie_together() -> None:
    first = -(-30 * 52 // BLOCK)
    assert mask_of(Method(select=Band(0.2)), WAN_480P)[:, :first].all()
    assert not mask_of(Method(select=Band(0.2, first_frame=False)), WAN_480P)[:, :first].all()
    assert not mask_of(Method(HWF, Band(0.2)), WAN_480P)[:, :first].all()


def test_band_reads_the_nearest_blocks() -> None:
    mask = mask_of(Method(select=Band(0.25, first_frame=False)), WAN_480P)
    blocks = len(mask)
    for row in range(blocks):
        kept = mask[row].nonzero().flatten()
        assert kept[-1] - kept[0] + 1 == len(kept), "a band is one run of blocks"
        if kept[0] > 0 and kept[-1] < blocks - 1:
            assert abs((row - kept[0]) - (kept[-1] - row)) <= 1, "it is centred where it does not touch an end"


def test_stripe_is_the_same_columns_for_all_queries() -> None:
    mask = mask_of(Method(select=Stripe(0.3, first_frame=False)), WAN_480P)
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
    ctx = Context(WAN_480P, "transformer", 1, (2, 0), {"stripe_mass/transformer": mass})
    masks = Method(select=Stripe(0.1, first_frame=False, calibrated=True)).mask(ctx)
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


METHODS = st.one_of(
    st.sampled_from([DENSE, Method(select=Skip())]),
    st.builds(
        Method,
        st.sampled_from(["fhw", "hwf", "whf"]).map(AxisOrder),
        st.builds(Band, st.floats(0.01, 1.0), st.booleans()),
    ),
    st.builds(
        lambda select: Method(select=select), st.builds(Stripe, st.floats(0.01, 1.0), st.booleans(), st.booleans())
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
        ({"select": {"kind": "all"}, "precision": "int8"}, "unknown key 'precision'"),
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


def test_named_methods_build() -> None:
    assert NAMED["dense"]() == Recipe(heads=(DENSE,))
    assert {method.order.axes for method in NAMED["pattern"](density=0.3).heads} == {"fhw", "hwf"}


def test_refuses_where_only_the_reference_could_run() -> None:
    reason = Method(select=Band(0.5)).refuses(64, torch.device("meta"), torch.float32)
    assert reason is not None and "cpu" in reason
    assert Method(select=Band(0.5)).refuses(64, torch.device("cpu"), torch.float32) is None
