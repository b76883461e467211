"""A budget that no plan can keep is refused as soon as that is clear: at the first timed step, not after the search."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_accel.search import plan_search
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.probe import RunProbe
from diffusers_accel.search.reach import SHARE_MARGIN, OutOfReach, check_reach, largest_speedup
from diffusers_accel.search.running import Enough
from diffusers_accel.search.schedule import open_share
from diffusers_accel.search.scores import Scores
from diffusers_accel.search.trial import MOST_STEPS, Stopwatch, Trial
from tests.search.test_gates import LAYOUT, inputs
from tests.search.test_search import search
from tests.stages import call_of
from tests.tiny import tiny_wan

WEIGHTS = (1, 1, 1, 1)  # so that no span is measured


def test_the_most_is_attention_that_takes_no_time() -> None:
    assert largest_speedup(0.5, 1.0) == 2.0 and largest_speedup(0.5, 0.8) == pytest.approx(1 / 0.6)
    assert largest_speedup(1.1, 1.0) == float("inf")
    with pytest.raises(
        OutOfReach, match=r"takes 50% of a step here, so that 2\.00 is the most even if it took no time"
    ):
        check_reach(Budget.speedup(2.5), 0.5, 1.0, "a step")
    with pytest.raises(OutOfReach, match=r"here and 20% of the steps stay dense, so that 1\.67 .* fewer dense steps"):
        check_reach(Budget.speedup(2.0), 0.5, 0.8, "a generation")
    check_reach(Budget.speedup(1.6), 0.5, 0.8, "a generation")
    check_reach(Budget.sparse_vdit(), 0.01, 1.0, "a step")


def test_a_noisy_measurement_refuses_nothing_that_may_be_reached() -> None:
    most = largest_speedup((1 + SHARE_MARGIN) * 0.5, 1.0)
    assert most > 2.2
    check_reach(Budget.speedup(most - 0.01), 0.5, 1.0, "a step")
    with pytest.raises(OutOfReach):
        check_reach(Budget.speedup(most + 0.01), 0.5, 1.0, "a step")


def test_a_density_below_the_dense_steps() -> None:
    spans = ((0.0, 0.25), (0.25, 1.0))
    assert open_share(spans, 8, 0.0) == 1.0 and open_share(spans, 8, 0.25) == 0.75 and open_share(spans, 8, 1.0) == 0.0
    check_reach(Budget.density(0.25), 0.5, 0.75, "a step")
    with pytest.raises(OutOfReach, match=r"a density of 0\.2 is out of reach: the sparsest plan has 0\.250"):
        check_reach(Budget.density(0.2), 0.5, 0.75, "a step")


@pytest.mark.parametrize(("reach", "steps"), [(False, MOST_STEPS), (True, 1)])
def test_a_slow_first_step_is_not_trusted(reach: bool, steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step compiles: attention's share looks small. Later steps are timed where that is reason to refuse."""
    run = 0

    class Probe:
        measuring_seconds = 0.0
        settings = type("settings", (), {"in_segments": False})

        def measure(self, *_: Any) -> None: ...

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return q

    watch = Stopwatch(lambda layout, steps: Probe(), lambda trial: not reach)  # type: ignore[arg-type, return-value]
    with pytest.raises(Enough):
        for run in range(10):
            watch.attend(None, call_of(LAYOUT, now=(run, 10), dense=dense), *inputs(1))  # type: ignore[arg-type]
            time.sleep(0.2 if run == 0 else 0.02)
    assert run == steps
    trial = watch.result()
    assert isinstance(trial, Trial) and trial.calls == 1
    assert (trial.attention_share < 0.2) == reach, "the largest of all timed steps"
    assert (trial.step_seconds < 0.15) != reach, "and the shortest"


def test_out_of_reach_at_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunProbe, "finished", lambda *_: pytest.fail("measured a whole run"))
    message = "speed-up of 50 is out of reach: .* of a step here.* Of the search, nothing is kept"
    with pytest.raises(ValueError, match=message):
        search(tiny_wan(), tmp_path / "s.safetensors", budget=Budget.speedup(50), span_weights=WEIGHTS)


def test_what_was_measured_is_kept_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a whole generation tells, with text encoder and decoder, is used as soon as the first one is there."""
    path = tmp_path / "s.safetensors"
    monkeypatch.setattr(plan_search, "check_reach", lambda budget, share, open_share, of: of == "a step" or stop())

    def stop() -> None:
        raise OutOfReach("a speed-up is out of reach")

    with pytest.raises(OutOfReach, match=r"Of the search, 1 of 2 prompts are kept in .*s\.safetensors"):
        search(tiny_wan(), path, span_weights=WEIGHTS)
    assert len(Scores.load(path).runs) == 1


def test_spans_are_not_measured_for_what_cannot_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, pipe = tmp_path / "s.safetensors", tiny_wan()
    search(pipe, path, prompts=1, span_weights=WEIGHTS)
    monkeypatch.setattr(plan_search, "impacts", lambda *_: pytest.fail("measured a span"))
    with pytest.raises(OutOfReach, match="a speed-up of 50 is out of reach: .* 1 of 1 prompts are kept"):
        search(pipe, path, prompts=1, budget=Budget.speedup(50), step_caches=False)
