"""The latents at the end of a generation, by which one is compared with another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from diffusers_accel.search.running import Enough


class LastLatents:
    """A `callback_on_step_end` that keeps the latents of the last step and, if told to, leaves the decoder out.

    Args:
        stop: end the generation there.
        on_share: called after each step with the share of the steps that is done.
    """

    def __init__(self, stop: bool, on_share: Callable[[float], None] = lambda share: None) -> None:
        self._latents: Tensor | None = None
        self._stop = stop
        self._on_share = on_share

    def __call__(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps = steps_that_run(pipe)
        self._on_share(min(1.0, (step + 1) / steps))
        self._latents = tensors["latents"]
        if step + 1 == steps and self._stop:
            raise Enough
        return {}

    @property
    def latents(self) -> Tensor:
        """fp64, on the CPU; call it after the run."""
        if self._latents is None:
            raise RuntimeError(
                "the pipeline showed no latents at the end of its steps (callback_on_step_end), by which a search measures how "
                "much each span matters: say it yourself with span_weights, one number per span"
            )
        return self._latents.detach().double().cpu()


def steps_that_run(pipe: Any) -> int:
    """Of the schedule of the running call: video to video with a strength below 1 leaves the first ones out."""
    steps = getattr(pipe, "_num_timesteps", None)
    return steps if isinstance(steps, int) and steps > 0 else len(pipe.scheduler.timesteps)
