"""SeaCache (arXiv 2602.18993): predict while the latents, as far as they are video and not noise, have changed little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusers_accel.forwards.rule import NOISE, VIDEO, Decision, Now
from diffusers_accel.forwards.rule_parts import TOO_FEW, check_count, check_threshold, fewest

POWER = 3.0  # of the frequency by which the power of video falls, as the authors take it
CLEANEST = 1e-6  # share of noise, or of video, that counts as none: a filter must have both


@dataclass(frozen=True)
class SeaCache:
    """Early steps settle the low frequencies of a video and late ones the high ones, so a change of the latents counts where
    they already are video: behind a Wiener filter, which knows the noise level and the spectrum that videos usually have.

    With s the share of noise in the latents x, per axis of frames, height and width with the frequency f in cycles per latent

        gain(f) = (1 - s) / ((1 - s)^2 + s^2 |f|^3)        G = the product of the axes' gains, divided by its mean

    and y = G x, filtered in the space of frequencies,

        error += mean|y - y of the step before| / mean|y of the step before|

    A step is predicted while error < threshold and no more than `max_skips` in a row are; a step that computes sets it to 0. No
    table and no calibration is needed, and the decision waits for the device once a step. `threshold=0` computes every step.

    Args:
        threshold: relative change, added up over predicted steps, at which the model runs again; 0 or more. The authors take
            0.2 to 0.3.
        max_skips: most steps in a row that are predicted, 1 or more.
    """

    kind: ClassVar[str] = "seacache"
    wants: ClassVar[frozenset[str]] = frozenset({NOISE, VIDEO})
    made_for: ClassVar[str | None] = None
    threshold: float = 0.25
    max_skips: int = 2

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        check_count("max_skips", self.max_skips, 1)

    @property
    def label(self) -> str:
        return f"seacache {self.threshold:g}"

    @property
    def looks_back(self) -> int:
        return 1

    def check(self, steps: int) -> None:
        """Fits any number of steps."""

    def idle(self, steps: int) -> str | None:
        if not self.threshold or steps > 2:
            return None
        return TOO_FEW

    def least(self, steps: int) -> int:
        return fewest(steps, 1, self.max_skips + 1) if self.threshold else steps

    def decide(self, now: Now, carry: Any) -> Decision:
        if not self.threshold or now.step - now.last.step > self.max_skips:
            return Decision(True)
        assert now.video is not None and now.noise is not None and now.noise_before is not None
        y, before = (
            filtered(now.video.of(x), noise) for x, noise in ((now.x, now.noise), (now.before, now.noise_before))
        )
        error = (carry or 0.0) + float((y - before).abs().mean() / before.abs().mean())
        return Decision(False, error) if error < self.threshold else Decision(True)  # NaN computes


def filtered(video: Tensor, noise: float) -> Tensor:
    """Latents [B, C, frames, height, width] behind the filter for their share of noise in 0..1: fp32 (fp64 of fp64)."""
    video = video if video.dtype == torch.float64 else video.float()
    spectrum = torch.fft.fftn(video, dim=(-3, -2, -1))
    for axis in (-3, -2, -1):
        gain = axis_gain(video.shape[axis], noise).to(video.device, video.dtype)
        spectrum = spectrum * gain.reshape(-1, *[1] * (-axis - 1))
    return torch.fft.ifftn(spectrum, dim=(-3, -2, -1)).real


def axis_gain(size: int, noise: float) -> Tensor:
    """The gain of each frequency of an axis, in the order of `torch.fft.fftfreq`: fp64 [size] on the CPU, of mean 1."""
    s = min(max(noise, CLEANEST), 1 - CLEANEST)
    frequencies = torch.fft.fftfreq(size, dtype=torch.float64).abs()
    gain = (1 - s) / ((1 - s) ** 2 + s**2 * frequencies**POWER)
    return gain / gain.mean()
