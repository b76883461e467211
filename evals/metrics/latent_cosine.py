"""Cosine similarity of the last latents of a clip and of the dense one, as two vectors of all their values.

It says whether two runs of a sampler ended in the same place, and nothing of how that looks: where the sampler ends at another
clip that is as good, it falls. No decoder is in it, so that it moves with every change of attention, also with one that 8 bits
would round away.

Unit: none. Range: -1 (the opposite) to 1 (the same direction, whatever the length).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from diffusers_accel.evals.metrics.latent_metric import LatentMetric, LatentScore


def cosine(reference: Sequence[np.ndarray], latents: Sequence[np.ndarray]) -> float:
    """Of the values of all chunks [any shape], summed in float64; NaN where one side is zero throughout."""
    product, one, other = (
        math.fsum(float(np.vdot(a.astype(np.float64), b.astype(np.float64))) for a, b in zip(x, y, strict=True))
        for x, y in ((reference, latents), (reference, reference), (latents, latents))
    )
    if not one or not other:
        return math.nan
    return min(1.0, max(-1.0, product / math.sqrt(one * other)))  # beyond them by rounding


def _load() -> LatentScore:
    return cosine


LATENT_COSINE = LatentMetric(
    name="latent_cosine",
    title="Latent cosine",
    unit="",
    range="-1 to 1",
    better="higher",
    protocol="cosine similarity of all values of the last latents, those of all chunks together; 1 is the same direction.",
    comparable="none: only of the same model, sampler and steps, and then as a difference between two methods",
    load=_load,
    needs="a pipeline that shows its latents to `callback_on_step_end`",
    digits=6,
)
