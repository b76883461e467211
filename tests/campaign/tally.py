"""How much a campaign tries, what it draws, and what came of it."""

from __future__ import annotations

from collections import Counter
from random import Random

COLUMNS = ("tried", "as before", "refused", "raw exceptions", "differences", "losses")


class Campaign:
    """One run of the campaign.

    Args:
        seed: of everything that is drawn; the same seed tries the same.
        long: try as much as takes an hour, not a minute.
    """

    def __init__(self, seed: int, long: bool) -> None:
        self.seed, self.long = seed, long
        self.counts: dict[str, Counter[str]] = {}

    def many(self, short: int, long: int) -> int:
        """How often something is tried."""
        return long if self.long else short

    def random(self, *names: object) -> Random:
        """The generator of one case, which does not depend on which others are tried."""
        return Random("/".join(map(str, (self.seed, *names))))

    def count(self, part: str, what: str, times: int = 1) -> None:
        """Adds to the table; `what` is a column of it."""
        assert what in COLUMNS
        self.counts.setdefault(part, Counter())[what] += times

    def table(self) -> str:
        """What was tried and what came of it, as a Markdown table."""
        rows = [("part", *COLUMNS), ("---", *["---:"] * len(COLUMNS))]
        rows += [(part, *(f"{counts[column]:,}" for column in COLUMNS)) for part, counts in self.counts.items()]
        how = f"seed {self.seed}, {'long' if self.long else 'short: --long tries more'}"
        return "\n".join([how, "", *(f"| {' | '.join(row)} |" for row in rows)])
