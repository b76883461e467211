"""Mixed against single methods: plans from one set of scores, their correction, and the comparison from end to end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffusers_accel import Plan
from diffusers_accel.evals import mixed, toy
from diffusers_accel.evals.clip_record import ClipRecord
from diffusers_accel.evals.intervals import estimate
from diffusers_accel.evals.kept import KeptClips
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


def judged(*singles: tuple[list[float], float]) -> str:
    """The verdict where the mixed plan has so much more PSNR than each single method on each clip, at so much of its speed."""
    names = [f"single {number}" for number in range(len(singles))]
    rows = {}
    for name, (more, ratio) in zip(names, singles, strict=True):
        value, spread = estimate(more, [str(clip) for clip in range(len(more))], comparisons=len(singles))
        rows["psnr_difference", name] = SimpleNamespace(value=value, spread=spread, note=None)
        rows["speed_ratio", name] = SimpleNamespace(value=ratio)
    report: Any = SimpleNamespace(pair=lambda metric, one, other: rows[metric, other] if one == "mixed" else None)
    return mixed.verdict(report, ["mixed", *names])


def test_a_winner_is_named_by_intervals_alone() -> None:
    sure, unsure = [2.0, 2.5, 3.0, 1.5] * 2, [9.0, -3.0, -2.0, -1.0] * 2
    worse = [-each for each in sure]
    assert "is higher than that of every single method (single 0, single 1)." in judged((sure, 1.0), (sure, 0.98))
    text = judged((sure, 1.0), (unsure, 1.0), (worse, 1.0))
    assert "NOT shown to be higher" in text and "single 1 (not told apart), single 2 (NOT higher)." in text
    assert "- single 0: higher: mean +2.25 dB, median +2.25 dB (95 % interval +1.5" in text
    assert "t over 8 prompts, Bonferroni over 3 pairs), at 1.00x its speed." in text
    for few in (sure[:4], [40.0] * 7):
        text = judged((few, 1.0))
        assert "Too few clips to tell whether mixing pays: an interval takes 8 prompts or more." in text
        assert "is higher" not in text and "- single 0: too few clips to tell: mean +" in text


def test_more_quality_for_more_time_is_no_win() -> None:
    sure = [2.0, 2.5, 3.0, 1.5] * 2
    for more, ratio in ((sure, 0.9), ([-each for each in sure], 1.1)):
        assert "single 0 (no verdict, the better one is more than 3% slower)." in judged((more, ratio))
    assert "single 0 (NOT higher)." in judged(([-each for each in sure], 0.9))


def test_from_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(toy, "load_pipeline", random_pipeline)
    monkeypatch.setattr(toy, "verify_weights", lambda: {"files": {}})
    monkeypatch.setattr(toy, "CALL", SMALL)
    monkeypatch.setattr(plan_search, "COST_SECONDS", 0.1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DIFFUSERS_ACCEL_OFFLINE", "1")
    out = tmp_path / "mixed"
    asked = ["--out", str(out), "--prompts", "1", "--search-prompts", "2", "--speedup", "1.0001"]
    stock = KeptClips.save

    def stop(self: KeptClips, number: int, record: ClipRecord) -> None:
        stock(self, number, record)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(KeptClips, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            mixed.main(asked)
    before = {name: path.read_bytes() for name in SETS if (path := out / f"{name}.json").exists()}
    monkeypatch.setattr(mixed, "corrected", None)  # it goes on with its plans, and tries none again
    mixed.main(asked)
    assert before == {name: path.read_bytes() for name in SETS if (path := out / f"{name}.json").exists()} != {}
    assert not list(out.glob("*.partial"))
    text = (out / "mixed.md").read_text()
    assert "| mixed |" in text and text in capsys.readouterr().out
    rows = read_rows(out / "report" / "report.json")
    compared = {row.subject for row in rows} - {"dense", "floor"}
    assert compared >= {"mixed", "pattern"} and compared <= {"mixed", *SETS}
    assert all(Plan.load(out / f"{name}.json").models["transformer"].layers == 2 for name in compared)
    assert "Too few clips to tell whether mixing pays" in text or "NOT shown" in text, "one clip names no winner"
    assert all(f"\n- {name}: " in text for name in compared - {"mixed"})
    with pytest.raises(ValueError, match="2 or more to search with, found 8 and 1"):
        mixed.main(["--out", str(out), "--search-prompts", "1"])


def test_a_folder_that_cannot_be_written_is_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "load_pipeline", None)
    (tmp_path / "report").touch()
    with pytest.raises(WriteError, match="report: .*there is a file of that name"):
        mixed.main(["--out", str(tmp_path)])
