"""Radial Attention's mask: against its rule token by token, in closed form, on all families, in a search."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_accel import Plan, patch
from diffusers_accel.call import AttentionCall
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, DENSE, AxisOrder, Band, Kept, Method, Patches, Radial
from diffusers_accel.methods.arrangement import arrangement
from diffusers_accel.methods.select import Inputs
from diffusers_accel.search import plan_search
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.plan_search import search_plan
from tests.tiny import (
    HEADS,
    TEXT_DIM,
    tiny_cogvideox,
    tiny_cogvideox_call,
    tiny_hunyuan,
    tiny_hunyuan_call,
    tiny_wan,
    tiny_wan_call,
)

WAN_480P = TokenLayout(21, 30, 52)
RAGGED = TokenLayout(11, 9, 13)
SMALL_FRAMES = TokenLayout(17, 5, 6)
ONE_ROW = TokenLayout(5, 1, 1)
TEXT_END = TokenLayout(9, 16, 16, text_tokens=226, text_at="end")
TEXT_START = TokenLayout(9, 10, 16, text_tokens=226, text_at="start")
LAYOUTS = [RAGGED, SMALL_FRAMES, ONE_ROW, TokenLayout(9, 12, 20), TEXT_END, TEXT_START]


def mask_of(select: Radial, layout: TokenLayout) -> Tensor:
    """bool [query blocks, key blocks]."""
    return select.mask(AttentionCall(layout), AxisOrder(), {})[0]


def token_mask(layout: TokenLayout, decay: float) -> Tensor:
    """bool [S, S]: the published rule, one pair of frames after the other. Of tokens of text nothing."""
    size = layout.height * layout.width
    place = torch.arange(size)
    mask = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool)
    for i in range(layout.frames):
        for j in range(layout.frames):
            distance = abs(i - j)
            near = (place[:, None] - place).abs()
            octave = len(f"{distance:b}") if distance else 0
            length = 2 ** len(f"{size:b}") / 2**octave
            if distance <= 1:
                pair = torch.ones(size, size, dtype=torch.bool)
            elif length < BLOCK and distance % math.floor(BLOCK / length) != 0:
                pair = torch.zeros(size, size, dtype=torch.bool)
            else:
                pair = near <= max(BLOCK, length * decay)
            row, column = (layout.video_start + frame * size for frame in (i, j))
            mask[row : row + size, column : column + size] = pair
    return mask


def by_hand(layout: TokenLayout, decay: float, first_frame: bool) -> Tensor:
    """The block mask, pair by pair."""
    tokens = token_mask(layout, decay)
    blocks = layout.blocks(BLOCK)
    video = torch.zeros(layout.tokens, dtype=torch.bool)
    video[layout.video_start : layout.video_start + layout.video_tokens] = True
    sink = torch.zeros(layout.tokens, dtype=torch.bool)
    if first_frame:
        sink[layout.video_start : layout.video_start + layout.height * layout.width] = True
    mask = torch.zeros(blocks, blocks, dtype=torch.bool)
    for row in range(blocks):
        queries = slice(row * BLOCK, (row + 1) * BLOCK)
        for column in range(blocks):
            keys = slice(column * BLOCK, (column + 1) * BLOCK)
            if row == column or not (video[queries].all() and video[keys].all()) or sink[keys].any():
                mask[row, column] = True
                continue
            filled = [float(x) for x in tokens[queries, keys].double().mean(0)]
            some = [x for x in filled if x > 0]
            mask[row, column] = bool(some) and sum(x > 1 / 3 for x in some) > 0.6 * len(some)
    return mask


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("decay", [1.0, 0.2, 3.7])
@pytest.mark.parametrize("first_frame", [True, False])
def test_the_mask_is_that_of_the_rule_for_tokens(layout: TokenLayout, decay: float, first_frame: bool) -> None:
    assert torch.equal(mask_of(Radial(decay, first_frame), layout), by_hand(layout, decay, first_frame))


def test_frames_of_one_block_read_those_at_powers_of_two() -> None:
    """w = 256 / 2**bits(d): at 2**n <= d < 2**(n + 1), from 2 on, distances that 2**n divides, of which there is one."""
    mask = mask_of(Radial(first_frame=False), TokenLayout(70, 8, 16))
    for i in range(70):
        for j in range(70):
            assert mask[i, j] == (abs(i - j) & (abs(i - j) - 1) == 0 or i == j)


def test_frames_of_two_blocks_read_every_second_from_four_on() -> None:
    """w = 512 / 2**bits(d): 128 at 2 and 3, 64 from 4 to 7, 32 from 8 to 15. A window of 128 is wide enough for both blocks."""
    mask = mask_of(Radial(first_frame=False), TokenLayout(16, 16, 16)).unflatten(0, (16, 2)).unflatten(2, (16, 2))
    read = {d for d in range(16) if mask[0, :, d].all()}
    assert read == {0, 1, 2, 3, 4, 6, 8, 12}
    assert not mask[0][:, sorted(set(range(16)) - read)].any()


@pytest.mark.parametrize("grid", [(8, 16), (16, 32), (25, 40)])
@pytest.mark.parametrize("decay", [1.0, 0.5])
def test_pairs_grow_as_n_log_n(grid: tuple[int, int], decay: float) -> None:
    """A row reads about as many blocks more whenever the number of frames doubles; a dense row would read twice as many."""
    frames = [16, 32, 64, 128]
    masks = [mask_of(Radial(decay, first_frame=False), TokenLayout(count, *grid)).double() for count in frames]
    reads = [float(mask.sum(1).mean()) for mask in masks]
    more = [later - earlier for earlier, later in zip(reads, reads[1:])]
    assert min(more) > 0 and max(more) < 1.5 * min(more)
    density = [float(mask.mean()) for mask in masks]
    assert all(later < 0.75 * earlier for earlier, later in zip(density, density[1:]))


@pytest.mark.parametrize("layout", [TEXT_END, TEXT_START], ids=str)
def test_text_is_always_read_and_reads_everything(layout: TokenLayout) -> None:
    mask = mask_of(Radial(0.2, first_frame=False), layout)
    for block in (torch.arange(layout.text_start, layout.text_start + layout.text_tokens) // BLOCK).unique():
        assert mask[block].all() and mask[:, block].all()
    assert not mask.all()


def test_the_first_frame_is_a_sink() -> None:
    first = -(-30 * 52 // BLOCK)
    assert mask_of(Radial(0.2), WAN_480P)[:, :first].all()
    assert not mask_of(Radial(0.2, first_frame=False), WAN_480P)[:, :first].all()
    with_sink, without = (mask_of(Radial(0.2, first_frame), WAN_480P) for first_frame in (True, False))
    assert torch.equal(with_sink[:, first:], without[:, first:])


@pytest.mark.parametrize("layout", [TokenLayout(9, 25, 40), TokenLayout(33, 3, 3), TokenLayout(1, 4, 4)], ids=str)
def test_no_row_is_empty(layout: TokenLayout) -> None:
    """As one is in the authors' code with 1,000 tokens a frame."""
    assert mask_of(Radial(0.01, first_frame=False), layout).diagonal().all()


