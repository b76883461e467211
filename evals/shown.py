"""Which clips are shown: the worst, which is known only when all are there, so that films of the worst so far are kept."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from diffusers_accel.evals.clip_record import ClipRecord, Seen
from diffusers_accel.evals.report.worst import rank

Place = tuple[tuple[float, ...], int]  # of a clip among others, the worst first: its rank, then its number


class WorstSoFar:
    """The `count` worst of the clips that were added, over all subjects. One that is not among them never is with more."""

    def __init__(self, subjects: Collection[str], count: int) -> None:
        self._subjects, self.count = subjects, count
        self._places: list[Place] = []

    def add(self, number: int, seen: Mapping[str, Seen]) -> bool:
        """Whether this clip is among them now.

        Args:
            seen: by subject, scored.
        """
        metrics = dict.fromkeys(metric for name in self._subjects for metric in seen[name].scores)
        place = rank({metric: [seen[name].scores[metric] for name in self._subjects] for metric in metrics}), number
        self._places = sorted([*self._places, place])[: self.count]
        return place in self._places

    @property
    def numbers(self) -> set[int]:
        return {number for _, number in self._places}


def worst_of_records(records: Mapping[int, ClipRecord], subjects: Collection[str], count: int) -> WorstSoFar:
    """Of clips by their numbers."""
    worst = WorstSoFar(subjects, count)
    for number, record in records.items():
        worst.add(number, record.numbers.seen)
    return worst


def drop_films(records: dict[int, ClipRecord], shown: Collection[int]) -> set[int]:
    """Takes the films from the records of all other clips, in place; the numbers of those that had some."""
    dropped = {number for number, record in records.items() if record.films and number not in shown}
    for number in dropped:
        records[number] = ClipRecord(records[number].numbers)
    return dropped
