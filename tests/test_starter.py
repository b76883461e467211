"""Starter plans: what they make of measured heads, for whom, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel, WanTransformer3DModel

from diffusers_accel import Plan, patch
from diffusers_accel.families import find
from diffusers_accel.methods import Draft
from diffusers_accel.starter import Starter
from diffusers_accel.starter.checkpoints import CHECKPOINTS
from diffusers_accel.starter.starter import DENSE_FROM, LEVEL, levels_of, margin_for, mean_density
from tests.tiny import POOLED_DIM, TEXT_DIM, tiny_wan, tiny_wan_call

every_checkpoint = pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda each: each.key)
BY_KEY = {each.key: each for each in CHECKPOINTS}


def wan(layers: int, heads: int, channels: int = 16, out_channels: int = 16, **config: Any) -> WanTransformer3DModel:
    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=heads,
        attention_head_dim=8,
        in_channels=channels,
        out_channels=out_channels,
        text_dim=TEXT_DIM,
        freq_dim=8,
        ffn_dim=8,
        num_layers=layers,
        **config,
    ).eval()


def hunyuan(image: str | None) -> HunyuanVideoTransformer3DModel:
    return HunyuanVideoTransformer3DModel(
        in_channels=16,
        out_channels=16,
        num_attention_heads=24,
        attention_head_dim=8,
        num_layers=20,
        num_single_layers=40,
        num_refiner_layers=1,
        mlp_ratio=1.0,
        text_embed_dim=TEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        rope_axes_dim=(2, 2, 4),
        image_condition_type=image,
    ).eval()


def pipe_of(key: str) -> Any:
    """A pipeline that looks like a checkpoint, with heads of 8 channels and without weights."""
    pipe = tiny_wan()
    with torch.device("meta"):
        if key.startswith("hunyuan"):
            return hunyuan("token_replace" if "i2v" in key else None)
        sizes = (30, 12) if "1_3B" in key else (40, 40)
        config = {"image_dim": 8} if key == "wan_14B_i2v" else {}
        made = [wan(*sizes, channels=36 if "i2v" in key else 16, **config) for _ in range(2)]
        pipe.transformer, pipe.transformer_2 = made[0], made[1] if "A14B" in key else None
    return pipe


def densities(plan: Plan, transformer: str = "transformer") -> np.ndarray:
    """[layers, heads] of the last span; 1 for dense heads."""
    of = {s: m.select.density if isinstance(m.select, Draft) else 1.0 for s, m in plan.methods.items()}
    return np.array([[of[symbol] for symbol in row] for row in plan.spans[-1].heads[transformer]])


@every_checkpoint
def test_each_checkpoint_is_recognised_and_heads_keep_their_rank(checkpoint: Any) -> None:
    found = find(pipe_of(checkpoint.key))
    assert [each.key for each in CHECKPOINTS if each.is_that_of(found)] == [checkpoint.key]
    plan = Starter().plan(found)
    assert plan.provenance["checkpoint"] == checkpoint.title
    assert plan.provenance["starter"] == "from published head statistics, not from a search on your device"
    for name, need in checkpoint.needs().items():
        given, wanted = densities(plan, name).flatten(), need.numpy().flatten()
        assert (np.diff(given[np.argsort(wanted)]) >= 0).all()  # whoever needs more reads no less
        sparse = given < 1
        assert (given[sparse] >= 1.5 * wanted[sparse] - 1e-6).all() and (given[sparse] < DENSE_FROM).all()
        assert (1.5 * wanted[~sparse] > DENSE_FROM - LEVEL).all()


@every_checkpoint
@pytest.mark.parametrize("density", [0.15, 0.25, 0.4])
def test_a_density_that_is_asked_for_is_met(checkpoint: Any, density: float) -> None:
    plan = Starter(density=density).plan(find(pipe_of(checkpoint.key)))
    mean = np.mean([densities(plan, name) for name in checkpoint.needs()])
    assert density - 0.02 < mean <= density
    assert plan.provenance["mean density"] == pytest.approx(mean, abs=1e-3)
    assert [span.start for span in plan.spans] == [0.0, 0.2] and "." in plan.methods


def missing(given: torch.Tensor, need: torch.Tensor) -> float:
    """Mean over heads of the share of a head's need that it does not read."""
    density = torch.where(given == 0, 1.0, given * LEVEL)
    return float((1 - (density / need).clamp(max=1)).mean())


