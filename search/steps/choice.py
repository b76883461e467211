"""One way to leave steps out, and what it is expected to cost in quality."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers_accel.forwards import Forwards


@dataclass(frozen=True)
class StepChoice:
    """Which steps are computed, and how far the result is expected to be from the dense one.

    Args:
        forwards: rule and predictor, as `patch` takes them.
        computed: the steps that are computed, ascending, those that compute in any case among them. Of a rule that decides while
            it runs: those of the recorded prompt on which it computes most.
        error: relative squared error of the final latents, 0 or more. A predicted one, a mean over prompts, ranks choices: the
            model's answer to deviating latents is not in it. A measured one is a geometric mean.
        measured: whether the model ran with it to find the error.
    """

    forwards: Forwards
    computed: tuple[int, ...]
    error: float
    measured: bool = False
