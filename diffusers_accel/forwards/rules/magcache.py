"""MagCache (arXiv 2506.09045): predict while what the model adds keeps its magnitude, which a table knows ahead."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from diffusers_accel.files import quoted
from diffusers_accel.forwards.rule import NOISE, Decision, Now
from diffusers_accel.forwards.rule_parts import TOO_FEW, check_count, check_share, check_threshold, fewest, is_number

Ratios = tuple[float, ...]

SAME_NOISE = 0.01  # by which noise levels of one schedule may differ: schedulers round them


@dataclass(frozen=True)
class MagCache:
    """How much the residual, what the model adds to its input, grows or shrinks from step to step is nearly the same for all
    prompts: one calibration run tells it.

    With gamma_t the ratio of the residual's magnitude at step t to that at step t - 1, and c the last computed step,

        error_t = sum over u = c + 1 .. t of |1 - gamma_(c+1) * ... * gamma_u|

    A step is predicted while error < threshold and no more than `max_skips` in a row are. `threshold=0` computes every step.

    Args:
        ratios: gamma of each step of a schedule, from step 0, whose ratio is never read. For another number of steps the
            nearest one is taken, as the authors do. Or a table for each branch of guidance by its name, such as "cond" and
            "uncond": then a step is predicted while each of them allows it. The branch that decides must have one.
        threshold: added up error at which the model runs again; 0 or more. The authors take 0.12 for Wan 2.1 1.3B and 0.24
            for 14B and HunyuanVideo.
        max_skips: most steps in a row that are predicted, 1 or more; the authors' K: 2 to 4 and 6.
        retention: share of the schedule, from its start, that computes, in [0, 1].
        made_for: the model of the ratios, such as "wan, 30 layers of 12 heads": others are refused. None: any.
        noise: the share of noise at each step of the call that the ratios were taken from, see `Now`: a call of another number of
            steps, or with another noise schedule, is refused. None: any.
    """

    kind: ClassVar[str] = "magcache"
    ratios: Ratios | dict[str, Ratios] = field(hash=False)
    threshold: float = 0.12
    max_skips: int = 2
    retention: float = 0.2
    made_for: str | None = None
    noise: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        given: Any = self.ratios
        if isinstance(given, Mapping):
            if not given or not all(isinstance(name, str) for name in given):
                raise ValueError(f"ratios: expected a table for each branch by its name, found {quoted(given)}")
            tables: Any = {name: _table(f"ratios of {quoted(name)}", table) for name, table in given.items()}
        else:
            tables = _table("ratios", given)
        object.__setattr__(self, "ratios", tables)
        check_threshold(self.threshold)
        check_count("max_skips", self.max_skips, 1)
        check_share("retention", self.retention)
        if self.made_for is not None and not isinstance(self.made_for, str):
            raise ValueError(f"made_for: expected the name of a model or None, found {quoted(self.made_for)}")
        if self.noise is not None:
            object.__setattr__(self, "noise", _shares(self.noise))

    @property
    def label(self) -> str:
        return f"magcache {self.threshold:g}"

    @property
    def wants(self) -> frozenset[str]:
        return frozenset() if self.noise is None else frozenset({NOISE})

    @property
    def looks_back(self) -> int:
        return 1

    def check(self, steps: int) -> None:
        if self.noise is not None and len(self.noise) != steps:
            raise ValueError(
                f"the table of magnitudes was made for a call of {len(self.noise)} steps, found one of {steps}: calibrate with "
                "this number of steps, or give the ratios without noise, which are then stretched"
            )

    def idle(self, steps: int) -> str | None:
        retained = self._retained(steps)
        if not self.threshold or max(retained, 1) < steps - 1:
            return None
        if steps < 3:
            return TOO_FEW
        return (
            f"its retention={self.retention:g} computes the first {retained}, and the last one computes in any case: give it a "
            "smaller one"
        )

    def least(self, steps: int) -> int:
        first = max(self._retained(steps), 1)
        return fewest(steps, first, self.max_skips + 1) if self.threshold else steps

    def _retained(self, steps: int) -> int:
        """How many steps at the start of a schedule compute."""
        return int(self.retention * steps)

    def decide(self, now: Now, carry: Any) -> Decision:
        tables = self._tables(now.branch)
        self._check_noise(now)
        if now.step < self._retained(now.steps) or now.step - now.last.step > self.max_skips:
            return Decision(True)
        return Decision(not all(_error(table, now) < self.threshold for table in tables))

    def _check_noise(self, now: Now) -> None:
        if self.noise is None or now.noise is None:
            return
        if abs(now.noise - self.noise[now.step]) > SAME_NOISE:
            raise ValueError(
                f"the table of magnitudes was made for a noise level of {self.noise[now.step]:.3f} at step {now.step}, found "
                f"{now.noise:.3f}: another shift, scheduler or strength. Calibrate with this one, or give ratios without noise"
            )

    def _tables(self, branch: str) -> tuple[Ratios, ...]:
        if not isinstance(self.ratios, dict):
            return (self.ratios,)
        if branch not in self.ratios:
            raise ValueError(
                f"ratios: expected a table for the branch {quoted(branch)}, which is to be predicted, found those of "
                f"{quoted(sorted(self.ratios))}; name the branches that may be predicted with Forwards(branches=...), or "
                "give one table for all"
            )
        return tuple(self.ratios.values())


def _error(table: Ratios, now: Now) -> float:
    """Added up since the last computed step."""
    size, error = 1.0, 0.0
    for step in range(now.last.step + 1, now.step + 1):
        size *= table[round(step * (len(table) - 1) / (now.steps - 1))]
        error += abs(1 - size)
    return error


def _table(what: str, values: Any) -> Ratios:
    good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not good or not all(is_number(value) and value > 0 for value in values):
        raise ValueError(f"{what}: expected a list of numbers above 0, one for each step, found {quoted(values)}")
    return tuple(float(value) for value in values)


def _shares(values: Any) -> tuple[float, ...]:
    good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not good or not all(is_number(value) and 0 <= value <= 1 for value in values):
        raise ValueError(f"noise: expected a list of numbers in [0, 1], one for each step, found {quoted(values)}")
    return tuple(float(value) for value in values)
