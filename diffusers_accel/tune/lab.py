"""Real clips of a few plans, each beside the dense clip of the same prompt, seed and noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from diffusers_accel.evals.compare import compare
from diffusers_accel.evals.generate import Prompt
from diffusers_accel.evals.measurement import Measurement
from diffusers_accel.evals.report import Report
from diffusers_accel.forwards import Forwards
from diffusers_accel.plan import Plan
from diffusers_accel.search.steps.measured import MeasuredSteps
from diffusers_accel.support.processes import processes
from diffusers_accel.tune.goal import Goal

SAME = 100.0  # dB, for clips that equal the dense ones


class Lab(Protocol):
    """What the loop asks for numbers."""

    def compare(self, plans: Mapping[str, Plan], prompts: Sequence[Prompt], last: bool) -> Report: ...

    def step_error(self, forwards: Forwards, prompts: Sequence[Prompt]) -> float: ...


@dataclass
class PipelineLab:
    """The user's own pipeline.

    Args:
        call, seed: of the search.
        metrics: that are measured.
        floor, show: of the last report, see `compare`; the others have neither.
        progress: show a bar.
    """

    pipe: Any
    call: Mapping[str, Any]
    seed: int
    metrics: Sequence[str]
    floor: bool
    show: int
    progress: bool
    _steps: MeasuredSteps | None = None

    def compare(self, plans: Mapping[str, Plan], prompts: Sequence[Prompt], last: bool) -> Report:
        return compare(
            self.pipe,
            plans,
            prompts,
            call=self.call,
            seeds=(self.seed,),
            metrics=self.metrics,
            show=self.show if last else 0,
            floor=self.floor and last,
            progress=self.progress,
        )

    def step_error(self, forwards: Forwards, prompts: Sequence[Prompt]) -> float:
        """Relative squared error of the final latents under a step cache, as of `MeasuredSteps`; always of the same prompts."""
        if self._steps is None:
            self._steps = MeasuredSteps(self.pipe, prompts, self.call, self.seed)
        with processes() as here:
            return here.first(partial(self._steps.error, forwards))


def metrics_of(goal: Goal) -> tuple[str, ...]:
    """What has to be measured for a goal: PSNR always, from which the error model learns."""
    return tuple(dict.fromkeys(("psnr", goal.metric)))


def value_of(report: Report, metric: str, subject: str) -> float:
    """A mean over the clips; of a PSNR of clips that are equal `SAME`."""
    row = row_of(report, metric, subject)
    if row.value is None:
        if row.note == "identical":
            return SAME
        raise ValueError(f"{subject}: expected a value of {metric}, found none: {row.note}")
    return row.value


def row_of(report: Report, metric: str, subject: str) -> Measurement:
    """The row of a report over all clips."""
    row = report.row(metric, subject)
    if row is None:
        raise ValueError(f"{subject}: expected a row of {metric}, found none")
    return row
