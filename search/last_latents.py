"""The latents at the end of a generation, by which one is compared with another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_accel.search.running import Enough


class Ending(NamedTuple):
    """What a generation ended with.

    Args:
        latents: of the last step of each of its schedules, one after the other, fp64 on the CPU.
        steps: how many steps its schedules had, all together.
    """

    latents: Tensor
    steps: int


class LastLatents:
    """A `callback_on_step_end` that keeps the latents of the last step and, if told to, leaves the decoder out. A video that is
    made chunk by chunk has a schedule for each: those of the last step of every one.

    Args:
        steps: end the generation after so many steps, of all schedules; None: let it run to its end.
        on_share: called after each step with the share of these steps that is done.
    """

    def __init__(self, steps: int | None = None, on_share: Callable[[float], None] = lambda share: None) -> None:
        self._steps = steps
        self._on_share = on_share
        self._ends: list[Tensor] = []
        self._last = -1  # step of the running schedule
        self._count = 0

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._ends and step > self._last:  # the same schedule goes on
            self._ends.pop()
        self._ends.append(tensors["latents"].detach().clone())  # pipelines go on in place
        self._last = step
        self._count += 1
        if self._steps is not None:
            self._on_share(self._count / self._steps)
            if self._count == self._steps:
                raise Enough
        return {}

    @property
    def ending(self) -> Ending:
        """Call it after the run."""
        if not self._ends:
            raise RuntimeError(
                "the pipeline showed no latents at the end of its steps (callback_on_step_end), by which a search measures how "
                "much each span matters: say it yourself with span_weights, one number per span"
            )
        return Ending(torch.cat([each.double().cpu().flatten() for each in self._ends]), self._count)
