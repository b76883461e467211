"""What choices of steps really do: the model runs with them, and its final latents are compared with the dense ones."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffusers_accel.forwards import Forwards
from diffusers_accel.search.last_latents import LastLatents
from diffusers_accel.search.running import Prompt, run_pipeline
from diffusers_accel.search.sensitivity import drift


@dataclass
class MeasuredSteps:
    """Generates without the decoder, the dense clips once.

    Args:
        pipe: a loaded diffusers pipeline that shows its latents at the end of each step; not patched.
        prompts: one generation of each for each choice, that of prompt i with the seed + i.
        call: all further arguments of `pipe(...)`.
        seed: of the noise.
    """

    pipe: Any
    prompts: Sequence[Prompt]
    call: Mapping[str, Any]
    seed: int
    _dense: list[Tensor] = field(default_factory=list)
    _steps: int | None = None  # of a generation, once known

    def error(self, forwards: Forwards) -> float:
        """Relative squared error of the final latents under a step cache, 0 or more. Over prompts it is the geometric mean, as
        a mean of PSNRs is: of a few prompts a single hard one would decide alone otherwise."""
        if not self._dense:
            self._dense = [self._latents(number, None) for number in range(len(self.prompts))]
        found = [drift(self._latents(number, forwards), dense) for number, dense in enumerate(self._dense)]
        return statistics.geometric_mean(found) if all(found) else 0.0

    def _latents(self, number: int, forwards: Forwards | None) -> Tensor:
        last = LastLatents(self._steps)
        run_pipeline(self.pipe, None, self.prompts[number], self.call, self.seed + number, last, forwards=forwards)
        ending = last.ending
        self._steps = ending.steps
        return ending.latents
