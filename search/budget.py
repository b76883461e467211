"""What a plan may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from diffusers_accel.files import quoted
from diffusers_accel.search.checks import real_number


@dataclass(frozen=True)
class Budget:
    """What a plan may cost. Built with `Budget.speedup`, `Budget.density` or `Budget.sparse_vdit`."""

    kind: Literal["speedup", "density", "sparse_vdit"]
    value: float
    penalty: float = 0.0
    mse: Literal["mean", "relative"] = "mean"
    cost: Literal["time", "blocks"] = "blocks"

    def __post_init__(self) -> None:
        for name, allowed in _WORDS.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}: expected one of {', '.join(allowed)}, found {quoted(getattr(self, name))}")
        for name in ("value", "penalty"):
            # numpy's numbers become plain ones, for the plan file
            object.__setattr__(self, name, real_number(f"Budget.{self.kind}", getattr(self, name)))
        if self.kind == "speedup" and not (math.isfinite(self.value) and self.value >= 1):
            raise ValueError(f"a speed-up is a factor, expected 1 or more, found {self.value}")
        if self.kind == "density" and not 0 < self.value <= 1:
            raise ValueError(
                f"a density is a share of block pairs, expected in (0, 1], found {self.value:g}; 0 would leave no attention "
                "at all, and 0.1 is the least that the candidates are made for"
            )
        if self.kind == "sparse_vdit" and not (self.value >= 0 and math.isfinite(self.penalty) and self.penalty >= 0):
            raise ValueError(f"epsilon and lambda are 0 or more, found epsilon {self.value}, lambda {self.penalty}")

    @classmethod
    def speedup(cls, factor: float) -> Budget:
        """Least error at which a whole generation is `factor` times as fast, text encoder and VAE included.

        Predicted from the measured kernel times and attention's measured share of a generation.
        """
        return cls("speedup", factor, cost="time")

    @classmethod
    def density(cls, density: float) -> Budget:
        """Least error at which the mean density of the whole run, dense steps included, is at most `density`, in (0, 1]."""
        return cls("density", density)

    @classmethod
    def sparse_vdit(
        cls,
        epsilon: float = 1.0,
        lam: float = 0.5,
        *,
        mse: Literal["mean", "relative"] = "mean",
        cost: Literal["time", "blocks"] = "blocks",
    ) -> Budget:
        """Sparse-vDiT's rule: argmin over sparse i of MSE_i + lam * (1 - S_i), or dense where none of these is below epsilon.

        Args:
            epsilon: threshold; 0 keeps every head dense, infinity none. The paper's 1.0 is tuned to CogVideoX1.5.
            lam: weight of the cost that is left, 1 - S_i.
            mse: "mean" over rows and channels as in the paper, which does not transfer between models, or "relative" to
                the head's own energy, which does.
            cost: what S_i counts: skipped "blocks" as in the paper, or saved kernel "time" on this device.
        """
        return cls("sparse_vdit", epsilon, lam, mse, cost)

    def to_json(self) -> dict[str, Any]:
        """Plain data for a plan; an infinite epsilon, which JSON has no number for, as "infinity"."""
        if self.kind == "sparse_vdit":
            epsilon = self.value if math.isfinite(self.value) else "infinity"
            return {
                "kind": "sparse_vdit",
                "epsilon": epsilon,
                "lambda": self.penalty,
                "mse": self.mse,
                "cost": self.cost,
            }
        return {"kind": self.kind, "value": self.value}


_WORDS = {"kind": ("speedup", "density", "sparse_vdit"), "mse": ("mean", "relative"), "cost": ("time", "blocks")}
