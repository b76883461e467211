"""Search, clips, correction, proof: the whole way to a plan that does what was asked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers_accel.files import quoted
from diffusers_accel.search.assignment import gap_words
from diffusers_accel.search.plan_search import search_profile
from diffusers_accel.search.profile import Profile
from diffusers_accel.search.running import Prompt
from diffusers_accel.search.screen import Screen
from diffusers_accel.support.processes import processes
from diffusers_accel.tune.goal import Goal
from diffusers_accel.tune.lab import PipelineLab, metrics_of
from diffusers_accel.tune.tuned import Tuned
from diffusers_accel.tune.tuning import Prompts, Tuning, verdict

TRIAL_PROMPTS = 2  # of the search's: more of them tell more of each plan, and cost more


def tune_plan(
    pipe: Any,
    prompts: Sequence[Prompt],
    goal: Goal,
    *,
    call: Mapping[str, Any],
    validation: Sequence[Prompt],
    held_out: Sequence[Prompt] = (),
    out: str | os.PathLike[str] | None = None,
    seed: int = 0,
    dense_steps: float = 0.0,
    correct: bool = False,
    progress: bool = True,
    floor: bool = True,
    show: int = 4,
    **search: Any,
) -> Tuned:
    """Finds the mix of step caches and sparse heads that reaches a goal, and proves it on clips.

    What `search_profile` predicts is tried on clips of its own prompts, and its error and its times are corrected by what they
    show, until a plan does there what is asked. Validation decides: a speed has to be met within 3 %, a quality by the lower end
    of the 95 % interval of its mean; else the plan goes back. Held-out prompts are read once, at the end.

    Args:
        pipe: a loaded diffusers video pipeline.
        prompts: calibration prompts: of the search, and the first two of them of the trials.
        goal: `Goal.speedup(2)`, `Goal.psnr(32)`, `Goal.lpips(0.1)`, ...
        call: all further arguments of `pipe(...)`.
        validation: prompts that decide; 8 or more, for an interval of the mean.
        held_out: prompts for the report; where there are none, it is that of the validation.
        out: the plan file (.json) to write.
        seed: of the noise, in the search and on the clips.
        dense_steps: what stays dense and is computed at the start of the schedule, as of `search_plan`.
        correct: plans subtract each head's mean error.
        progress: say what is tried, and show bars, on stderr.
        floor, show: of the report, see `compare`.
        search: further arguments of `search_profile`, such as candidates or scores_path.

    Raises:
        OutOfReach: a ValueError: not even the fastest plan is that fast.
        TypeError, ValueError: as of `search_profile` and `compare`.
    """
    if not isinstance(goal, Goal):
        raise TypeError(f"goal: expected a Goal, such as Goal.speedup(2), found {quoted(goal)}")
    if not validation:
        raise ValueError(
            "validation: expected prompts on which a plan is judged, 8 or more for an interval, found none"
        )
    profile = search_profile(
        pipe, prompts, call=call, out=out, seed=seed, dense_steps=dense_steps, progress=progress, **search
    )
    lab = PipelineLab(pipe, call, seed, metrics_of(goal), floor, show, progress)
    parts = Prompts(list(prompts)[:TRIAL_PROMPTS], validation, held_out)
    with processes() as here:
        first = here.is_first
    screen, asked = Screen(progress and first), _as_speedup(goal, profile)
    plan, report, proof = Tuning(profile, lab, asked, parts, dense_steps, correct, screen.say).run()
    met, words = verdict(asked, proof)
    plan = replace(
        plan, provenance={**plan.provenance, "tuned": {"goal": str(goal), "met": met, **proof.to_json(goal.metric)}}
    )
    if out is not None and first:
        plan.save(Path(out))
    optimality = plan.provenance.get("assignment", {})
    screen.say(f"{words}{gap_words(optimality.get('gap'))} by the predicted error" if optimality else words)
    return Tuned(goal, plan, report, proof, met, words)


def _as_speedup(goal: Goal, profile: Profile) -> Goal:
    """A number of ms per step as the speed-up of a generation that it takes."""
    if goal.kind != "ms_per_step":
        return goal
    if profile.steps is None:
        raise ValueError(
            "goal: ms a step are told by the dense runs that step caches are derived from: give step_caches=True"
        )
    dense = profile.steps.share * profile.scores.seconds * 1e3 / len(profile.steps.transformers)
    if goal.value >= dense:
        raise ValueError(
            f"goal: expected fewer ms a step than the {dense:,.0f} of the dense model here, found {goal.value:g}"
        )
    return Goal.speedup(1 / (1 - profile.steps.share * (1 - goal.value / dense)))
