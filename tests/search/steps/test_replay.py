"""A rule replayed in a recorded generation does what it does in a patched pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusers_accel import patch
from diffusers_accel.forwards import EasyCache, Forwards, Last, MagCache, Predictor, Rule, Schedule, Taylor
from diffusers_accel.search.steps.recorder import record
from diffusers_accel.search.steps.replay import replay, threshold_ranges, with_threshold
from tests.forwards.toys import toy
from tests.search.steps.synthetic import drawn, euler, wan_call, wan_prompt, wave, wave_pipeline
from tests.search.steps.test_step_map import cogvideox, unipc
from tests.tiny import tiny_wan

STEPS = 8
RATIOS = (1.0, 1.1, 0.95, 1.03, 1.2, 0.9, 1.01, 1.0)


def ran(pipe: Any, forwards: Forwards) -> tuple[int, ...]:
    """The steps that a patched pipeline computes."""
    with patch(pipe, forwards) as done:
        generator = torch.Generator().manual_seed(0)
        pipe(**wan_prompt(), **wan_call(), generator=generator, output_type="latent")
        report = done.report().forwards
    assert report is not None
    return tuple(sorted(step for row in report.rows for step in row["steps"]))


@pytest.mark.parametrize("predictor", [Last("residual"), Last("velocity"), Taylor(1)], ids=lambda each: each.label)
@pytest.mark.parametrize("scheduler", [None, unipc])
@pytest.mark.parametrize(
    "rule", [EasyCache(warm_up=1), EasyCache(warm_up=3), MagCache(RATIOS, max_skips=3, retention=0.2)], ids=repr
)
def test_every_range_is_what_a_patched_pipeline_does(rule: Rule, predictor: Predictor, scheduler: Any) -> None:
    """With a model whose output does not depend on the latents the replay leaves nothing out."""
    pipe = wave_pipeline(scheduler() if scheduler else None)
    trajectory = record(pipe, wan_prompt(), wan_call(), 0)
    found = threshold_ranges(rule, predictor, trajectory)
    assert len(found) > 2 and found[0].computed == tuple(range(STEPS))
    for one, other in zip(found, found[1:]):
        assert one.high is not None and other.low is not None
        assert one.high < other.low < one.high * (1 + 1e-3) + 1e-5 and one.computed != other.computed
    for each in found:
        assert each.low is not None and each.high is not None
        chosen = with_threshold(rule, (each.low + min(each.high, 3 * each.low + 0.01)) / 2)
        assert replay(chosen, predictor, trajectory) == each.computed
        assert ran(pipe, Forwards(chosen, predictor)) == each.computed


def test_an_expert_begins_anew() -> None:
    pipe = tiny_wan(2)
    pipe.register_modules(transformer=toy(wave()), transformer_2=toy(wave(7)))
    trajectory = record(pipe, wan_prompt(), wan_call(), 0)
    first = trajectory.fresh[1]
    for rule in (EasyCache(1e9, 0), MagCache(RATIOS, 1e9, 8, 0.0)):
        found = replay(rule, Last(), trajectory)
        assert first in found and len(found) < STEPS
        assert ran(pipe, Forwards(rule, Last())) == found


def test_a_rule_without_a_threshold_has_one_range() -> None:
    trajectory = euler(lambda step: {"": drawn(step)}, {"": 1.0})
    (found,) = threshold_ranges(Schedule(steps=(0, 2, 3)), Last(), trajectory)
    assert (found.low, found.high, found.computed) == (None, None, (0, 2, 3, 6))
    with pytest.raises(ValueError, match="this call has 7 steps"):
        replay(Schedule(steps=(0, 9)), Last(), trajectory)


def test_magcache_in_closed_form() -> None:
    """One ratio of 1.3 among ones of 1: the steps from it on have an error of 0.3, 0.6 ..."""
    trajectory = euler(lambda step: {"": drawn(step)}, {"": 1.0})
    rule = MagCache((1, 1, 1, 1.3, 1, 1, 1), max_skips=9, retention=0.0)
    found = threshold_ranges(rule, Last(), trajectory)
    assert [each.computed for each in found] == [tuple(range(7)), (0, 3, 6), (0, 4, 6), (0, 5, 6), (0, 6)]
    assert [each.high for each in found[1:-1]] == pytest.approx([0.3, 0.6, 0.9], rel=1e-3)


def test_of_a_batch_of_guidance_the_rule_sees_both_parts() -> None:
    """As in the pipeline: means over all values."""
    trajectory, shapes = cogvideox(3.0), []

    class Spy(EasyCache):
        def decide(self, now: Any, carry: Any) -> Any:
            shapes.append((now.x.shape, now.before.shape, now.last.x.shape, now.last.v.shape))
            return super().decide(now, carry)

    replay(Spy(0.1, 1), Last(), trajectory)
    ((branch, v),) = trajectory.steps[0].v.items()
    assert branch == "cond_uncond" and shapes and set(shapes) == {(v.shape,) * 4}
