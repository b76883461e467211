"""Statistics of numbers of which each clip has one, and how sure a mean of them is beyond these clips.

Each number is paired already: a subject beside dense, or one subject beside another, at the same prompt, seed and noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from diffusers_accel.evals.measurement import Spread

CONFIDENCE = 0.95
# Prompts. Simulated, the t interval covers 93 % and more from here on, up to a skewness of 1 (tests/evals/test_intervals.py).
FEWEST = 8


def summarise(values: Sequence[float], statistic: Literal["mean", "median"]) -> tuple[float, Spread]:
    """The statistic of finite `values` and how far they lie apart, at least one value; of no more than these."""
    data = _finite(values)
    centre = float(np.mean(data) if statistic == "mean" else np.median(data))
    return centre, Spread(data.size, _std(data), median=float(np.median(data)))


def estimate(
    values: Sequence[float], prompts: Sequence[str], *, comparisons: int = 1, ratio: bool = False
) -> tuple[float, Spread]:
    """The mean of numbers that belong to clips, and an interval for that of all such prompts.

    Seeds of one prompt are alike, so that their mean counts once: the mean is that of the prompts' means, and the interval is
    Student's t over prompts. There is none below `FEWEST` prompts.

    Args:
        values: finite, one or more.
        prompts: of each value, what its clip shows.
        comparisons: made side by side: 95 % hold for all of their intervals together (Bonferroni).
        ratio: the values are ratios above 0, whose mean is the geometric one; its interval is made of their logarithms.
    """
    data = _finite(values)
    scaled = np.log(data) if ratio else data
    by_prompt: dict[str, list[float]] = {}
    for prompt, value in zip(prompts, scaled, strict=True):
        by_prompt.setdefault(prompt, []).append(float(value))
    means = np.array([np.mean(each) for each in by_prompt.values()])
    low, high = None, None
    if means.size >= FEWEST:
        low, high = (float(each) for each in t_interval(means, 1 - (1 - CONFIDENCE) / comparisons))
    spread = Spread(
        data.size,
        _std(data),
        _back(low, ratio),
        _back(high, ratio),
        median=float(np.median(data)),
        prompts=means.size,
        comparisons=comparisons,
    )
    return float(np.exp(means.mean()) if ratio else means.mean()), spread


def t_interval(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Student's t interval of the mean of independent values [..., n] -> its two bounds [...]."""
    from scipy import stats  # of the extra `eval`

    centre, error = values.mean(axis=-1), stats.sem(values, axis=-1)
    same = error == 0  # for which scipy has no interval
    low, high = stats.t.interval(level, values.shape[-1] - 1, loc=centre, scale=np.where(same, 1.0, error))
    return np.where(same, centre, low), np.where(same, centre, high)


def _back(bound: float | None, ratio: bool) -> float | None:
    return float(np.exp(bound)) if ratio and bound is not None else bound


def _finite(values: Sequence[float]) -> np.ndarray:
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0 or not np.isfinite(data).all():
        raise ValueError(f"expected one or more finite values, found {list(values)}")
    return data


def _std(data: np.ndarray) -> float | None:
    return float(data.std(ddof=1)) if data.size > 1 else None
