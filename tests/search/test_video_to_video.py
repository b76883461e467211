"""Video to video runs the end of a schedule only: a search counts the steps that run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanVideoToVideoPipeline

from diffusers_accel.api import patch
from diffusers_accel.plan import Plan
from diffusers_accel.search.last_latents import LastLatents
from diffusers_accel.search.scores import Scores
from tests.search.test_search import a_call, a_prompt, search
from tests.tiny import tiny_wan_transformer, tiny_wan_vae

STEPS, STRENGTH, RUN = 8, 0.5, 4


def tiny_wan_video_to_video() -> WanVideoToVideoPipeline:
    pipe = WanVideoToVideoPipeline(
        tokenizer=None,
        text_encoder=None,
        transformer=tiny_wan_transformer(),
        vae=tiny_wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def video_call() -> dict[str, Any]:
    """Of 5 frames, which the video says."""
    call = a_call(num_inference_steps=STEPS, output_type="latent")
    del call["num_frames"]
    video = torch.rand(1, 5, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return {**call, "strength": STRENGTH, "video": video}


def test_a_whole_search_of_the_steps_that_run(tmp_path: Path) -> None:
    pipe, call = tiny_wan_video_to_video(), video_call()
    plan = search(pipe, None, prompts=1, call=call, dense_steps=0.5, spans=(0.5,), out=tmp_path / "plan.json")
    scores = Scores.load(tmp_path / "plan.scores.safetensors")
    assert scores.steps("transformer").tolist() == [RUN / 2, RUN / 2], "shares of the steps that run"
    assert (scores.measured_impacts("transformer") > 0).all() and len(scores.impacts) == 2
    plan = Plan.load(tmp_path / "plan.json")
    with patch(pipe, plan) as patched:
        pipe(**call, **a_prompt(0), generator=torch.Generator().manual_seed(0))
        realised = patched.report().density
    assert realised == pytest.approx(plan.provenance["predicted"]["density"], abs=1e-6)
    assert plan.provenance["predicted"]["density"] >= 0.5


def test_latents_that_no_pipeline_shows_are_asked_for() -> None:
    with pytest.raises(RuntimeError, match=r"showed no latents .* span_weights, one number per span"):
        assert LastLatents().ending


def test_spans_are_weighed_over_the_steps_that_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A callback's step counts them from 0; the scheduler's own steps are more. No run but the calibration's decodes."""
    pipe, call, decoded = tiny_wan_video_to_video(), {**video_call(), "output_type": "np"}, []
    stock = pipe.vae.decode
    monkeypatch.setattr(pipe.vae, "decode", lambda *args, **options: (decoded.append(1), stock(*args, **options))[1])
    search(pipe, tmp_path / "s.safetensors", prompts=1, call=call, spans=(0.5,))
    assert len(decoded) == 1
