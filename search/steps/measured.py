"""What choices of steps really do: the model runs with them, and its final latents are compared with the dense ones."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.api import patch
from diffusers_accel.forwards import Forwards
from diffusers_accel.search.last_latents import LastLatents
from diffusers_accel.search.running import Enough, Prompt, as_arguments, quiet
from diffusers_accel.search.sensitivity import drift
from diffusers_accel.support.seeded import seeded


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
        device = torch.device(self.pipe._execution_device)
        patched = patch(self.pipe, forwards) if forwards is not None else None
        try:
            with quiet(self.pipe), seeded(self.seed + number, device) as generator:
                arguments = {**self.call, **as_arguments(self.prompts[number]), "callback_on_step_end": last}
                self.pipe(**arguments, generator=generator)
        except Enough:
            if hasattr(self.pipe, "maybe_free_model_hooks"):
                self.pipe.maybe_free_model_hooks()  # what an offloaded pipeline does at the end of a call
        finally:
            if patched is not None:
                patched.unpatch()
        ending = last.ending
        self._steps = ending.steps
        return ending.latents
