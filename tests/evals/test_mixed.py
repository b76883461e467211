"""Mixed against single methods: plans from one set of scores, their correction, and the comparison from end to end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffusers_accel import Plan
from diffusers_accel.evals import mixed, toy
from diffusers_accel.evals.measurement import read_rows
from diffusers_accel.files import WriteError
from diffusers_accel.methods import DENSE
from diffusers_accel.search import plan_search
from diffusers_accel.search.candidates import SETS, candidates
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.scores import Scores
from tests.evals.test_demo import SMALL, random_pipeline
from tests.search.test_assign import costs, make_scores

METHODS = tuple(method for method in candidates((0.2, 0.4), methods=("pattern", "draft", "cached")))


def synthetic() -> tuple[Scores, Cost]:
    """Each head is suited by another of the methods."""
    density = np.array([1.0 if m == DENSE else getattr(m.select, "density", 0.0) for m in METHODS])
    error = np.random.default_rng(0).uniform(0.01, 1, (2, 4, 4, len(METHODS))) * (1 - density)
    error[..., 0] = 0
    return make_scores(error, densities=density, methods=METHODS, share=0.6), costs(
        *(100 * density + 10.0 * (density < 1))
    )


def test_each_method_alone_and_all_of_them() -> None:
    scores, cost = synthetic()
    plans, missing = mixed.find_plans(scores, cost, {"mixed": 1.3, "pattern": 1.3, "draft": 1.3, "cached": 1.3})
    assert set(plans) == {"mixed", "pattern", "draft", "cached"} and not missing
    kinds = {name: {m.select.kind for m in plan.methods.values()} - {"all"} for name, plan in plans.items()}
    assert kinds["draft"] == {"draft"} and kinds["pattern"] <= {"skip", "band", "stripe"} and len(kinds["mixed"]) > 2
    assert all(m.rest.remembers for m in plans["cached"].methods.values() if m != DENSE)
    assert not any(m.rest.remembers for m in plans["draft"].methods.values())
    errors = {name: plan.provenance["predicted"]["error"] for name, plan in plans.items()}
    assert errors["mixed"] < min(errors[name] for name in ("pattern", "draft", "cached"))
    assert all(plan.provenance["predicted"]["speedup"] >= 1.3 for plan in plans.values())


def test_what_is_out_of_reach_is_said() -> None:
    plans, missing = mixed.find_plans(*synthetic(), {"mixed": 1.3, "draft": 50.0})
    assert set(plans) == {"mixed"} and "out of reach" in missing["draft"]


def test_budgets_are_corrected_by_what_they_reach() -> None:
    scores, cost = synthetic()
    plans, _ = mixed.find_plans(scores, cost, {"mixed": 1.3, "pattern": 1.3, "draft": 1.3})
    reached = {"mixed": 1.25, "pattern": 1.4, "draft": 0.01}
    tried: Any = SimpleNamespace(row=lambda metric, name: SimpleNamespace(value=reached[name]))
    better = mixed.corrected(scores, cost, plans, tried, 1.3)
    assert better["mixed"].budget["value"] == pytest.approx(1.3 * 1.3 / 1.25)
    assert better["pattern"].budget["value"] == pytest.approx(1.3 * 1.3 / 1.4)
    assert better["draft"] is plans["draft"]  # as much more is out of reach
    again = mixed.corrected(scores, cost, {"pattern": better["pattern"]}, tried, 1.3)
    assert again["pattern"].budget["value"] == pytest.approx(1.3 * (1.3 / 1.4) ** 2)


def test_the_verdict_says_win_or_lose() -> None:
    def verdict(mine: float, theirs: float, my_speedup: float = 1.4) -> str:
        psnr = {"mixed": mine, "draft": theirs, "cached": 1.0}
        speedup = {"mixed": my_speedup, "draft": 1.4, "cached": 9.0}
        values = {"psnr": psnr, "speedup": speedup}
        report: Any = SimpleNamespace(row=lambda metric, name: SimpleNamespace(value=values[metric][name]))
        return mixed.verdict(report, ["mixed", "draft", "cached"])

    found = "mixed 30.00 dB at 1.40x and draft 29.00 dB at 1.40x"
    assert verdict(30, 29) == f"The mixed plan's PSNR is higher than that of the best single method, draft: {found}."
    assert "is NOT higher" in verdict(29, 29) and "is NOT higher" in verdict(28, 29, 1.38)
    assert "is higher" in verdict(30, 29, 1.6) and "is higher" in verdict(30, 29, 1.37)
    assert verdict(30, 29, 1.3).startswith("No verdict") and verdict(28, 29, 1.5).startswith("No verdict")


def test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(toy, "load_pipeline", random_pipeline)
    monkeypatch.setattr(toy, "verify_weights", lambda: {"files": {}})
    monkeypatch.setattr(toy, "CALL", SMALL)
    monkeypatch.setattr(plan_search, "COST_SECONDS", 0.1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DIFFUSERS_ACCEL_OFFLINE", "1")
    out = tmp_path / "mixed"
    mixed.main(["--out", str(out), "--prompts", "1", "--search-prompts", "2", "--speedup", "1.0001"])
    text = (out / "mixed.md").read_text()
    assert "| mixed |" in text and text in capsys.readouterr().out
    rows = read_rows(out / "report" / "report.json")
    compared = {row.subject for row in rows} - {"dense"}
    assert compared >= {"mixed", "pattern"} and compared <= {"mixed", *SETS}
    assert all(Plan.load(out / f"{name}.json").models["transformer"].layers == 2 for name in compared)
    assert any(f"best single method, {name}" in text for name in compared)
    with pytest.raises(ValueError, match="2 or more to search with, found 4 and 1"):
        mixed.main(["--out", str(out), "--search-prompts", "1"])


def test_a_folder_that_cannot_be_written_is_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "load_pipeline", None)
    (tmp_path / "report").touch()
    with pytest.raises(WriteError, match="report: .*there is a file of that name"):
        mixed.main(["--out", str(tmp_path)])
