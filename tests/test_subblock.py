"""The score of the parts of blocks: against loops, against Draft, by the attention that it finds, at work, in a search."""

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
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.pool import pool
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, DENSE, AxisOrder, Draft, Kept, Method, Order, Patches, Pooled, Recipe, Select
from diffusers_accel.methods.select import Inputs
from diffusers_accel.methods.selects import SubBlock, subblock
from diffusers_accel.methods.selects.subblock import pair_scores
from diffusers_accel.search import plan_search
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.plan_search import search_plan
from tests.tiny import (
    TEXT_DIM,
    tiny_cogvideox,
    tiny_cogvideox_call,
    tiny_hunyuan,
    tiny_hunyuan_call,
    tiny_wan,
    tiny_wan_call,
)

FHW = AxisOrder()
RAGGED = TokenLayout(5, 9, 15)
TEXT_END = TokenLayout(9, 16, 16, text_tokens=226, text_at="end", text_valid=70)
TEXT_START = TokenLayout(9, 10, 16, text_tokens=226, text_at="start")
LAYOUTS = [RAGGED, TEXT_END, TEXT_START, TokenLayout(1, 8, 8, 20, "end", 7)]
BUDGETS: list[dict[str, Any]] = [
    {"density": 0.3},
    {"density": 0.3, "per": "row", "min_blocks": 3},
    {"density": None, "top_p": 0.4},
    {"density": 0.1, "min_blocks": 0, "diagonal": False, "first_frame": False},
]


