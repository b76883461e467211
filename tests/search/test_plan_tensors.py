"""What a plan's tensors must be: stored masks and gates are checked as the stripes' masses are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import DENSE, AxisOrder, Draft, Kept, Method, Patches, Stored
from diffusers_accel.plan import Plan, PlanError, Span
from diffusers_accel.search import identity, scores_file
from diffusers_accel.search.recorders.stored_masks import StoredMasks, of_every_segment
from diffusers_accel.search.schedule import ProbeSchedule, ProbeSettings
from diffusers_accel.search.stored_masks import (
    QUERY_STEP,
    MaskSettings,
    best_orders,
    block_shares,
    kept_levels,
    order_scores,
)
from diffusers_accel.shape import ModelShape
from tests.stages import mask_of

STORED = Method(AxisOrder("hwf"), Stored(0.3))
BITS, HEADS = STORED.select.names(STORED.order, "transformer")
LAYOUT = TokenLayout(6, 8, 16)


def plan(provenance: dict[str, Any] | None = None, **tensors: torch.Tensor | None) -> Plan:
    """2 layers of 3 heads; head 1 of layer 0 takes a stored mask, head 2 of layer 1 a gated reuse."""
    found = {
        BITS: torch.full((1, 2, 6, 1), 0b11, dtype=torch.uint8),
        HEADS: torch.tensor([[-1, 0, -1], [-1, -1, -1]], dtype=torch.int32),
        "refresh/transformer": torch.ones(4, 2, 3, dtype=torch.uint8),
        **tensors,
    }
    return Plan(
        family="wan",
        models={"transformer": ModelShape(2, 3, 64)},
        methods={".": DENSE, "a": STORED, "b": Method(Patches(), Draft(0.3), rest=Kept(gated=True))},
        spans=(Span(0.0, 1.0, {"transformer": (".a.", "..b")}),),
        provenance=provenance or {},
        tensors={name: tensor for name, tensor in found.items() if tensor is not None},
    )


def bits(*rows: int, masks: int = 1, segments: int = 2) -> torch.Tensor:
    """Stored masks of one byte a row, all alike."""
    return torch.tensor(rows, dtype=torch.uint8).view(1, 1, -1, 1).repeat(masks, segments, 1, 1)


def layout(frames: int, height: int, width: int, text_tokens: int = 0) -> dict[str, Any]:
    names = ("frames", "height", "width", "text_tokens")
    return {"layout": dict(zip(names, (frames, height, width, text_tokens), strict=True))}


def test_files_of_scores_keep_the_former_names() -> None:
    """So that a search goes on with a file of an earlier version."""
    found = identity._masks(MaskSettings(segments=5))
    assert found["parts"] == 5 and "segments" not in found
    assert {"parts", "passes"} <= set(scores_file.Header.__struct_encode_fields__)


def test_what_fits_is_taken(tmp_path):
    plan().save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan()
    # Nobody reads what is not there, and what nobody reads is not looked at.
    unused = replace(plan(), spans=(Span(0.0, 1.0, {"transformer": ("...", "...")}),), tensors={})
    assert not unused.tensors


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no bits": (
        {BITS: None},
        f"tensors: expected '{BITS}', which the method 'a' reads, found 'refresh.*'stored hwf 0.3'",
    ),
    "no heads": ({HEADS: None}, f"tensors: expected '{HEADS}', which the method 'a' reads"),
    "no gate": ({"refresh/transformer": None}, "expected 'refresh/transformer', which the method 'b' reads"),
    "bits as bool": (
        {BITS: torch.ones(1, 2, 6, 6).bool()},
        r"expected uint8 \[masks, .*found torch.bool \[1, 2, 6, 6\]",
    ),
    "not packed": (
        {BITS: torch.ones(1, 2, 6, 6, dtype=torch.uint8)},
        r"expected uint8 .* found torch.uint8 \[1, 2, 6, 6\]",
    ),
    "no part": ({BITS: torch.ones(1, 0, 6, 1, dtype=torch.uint8)}, r"expected uint8 \[masks"),
    "heads of another type": (
        {HEADS: torch.zeros(2, 3).long()},
        r"expected int32 \[2 layers, 3 heads\], found torch.int64",
    ),
    "another model": ({HEADS: torch.zeros(2, 4, dtype=torch.int32)}, r"expected int32 .* \[2, 4\]"),
    "beyond the masks": ({HEADS: torch.ones(2, 3, dtype=torch.int32)}, "one of 1 masks, found 1 to 1"),
    "a head without": (
        {HEADS: torch.tensor([[0, -1, -1], [-1, -1, -1]], dtype=torch.int32)},
        "expected a mask for head 1 of layer 0, which takes the method 'a', found none",
    ),
    "gate of another type": ({"refresh/transformer": torch.ones(4, 2, 3)}, "expected uint8 .* found torch.float32"),
    "gate of another model": ({"refresh/transformer": torch.ones(4, 2, 2).byte()}, r"expected uint8 .* \[4, 2, 2\]"),
    "gate with a two": ({"refresh/transformer": torch.full((4, 2, 3), 2).byte()}, "0 elsewhere, found 2"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case):
    tensors, message = WRONG[case]
    with pytest.raises(PlanError, match=message):
        plan(**tensors)


def without(row: int, part: int) -> torch.Tensor:
    found = bits(*[0b11] * 6)
    found[0, part, row] = 0
    return found


@pytest.mark.parametrize(
    ("masks", "provenance", "message"),
    [
        (bits(*[0] * 6), {}, "found nothing in row 0 of segment 0 of mask 0, which head 1 of layer 0 takes"),
        (without(3, 1), {}, "found nothing in row 3 of segment 1 of mask 0"),
        (without(0, 1), {}, "found nothing in row 0 of segment 1"),
        (without(0, 1), layout(6, 8, 16), "found nothing in row 0 of segment 1"),
        (bits(0, *[3] * 5), layout(6, 8, 16), "found nothing in row 0 of segment 0"),
        (bits(*[3] * 4, 0, 0), layout(5, 8, 16, 30), "found nothing in row 4"),
        (bits(3, 3, 3, 3, 3, 0b1000011), {}, "expected no bit beyond the last of 6 blocks"),
        (bits(*[3] * 5), layout(6, 8, 16), r"masks of 6 blocks, for the 768 tokens of provenance.layout, found 5"),
    ],
)
def test_a_row_of_video_that_reads_nothing_is_refused(masks, provenance, message):
    with pytest.raises(PlanError, match=f"tensors.{BITS}: .*{message}"):
        plan(provenance, **{BITS: masks})


@pytest.mark.parametrize(
    ("masks", "provenance"),
    [
        (bits(*[3] * 5, 0), {}),  # text may be at either end, and reads everything whatever is stored
        (bits(0, *[3] * 5), {}),
        (bits(*[3] * 5, 0), layout(5, 8, 16, 30)),
        (bits(0, *[3] * 5), layout(5, 8, 16, 30)),
        (bits(*[3] * 6), layout(6, 8, 16)),
        (bits(*[3] * 6), {"layout": "wide"}),  # as free as all provenance
        (torch.cat([bits(*[3] * 6), bits(*[0] * 6)]), {}),  # no head takes the second one
    ],
)
def test_rows_of_text_and_masks_that_nobody_takes_may_be_empty(masks, provenance):
    assert torch.equal(plan(provenance, **{BITS: masks}).tensors[BITS], masks)


def test_stored_masks_of_one_plan_are_of_one_size():
    other = Method(AxisOrder("fhw"), Stored(0.3))
    names = other.select.names(other.order, "transformer")

    def both(masks: torch.Tensor) -> Plan:
        one = plan()
        heads = torch.tensor([[0, -1, -1], [-1, -1, -1]], dtype=torch.int32)
        return replace(
            one,
            methods={**one.methods, "c": other},
            spans=(Span(0.0, 1.0, {"transformer": ("ca.", "..b")}),),
            tensors={**one.tensors, names[0]: masks, names[1]: heads},
        )

    assert both(bits(*[3] * 6))
    for masks, found in (
        (bits(*[3] * 5), (r"\(2, 6\)", r"\(2, 5\)")),
        (bits(*[3] * 6, segments=3), (r"\(2, 6\)", r"\(3, 6\)")),
    ):
        with pytest.raises(
            PlanError,
            match=f"methods.c: expected tensors for {found[0]} .segments, blocks., as those of methods.a are, found {found[1]}",
        ):
            both(masks)


def test_the_constants_of_stored_masks_do_what_they_say():
    torch.manual_seed(0)
    q = torch.randn(1, LAYOUT.tokens, 1, 16)
    lse = torch.logsumexp(torch.einsum("bshd,bthd->bhst", q, q) / 4, -1)

    def empty(**constants: float) -> float:
        return float(order_scores(q, q, lse, LAYOUT, ("fhw",), MaskSettings(**constants))[0].mean())

    assert empty(epsilon=1e-12) == 0 and empty(epsilon=0.999, sigma=0.9) == 1, "which weights are small"
    assert empty(epsilon=2e-3, sigma=0.01) > empty(epsilon=2e-3, sigma=1.0), "how many make a tile empty"
    sparse, quant = np.array([[0.1, 0.8]]), np.array([[2.0, 9.0]])
    assert best_orders(sparse, quant, MaskSettings(alpha=1.0)).tolist() == [1]
    assert best_orders(sparse, quant, MaskSettings(alpha=0.0)).tolist() == [0]
    candidates = (DENSE, Method(select=Stored(0.3)))
    schedule = ProbeSchedule.of(ProbeSettings(candidates, ((0.0, 1.0),), 2, 1, 0, MaskSettings(segments=5)), 10)
    assert sorted(schedule.segments.values()) == [0, 1, 2, 3, 4]
    for wrong in ({"alpha": 1.1}, {"epsilon": 0}, {"sigma": 0}, {"segments": 0}, {"segments": 1.5}):
        with pytest.raises(ValueError, match="masks: expected"):
            MaskSettings(**wrong)


def test_the_order_of_a_head_is_the_one_that_gathers_its_attention():
    """A head that looks at its own position through all frames takes an order whose last axis is the frames."""
    torch.manual_seed(0)
    frames, height, width = LAYOUT.frames, LAYOUT.height, LAYOUT.width
    position = torch.arange(LAYOUT.tokens) % (height * width)
    frame = torch.arange(LAYOUT.tokens) // (height * width)
    codes = torch.randn(height * width, 64), torch.randn(frames, 64)
    q = torch.stack([codes[0][position], codes[1][frame]], 1)[None] * 4  # head 0: same place; head 1: same frame
    axes = ("fhw", "hwf", "whf")
    lse = torch.logsumexp(torch.einsum("bshd,bthd->bhst", q, q) / 8, -1)
    sparse, quant = order_scores(q, q, lse, LAYOUT, axes)
    assert sparse.shape == quant.shape == (2, 3) and ((sparse >= 0) & (sparse <= 1)).all() and (quant >= 1).all()
    best = best_orders(sparse, quant)
    assert axes[best[0]] in ("hwf", "whf") and axes[best[1]] == "fhw"
    assert best_orders(np.zeros((2, 3)), np.zeros((2, 3))).tolist() == [-1, -1]
    # More nearly empty tiles and flatter ones are both better: the paper's sign of the first is the other way round.
    assert best_orders(np.array([[0.1, 0.8]]), np.array([[5.0, 5.0]])).tolist() == [1]
    assert best_orders(np.array([[0.5, 0.5]]), np.array([[5.0, 9.0]])).tolist() == [0]


@pytest.mark.parametrize(
    "layout", [LAYOUT, TokenLayout(3, 9, 13, 30, "start"), TokenLayout(3, 9, 13, 60, "end")], ids=str
)
def test_masks_keep_the_blocks_with_most_attention(layout):
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, layout.tokens, 2, 16, generator=generator) * 2 for _ in range(2))
    logits = torch.einsum("bshd,bthd->bhst", q, k)[0] / 4
    shares = block_shares(q[:, ::QUERY_STEP], k, logits.logsumexp(-1)[None, :, ::QUERY_STEP].contiguous())
    blocks, weights = layout.blocks(128), logits.softmax(-1)
    expected = torch.stack(
        [
            torch.stack([part[:, ::QUERY_STEP].sum(-1).mean(-1) for part in rows.split(128, 2)], -1)
            for rows in weights.split(128, 1)
        ],
        1,
    )
    assert (shares - expected).abs().max() < 1e-5
    levels = kept_levels(shares, layout, (0.3, 0.6)).numpy()[None, None]
    methods = [Method(select=Stored(density)) for density in (0.3, 0.6)]
    tensors = [recorded(levels, method, methods, np.ones((1, 2), bool)) for method in methods]
    narrow, wide = (mask_of(*each, heads=2) for each in zip(methods, [layout] * 2, tensors, strict=True))
    assert not (narrow & ~wide).any() and narrow.any(-1).all()
    if not layout.text_tokens:
        assert wide.sum((1, 2)).tolist() == [round(0.6 * blocks**2)] * 2
        for head in range(2):
            dropped, best = shares[head][~wide[head]], shares[head] == shares[head].amax(1, keepdim=True)
            assert dropped.max() <= shares[head][wide[head] & ~best].min()
    else:  # the first or last block holds text, which reads and is read
        text = 0 if layout.text_at == "start" else -1
        assert narrow[:, text].all() and narrow[:, :, text].all()


def recorded(levels, method, methods, heads):
    """What a plan's `heads`, bool [layers, heads], read of the levels [segments, layers, heads, blocks, blocks] of a search."""
    return StoredMasks.tensors(methods, {"levels/transformer": levels}, "transformer", method, heads)


def test_stored_tensors_are_what_the_method_reads():
    levels = np.random.default_rng(0).integers(0, 3, (2, 2, 3, 6, 6)).astype("u1")
    levels[1, 1] = 0  # this layer did not run at the second part's step: the first part's masks hold
    heads = np.array([[False, True, True], [True, False, False]])
    wide = replace(STORED, select=Stored(0.6))
    tensors, others = (recorded(levels, method, (STORED, wide), heads) for method in (STORED, wide))
    assert set(tensors) == {BITS, HEADS} and torch.equal(
        others[wide.select.names(wide.order, "transformer")[1]], tensors[HEADS]
    )
    assert tensors[HEADS].tolist() == [[-1, 0, 1], [2, -1, -1]]
    for layer, head, part in ((0, 1, 0), (0, 2, 1), (1, 0, 0), (1, 0, 1)):
        kept_by = torch.from_numpy(of_every_segment(levels[:, layer])[part, head])
        for method, found, least in ((STORED, tensors, 2), (wide, others, 1)):
            (mask,) = mask_of(method, LAYOUT, found, (head,), layer=layer, now=(part, 2))
            assert torch.equal(mask, kept_by >= least)
    assert np.array_equal(of_every_segment(levels[:, 1])[1], levels[0, 1])
