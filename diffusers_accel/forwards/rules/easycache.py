"""EasyCache (arXiv 2507.02860): predict while the output is expected to have changed little since it was computed last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from diffusers_accel.forwards.rule import Decision, Now
from diffusers_accel.forwards.rule_parts import check_count, check_threshold


@dataclass(frozen=True)
class EasyCache:
    """How fast the output changes with the input hardly changes from step to step, so two computed forwards tell it.

    With x the latents, v the output, c and c' the last two computed steps and means over all values:

        k = mean|v_c - v_c'| / mean|x_c - x_c'|        error += k * mean|x - x of the step before| / mean|v_c|

    A step is predicted while error < threshold; a step that computes sets it to 0. The decision waits for the device once a
    step. `threshold=0` computes every step.

    Args:
        threshold: relative change of the output, added up over predicted steps, at which the model runs again; 0 or more.
            The authors take 0.05 for Wan 2.1 and 0.025 for HunyuanVideo.
        warm_up: number of first steps of a generation that compute; 0 or more. The authors take 10 and 5.
    """

    kind: ClassVar[str] = "easycache"
    wants: ClassVar[frozenset[str]] = frozenset()
    made_for: ClassVar[str | None] = None
    threshold: float = 0.025
    warm_up: int = 10

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        check_count("warm_up", self.warm_up, 0)

    @property
    def label(self) -> str:
        return f"easycache {self.threshold:g}"

    @property
    def looks_back(self) -> int:
        return 2

    def check(self, steps: int) -> None:
        """Fits any number of steps."""

    def idle(self, steps: int) -> str | None:
        first = max(self.warm_up, self.looks_back)  # that may be predicted
        if not self.threshold or first < steps - 1:
            return None
        enough = f"run {first + 2} steps or more"
        if steps < self.looks_back + 2:
            return f"the first {self.looks_back} steps and the last one compute in any case: {enough}"
        return (
            f"its warm_up computes the first {self.warm_up}, and the last one computes in any case. Give it a smaller one, "
            f"such as warm_up={max(self.looks_back, steps // 5)}, or {enough}"
        )

    def least(self, steps: int) -> int:
        return min(steps, max(self.warm_up, self.looks_back) + 1) if self.threshold else steps

    def decide(self, now: Now, carry: Any) -> Decision:
        if now.run < self.warm_up or len(now.computed) < 2:
            return Decision(True)
        earlier, last = now.computed[-2:]
        rate = _change(last.v, earlier.v) / _change(last.x, earlier.x)
        step = float(rate * _change(now.x, now.before) / last.v.float().abs().mean())
        error = (carry or 0.0) + step
        return Decision(False, error) if error < self.threshold else Decision(True)  # NaN computes


def _change(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference: a 0-d fp32 tensor."""
    return (a.float() - b.float()).abs().mean()
