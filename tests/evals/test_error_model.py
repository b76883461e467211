"""The experiment on the error model: what it predicts with each set of weights, the plans that it tries, and a run of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffusers_accel.evals import error_model, toy
from diffusers_accel.evals.error_model import BY_LAYER, BY_SPAN, CORRECTED, NONE, PlanOutcome
from diffusers_accel.search import plan_search
from diffusers_accel.search.predicted import layer_errors
from diffusers_accel.search.scores import Scores
from tests.evals.test_demo import SMALL, random_pipeline
from tests.search.test_assign import cost_of, densities_of, random_scores
from tests.search.test_sensitivity import with_impacts


def scores() -> Scores:
    return with_impacts(random_scores(calls=(2, 6)), (4.0, 1.0, 0.1), (0.5, 2.0, 8.0))


def test_weights_of_spans_predict_the_drift_that_impacts_were_measured_by() -> None:
    from diffusers_accel.search.predicted import heads_error
    from diffusers_accel.search.sensitivity import span_choice

    found = scores()
    for span in (0, 1):
        choice = span_choice(found, span)
        error = layer_errors(found, choice)["transformer"][span].sum()
        assert error_model.span_impacts(found)[span] * error == pytest.approx(heads_error(found, choice))
        predicted = error_model.predictions(found, choice)
        assert predicted[BY_SPAN] == pytest.approx(predicted[BY_LAYER]) and predicted[NONE] == pytest.approx(error)
    alike = with_impacts(random_scores(), 0.5, 2.0)
    assert error_model.span_impacts(alike) == pytest.approx([0.5, 2.0]), "where layers are alike, so are both"


def test_searched_plans_come_in_pairs_of_a_density() -> None:
    found = scores()
    plans = error_model.searched(found, cost_of(found), 6)
    assert [name.split(", density")[0] for name in plans] == [BY_LAYER, BY_SPAN] * 3
    density = [densities_of(found)[choice["transformer"]].mean((1, 2)) @ [0.25, 0.75] for choice in plans.values()]
    assert density[::2] == pytest.approx(density[1::2], abs=0.05) and density[0] < density[2] < density[4]
    errors = [error_model.predictions(found, choice)[BY_LAYER] for choice in plans.values()]
    assert all(new <= old for new, old in zip(errors[::2], errors[1::2], strict=True))


def test_random_plans_differ_and_are_the_same_each_time() -> None:
    found = scores()
    plans = error_model.drawn(found, cost_of(found), 6)
    again = error_model.drawn(found, cost_of(found), 6)
    tables = [choice["transformer"] for choice in plans.values()]
    assert all((table == again[name]["transformer"]).all() for name, table in zip(plans, tables, strict=True))
    assert len({table.tobytes() for table in tables}) == 6 and not any((table == 0).all() for table in tables)
    for name, table in zip(plans, tables, strict=True):
        assert ("candidates" in name) == bool((table == table[..., :1]).all()), "one candidate for all heads of a layer"


def measured(count: int, order: list[int]) -> list[PlanOutcome]:
    drifts = 2.0 ** np.arange(count)
    return [
        PlanOutcome(
            str(number), {NONE: 1.0, BY_SPAN: float(order[number]), BY_LAYER: float(number)}, (drift,), (-float(drift),)
        )
        for number, drift in enumerate(drifts)
    ]


def test_rank_correlations_and_their_difference() -> None:
    order = [1, 0, 3, 2, 5, 4, 7, 6]
    found = measured(8, order)
    expected = np.corrcoef(order, range(8))[0, 1]
    assert error_model.correlations(found, BY_LAYER) == pytest.approx((1.0, 1.0))
    assert error_model.correlations(found, BY_SPAN) == pytest.approx((expected, expected))
    gain, low, high = error_model.gain_interval(found, 0)
    assert gain == pytest.approx(1 - expected) and 0 <= low <= gain <= high


def test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(toy, "load_pipeline", random_pipeline)
    monkeypatch.setattr(toy, "verify_weights", lambda: {"files": {}})
    monkeypatch.setattr(toy, "CALL", SMALL)
    monkeypatch.setattr(plan_search, "COST_SECONDS", 0.1)
    monkeypatch.setattr(error_model, "RESAMPLES", 20)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "error_model"
    error_model.main(["--out", str(out), "--plans", "5", "--prompts", "1", "--steps", "3"])
    text = (out / "error_model.md").read_text()
    assert text in capsys.readouterr().out
    assert "5 plans of the toy model on 1 held-out prompt, 3 steps, guidance 2." in text
    assert all(f"| {weights} | " in text for weights in (NONE, BY_SPAN, BY_LAYER))
    assert f"{CORRECTED} |" in text and "- Correction of the same plans: drift " in text
    with pytest.raises(ValueError, match="expected 4 plans or more"):
        error_model.main(["--out", str(out), "--plans", "3"])
