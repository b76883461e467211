"""What is asked of a plan, and measured on clips."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from diffusers_accel.evals.metrics import METRICS
from diffusers_accel.files import quoted
from diffusers_accel.search.checks import real_number

Kind = Literal["speedup", "ms_per_step", "psnr", "ssim", "lpips"]
SPEEDS = ("speedup", "ms_per_step")
# By metric: the power of the clips' squared error that its loss grows with, as far as nothing was measured yet.
POWERS = {"psnr": 1.0, "ssim": 0.7, "lpips": 0.6}


@dataclass(frozen=True)
class Goal:
    """What a plan has to reach; as good, or as fast, as it can be then. Built with `Goal.speedup` and its like.

    Raises:
        ValueError: the number is none that can be reached by any plan.
    """

    kind: Kind
    value: float

    def __post_init__(self) -> None:
        if self.kind not in (*SPEEDS, *POWERS):
            raise ValueError(f"kind: expected one of {', '.join((*SPEEDS, *POWERS))}, found {quoted(self.kind)}")
        value = real_number(f"Goal.{self.kind}", self.value)
        object.__setattr__(self, "value", value)
        least, most = {"speedup": (1.0, math.inf), "ssim": (0.0, 1.0)}.get(self.kind, (0.0, math.inf))
        if not least < value < most:
            top = "" if most == math.inf else f" and below {most:g}"
            raise ValueError(f"Goal.{self.kind}: expected a number above {least:g}{top}, found {value:g}")

    @classmethod
    def speedup(cls, factor: float) -> Goal:
        """A whole generation `factor` times as fast as dense, text encoder and VAE included, at the best quality."""
        return cls("speedup", factor)

    @classmethod
    def ms_per_step(cls, milliseconds: float) -> Goal:
        """Forwards of the transformer that take so long per step of the schedule, on average, at the best quality."""
        return cls("ms_per_step", milliseconds)

    @classmethod
    def psnr(cls, decibels: float) -> Goal:
        """The fastest plan with this mean PSNR against dense, in dB."""
        return cls("psnr", decibels)

    @classmethod
    def ssim(cls, ssim: float) -> Goal:
        """The fastest plan with this mean SSIM against dense, in (0, 1)."""
        return cls("ssim", ssim)

    @classmethod
    def lpips(cls, lpips: float) -> Goal:
        """The fastest plan with at most this mean LPIPS against dense; its weights are to be fetched before."""
        return cls("lpips", lpips)

    @property
    def is_speed(self) -> bool:
        return self.kind in SPEEDS

    @property
    def metric(self) -> str:
        """The metric of `evals.metrics` by which quality is judged."""
        return "psnr" if self.is_speed else self.kind

    @property
    def higher_is_better(self) -> bool:
        return METRICS[self.metric].better == "higher"

    def loss(self, value: float) -> float:
        """A value of the metric as a loss above 0, which shrinks towards 0 as a clip comes to equal the dense one."""
        if self.metric == "psnr":
            return 10 ** (-value / 10)
        return max(1 - value if self.metric == "ssim" else value, 1e-9)

    def __str__(self) -> str:
        units = {
            "speedup": f"{self.value:g}x",
            "ms_per_step": f"{self.value:g} ms a step",
            "psnr": f"PSNR {self.value:g} dB",
        }
        return units.get(self.kind, f"{self.kind.upper()} {self.value:g}")