def test_a_wider_window_never_reads_fewer_tokens() -> None:
    density = [float(mask_of(Radial(decay), WAN_480P).double().mean()) for decay in (0.1, 0.2, 0.4, 0.8, 1.0, 2.0)]
    assert density == sorted(density) and density[0] < 0.75 * density[-1]


def test_masks_of_two_sizes_do_not_meet() -> None:
    """Nothing is kept on the class: each layout has its own, whichever came first."""
    method = Method(select=Radial(0.3))
    for layout in (RAGGED, WAN_480P, RAGGED, TEXT_END):
        found = method.select.pattern(AttentionCall(layout), method.order, {}, Inputs(torch.device("cpu")))
        assert torch.equal(found.mask()[0, 0], mask_of(Radial(0.3), layout))


def test_orders() -> None:
    assert Method(Patches(), Radial()).label == "radial 8x16 1"
    with pytest.raises(ValueError, match="it goes with orders that keep frames together, found hwf"):
        Method(AxisOrder("hwf"), Radial())


@pytest.mark.parametrize("decay", [0, -1.0, math.nan, math.inf, True, "1"])
def test_a_decay_that_means_nothing(decay: Any) -> None:
    with pytest.raises(ValueError, match="decay is a factor of the window's width, expected a number above 0, found"):
        Radial(decay)


def test_as_data() -> None:
    method = Method(select=Radial(0.2, first_frame=False))
    data = method.to_json()
    assert data == {"select": {"kind": "radial", "decay": 0.2, "first_frame": False}}
    assert Method.from_json(data) == method and method.label == "radial 0.2"
    assert Method.from_json({"select": {"kind": "radial"}}) == Method(select=Radial())
    assert method.expected_density() is None, "it follows from the layout"
    assert mask_of(Radial(1e300), WAN_480P).sum() >= mask_of(Radial(), WAN_480P).sum()


# At work

