"""From another branch of the same step: what it gives now, and how far the two were apart last."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_accel.files import quoted
from diffusers_accel.forwards.predictors.quantity import wide
from diffusers_accel.forwards.rule import GUIDE, VIDEO, Now
from diffusers_accel.forwards.rule_parts import check_share, is_number


@dataclass(frozen=True)
class Guided:
    """The output of the branch that ran first in this step (g), and the last computed difference to it:

        v = g + low * L(v_c - g_c) + high * H(v_c - g_c)

    FasterCache (arXiv 2410.19355) predicts the unconditional pass from the conditional one so, because their difference changes
    slowly. L are the frequencies of a frame up to a fifth of its shorter side, H the others. As in the paper, `low` acts before
    `turn` and `high` from there on; the other factor is 1 then. The first branch of a step always computes. Of what is denoised
    beside the video, such as audio, the difference is taken as it is.

    Args:
        low, high: factors of the two bands, above 0. 1 for both: the difference as it was.
        turn: share of the schedule, in [0, 1].
    """

    kind: ClassVar[str] = "guided"
    low: float = 1.0
    high: float = 1.0
    turn: float = 0.7

    def __post_init__(self) -> None:
        for name, value in (("low", self.low), ("high", self.high)):
            if not (is_number(value) and value > 0):
                raise ValueError(f"{name} is a factor, expected a number above 0, found {quoted(value)}")
        check_share("turn", self.turn)

    @property
    def label(self) -> str:
        weighted = "" if self.low == self.high == 1 else f" x {self.low:g} and {self.high:g}"
        return f"guided by the first branch{weighted}"

    @property
    def wants(self) -> frozenset[str]:
        return frozenset({GUIDE} if self.low == self.high == 1 else {GUIDE, VIDEO})

    @property
    def looks_back(self) -> int:
        return 1

    def predict(self, now: Now) -> Tensor:
        guide, last = now.guide, now.last.guide
        assert guide is not None and last is not None
        difference = wide(now.last.v) - wide(last)
        if now.video is not None:
            early = now.step < self.turn * now.steps
            video = now.video.of(difference)  # a view
            video.copy_(_weighted(video, self.low if early else 1.0, 1.0 if early else self.high))
        return wide(guide) + difference


def _weighted(video: Tensor, low: float, high: float) -> Tensor:
    """[..., height, width] with the low and the high frequencies of each frame multiplied."""
    height, width = video.shape[-2:]
    down, across = (torch.fft.fftfreq(size, 1 / size, device=video.device) for size in (height, width))
    within = down[:, None] ** 2 + across**2 <= (min(height, width) // 5) ** 2
    factors = torch.where(within, low, high).to(video.dtype)
    return torch.fft.ifft2(torch.fft.fft2(video) * factors).real
