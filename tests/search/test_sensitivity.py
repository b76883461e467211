"""How much an error in each span and layer matters: measured against running the plan by hand, and used by the assignment."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from diffusers_accel.api import patch
from diffusers_accel.plan import Plan
from diffusers_accel.search.arguments import check_callback
from diffusers_accel.search.assign import assign
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.plan_making import chosen_spans, plan_tensors
from diffusers_accel.search.predicted import heads_error, layer_errors
from diffusers_accel.search.scores import DENSE, Scores
from diffusers_accel.search.sensitivity import drift, impacts, layer_choice, span_choice
from tests.search.test_assign import cost_of, densities_of, random_scores
from tests.search.test_search import KINDS, METHODS, a_call, a_prompt, search
from tests.tiny import LAYERS, tiny_wan


def with_impacts(scores: Scores, *spans: float | Sequence[float]) -> Scores:
    """One number per span, for all layers alike, or one per layer."""
    rows = [
        {name: tuple(np.broadcast_to(span, model.layers).tolist()) for name, model in scores.models.items()}
        for span in spans
    ]
    return Scores(**{**vars(scores), "impacts": tuple(rows)})


def test_impacts_predict_the_drift_that_they_were_measured_by(tmp_path):
    pipe = tiny_wan()
    search(pipe, tmp_path / "s.safetensors", prompts=1)
    scores = Scores.load(tmp_path / "s.safetensors")
    measured = scores.measured_impacts("transformer")
    assert measured.shape == (4, LAYERS) and (measured[0] == 0).all()  # no step falls into the first span
    assert (measured[1:] > 0).all() and (measured[1:].max(1) > 1.05 * measured[1:].min(1)).all()
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
            moved = drift(latents(), reference)
        assert moved > 0 and heads_error(scores, choice) == pytest.approx(moved, rel=1e-6)


def test_impacts_share_the_drift_out_by_gain():
    scores = random_scores(calls=(2, 6))
    choice = span_choice(scores, 1)
    error = layer_errors(scores, choice)["transformer"][1]
    found = np.array(impacts(scores, choice, 1, {"transformer": np.array([4.0, 1.0, 0.0])}, 0.5)["transformer"])
    assert found @ error == pytest.approx(0.5)
    assert found[0] == pytest.approx(4 * found[1]) and found[2] == 0
    (alike,) = impacts(scores, choice, 1, {"transformer": np.zeros(3)}, 0.5).values()
    assert alike == pytest.approx([0.5 / error.sum()] * 3), "where nothing is known of the layers, they count alike"


def test_span_choice_makes_one_span_sparse():
    scores = random_scores(calls=(2, 6))
    choice = span_choice(scores, 1)
    density = densities_of(scores)[choice["transformer"]]
    assert (density[0] == 1).all() and 0.2 < density[1].mean() <= 0.3 + 1e-9
    error = np.take_along_axis(scores.error("transformer"), choice["transformer"][..., None], -1)
    errors = layer_errors(scores, choice)["transformer"]
    assert (errors[0] == 0).all() and errors[1] == pytest.approx(6 * error[1].sum((1, 2)))


def test_layer_choice_makes_every_layer_of_one_span_sparse():
    scores = random_scores(heads=8)
    density = densities_of(scores)[layer_choice(scores, 1)["transformer"]]
    assert (density[0] == 1).all() and ((density[1].mean(-1) > 0.2) & (density[1].mean(-1) <= 0.3 + 1e-9)).all()


def test_layer_choice_takes_what_keeps_something_only_where_there_is_nothing_else():
    def scores_of(*methods) -> Scores:
        found = random_scores(methods=(METHODS[0], *methods))
        error = found.sums["error/transformer"]
        error[..., 1:] = 2.0
        error[..., [index for index, method in enumerate(found.candidates) if method.rest.remembers]] = 0.2
        return found

    keeping = [method for method in KINDS if method.rest.remembers]
    others = [method for method in KINDS if not method.rest.remembers and not method.dense]
    mixed = scores_of(*keeping, *others[: 4 - len(keeping)])
    kept = [index for index, method in enumerate(mixed.candidates) if method.rest.remembers]
    assert kept and np.isin(span_choice(mixed, 1)["transformer"][1], kept).any()
    assert not np.isin(layer_choice(mixed, 1)["transformer"], kept).any()
    assert (layer_choice(mixed, 1)["transformer"][1] != DENSE).any()


def test_assign_weighs_spans_as_measured():
    scores = random_scores()
    for spans in ((10.0, 1.0), (1.0, 10.0)):
        measured = assign(with_impacts(scores, *spans), cost_of(scores), Budget.density(0.3))
        told = assign(scores, cost_of(scores), Budget.density(0.3), span_weights=spans)
        assert (measured.choice["transformer"] == told.choice["transformer"]).all()
    alike = assign(scores, cost_of(scores), Budget.density(0.3))
    assert (measured.choice["transformer"] != alike.choice["transformer"]).any()


def test_assign_gives_the_blocks_to_the_layers_that_matter():
    scores = random_scores()
    for layer in range(3):
        row = np.full(3, 0.05)
        row[layer] = 5.0
        found = assign(with_impacts(scores, row, row), cost_of(scores), Budget.density(0.3))
        alike = assign(scores, cost_of(scores), Budget.density(0.3))
        density = [densities_of(scores)[each.choice["transformer"]].mean((0, 2)) for each in (found, alike)]
        assert density[0][layer] > density[1][layer] + 0.1
        assert found.density <= 0.3 + 1e-9


def test_weights_that_are_given_hold_for_all_layers_whatever_was_measured():
    scores = random_scores()
    measured = with_impacts(scores, (9.0, 1.0, 0.1), (0.1, 1.0, 9.0))
    told = [
        assign(each, cost_of(scores), Budget.density(0.3), span_weights=(1.0, 2.0)).choice["transformer"]
        for each in (scores, measured)
    ]
    assert (told[0] == told[1]).all()


def test_weights_need_all_spans_and_have_a_floor():
    scores = random_scores()
    assert (scores.weights("transformer") == 1).all() and scores.weights("transformer").shape == (2, 3)
    assert (with_impacts(scores, 3.0).weights("transformer") == 1).all()
    found = with_impacts(scores, 0.0, (4.0, 1.0, 0.001)).weights("transformer")
    assert found.tolist() == [[0.04, 0.04, 0.04], [4.0, 1.0, 0.04]]
    assert (with_impacts(scores, 0.0, 0.0).weights("transformer") == 1).all()
    with pytest.raises(ValueError, match=r"impacts\[1\].transformer: expected 3 finite numbers of 0 or more"):
        with_impacts(scores, 1.0, float("nan"))


def test_impacts_are_kept_and_not_measured_again(tmp_path, monkeypatch):
    from diffusers_accel.search import plan_search

    path, pipe = tmp_path / "s.safetensors", tiny_wan()
    search(pipe, path, prompts=1, span_weights=(1, 1, 1, 1))
    assert Scores.load(path).impacts == ()
    search(pipe, path, prompts=1)
    measured = Scores.load(path)
    assert len(measured.impacts) == 4
    monkeypatch.setattr(plan_search, "impacts", lambda *args: pytest.fail("measured again"))
    plan = search(pipe, path, prompts=1)
    assert plan.provenance["impacts"] == {"transformer": measured.measured_impacts("transformer").tolist()}


def test_a_single_span_is_measured_too_as_layers_differ(tmp_path):
    search(tiny_wan(), tmp_path / "s.safetensors", prompts=1, spans=())
    (span,) = Scores.load(tmp_path / "s.safetensors").impacts
    assert len(set(span["transformer"])) == LAYERS


def test_two_experts_have_weights_of_their_own(tmp_path):
    pipe = tiny_wan(experts=2)
    search(pipe, tmp_path / "s.safetensors", prompts=1)
    scores = Scores.load(tmp_path / "s.safetensors")
    for name in scores.models:
        runs = scores.calls(name) > 0
        measured = (scores.samples(name)[:, 0, 0, 0] > 0) & runs
        assert measured.any() and (scores.measured_impacts(name)[measured] > 0).all()
        assert (scores.measured_impacts(name)[~runs] == 0).all()


def test_a_pipeline_that_hides_its_latents_is_refused():
    class Opaque:
        def __call__(self, prompt): ...

    with pytest.raises(ValueError, match="span_weights"):
        check_callback(Opaque())
