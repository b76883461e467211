"""What a search has measured of a pipeline, from which plans for any budget follow in seconds."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from diffusers_accel.plan import Plan
from diffusers_accel.search.assignment import Assignment
from diffusers_accel.search.budget import Budget
from diffusers_accel.search.cost import Cost
from diffusers_accel.search.joint import Joint
from diffusers_accel.search.keeping import cost_file, steps_file
from diffusers_accel.search.plan_making import make_plan
from diffusers_accel.search.scores import Scores
from diffusers_accel.search.step_options import StepOptions


@dataclass(frozen=True)
class Profile:
    """What one search measured.

    Args:
        scores: errors of the heads.
        cost: times of the candidates.
        steps: step caches to choose from; None where the search looked at none.
        exact: assignments are solved as integer programs, see `assign`.
    """

    scores: Scores
    cost: Cost
    steps: StepOptions | None
    exact: bool = False

    @classmethod
    def load(cls, scores: str | os.PathLike[str]) -> Profile:
        """Reads what a search kept: its scores and what lies beside them.

        Raises:
            FileNotFoundError, FileError: as of `Scores.load`.
        """
        path = Path(scores)
        steps = StepOptions.load(steps_file(path)) if steps_file(path).exists() else None
        return cls(Scores.load(path), Cost.load(cost_file(path)), steps)

    def joint(self, dense_steps: float = 0.0) -> Joint:
        """All pairs of a choice of steps and of heads."""
        return Joint(self.scores, self.cost, self.steps, dense_steps, exact=self.exact)

    def plan(self, assignment: Assignment, budget: Budget, correct: bool = False) -> Plan:
        """The plan of an assignment; with `correct` it subtracts each head's mean error."""
        return make_plan(self.scores, self.cost, assignment, budget, correct)
