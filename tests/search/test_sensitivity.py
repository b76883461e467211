"""How much an error in each span matters: measured against running the plan by hand, and used by the assignment."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_accel.api import patch
from diffusers_accel.plan import Plan
from diffusers_accel.search.arguments import check_callback
from diffusers_accel.search.assign import assign
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.plan_making import chosen_spans, plan_tensors
from diffusers_accel.search.predicted import span_errors
from diffusers_accel.search.scores import Scores
from diffusers_accel.search.sensitivity import span_choice
from tests.search.test_assign import cost_of, densities_of, random_scores
from tests.search.test_search import a_call, a_prompt, search
from tests.tiny import tiny_wan


def with_impacts(scores: Scores, *impacts: float) -> Scores:
    return Scores(**{**vars(scores), "impacts": impacts})


def test_impacts_are_the_drift_of_the_final_latents(tmp_path):
    pipe = tiny_wan()
    search(pipe, tmp_path / "s.safetensors", prompts=1)
    scores = Scores.load(tmp_path / "s.safetensors")
    assert scores.impacts[0] == 1.0  # no step falls into the first span
    call = {**a_call(output_type="latent"), **a_prompt(0)}

    def latents() -> torch.Tensor:
        return pipe(**call, generator=torch.Generator().manual_seed(0)).frames.double()

    reference = latents()
    for span in (1, 3):
        choice = span_choice(scores, span)
        methods, spans = chosen_spans(scores, choice)
        assert {m for s in spans if s is not spans[span] for row in s.heads["transformer"] for m in row} == {"."}
        plan = Plan(scores.family, scores.models, methods, tuple(spans), tensors=plan_tensors(scores, choice))
        with patch(pipe, plan):
            drift = (latents() - reference).square().sum() / reference.square().sum()
        assert drift > 0
        assert scores.impacts[span] == pytest.approx(float(drift) / span_errors(scores, choice).sum(), rel=1e-6)


def test_span_choice_makes_one_span_sparse():
    scores = random_scores(calls=(2, 6))
    choice = span_choice(scores, 1)
    density = densities_of(scores)[choice["transformer"]]
    assert (density[0] == 1).all() and 0.2 < density[1].mean() <= 0.3 + 1e-9
    error = np.take_along_axis(scores.error("transformer"), choice["transformer"][..., None], -1)
    assert span_errors(scores, choice).sum() == pytest.approx(6 * error[1].sum())


def test_assign_weighs_spans_as_measured():
    scores = random_scores()
    for impacts in ((10.0, 1.0), (1.0, 10.0)):
        measured = assign(with_impacts(scores, *impacts), cost_of(scores), Budget.density(0.3))
        told = assign(scores, cost_of(scores), Budget.density(0.3), span_weights=impacts)
        assert (measured.choice["transformer"] == told.choice["transformer"]).all()
    alike = assign(scores, cost_of(scores), Budget.density(0.3))
    assert (measured.choice["transformer"] != alike.choice["transformer"]).any()


def test_span_weights_need_all_spans_and_have_a_floor():
    scores = random_scores()
    assert scores.span_weights().tolist() == with_impacts(scores, 3.0).span_weights().tolist() == [1, 1]
    assert with_impacts(scores, 0.0, 4.0).span_weights().tolist() == [0.2, 4.0]
    assert with_impacts(scores, 0.0, 0.0).span_weights().tolist() == [1, 1]
    with pytest.raises(ValueError, match="at most 2 finite numbers of 0 or more"):
        with_impacts(scores, 1.0, float("nan"))


def test_impacts_are_kept_and_not_measured_again(tmp_path, monkeypatch):
    from diffusers_accel.search import plan_search

    path, pipe = tmp_path / "s.safetensors", tiny_wan()
    search(pipe, path, prompts=1, span_weights=(1, 1, 1, 1))
    assert Scores.load(path).impacts == ()
    search(pipe, path, prompts=1)
    measured = Scores.load(path).impacts
    assert len(measured) == 4
    monkeypatch.setattr(plan_search, "impact", lambda *args: pytest.fail("measured again"))
    plan = search(pipe, path, prompts=1)
    assert tuple(plan.provenance["span_impacts"]) == measured


def test_a_pipeline_that_hides_its_latents_is_refused():
    class Opaque:
        def __call__(self, prompt): ...

    with pytest.raises(ValueError, match="span_weights"):
        check_callback(Opaque())
