"""What VBench makes of the scores of its dimensions: normalised ones, quality, semantic, and the total.

A normalised score is (score - low) / (high - low); quality and semantic are weighted means of theirs, dynamic degree with half
the weight of the others; the total is (4 quality + semantic) / 5. All are shares here, which tables show as percent.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from diffusers_accel.evals.vbench.dimensions import DIMENSIONS, Group

QUALITY, SEMANTIC = 4, 1  # their weights in the total


@dataclass(frozen=True)
class Summary:
    """The scores of a set of clips; a score whose dimensions are not all there is None."""

    normalised: Mapping[str, float]
    quality: float | None
    semantic: float | None
    total: float | None


def summarise(scores: Mapping[str, float], *, standard: bool) -> Summary:
    """Of scores by dimension.

    Args:
        standard: whether they are of all clips that VBench asks for. Without that there is no summary score: the labels of the
            semantic dimensions and the prompts of all of them are VBench's, so the number would compare with no other one.
    """
    found = {name: normalised(name, score) for name, score in scores.items()}
    quality = _mean(found, "quality") if standard else None
    semantic = _mean(found, "semantic") if standard else None
    total = None
    if quality is not None and semantic is not None:
        total = (QUALITY * quality + SEMANTIC * semantic) / (QUALITY + SEMANTIC)
    return Summary(found, quality, semantic, total)


def normalised(name: str, score: float) -> float:
    dimension = DIMENSIONS[name]
    return (score - dimension.low) / (dimension.high - dimension.low)


def _mean(found: Mapping[str, float], group: Group) -> float | None:
    weights = {name: each.weight for name, each in DIMENSIONS.items() if each.group == group}
    if not set(weights) <= set(found):
        return None
    return sum(weight * found[name] for name, weight in weights.items()) / sum(weights.values())
