"""The whole way on a tiny pipeline: search, trials, validation, a plan with its proof; and what is refused before the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffusers_accel import Goal, tune_plan
from diffusers_accel.plan import Plan
from diffusers_accel.search import plan_search
from diffusers_accel.tune import tuning
from tests.search.test_search import METHODS, a_call, a_prompt, processors
from tests.tiny import tiny_wan


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """On so small a model times are noise, in which no loop would settle: one round, one check."""
    monkeypatch.setattr(plan_search, "COST_SECONDS", 0.05)
    monkeypatch.setattr(tuning, "ROUNDS", 1)
    monkeypatch.setattr(tuning, "CHECKS", 1)


def tuned(goal: Goal, **options: Any) -> Any:
    call = {name: value for name, value in a_call(num_inference_steps=4).items() if name != "output_type"}
    options = {"validation": [a_prompt(2)], "candidates": METHODS, "rows": 64, "progress": False, **options}
    return tune_plan(tiny_wan(), [a_prompt(0)], goal, call=call, **options)


def test_a_plan_comes_with_its_proof(tmp_path: Path) -> None:
    found = tuned(Goal.speedup(1.01), out=tmp_path / "plan.json", held_out=[a_prompt(3)])
    assert found.proof.clips == 1 == len(found.report.clips)
    told = Plan.load(tmp_path / "plan.json").provenance["tuned"]
    assert told["goal"] == "1.01x" and told["met"] == found.met and told["speedup"] == found.proof.speedup
    assert told["clips"] == 1 and told["interval"] is None
    assert found.verdict.startswith("1.01x: ") and found.verdict.endswith("on 1 clip")
    assert (tmp_path / "plan.scores.steps.json").exists()


def test_a_quality_with_too_few_clips_cannot_be_told(tmp_path: Path) -> None:
    found = tuned(Goal.psnr(25), scores_path=tmp_path / "s.safetensors")
    assert found.met is None and "cannot tell" in found.verdict and "too few clips for an interval" in found.verdict


def test_a_step_that_is_slower_than_dense_is_no_goal(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="goal: expected fewer ms a step than the .* of the dense model here, found 1e"
    ):
        tuned(Goal.ms_per_step(1e9), scores_path=tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="give step_caches=True"):
        tuned(Goal.ms_per_step(1.0), scores_path=tmp_path / "s.safetensors", step_caches=False)


def test_wrong_arguments_are_refused_before_the_work() -> None:
    pipe = tiny_wan()
    before = processors(pipe)
    with pytest.raises(TypeError, match=r"goal: expected a Goal, such as Goal.speedup\(2\), found 2"):
        tune_plan(pipe, [a_prompt(0)], 2, call=a_call(), validation=[a_prompt(1)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="validation: expected prompts on which a plan is judged"):
        tune_plan(pipe, [a_prompt(0)], Goal.speedup(2), call=a_call(), validation=[])
    assert processors(pipe) == before
