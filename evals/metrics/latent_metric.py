"""Metrics of what denoising ends with, before the decoder: the latents of a clip beside those of the dense one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from diffusers_accel.evals.metrics.metric import Latents, Metric, Scored, not_measured

LatentScore = Callable[[Sequence[np.ndarray], Sequence[np.ndarray]], float]  # of dense and of the clip, a chunk each
UNSEEN = "the pipeline shows no latents: it has no callback_on_step_end, or one without them"


@dataclass(frozen=True, kw_only=True)
class LatentMetric(Metric[LatentScore]):
    """One number of a clip's last latents against those of the dense clip; none where a pipeline does not show them."""

    kind: ClassVar[str] = "latents"
    about: ClassVar[str] = (
        "These look at the latents after the last step of denoising, as the pipeline shows them to callback_on_step_end, against "
        "those of the first dense run: the decoder and what it hides or adds are not in them."
    )
    scores_dense: ClassVar[bool] = False

    def of_clip(
        self,
        score: LatentScore | str,
        frames: np.ndarray,
        dense: np.ndarray | None,
        latents: tuple[Latents, Latents] = ((), ()),
    ) -> Scored | None:
        if dense is None:
            return None
        mine, reference = latents
        if reason := score if isinstance(score, str) else _refuses(mine, reference):
            return not_measured(reason)
        assert not isinstance(score, str)
        value = float(score(reference, mine))
        return (value, None) if math.isfinite(value) else not_measured(f"{self.title} of these latents is {value}")


def _refuses(mine: Latents, reference: Latents) -> str | None:
    if not mine or not reference:
        return UNSEEN
    shapes = [[list(chunk.shape) for chunk in each] for each in (reference, mine)]
    if shapes[0] != shapes[1]:
        return f"the latents of the dense clip are {shapes[0]}, those of the patched one {shapes[1]}"
    return None if all(np.isfinite(chunk).all() for chunk in mine) else "the latents hold NaN or infinite values"
