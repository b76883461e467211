"""What goes with every family, on the first tiny pipeline of each: a search, the doctor, the preset, adapters, offloading.

Where diffusers, or a family, has no such thing, the test says why and is skipped: docs/matrix.md shows both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ModularPipeline
from peft import LoraConfig
from torch import nn

from diffusers_accel import patch
from diffusers_accel.doctor import diagnose
from diffusers_accel.families import find
from diffusers_accel.methods import DENSE, Band, Draft, Method, Patches
from diffusers_accel.search import plan_search
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.plan_search import search_plan
from tests.families import TinyFamily
from tests.families.test_every_family import every_family, latents, layers_of, processors_of, shared, stock_latents

STEPS = 2
CANDIDATES = (DENSE, Method(select=Band(0.4)), Method(Patches(), Draft(0.4)))


def arguments(tiny: TinyFamily) -> dict[str, Any]:
    """For `pipe(**...)`, of a few steps, without decoding where the pipeline can leave that out."""
    call = tiny.call(num_inference_steps=STEPS, output_type="latent")
    if isinstance(shared(tiny), ModularPipeline):  # its blocks end before a decoder; its schedule has its end as a step
        del call["output_type"]
        call["num_inference_steps"] += 1
    return call


def close(one: np.ndarray, other: np.ndarray) -> bool:
    return bool(np.abs(one - other).max() <= 1e-4 * np.abs(other).max())


@every_family
def test_a_search_finds_a_plan_that_keeps_its_word(
    tiny: TinyFamily, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_search, "COST_SECONDS", 0.01)
    pipe, prompt, stock = shared(tiny), arguments(tiny), stock_latents(tiny, STEPS)
    before = processors_of(pipe)
    del prompt["generator"]
    options = {
        "call": {},
        "budget": Budget.density(0.9),
        "candidates": CANDIDATES,
        "rows": 16,
        "spans": (),
        "span_weights": (1.0,),
        "scores_path": tmp_path / "s.safetensors",
        "progress": False,
    }
    family = find(pipe)["transformer"][1]
    if family.no_search is not None:
        with pytest.raises(ValueError, match=f"a search cannot measure {family.name} yet"):
            search_plan(pipe, [prompt], **options)
        pytest.skip(f"refused: {family.no_search}")
    plan = search_plan(pipe, [prompt], **options)
    assert processors_of(pipe) == before
    with patch(pipe, plan) as done:
        out = latents(tiny, pipe, num_inference_steps=STEPS)
        assert np.isfinite(out).all() and not np.array_equal(out, stock)
        assert done.report().density == pytest.approx(plan.provenance["predicted"]["density"], abs=0.01)


@every_family
def test_the_doctor_measures_a_step(tiny: TinyFamily) -> None:
    pipe = shared(tiny)
    before = processors_of(pipe)
    found = diagnose(pipe, arguments(tiny), densities=(0.5,)).call
    assert found is not None and found.family == find(pipe)["transformer"][1].name
    assert found.layout.whole in {each.whole for each in (tiny.layout, *tiny.others)}
    assert 0 < found.attention_ms < found.step_ms and found.forwards == len(tiny.branches)
    assert 0 < found.expectations[0].density <= 1 and found.preset
    assert processors_of(pipe) == before


@every_family
def test_the_preset_knows_when_to_stay_dense(tiny: TinyFamily) -> None:
    """At this size nothing can win, and a patch without a method leaves the video as it is and says so."""
    pipe, stock = shared(tiny), stock_latents(tiny, tiny.least)
    with patch(pipe) as done:
        assert close(latents(tiny, pipe, num_inference_steps=tiny.least), stock)
        report = done.report()
    assert report.density == 1 and len(report.rows) == layers_of(pipe)
    assert "dense" in str(report)


def linears(pipe: Any) -> list[str]:
    """The linear maps inside the self-attention modules."""
    module, family = find(pipe)["transformer"]
    parts = (
        (f"{name}.{path}", part) for name, each in family.self_attention(module) for path, part in each.named_modules()
    )
    return [path for path, part in parts if isinstance(part, nn.Linear)]


@every_family
def test_an_adapter_is_part_of_what_runs(tiny: TinyFamily) -> None:
    pipe = tiny.pipe()
    if not hasattr(pipe.transformer, "add_adapter"):
        pytest.skip(f"diffusers gives {type(pipe.transformer).__name__} no adapters")
    torch.manual_seed(1)
    pipe.transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=linears(pipe), init_lora_weights=False))
    adapted = latents(tiny, pipe, num_inference_steps=tiny.least)
    assert not close(adapted, stock_latents(tiny, tiny.least)), "the adapter must do something"
    with patch(pipe, "dense") as done:
        assert close(latents(tiny, pipe, num_inference_steps=tiny.least), adapted)
        assert all(row["calls"] for row in done.report().rows)


@every_family
def test_offloaded_by_groups_it_is_the_same(tiny: TinyFamily) -> None:
    pipe, cpu, stock = tiny.pipe(), torch.device("cpu"), stock_latents(tiny, tiny.least)
    try:
        pipe.transformer.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    except ValueError as error:
        pytest.skip(f"diffusers: {error}")
    with patch(pipe, "dense") as done:
        assert close(latents(tiny, pipe, num_inference_steps=tiny.least), stock)
        assert all(row["calls"] for row in done.report().rows)
