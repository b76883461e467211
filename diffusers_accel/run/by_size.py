"""What `patch(pipe)` takes by the number of tokens: at which density, and below how many nothing sparse can win."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from diffusers_accel.layout import TokenLayout
from diffusers_accel.plan import Plan
from diffusers_accel.shape import ModelShape

# Video tokens, the density that is published near there, and by whom. Longer videos need a smaller share of their keys.
PUBLISHED = (
    (17_550, 0.5, "PAROAttention (arXiv 2506.16054) on CogVideoX at 480 x 720: 29 dB"),
    (32_256, 0.45, "DraftAttention (arXiv 2505.14708) on Wan 2.1 14B at 512 x 768: 25 dB"),
    (75_600, 0.3, "SVG (arXiv 2502.01776) on Wan 2.1 14B at 720p; Sparse-vDiT (arXiv 2506.03065) has .298"),
    (118_800, 0.25, "SVG on HunyuanVideo at 720p; Sparse-vDiT and DraftAttention go below"),
)
LEVEL = 0.05  # densities are rounded up to multiples of it

# Narrower transformers (Wan 1.3B, CogVideoX 2B) read half whatever the size: users of SVG and SpargeAttention report severe
# losses on Wan 1.3B at settings that suit 14B (SVG issue 19, SpargeAttn issue 33).
NARROW, NARROW_DENSITY = 2048, 0.5

# From so many video tokens on a density of 0.5 can be faster than dense attention, by type of device. A CPU: 32 blocks of 128,
# at which the toy model gains (README). A GPU: there block-sparse kernels of 128 x 128 have .37, .52 and .76 of the dense
# kernel's rate at 8, 16 and 64 thousand tokens (MIT Block-Sparse-Attention on an A100); not measured here.
WINS_FROM = {"cpu": 4_096}
WINS_FROM_ON_A_GPU = 16_384


def density_at(tokens: int) -> float:
    """The density for so many video tokens: between published ones by the logarithm of the tokens, never more for more."""
    low, high = PUBLISHED[0][:2], PUBLISHED[-1][:2]
    if not low[0] < tokens < high[0]:
        return low[1] if tokens <= low[0] else high[1]
    above = next(index for index, (published, _, _) in enumerate(PUBLISHED) if published >= tokens)
    (before, dense, _), (after, sparse, _) = PUBLISHED[above - 1 : above + 1]
    place = math.log(tokens / before) / math.log(after / before)
    return round(math.ceil(round((dense + (sparse - dense) * place) / LEVEL, 6)) * LEVEL, 2)


def wins_from(device: str) -> int:
    """From how many video tokens on sparse attention can be faster than dense on a device of this type, such as "cpu"."""
    return WINS_FROM.get(device, WINS_FROM_ON_A_GPU)


def preset_density(tokens: int, device: str, shape: ModelShape) -> float | None:
    """What the preset of `patch(pipe)` reads of so many video tokens; None where it stays dense."""
    if tokens < wins_from(device):
        return None
    narrow = shape.heads * shape.head_dim < NARROW
    return max(density_at(tokens), NARROW_DENSITY) if narrow else density_at(tokens)


# Where all is dense, by whether there is a history.
ADVICE = {
    False: 'Generate more frames or a larger picture, or name a method, as in patch(pipe, "draft")',
    True: 'What can be saved of a chunk is attention over its history: patch(pipe, "history")',
}


@dataclass(frozen=True)
class SizeChoice:
    """What a size takes.

    Args:
        dense: whether all stays dense, because nothing sparse can win.
        plan: what runs.
        line: says so, and why.
    """

    dense: bool
    plan: Plan
    line: str


class BySize:
    """The plans of a patch that chooses by the size of each call, so that one pipeline may be called at several.

    Args:
        name: of the family, for what is said.
        kept: what stays dense in any case, for what is said.
        method: name of the method that runs.
        shapes: transformer -> its shape.
        plan_at: density, or None for what the user has asked for, -> the plan.
        dense: the plan that leaves all dense.
        given: whether the user has asked for a density or the like, which then holds at all sizes that are not dense.
    """

    def __init__(
        self,
        name: str,
        kept: str,
        method: str,
        shapes: dict[str, ModelShape],
        plan_at: Callable[[float | None], Plan],
        dense: Plan,
        given: bool,
    ) -> None:
        self._name, self._kept, self._method = name, kept, method
        self._shapes, self._plan_at, self._dense, self._given = shapes, plan_at, dense, given
        self._plans: dict[float | None, Plan] = {}
        self._choices: dict[tuple[int, bool, str, str], SizeChoice] = {}
        self.plan = self._plan(None if given else NARROW_DENSITY)  # that ran last; before a call that of a small video

    def choose(self, layout: TokenLayout, transformer: str, device: str) -> SizeChoice:
        """What a call with this layout takes on a device of this type."""
        key = layout.video_tokens, layout.has_history, transformer, device
        if key not in self._choices:
            self._choices[key] = self._choice(*key)
        choice = self._choices[key]
        self.plan = choice.plan
        return choice

    def _choice(self, tokens: int, has_history: bool, transformer: str, device: str) -> SizeChoice:
        density = preset_density(tokens, device, self._shapes[transformer])
        if density is None:
            line = (
                f"dense: {tokens:,} tokens; sparse attention cannot win below {wins_from(device):,} here ({device}). "
                + ADVICE[has_history]
            )
            return SizeChoice(True, self._dense, line)
        if self._given:
            line = f"{self._name}, {tokens:,} tokens: {self._method} as asked for; {self._kept}"
            return SizeChoice(False, self._plan(None), line)
        why = (
            "as published for sizes near it"
            if tokens >= PUBLISHED[0][0]
            else "that of the smallest size that is published"
        )
        why = "a narrow transformer" if density > density_at(tokens) else why
        line = f"{self._name}, {tokens:,} tokens: {self._method} at density {density:g} ({why}); {self._kept}"
        return SizeChoice(False, self._plan(density), line)

    def _plan(self, density: float | None) -> Plan:
        if density not in self._plans:
            self._plans[density] = self._plan_at(density)
        return self._plans[density]
