"""What step caches could win: as many forwards as they compute at least of the steps that are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from diffusers_accel.doctor.diagnosis import CacheOutlook
from diffusers_accel.doctor.speedup import speedup
from diffusers_accel.forwards.rule import Rule
from diffusers_accel.forwards.rules import EasyCache, MagCache, Schedule, SeaCache


def outlooks(stages: Sequence[int], share: float) -> tuple[CacheOutlook, ...]:
    """Of the rules with their usual settings.

    Args:
        stages: steps of each schedule of the call.
        share: the forwards' share of a step, 0..1.
    """
    return (
        _outlook("easycache", lambda steps: EasyCache(), stages, share),
        _outlook("seacache, 2 in a row", lambda steps: SeaCache(), stages, share),
        _outlook("magcache, 2 in a row", lambda steps: MagCache((1.0,)), stages, share),  # a table may allow fewer
        _outlook("schedule of every other step", _every_other, stages, share, fixed=True),
    )


def _every_other(steps: int) -> Rule:
    return Schedule(steps=tuple(range(0, steps, 2)))


def _outlook(
    name: str, rule: Callable[[int], Rule], stages: Sequence[int], share: float, fixed: bool = False
) -> CacheOutlook:
    least = sum(rule(steps).least(steps) for steps in stages)
    best = speedup(share, least / sum(stages))
    longest = max(stages)
    return CacheOutlook(name, least, best, best if fixed else None, rule(longest).idle(longest))
