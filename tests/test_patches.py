"""Patches put text behind the video and ragged grids into bands: blocks are compact and the draft's map says more of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.files import FileError
from diffusers_accel.kernels.pool import pool
from diffusers_accel.layout import Segment, TokenLayout
from diffusers_accel.methods import BLOCK, Draft, Method, Patches
from diffusers_accel.methods.arrangement import arrangement
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.orders import parse_order
from diffusers_accel.methods.select import Inputs
from diffusers_accel.plan import Plan

COGVIDEOX = TokenLayout(5, 32, 48, 226, "start")  # its text, before a grid that patches divide
LEADING = {
    "text": COGVIDEOX,
    "text and image": TokenLayout.of(Segment("text", 226), Segment("image", 61), Segment.video((5, 32, 48))),
    "history": TokenLayout.of(Segment("history", 300, queries=False), Segment("text", 9), Segment.video((5, 32, 48))),
}
OLD, NEW = Patches(text_last=False), Patches()


@pytest.mark.parametrize("layout", LEADING.values(), ids=LEADING)
def test_a_block_is_exactly_a_patch(layout: TokenLayout) -> None:
    index, places = NEW.index(layout), arrangement(NEW, layout)
    assert torch.equal(index.sort().values, torch.arange(layout.tokens))
    assert places.video_keys == places.video_queries == (0, layout.video_tokens // BLOCK)
    for block in index[: layout.video_tokens].split(BLOCK):
        token = block - layout.video_start
        frame, row, column = token // (32 * 48), token // 48 % 32, token % 48
        for axis, size in ((frame, 1), (row, 8), (column, 16)):
            assert int(axis.max() - axis.min()) == size - 1
    own = places.own[: layout.video_tokens // BLOCK]
    assert torch.equal(own, torch.eye(*own.shape, dtype=torch.bool)), "a patch of queries is one of keys"
    assert torch.equal(index[layout.video_tokens :], torch.arange(layout.video_start)), (
        "the others, in the model's order"
    )


def test_left_in_front_text_puts_every_block_across_patches() -> None:
    index = OLD.index(COGVIDEOX)
    assert torch.equal(index[:226], torch.arange(226))
    cells = (index[226:] - 226).view(-1, BLOCK)
    patch = cells // (32 * 48) * 12 + cells // 48 % 32 // 8 * 3 + cells % 48 // 16
    assert bool((patch.amin(1) == patch.amax(1)).all()), "the video alone is cut at patches"
    blocks = patch.flatten()[2 * BLOCK - 226 :].split(BLOCK)
    assert all(len(block.unique()) == 2 for block in blocks[:-1]), "and text shifts the cut"


@pytest.mark.parametrize("layout", [TokenLayout(5, 32, 48), TokenLayout(3, 32, 48, 20, "end", 7)])
def test_without_leading_text_nothing_moves(layout: TokenLayout) -> None:
    assert torch.equal(OLD.index(layout), NEW.index(layout))


def smooth(layout: TokenLayout, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """q and k [1, S, heads, dim] whose video changes slowly over the grid, as in real models, with noise upon it."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.randn(1, heads * dim, 2, 8, 12, generator=generator)
    field = F.interpolate(coarse, size=layout.grid, mode="trilinear").flatten(2)[0].T.unflatten(1, (heads, dim))
    q, k = (torch.randn(layout.tokens, heads, dim, generator=generator) for _ in range(2))
    for x in (q, k):
        x[layout.video_start :] = 2 * field + 0.5 * x[layout.video_start :]
    return q[None], k[None]


def attention_of_video(layout: TokenLayout, q: Tensor, k: Tensor) -> Tensor:
    """[heads, video tokens, video tokens], in the model's order: weights of a softmax over all tokens."""
    start, stop = layout.video_start, layout.video_start + layout.video_tokens
    weights = (torch.einsum("qhd,khd->hqk", q[0], k[0]) * q.shape[3] ** -0.5).softmax(-1)
    return weights[:, start:stop, start:stop]


