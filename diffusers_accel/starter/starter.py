"""A plan from what heads were found to need elsewhere: each as many key blocks as its need, times a margin, or under a budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_accel.files import quoted
from diffusers_accel.methods import DENSE, Draft, Method, Patches
from diffusers_accel.plan import Plan, Span
from diffusers_accel.shape import ModelShape
from diffusers_accel.starter.checkpoints import CHECKPOINTS, Checkpoint, Found

LEVEL = 0.05  # densities are multiples of it, so that heads share methods
DENSE_FROM = (
    0.65  # a sparse head of this density is expected to take about as long as a dense one; not measured on a GPU
)
SOURCE = "SVOO head profiles (arXiv 2603.18636), from the package sparsevideo 0.1.0, Apache-2.0"
NOTE = "from published head statistics, not from a search on your device"


@dataclass(frozen=True)
class Starter:
    """A starter plan for seven checkpoints of Wan and HunyuanVideo: DraftAttention's selection, each head with a density of its
    own.

    What a head needs, the share of keys that holds 95 % of its attention mass, differs between heads a hundredfold and hardly
    between steps and prompts; Wan 2.1 and 2.2 agree in it. It was measured key by key: blocks of 128 x 128 must read more, hence
    the margin.

    Args:
        density: mean share of the video's block pairs over all heads in the steps that are not dense, in [0.05, 1]: the margin
            is then what meets it, below 1 where heads need more. Heads whose density would be 0.65 or more are dense and count
            as 1.
        margin: a head's density is its need times this, 1 or more.
        dense_steps: share of the schedule that stays dense at its start, in [0, 1).

    Raises:
        ValueError: a number is out of range.
    """

    density: float | None = None
    margin: float = 1.5
    dense_steps: float = 0.2

    def __post_init__(self) -> None:
        if self.density is not None and not LEVEL <= self.density <= 1:
            raise ValueError(f"density is a mean over heads, expected in [{LEVEL:g}, 1], found {quoted(self.density)}")
        if self.density is not None and self.margin != type(self).margin:
            raise ValueError("density is met by a margin of its own: give one of the two, density or margin")
        if not self.margin >= 1:
            raise ValueError(f"margin multiplies what a head needs, expected 1 or more, found {quoted(self.margin)}")
        if not 0 <= self.dense_steps < 1:
            raise ValueError(
                f"dense_steps is a share of the schedule, expected in [0, 1), found {quoted(self.dense_steps)}"
            )

    def plan(self, found: Found) -> Plan:
        """The plan for a pipeline's transformers.

        Raises:
            ValueError: nobody has measured a checkpoint of these sizes.
        """
        checkpoint = next((each for each in CHECKPOINTS if each.is_that_of(found)), None)
        if checkpoint is None:
            raise ValueError(_refusal(found))
        return self._plan(checkpoint, {name: family.shape(module) for name, (module, family) in found.items()})

    def _plan(self, checkpoint: Checkpoint, models: dict[str, ModelShape]) -> Plan:
        needs = checkpoint.needs()
        margin = self.margin if self.density is None else margin_for(self.density, torch.cat([*needs.values()]))
        levels = {name: levels_of(need, margin) for name, need in needs.items()}
        used = sorted({int(level) for each in levels.values() for level in each.unique()})
        methods = {_symbol(level): _method(level) for level in used} | {_symbol(0): DENSE}
        rows = {
            name: tuple(tuple(_symbol(int(level)) for level in row) for row in each) for name, each in levels.items()
        }
        dense = {name: ((_symbol(0),) * shape.heads,) * shape.layers for name, shape in models.items()}
        first = [Span(0.0, self.dense_steps, dense)] if self.dense_steps else []
        return Plan(
            family=checkpoint.family,
            models=models,
            methods=methods,
            spans=(*first, Span(self.dense_steps, 1.0, rows)),
            provenance={
                "starter": NOTE,
                "checkpoint": checkpoint.title,
                "source": SOURCE,
                "margin": round(float(margin), 4),
                "mean density": round(mean_density([*levels.values()]), 4),
            },
        )


def levels_of(need: Tensor, margin: float) -> Tensor:
    """Needs [..., heads] -> densities in units of LEVEL, rounded up, of the same shape; 0 for heads that stay dense."""
    density = need * margin
    level = torch.ceil(density / LEVEL - 1e-6).clamp(min=1).to(torch.int32)
    return torch.where(level * LEVEL >= DENSE_FROM, 0, level)


def mean_density(levels: list[Tensor]) -> float:
    """Over all heads, a dense one counted as 1."""
    each = torch.cat([level.flatten() for level in levels]).float() * LEVEL
    return float(torch.where(each == 0, 1.0, each).mean())


def margin_for(density: float, need: Tensor) -> float:
    """The largest margin whose densities have at most this mean; the needs' spread decides how near it comes."""
    low, high = 0.0, 1 / float(need.clamp(min=1e-4).min())
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mean_density([levels_of(need, middle)]) <= density else (low, middle)
    return low


def _symbol(level: int) -> str:
    return f"d{round(level * LEVEL * 100):02d}" if level else "."


def _method(level: int) -> Method:
    return Method(Patches(), Draft(round(level * LEVEL, 2))) if level else DENSE


def _refusal(found: Found) -> str:
    shapes = {name: (family.name, family.shape(module)) for name, (module, family) in found.items()}
    seen = ", ".join(f"{name}: {family} of {s.layers} layers x {s.heads} heads" for name, (family, s) in shapes.items())
    known = ", ".join(each.title for each in CHECKPOINTS)
    return (
        f'"starter" has plans for checkpoints whose heads somebody has measured ({known}), found {seen}: search a plan for this '
        'one (diffusers_accel.search_plan), or take a method that knows nothing of heads, such as "draft"'
    )
