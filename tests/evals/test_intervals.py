"""Means of numbers of which each clip has one, and intervals that hold what they promise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy import stats

from diffusers_accel.evals.intervals import CONFIDENCE, FEWEST, estimate, summarise, t_interval
from diffusers_accel.evals.measurement import Spread

TRIALS = 10_000
SKEWED = 1.0  # more than differences of PSNR had on 25 clips of a tiny model (docs/report.md)


def prompts(count: int, seeds: int = 1) -> list[str]:
    return [f"prompt {number // seeds}" for number in range(count * seeds)]


def test_the_interval_is_students_t_on_the_clips() -> None:
    values = [1.0, 2.0, 4.0, 9.0, 3.0, 3.5, -2.0, 0.5]
    mean, spread = estimate(values, prompts(8))
    by_scipy = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert mean == pytest.approx(np.mean(values))
    assert (spread.n, spread.prompts, spread.median) == (8, 8, 2.5)
    assert spread.std == pytest.approx(np.std(values, ddof=1))
    assert (spread.low, spread.high) == pytest.approx((by_scipy.low, by_scipy.high))


def test_several_comparisons_widen_the_interval() -> None:
    values = [1.0, 2.0, 4.0, 9.0, 3.0, 3.5, -2.0, 0.5]
    spread = estimate(values, prompts(8), comparisons=5)[1]
    by_scipy = stats.ttest_1samp(values, 0).confidence_interval(0.99)
    assert (spread.low, spread.high, spread.comparisons) == (
        pytest.approx(by_scipy.low),
        pytest.approx(by_scipy.high),
        5,
    )


def test_the_mean_of_ratios_is_geometric() -> None:
    mean, spread = estimate([0.5, 2.0] * 4, prompts(8), ratio=True)
    assert mean == pytest.approx(1.0) and spread.low is not None and spread.high is not None
    assert spread.low * spread.high == pytest.approx(1.0) and 0.5 < spread.low < 1 < spread.high
    assert estimate([1.25], ["a"], ratio=True)[0] == pytest.approx(1.25)


def test_seeds_of_a_prompt_count_once() -> None:
    """Also where one prompt has fewer values, as when its clip is identical to dense."""
    mean, spread = estimate([1.0, 3.0, 5.0], ["a", "a", "b"])
    assert (mean, spread.n, spread.prompts) == (3.5, 3, 2)
    values = [float(number // 2) for number in range(16)]
    alone = estimate(values[::2], prompts(8))[1]
    twice = estimate(values, prompts(8, seeds=2))[1]
    assert (twice.low, twice.high) == (alone.low, alone.high) and (twice.n, twice.prompts) == (16, 8)


def test_few_prompts_have_no_interval() -> None:
    assert estimate([3.0], ["a"]) == (3.0, Spread(1, median=3.0, prompts=1))
    for count, seeds, told in ((FEWEST - 1, 1, False), (FEWEST, 1, True), (FEWEST // 2, 4, False)):
        values = [float(number) for number in range(count * seeds)]
        assert (estimate(values, prompts(count, seeds))[1].low is not None) == told
    same = estimate([2.0] * 8, prompts(8))[1]
    assert (same.std, same.low, same.high) == (0.0, 2.0, 2.0)


def test_a_summary_claims_no_more_than_its_values() -> None:
    assert summarise([1.0, 2.0, 6.0], "median") == (2.0, Spread(3, pytest.approx(7**0.5), median=2.0))
    assert summarise([1.0, 2.0, 6.0], "mean")[0] == 3.0 and summarise([1.0], "mean") == (1.0, Spread(1, median=1.0))


@pytest.mark.parametrize("values", [[], [1.0, float("inf")], [float("nan")]])
def test_what_has_no_mean_is_refused(values: list[float]) -> None:
    for function in (lambda: summarise(values, "mean"), lambda: estimate(values, prompts(len(values)))):
        with pytest.raises(ValueError, match="finite"):
            function()


def coverage(draw: Callable[[tuple[int, int]], np.ndarray], mean: float, count: int) -> float:
    """How often the interval of `count` independent values holds the mean around which `draw` draws them, [trials, count]."""
    low, high = t_interval(draw((TRIALS, count)), CONFIDENCE)
    return float(np.mean((low <= mean) & (mean <= high)))


def gamma(skewness: float, rng: np.random.Generator) -> tuple[Callable[[tuple[int, int]], np.ndarray], float]:
    shape = 4 / skewness**2
    return lambda size: rng.gamma(shape, size=size), shape


def test_intervals_cover_what_they_say() -> None:
    """Of normal values, and of moderately skewed ones."""
    rng = np.random.default_rng(0)
    for count in (*range(FEWEST, 25), 32, 64):
        assert coverage(lambda size: rng.normal(size=size), 0.0, count) >= 0.93
        assert coverage(*gamma(SKEWED, rng), count) >= 0.93


def test_intervals_cover_where_seeds_of_a_prompt_are_alike() -> None:
    """Taken as 24 clips of their own, they would cover three of four times."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(500, FEWEST)).repeat(3, axis=1)
    clips = shared + 0.3 * rng.normal(size=shared.shape)
    held = [estimate(values, prompts(FEWEST, seeds=3))[1] for values in clips]
    assert np.mean([each.low <= 0 <= each.high for each in held]) >= 0.93  # type: ignore[operator]
    assert coverage(lambda _: clips, 0.0, 24) < 0.8


def test_where_they_do_not_cover() -> None:
    """What docs/report.md says of strongly skewed values."""
    rng = np.random.default_rng(0)
    assert 0.86 < coverage(*gamma(2.0, rng), FEWEST) < 0.92