def noise(layout: TokenLayout, parts: int = 4, batch: int = 1, heads: int = 2, dim: int = 16) -> tuple[Tensor, Tensor]:
    """q [B, S, heads, dim] and k [B, keys, heads, dim] whose parts of blocks have means of their own, far from their block's."""
    generator = torch.Generator().manual_seed(layout.tokens)
    shape = (2, batch, layout.blocks(BLOCK) * parts, heads, dim)
    means = 2 * torch.randn(shape, generator=generator).repeat_interleave(BLOCK // parts, 2)[:, :, : layout.tokens]
    q, k = means + torch.randn(means.shape, generator=generator)
    return q, k[:, : layout.keys]


def pattern_of(select: Select, layout: TokenLayout, q: Tensor, k: Tensor, order: Order = FHW) -> BlockPattern:
    """What all heads read; q and k lie in the order."""
    call = AttentionCall(layout, heads=tuple(range(q.shape[2])))
    means = (pool(q, BLOCK), pool(k, BLOCK))
    pattern = select.pattern(call, order, {}, Inputs(q.device, means, (q, k)))
    if pattern.device.type == "cpu":
        pattern.check()
    return pattern


# The score


@pytest.mark.parametrize("parts", [1, 2, 4, 16])
@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (257, 250), (128, 40)])
@pytest.mark.parametrize("normalize", [False, True])
def test_scores_are_log_sums_over_the_parts(parts: int, queries: int, keys: int, normalize: bool) -> None:
    generator = torch.Generator().manual_seed(queries)
    q, k = (torch.randn(1, tokens, 2, 8, generator=generator) for tokens in (queries, keys))
    size = BLOCK // parts
    found = pair_scores(pool(q, size), pool(k, size), parts, normalize)
    assert found.shape == (1, 2, -(-queries // BLOCK), -(-keys // BLOCK)) and found.dtype == torch.float32
    for head in range(2):
        q_means, k_means = ([x.mean(0) for x in side[0, :, head].double().split(size)] for side in (q, k))
        weights = [[math.exp(float(a @ b) / math.sqrt(8)) for b in k_means] for a in q_means]
        if normalize:
            weights = [[weight / sum(row) for weight in row] for row in weights]
        for i in range(found.shape[2]):
            for j in range(found.shape[3]):
                block = [row[j * parts : (j + 1) * parts] for row in weights[i * parts : (i + 1) * parts]]
                assert float(found[0, head, i, j]) == pytest.approx(math.log(sum(map(sum, block))), abs=1e-5)


def test_heads_are_scored_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = (pool(x, 32) for x in noise(RAGGED, batch=2, heads=5))
    whole = pair_scores(q, k, 4)
    for at_once in (1, 2):
        monkeypatch.setattr(subblock, "MAP_BYTES", at_once * 4 * 2 * q.shape[1] * k.shape[1])
        assert torch.allclose(pair_scores(q, k, 4), whole, atol=1e-5)


def test_where_parts_are_constant_the_score_is_the_attention_that_a_pair_holds() -> None:
    """The log of the sum of exp(scores) over its tokens, but for the number of tokens in a pair of parts."""
    q, k = (x[:, ::32].repeat_interleave(32, 1) for x in noise(TokenLayout(2, 16, 16)))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 4
    held = scores.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).logsumexp((3, 5)) - math.log(32 * 32)
    assert torch.allclose(pair_scores(pool(q, 32), pool(k, 32), 4), held, atol=1e-4)


# The choice


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
@pytest.mark.parametrize("order", [Patches(), AxisOrder("hwf")], ids=str)
def test_of_one_part_it_is_draft(layout: TokenLayout, budget: dict[str, Any], order: Order) -> None:
    q, k = noise(layout, parts=1, batch=2)
    draft = pattern_of(Draft(**budget), layout, q, k, order)
    for normalize in (False, True):
        one = pattern_of(SubBlock(**budget, parts=1, normalize=normalize), layout, q, k, order)
        assert torch.equal(one.mask(), draft.mask())


@pytest.mark.parametrize("floor", [0, 2])
def test_rows_read_the_pairs_that_score_most(floor: int) -> None:
    """By rank, one row after the other; the diagonal and the first frame come first."""
    layout = TokenLayout(5, 16, 16)
    q, k = noise(layout)
    mask = pattern_of(SubBlock(0.4, per="row", min_blocks=floor), layout, q, k).mask()[0]
    scores = pair_scores(pool(q, 32), pool(k, 32), 4)[0]
    for head in range(2):
        for row in range(10):
            forced = {row, 0, 1}
            ranked = sorted(range(10), key=lambda j: (j not in forced, -float(scores[head, row, j])))
            assert set(mask[head, row].nonzero()[:, 0].tolist()) == set(ranked[:4])


@pytest.mark.parametrize("layout", [TEXT_END, TEXT_START], ids=str)
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_text_is_read_whole(layout: TokenLayout, budget: dict[str, Any]) -> None:
    mask = pattern_of(SubBlock(**budget), layout, *noise(layout)).mask()[0]
    assert mask.shape[1:] == (layout.blocks(BLOCK), layout.key_blocks(BLOCK))
    rows = torch.zeros(layout.blocks(BLOCK), dtype=torch.bool)
    rows[torch.arange(layout.text_start, layout.text_start + layout.text_tokens) // BLOCK] = True
    assert mask[:, rows].all() and mask[:, :, rows[: mask.shape[2]]].all() and not mask[:, ~rows].all()


def test_density_1_reads_everything_and_what_is_not_there_counts_for_nothing() -> None:
    q, k = noise(RAGGED)
    assert pattern_of(SubBlock(1.0), RAGGED, q, k).density == 1
    assert pattern_of(SubBlock(None, 1.0, parts=128), RAGGED, q, k).density == 1


def test_nothing_is_read_from_the_device() -> None:
    q, k = (x.to("meta") for x in noise(RAGGED))
    pattern = pattern_of(SubBlock(0.3), RAGGED, q, k)
    assert pattern.device.type == "meta" and pattern.blocks.shape[1:3] == (2, RAGGED.blocks(BLOCK))


def captured(pattern: BlockPattern, q: Tensor, k: Tensor) -> float:
    """The share of the attention that lies in the blocks that are read, in the mean over tokens and heads."""
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * q.shape[3] ** -0.5).softmax(-1)
    return float(weights.masked_fill(~pattern.token_mask(), 0).sum(-1).mean())


def gains(rule: str, stretches: tuple[int, int], select: SubBlock) -> list[float]:
    """What is captured more than by Draft, of tokens in clusters, whose stretches of q and of k have these lengths."""
    layout, found = TokenLayout(8, 16, 16), []
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        centres = 1.5 * torch.randn(12, 16, generator=generator)
        q, k = (
            centres[torch.randint(12, (layout.tokens // size, 1), generator=generator).repeat_interleave(size, 0)]
            + torch.randn(layout.tokens, 1, 16, generator=generator)
            for size in stretches
        )
        for density in (0.1, 0.25):
            options: dict[str, Any] = {"density": density, "per": rule, "diagonal": False, "first_frame": False}
            patterns = [
                pattern_of(each, layout, q[None], k[None]) for each in (replace(select, **options), Draft(**options))
            ]
            mine, drafts = (captured(pattern, q[None], k[None]) for pattern in patterns)
            found.append(mine - drafts)
    return found


@pytest.mark.parametrize("rule", ["head", "row"])
def test_it_finds_more_attention_than_draft_where_the_keys_of_blocks_are_mixed(rule: str) -> None:
    found = gains(rule, (128, 32), SubBlock())
    assert float(np.mean(found)) > 0.04 and min(found) > 0


@pytest.mark.parametrize("rule", ["head", "row"])
@pytest.mark.parametrize("stretches", [(128, 32), (32, 32), (32, 128)])
def test_normalized_it_finds_more_whatever_is_mixed(rule: str, stretches: tuple[int, int]) -> None:
    """As published, it does not where queries are: the part with the largest scores decides for its block."""
    found = gains(rule, stretches, SubBlock(normalize=True))
    assert float(np.mean(found)) > 0.04 and min(found) > 0
    if stretches[0] == 32:
        assert float(np.mean(gains(rule, stretches, SubBlock()))) < float(np.mean(found)) - 0.04


# As data


def test_as_data() -> None:
    method = Method(Patches(), SubBlock(0.2, parts=8, reselect_every=2), "int8")
    data = method.to_json()
    assert data["select"]["kind"] == "subblock" and data["select"]["parts"] == 8
    assert Method.from_json(data) == method and method.label == "subblock of 8 8x16 0.2 reselect 2 int8"
    assert Method.from_json({"select": {"kind": "subblock"}}).label == "subblock 0.25"
    assert method.expected_density() == 0.2 and method.period == 2
    assert SubBlock(normalize=True).name == "subblock normalized"
    with pytest.raises(ValueError, match="select.parts: expected int, found 4.0"):
        Method.from_json({"select": {"kind": "subblock", "parts": 4.0}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"parts": 3}, "expected a divisor of 128, found 3"),
        ({"parts": 0}, "expected a divisor of 128, found 0"),
        ({"parts": True}, "expected a divisor of 128, found True"),
        ({"parts": 256}, "expected a divisor of 128, found 256"),
        ({"density": None}, "a subblock takes either a density or a top_p"),
        ({"reselect_every": 0}, "reselect_every >= 1"),
    ],
)
def test_what_means_nothing(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SubBlock(**arguments)


# At work

SHORT = {"num_inference_steps": 2, "output_type": "latent"}
PIPES = {
    "wan": (tiny_wan, tiny_wan_call),
    "hunyuan": (tiny_hunyuan, tiny_hunyuan_call),
    "cogvideox": (tiny_cogvideox, tiny_cogvideox_call),
}
FREE: dict[str, Any] = {"diagonal": False, "first_frame": False}


def frames(pipe: Any, family: str, plan: Any) -> tuple[Tensor, Any]:
    with patch(pipe, plan) as done:
        return pipe(**PIPES[family][1](**SHORT)).frames, done.report()


@pytest.mark.parametrize("family", PIPES)
def test_in_a_pipeline(family: str) -> None:
    pipe = PIPES[family][0]()
    dense = pipe(**PIPES[family][1](**SHORT)).frames
    everything, report = frames(pipe, family, Method(Patches(), SubBlock(1.0)))
    assert report.density == 1 and torch.allclose(everything, dense, atol=1e-3)
    some, report = frames(pipe, family, Method(Patches(), SubBlock(0.3, **FREE)))
    assert bool(torch.isfinite(some).all()) and not torch.equal(some, dense)
    assert report.density == pytest.approx(0.3, abs=0.05) if family == "wan" else report.density < 0.7
    one, _ = frames(pipe, family, Method(Patches(), SubBlock(0.3, parts=1, **FREE)))
    draft, _ = frames(pipe, family, Method(Patches(), Draft(0.3, **FREE)))
    assert torch.equal(one, draft) and not torch.equal(one, some)


@pytest.mark.parametrize("family", PIPES)
def test_quantized(family: str) -> None:
    """It looks at q and k as they are, not at their codes, so the blocks are nearly always the same."""
    pipe = PIPES[family][0]()
    plain, _ = frames(pipe, family, Method(Patches(), SubBlock(0.3)))
    codes, report = frames(pipe, family, Method(Patches(), SubBlock(0.3), "int8"))
    assert "int8" in str(report.rows[0]["kernels"])
    error = (codes - plain).square().mean() / plain.square().mean()
    assert 0 < float(error) < 0.01


def test_beside_other_methods_in_one_launch() -> None:
    """One group of heads wants means, another tokens, one reads what is fixed ahead; each chooses as it does alone."""
    pipe = tiny_wan()
    methods = (Method(Patches(), SubBlock(0.3)), Method(Patches(), Draft(0.3)), DENSE)
    _, report = frames(pipe, "wan", Recipe(heads=methods))
    assert {"subblock 8x16 0.3", "draft 8x16 0.3"} <= set(report.rows[0]["methods"])
    for rest in (Kept(2), Pooled()):
        out, report = frames(pipe, "wan", Method(Patches(), SubBlock(0.3), rest=rest))
        assert bool(torch.isfinite(out).all())
        assert report.rows[0]["reused"] > 0 if rest.remembers else not report.rows[0]["reused"]


def test_as_a_candidate_of_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_search, "COST_SECONDS", 0.05)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pipe, call = tiny_wan(), tiny_wan_call(num_inference_steps=3)
    for name in ("generator", "prompt_embeds", "negative_prompt_embeds"):
        del call[name]
    prompt = {"prompt_embeds": torch.ones(1, 8, TEXT_DIM), "negative_prompt_embeds": torch.zeros(1, 8, TEXT_DIM)}
    plain = SubBlock(0.3, **FREE)
    methods = (
        DENSE,
        Method(Patches(), plain),
        Method(AxisOrder("hwf"), plain, "int8"),
        Method(Patches(), plain, rest=Pooled()),
        Method(Patches(), SubBlock(0.3, reselect_every=2, **FREE)),
    )
    budget = Budget.density(0.6)
    plan = search_plan(pipe, [prompt], call=call, budget=budget, candidates=methods, rows=64, progress=False)
    plan.save(tmp_path / "plan.json")
    plan = Plan.load(tmp_path / "plan.json")
    assert {method.select.kind for method in plan.methods.values()} == {"all", "subblock"}
    with patch(pipe, plan) as done:
        out = pipe(**call, **prompt, generator=torch.Generator().manual_seed(0)).frames
        assert done.report().density == pytest.approx(plan.provenance["predicted"]["density"], abs=0.02)
    assert np.isfinite(out).all()