LONG = {"num_frames": 17, "num_inference_steps": 2, "output_type": "latent"}  # 9 latent frames (Hunyuan: 5)
PIPES = {
    "wan": (tiny_wan, tiny_wan_call, TokenLayout(9, 16, 16)),
    "hunyuan": (tiny_hunyuan, tiny_hunyuan_call, TokenLayout(9, 16, 16, 20, "end", 7)),
    "cogvideox": (tiny_cogvideox, tiny_cogvideox_call, TokenLayout(9, 16, 16, 20, "start")),
}


@pytest.mark.parametrize("family", PIPES)
def test_in_a_pipeline(family: str) -> None:
    pipe, call, layout = PIPES[family]
    pipe, options = pipe(), {**LONG, "num_frames": 33 if family == "hunyuan" else 17}
    dense = pipe(**call(**options)).frames
    select = Radial(0.2, first_frame=False)
    with patch(pipe, Method(select=select)) as done:
        frames = pipe(**call(**options)).frames
        report = done.report()
    assert bool(torch.isfinite(frames).all()) and not torch.equal(frames, dense)
    keys = layout.key_blocks(BLOCK)
    assert report.density == pytest.approx(float(mask_of(select, layout)[:, :keys].double().mean()), abs=1e-6)
    assert report.density < 0.95
    assert torch.equal(pipe(**call(**options)).frames, dense)


@pytest.mark.parametrize(
    "layout", [TokenLayout(33, 8, 16), TokenLayout(17, 12, 20, 300, "start")], ids=["video", "text"]
)
@pytest.mark.parametrize("first_frame", [True, False])
def test_its_density_is_known_once_the_layout_is(layout: TokenLayout, first_frame: bool) -> None:
    method = Method(select=Radial(0.2, first_frame))
    places = arrangement(method.order, layout)
    video = mask_of(method.select, layout)[slice(*places.video_queries), slice(*places.video_keys)]
    assert 0.1 < video.double().mean() < 0.9
    assert method.expected_density(layout) == pytest.approx(float(video.double().mean()))
    kept = replace(method, rest=Kept(2))
    assert kept.expected_density(layout) == pytest.approx(float(video.double().mean()) / 2 + 0.5)
    assert kept.expected_density() is None


@pytest.mark.parametrize("text", [0, 1500])
def test_what_it_reads_is_held_against_what_it_would_read_of_the_video(text: int) -> None:
    layout = TokenLayout(33, 8, 16, text, "end" if text else "none")
    method = Method(select=Radial(0.2))
    pipe = tiny_wan()
    with patch(pipe, method) as done:
        heads = tuple(range(HEADS))
        x = torch.zeros(1, layout.tokens, HEADS, 16)
        done.sites[0].engine.attend(AttentionCall(layout, "transformer", 0, heads, now=(0, 1)), x, x, x)
        notes = [note for note in done.report().notes if "was asked for" in note]
    said = f"radial 0.2: density {method.expected_density(layout):.3g} was asked for"
    assert [note.startswith(said) for note in notes] == ([True] if text else [])


def test_where_everything_is_near_it_is_dense() -> None:
    """Of two frames each reads the other whole."""
    pipe, options = tiny_wan(), {**LONG, "num_frames": 3}
    dense = pipe(**tiny_wan_call(**options)).frames
    with patch(pipe, Method(select=Radial(0.2))) as done:
        frames = pipe(**tiny_wan_call(**options)).frames
        assert done.report().density == 1
    assert torch.allclose(frames, dense, atol=1e-4)


def test_as_a_candidate_of_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_search, "COST_SECONDS", 0.05)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pipe, call = tiny_wan(), tiny_wan_call(num_frames=17, num_inference_steps=3)
    for name in ("generator", "prompt_embeds", "negative_prompt_embeds"):
        del call[name]
    prompt = {"prompt_embeds": torch.ones(1, 8, TEXT_DIM), "negative_prompt_embeds": torch.zeros(1, 8, TEXT_DIM)}
    radial = Method(select=Radial(0.2, first_frame=False))
    methods = (DENSE, radial, Method(select=Band(0.9)))
    budget = Budget.density(0.9)
    plan = search_plan(pipe, [prompt], call=call, budget=budget, candidates=methods, rows=64, progress=False)
    plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert radial in plan.methods.values(), "the others do not reach the budget alone"
    with patch(pipe, plan) as done:
        frames = pipe(**call, **prompt, generator=torch.Generator().manual_seed(0)).frames
        assert done.report().density == pytest.approx(plan.provenance["predicted"]["density"], abs=1e-6)
    assert np.isfinite(frames).all()
