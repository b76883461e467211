"""A search over both scopes on a tiny pipeline: it records, chooses, keeps, and its plan does in the pipeline what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffusers_accel.api import patch
from diffusers_accel.methods import DENSE, Band, Method
from diffusers_accel.search import plan_search
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.plan_search import search_profile
from diffusers_accel.search.profile import Profile
from diffusers_accel.search.reach import OutOfReach
from diffusers_accel.search.step_options import WAYS
from diffusers_accel.search.steps.measured import MeasuredSteps
from tests.search.test_search import a_call, a_prompt, processors, search
from tests.tiny import tiny_wan

STEPS = 6
NEARLY_DENSE = (DENSE, Method(select=Band(0.9)))  # that give no speed worth mentioning, on whatever machine


def test_a_speed_that_attention_alone_cannot_give_is_found(tmp_path: Path) -> None:
    pipe, call = tiny_wan(), a_call(num_inference_steps=STEPS)
    before, forward = processors(pipe), pipe.transformer.forward
    profile = search_profile(
        pipe,
        [a_prompt(0)],
        call=call,
        candidates=NEARLY_DENSE,
        rows=64,
        progress=False,
        scores_path=tmp_path / "s.safetensors",
    )
    assert processors(pipe) == before and pipe.transformer.forward == forward
    assert profile.steps is not None and profile.steps.transformers == ("transformer",) * STEPS
    # Several choices for each number of computed steps, of which the first and the last are two; errors fall.
    counts = [len(each.computed) for each in profile.steps.choices]
    assert sorted(set(counts)) == [2, 3, 4, 5] and 1 < counts.count(3) <= WAYS
    assert all(each.computed[0] == 0 and each.computed[-1] == STEPS - 1 for each in profile.steps.choices)
    assert profile.steps.choices[0].error > profile.steps.choices[-1].error > 0
    attention, whole = profile.scores.attention_share, profile.steps.share
    assert 0 < attention < whole <= 1
    speedup = 1 / (1 - 0.4 * whole)
    joint = profile.joint()
    found = joint.assignment(joint.ranked(speedup)[0])
    assert found.steps is not None and found.speedup >= speedup
    plan = profile.plan(found, Budget.speedup(speedup))
    plan.save(tmp_path / "plan.json")
    with patch(pipe, tmp_path / "plan.json") as patched:
        pipe(**{**call, **a_prompt(1)})
        report = patched.report()
    assert report.forwards is not None
    assert report.forwards.rows[0]["steps"] == list(found.steps.computed)
    assert report.forwards.computed_share == pytest.approx(len(found.steps.computed) / STEPS)


def test_what_was_recorded_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, call = tmp_path / "s.safetensors", a_call(num_inference_steps=4)
    pipe = tiny_wan()
    first = search(pipe, path, prompts=1, budget=Budget.speedup(1.0), call=call)
    assert first.forwards is None  # nothing needs to be saved
    kept = Profile.load(path)
    monkeypatch.setattr(plan_search, "measure_steps", lambda *_: pytest.fail("recorded again"))
    with pytest.raises(
        OutOfReach, match=r"a speed-up of 1000 is out of reach: step caches and sparse attention together .* kept"
    ):
        search(pipe, path, prompts=1, budget=Budget.speedup(1000), call=call)
    assert Profile.load(path).steps == kept.steps
    alone = search(pipe, path, prompts=1, budget=Budget.speedup(1.0), call=call, step_caches=False)
    assert alone.forwards is None


def test_the_steps_of_a_plan_were_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The search takes what is best on the prompt, and keeps what it has seen: another speed measures only what is new."""
    path, call = tmp_path / "s.safetensors", a_call(num_inference_steps=STEPS)
    pipe = tiny_wan()
    speedup = 1 / (1 - 0.4 * measured_share(pipe, path, call))
    plan = search(pipe, path, prompts=1, budget=Budget.speedup(speedup), call=call, candidates=NEARLY_DENSE)
    seen = Profile.load(path).steps
    assert plan.forwards is not None and seen is not None
    known = {each.forwards: each.error for each in seen.choices if each.measured}
    assert 1 <= len(known) <= plan_search.MOST_ALONE
    assert plan.provenance["predicted"]["steps_error"] == known[plan.forwards]
    alone = MeasuredSteps(pipe, [a_prompt(0)], call, 0)
    assert known[plan.forwards] == pytest.approx(alone.error(plan.forwards))
    monkeypatch.setattr(MeasuredSteps, "error", lambda *_: pytest.fail("measured again"))
    again = search(pipe, path, prompts=1, budget=Budget.speedup(speedup), call=call, candidates=NEARLY_DENSE)
    assert again.forwards is not None


def measured_share(pipe: Any, path: Path, call: dict[str, Any]) -> float:
    """Of the forwards in a generation; searched with it."""
    search(pipe, path, prompts=1, budget=Budget.speedup(1.0), call=call, candidates=NEARLY_DENSE)
    steps = Profile.load(path).steps
    assert steps is not None
    return steps.share


def test_of_another_search_it_is_recorded_again(tmp_path: Path) -> None:
    path, call = tmp_path / "s.safetensors", a_call(num_inference_steps=4)
    search(tiny_wan(), path, prompts=1, budget=Budget.speedup(1.0), call=call)
    other = path.with_name("t.safetensors")
    other.with_suffix(".steps.json").write_bytes(path.with_suffix(".steps.json").read_bytes())
    search(tiny_wan(), other, prompts=1, budget=Budget.speedup(1.0), call=a_call(num_inference_steps=5))
    found = Profile.load(other).steps
    assert found is not None and len(found.transformers) == 5


@pytest.mark.parametrize("budget", [Budget.density(0.6), Budget.sparse_vdit(0.5)])
def test_budgets_of_heads_alone_record_nothing(tmp_path: Path, budget: Budget) -> None:
    path = tmp_path / "s.safetensors"
    plan = search(tiny_wan(), path, prompts=1, budget=budget)
    assert plan.forwards is None and not path.with_suffix(".steps.json").exists()
