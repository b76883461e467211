"""Plans that nobody should use without knowing: slower than dense, or ruined."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from diffusers_accel.plan import Plan
from diffusers_accel.search.assign import Assignment, assign
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.plan_making import make_plan
from diffusers_accel.search.predicted import RUINED_LATENTS, RUINED_LAYERS, latents_error, layer_errors, warnings
from diffusers_accel.search.scores import Scores
from tests.search.test_assign import cost_of, costs, make_scores, random_scores
from tests.search.test_search import search
from tests.search.test_sensitivity import with_impacts
from tests.tiny import tiny_wan


def uniform(error: float, *impacts: float) -> tuple[Scores, Assignment]:
    """2 layers of 2 heads, 2 and 6 calls; every head errs by `error` of its layer's energy at half the time."""
    table = np.zeros((2, 2, 2, 2))
    table[..., 1] = error
    scores = make_scores(table, densities=(1.0, 0.5))
    scores = with_impacts(scores, *impacts) if impacts else scores
    return scores, assign(scores, costs(100.0, 50.0), Budget.density(0.5))


def test_the_error_of_the_latents_adds_up_over_spans_and_layers() -> None:
    scores, found = uniform(0.1, 0.01, 0.02)
    errors = layer_errors(scores, found.choice)["transformer"]
    assert errors == pytest.approx(np.array([[2 * 2 * 0.1] * 2, [6 * 2 * 0.1] * 2]))
    assert latents_error(scores, found) == pytest.approx(0.01 * 0.8 + 0.02 * 2.4)
    scores = with_impacts(scores, (0.01, 0.0), (0.02, 0.5))
    assert latents_error(scores, found) == pytest.approx(0.01 * 0.4 + 0.02 * 1.2 + 0.5 * 1.2)
    assert latents_error(*(uniform(0.1)[0], found)) is None, "no span was measured"


def test_a_plan_slower_than_dense_says_so() -> None:
    scores = random_scores()
    slow = assign(scores, costs(100.0, 450.0, 450.0, 450.0, 450.0), Budget.density(0.3))
    (warning,) = warnings(scores, slow)
    assert slow.speedup < 1
    assert warning.startswith(f"slower than dense: expected {slow.speedup:.2f}x, as attention takes ")
    assert warnings(scores, assign(scores, cost_of(scores), Budget.speedup(1.2))) == []
    assert warnings(scores, assign(scores, cost_of(scores), Budget.density(1.0))) == [], "all dense is no slower"


@pytest.mark.parametrize(("factor", "count"), [(1.01, 1), (0.99, 0)])
def test_a_ruined_result_says_so(factor: float, count: int) -> None:
    per_unit = 0.02  # of 0.1 x 4 heads x 8 calls
    scores, found = uniform(factor * RUINED_LATENTS / (per_unit * 32), per_unit, per_unit)
    said = warnings(scores, found)
    assert len(said) == count and all(
        "the final latents are expected to have a relative squared error" in w for w in said
    )
    scores, found = uniform(factor * RUINED_LAYERS / 2)  # two heads a layer
    said = warnings(scores, found)
    assert len(said) == count and all("attention's output is expected to be wrong by 5" in w for w in said)


def test_no_attention_at_all_is_a_ruin_whatever_was_measured() -> None:
    """Errors of heads that agree add up to more than was measured of each."""
    table = np.zeros((2, 2, 2, 2))
    table[..., 1] = 0.01
    scores = make_scores(table, densities=(1.0, 0.0))
    (warning,) = warnings(scores, assign(scores, costs(100.0, 1.0), Budget.density(0.001)))
    assert "ruined result: no head attends to anything, at any step" in warning


def test_warnings_go_into_the_plan_and_onto_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers_accel.search.predicted.RUINED_LAYERS", 1e-9)
    options = {"prompts": 1, "span_weights": (1, 1, 1, 1), "out": tmp_path / "plan.json"}
    plan = search(tiny_wan(), None, progress=True, **options)
    shown = " ".join(capsys.readouterr().err.split())
    assert plan.provenance["warnings"] and Plan.load(tmp_path / "plan.json") == plan
    for warning in plan.provenance["warnings"]:
        assert f"WARNING: {warning}" in shown
    assert "ruined result" in shown

    said: list[str] = []
    monkeypatch.setattr(
        logging.getLogger("diffusers_accel"), "warning", lambda text, *values: said.append(text % values)
    )
    search(tiny_wan(), None, **options)
    assert any(each.startswith("ruined result") for each in said) and capsys.readouterr().err == ""


def test_a_plan_without_warnings_has_none() -> None:
    scores = random_scores()
    cost, budget = cost_of(scores), Budget.speedup(1.2)
    assert "warnings" not in make_plan(scores, cost, assign(scores, cost, budget), budget).provenance
