"""In which order the subjects of a clip run: each in every place as often, so that none always runs on a warmer machine."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SEED = 0


def order(names: Sequence[str], turn: int) -> list[str]:
    """A seeded order of the subjects, turned by one place with each `turn`: each run through all of them, over all clips."""
    shuffled = [names[place] for place in np.random.default_rng(SEED).permutation(len(names))]
    by = turn % len(names)
    return shuffled[by:] + shuffled[:by]