@pytest.mark.parametrize("density", [0.2, 0.25, 0.3, 0.4])
def test_needs_of_wan_2_1_serve_2_2_as_well_as_the_data_say(density: float) -> None:
    """A plan from the one serves the other nearly as well as its own plan, and far better than one density for all."""
    old, new = BY_KEY["wan_14B_t2v"].needs()["transformer"], BY_KEY["wan22_A14B_t2v"].needs()["transformer_2"]
    own, carried = (missing(levels_of(need, margin_for(density, need)), new) for need in (new, old))
    same = missing(torch.full_like(new, round(density / LEVEL)), new)
    print(
        f"density {density}: unread of what a head needs: own plan {own:.3f}, carried over {carried:.3f}, one for all {same:.3f}"
    )
    assert carried < own + 0.02 and carried < 0.65 * same, (own, carried, same)
    ranks = [torch.argsort(torch.argsort(need.flatten())).float() for need in (old, new)]
    assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.95


@pytest.mark.parametrize(
    "model",
    [
        partial(wan, 30, 24),  # Wan 2.2 5B
        partial(wan, 40, 40, 36, image_dim=8, pos_embed_seq_len=514),  # first and last frame
        partial(wan, 40, 40, 52),  # a control video beside the image
        partial(wan, 40, 40, 36),  # one of the experts of Wan 2.2
    ],
)
def test_lookalikes_are_refused(model: Any) -> None:
    with torch.device("meta"):
        found = find(model())
    assert not any(each.is_that_of(found) for each in CHECKPOINTS)


@every_checkpoint
def test_the_page_tells_the_means(checkpoint: Any) -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "starter.md").read_text(encoding="utf-8")
    needs = [*checkpoint.needs().values()]
    need, given = float(torch.cat(needs).mean()), mean_density([levels_of(each, 1.5) for each in needs])
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {checkpoint.title} |"))
    assert row.endswith(f"| {need:.3f} | {given:.2f} |".replace(" 0.", " .")), row


def test_margin_is_the_largest_that_meets_the_mean() -> None:
    need = BY_KEY["wan_1_3B_t2v"].needs()["transformer"]
    margin = margin_for(0.25, need)
    assert mean_density([levels_of(need, margin)]) <= 0.25 < mean_density([levels_of(need, margin * 1.05)])


def test_others_are_refused_and_told_what_to_do() -> None:
    pipe = tiny_wan()
    with pytest.raises(ValueError, match="Wan 2.1 1.3B .*found transformer: wan of 3 layers x 4 heads: search a plan"):
        patch(pipe, "starter")
    for wrong, message in (
        ({"density": 0.3, "margin": 2.0}, "give one of the two"),
        ({"density": 1.5}, "expected in"),
        ({"margin": 0.5}, "1 or more"),
        ({"dense_steps": 1.0}, r"\[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            patch(pipe, "starter", **wrong)
    with pytest.raises(TypeError, match="margins.*margin"):
        patch(pipe, "starter", margins=2)


def test_a_pipeline_runs_under_its_starter_plan_and_the_plan_is_a_file(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_wan()
    monkeypatch.setattr("diffusers_accel.starter.starter.CHECKPOINTS", (replace(CHECKPOINTS[0], channels=(4,)),))
    pipe.transformer = wan(30, 12, channels=4, out_channels=4)
    call = tiny_wan_call(num_inference_steps=3, guidance_scale=1.0)
    dense = pipe(**call).frames
    with patch(pipe, ["easycache", ("starter", {"density": 0.2})]) as done:
        sparse = pipe(**tiny_wan_call(num_inference_steps=3, guidance_scale=1.0)).frames
        assert not np.array_equal(sparse, dense) and 0.2 < done.report().density < 1
        done.plan.save(tmp_path / "starter.json")
    assert Plan.load(tmp_path / "starter.json") == done.plan
