"""What a choice of computed steps does to the calls of attention: how many are left, and for how many steps each one stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffusers_accel.search.schedule import span_index
from diffusers_accel.search.scores import Array

Spans = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Coverage:
    """Of one transformer.

    Args:
        computed: [spans], share of the steps of each span that run.
        covers: [spans, spans]: of the steps of span t, those whose output comes from a computed step of span s, per step of span
            s. An error that a head makes in a computed step is made again in each step that is predicted from it.
    """

    computed: Array
    covers: Array

    @classmethod
    def whole(cls, spans: int) -> Coverage:
        """Every step is computed and stands for itself."""
        return cls(np.ones(spans), np.eye(spans))

    @classmethod
    def of(cls, spans: Spans, transformers: Sequence[str], name: str, computed: Sequence[int]) -> Coverage:
        """Of the transformer `name`.

        Args:
            transformers: which one runs, for each step of the schedule.
            computed: the steps that run, ascending; the first of each transformer among them.
        """
        steps = len(transformers)
        where = [span_index(spans, step, steps) for step in range(steps)]
        mine = [step for step in range(steps) if transformers[step] == name]
        count = np.bincount([where[step] for step in mine], minlength=len(spans)).astype(float)
        runs, covers, source = np.zeros(len(spans)), np.zeros((len(spans), len(spans))), -1
        chosen = frozenset(computed)
        for step in mine:
            if step in chosen:
                source = where[step]
                runs[source] += 1
            covers[source, where[step]] += 1
        per = np.where(count > 0, count, 1)
        return cls(runs / per, covers / per[:, None])