def captured(
    order: Order, layout: TokenLayout, q: Tensor, k: Tensor, density: float, weights: Tensor
) -> tuple[float, float]:
    """The share of the video's attention to the video that falls into the blocks which a draft reads, and its density."""
    index = order.index(layout)
    call = AttentionCall(layout, heads=tuple(range(q.shape[2])))
    means = pool(q[:, index], BLOCK), pool(k[:, index], BLOCK)
    pattern = Draft(density, first_frame=False).pattern(call, order, {}, Inputs(q.device, means))
    start, stop = layout.video_start, layout.video_start + layout.video_tokens
    places = index.argsort()[start:stop]
    read = pattern.token_mask()[0][:, places][:, :, places]
    return float(weights[read].sum() / weights.sum()), pattern.density


@pytest.mark.parametrize(("density", "gain"), [(0.1, 0.06), (0.25, 0.06)])
def test_a_draft_captures_more_of_the_attention(density: float, gain: float) -> None:
    """With equally many blocks."""
    q, k = smooth(COGVIDEOX, 1, 64)
    both = [captured(each, COGVIDEOX, q, k, density, attention_of_video(COGVIDEOX, q, k)) for each in (OLD, NEW)]
    (before, density_before), (after, density_after) = both
    assert density_after == pytest.approx(density_before, abs=0.005)
    print(f"{density}: {before:.2f} -> {after:.2f}")
    assert after > before + gain


@pytest.mark.parametrize("grid", [(3, 30, 45), (3, 30, 52), (3, 52, 30), (2, 34, 60)])
def test_bands_capture_more_of_a_ragged_grid_than_patches_one_after_another(grid: tuple[int, int, int]) -> None:
    """With equally many blocks. On 45 x 80, of which patches fill all but a row, it is equal: 720p of Wan."""
    layout = TokenLayout(*grid)
    q, k = smooth(layout, 1, 64)
    weights = attention_of_video(layout, q, k)
    gains = []
    for density in (0.1, 0.25):
        both = [captured(each, layout, q, k, density, weights) for each in (OLD, NEW)]
        (before, density_before), (after, density_after) = both
        assert density_after == pytest.approx(density_before, abs=0.005)
        print(f"{grid}: density {density}, {before:.2f} -> {after:.2f}")
        gains.append(after - before)
    assert min(gains) > 0.01


# As text


def test_labels_tell_both() -> None:
    assert (NEW.label, OLD.label) == ("8x16", "8x16 text first")
    for order in (NEW, OLD, Patches(4, 32, text_last=False)):
        assert parse_order(order.label) == order
    assert Method(OLD, Draft()).label == "draft 8x16 text first 0.25"
    assert Method.from_json(Method(OLD, Draft()).to_json()) == Method(OLD, Draft())


def plan_file(path: Path, version: int, order: str) -> Path:
    """A plan of one head."""
    method = f'{{"a": {{"order": "{order}", "select": {{"kind": "draft"}}}}}}'
    spans = '[{"start": 0.0, "stop": 1.0, "heads": {"transformer": ["a"]}}]'
    parts = f'"methods": {method}, "spans": {spans}'
    heads = parts if version == 1 else f'"schedule": null, "forwards": null, "correct": null, "heads": {{{parts}}}'
    path.write_text(
        f'{{"format": "diffusers_accel.plan", "version": {version}, "family": "cogvideox", '
        '"models": {"transformer": {"layers": 1, "heads": 1, "head_dim": 64}}, '
        f'{heads}, "budget": {{}}, "provenance": {{}}, "tensors": null}}'
    )
    return path


def test_plans_of_version_1_keep_their_text_in_front(tmp_path: Path) -> None:
    read = Plan.load(plan_file(tmp_path / "old.json", 1, "8x16"))
    assert read.methods["a"].order == OLD
    read.save(tmp_path / "again.json")
    assert Plan.load(tmp_path / "again.json").methods["a"].order == OLD
    with pytest.raises(FileError, match="8x16 text first"):
        Plan.load(plan_file(tmp_path / "wrong.json", 1, "8x16 text first x"))
