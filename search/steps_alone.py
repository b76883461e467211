"""Which choices of steps are good is found out by running the most promising ones alone, with dense heads, until the best are
known: predicted errors rely on errors that cancel, and those of the worst predictions look best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from diffusers_accel.forwards import Forwards
from diffusers_accel.search.joint import Expected, Joint
from diffusers_accel.search.steps.choice import StepChoice


@dataclass
class StepsAlone:
    """Measures choices of steps, each once.

    Args:
        joint: that learns the errors.
        measure: gives the relative squared error of the final latents under a step cache.
        most: choices that are measured in all; then the best of those that were is taken.
        say: told what came of each, a line.
    """

    joint: Joint
    measure: Callable[[Forwards], float]
    most: int
    say: Callable[[str], None]
    _measured: int = 0

    def settle(self, rank: Callable[[bool], list[Expected]], breadth: int) -> list[Expected]:
        """Of what `rank` gives, whose first `breadth` are measured then.

        Args:
            rank: the best first, by what `joint` knows; told whether choices that were not measured shall come last.
        """
        while True:
            enough = self._measured >= self.most
            ranked = rank(enough)
            new = [each.steps for each in ranked[:breadth] if each.steps is not None and not each.steps.measured]
            if enough or not new:
                return ranked
            for steps in new[: self.most - self._measured]:
                self._measure(steps)

    def _measure(self, steps: StepChoice) -> None:
        error = self.measure(steps.forwards)
        self.joint.learn({steps.forwards: error})
        self._measured += 1
        seen = f"{steps.forwards.label}: error {error:.2g}, expected {steps.error:.2g}"
        self.say(f"{len(steps.computed)} steps alone: {seen}")
