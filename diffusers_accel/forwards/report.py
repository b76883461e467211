"""What the scope `forwards` has done: its part of `Patch.report()`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers_accel.forwards.scope import Scope


@dataclass(frozen=True)
class ForwardsReport:
    """A row per transformer: transformer, computed and predicted (forwards, so branches of guidance count each), why {reason to
    compute: forwards}, steps (those of the last generation that were computed on some branch), cache_bytes (most that was
    kept at once), notes. `label` names rule and predictor.
    """

    label: str
    rows: list[dict[str, Any]]

    @staticmethod
    def of(scope: Scope) -> ForwardsReport:
        rows = [
            {
                "transformer": name,
                "computed": tally.computed,
                "predicted": tally.predicted,
                "why": dict(tally.why),
                "steps": list(tally.steps),
                "cache_bytes": tally.cache_bytes,
                "notes": _notes(scope.forwards.branches, tally.branches),
            }
            for name, tally in scope.tallies.items()
        ]
        return ForwardsReport(scope.forwards.label, rows)

    @property
    def computed(self) -> int:
        return sum(row["computed"] for row in self.rows)

    @property
    def predicted(self) -> int:
        return sum(row["predicted"] for row in self.rows)

    @property
    def computed_share(self) -> float | None:
        """Of all forwards, in 0..1; None before the first one."""
        return self.computed / (self.computed + self.predicted) if self.computed else None

    def share(self, transformer: str) -> float:
        """Computed share of the transformer's forwards, in 0..1; 1 before the first one."""
        row = next(row for row in self.rows if row["transformer"] == transformer)
        forwards = row["computed"] + row["predicted"]
        return row["computed"] / forwards if forwards else 1.0

    def __str__(self) -> str:
        lines = [f"forwards: {self.label}"]
        for row in self.rows:
            total = row["computed"] + row["predicted"]
            why = ", ".join(f"{reason} {count}" for reason, count in row["why"].items())
            lines.append(
                f"  {row['transformer']}: {row['computed']} of {total} forwards computed" + f" ({why})" * bool(why)
            )
            lines += [f"    {note}" for note in row["notes"]]
        return "\n".join(lines)


def _notes(named: tuple[str, ...] | None, ran: set[str]) -> list[str]:
    missing = sorted(set(named or ()) - ran) if ran else []
    return [f"no branch named {name!r} has run, only {', '.join(sorted(ran))}" for name in missing]
