"""A search on a modular pipeline, whose arguments are the inputs of its blocks: MiniMax-H3's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffusers_accel import patch
from diffusers_accel.methods import DENSE, Band, Draft, Kept, Method, Patches, Stripe
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.plan_search import search_plan
from diffusers_accel.search.scores import Scores
from tests.families.minimax_h3 import MINIMAX_H3, run_latents

STEPS = 6
CANDIDATES = (
    DENSE,
    Method(select=Band(0.4)),
    Method(select=Stripe(0.4, calibrated=True)),
    Method(Patches(), Draft(0.3), rest=Kept(2)),
)


def arguments(**overrides: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a prompt brings, and the call; the schedule has its end as one more step."""
    call = MINIMAX_H3.call(num_inference_steps=STEPS + 1, **overrides)
    for ours in ("output_type", "generator"):
        del call[ours]
    prompt = {name: call.pop(name) for name in ("prompt_embeds", "text_token_tags")}
    return prompt, call


def search(pipe: Any, **overrides: Any) -> Any:
    prompt, call = arguments()
    options = {
        "call": call,
        "budget": Budget.density(0.9),
        "candidates": CANDIDATES,
        "rows": 64,
        "spans": (0.5,),
        "span_weights": (1.0, 1.0),
        "progress": False,
    }
    return search_plan(pipe, [prompt], **{**options, **overrides})


def test_it_finds_a_plan_that_keeps_its_word(tmp_path: Path) -> None:
    pipe = MINIMAX_H3.pipe()
    plan = search(pipe, scores_path=tmp_path / "s.safetensors", dense_steps=0.5)
    scores = Scores.load(tmp_path / "s.safetensors")
    assert scores.layout == MINIMAX_H3.layout and scores.steps("transformer").tolist() == [STEPS / 2, STEPS / 2]
    with patch(pipe, plan) as done:
        run_latents(pipe, MINIMAX_H3.call(num_inference_steps=STEPS))
        realised = done.report().density
    assert realised == pytest.approx(plan.provenance["predicted"]["density"], abs=1e-6)
    assert 0.5 < realised < 1


def test_progress_bars_of_its_blocks_are_as_before() -> None:
    pipe = MINIMAX_H3.pipe()
    (loop,) = (block for block in pipe._blocks.sub_blocks.values() if hasattr(block, "_progress_bar_config"))
    loop.set_progress_bar_config(leave=False)
    search(pipe)
    assert loop._progress_bar_config == {"leave": False}
    del loop._progress_bar_config
    search(pipe)
    assert not hasattr(loop, "_progress_bar_config")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"span_weights": None}, "MiniMaxH3ModularPipeline has no callback_on_step_end, .* span_weights"),
        ({"call": {"num_inference_stepz": 3}}, "takes no 'num_inference_stepz'; did you mean 'num_inference_steps'"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_runs(overrides: dict[str, Any], message: str) -> None:
    pipe = MINIMAX_H3.pipe()
    pipe.transformer.forward = None
    with pytest.raises(ValueError, match=message):
        search(pipe, **overrides)
