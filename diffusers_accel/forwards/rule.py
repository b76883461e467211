"""The interface of a rule: which steps are computed, and which are predicted from earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from diffusers_accel.forwards.video import VideoView

# What rules and predictors may want beside latents; other names are those of indicators.
NOISE, VIDEO, GUIDE, SINCE_COMPUTED = "noise", "video", "guide", "since computed"


@dataclass(frozen=True)
class Computed:
    """One computed forward of a transformer, on one branch.

    Args:
        step: index of its step in the schedule.
        timestep: 0-d tensor, on the model's device: the timestep that the model was given (the largest, where tokens differ).
        x: the latents that went in, without channels of a condition; of v's shape.
        v: what came out, a velocity or noise prediction. Any dtype.
        guide: v of the branch that ran first in this step, where `GUIDE` is wanted; None on that branch.
    """

    step: int
    timestep: Tensor
    x: Tensor
    v: Tensor
    guide: Tensor | None = None


@dataclass(frozen=True)
class Now:
    """A forward that is about to run, on one branch of a step.

    Args:
        step, steps: index of the step in a schedule of that many steps.
        run: how many steps of this generation have run before this one.
        branch: of guidance, such as "cond".
        timestep, x: as of `Computed`.
        before: x of the last step at which this branch ran, computed or predicted.
        computed: the last forwards of this branch that were computed, oldest first, at least one.
        noise: with `NOISE`, the share s of noise in x, which is (1 - s) video + s noise up to a factor: sigma in flow matching.
        noise_before: that of `before`.
        video: with `VIDEO`, how x is read as video.
        indicator: with the name of an indicator, what the model makes of the step before its blocks.
        indicator_before: that of the last step at which this branch ran, with `SINCE_COMPUTED` of the last that was computed;
            None where it was not looked at.
        guide: with `GUIDE`, what the branch that ran first in this step has given, computed or predicted.
    """

    step: int
    steps: int
    run: int
    branch: str
    timestep: Tensor
    x: Tensor
    before: Tensor
    computed: tuple[Computed, ...]
    noise: float | None = None
    noise_before: float | None = None
    video: VideoView | None = None
    indicator: Tensor | None = None
    indicator_before: Tensor | None = None
    guide: Tensor | None = None

    @property
    def last(self) -> Computed:
        """The last forward that was computed."""
        return self.computed[-1]


class Decision(NamedTuple):
    """Whether the step computes, and what the rule is given back at the next step (None after a step that had to compute)."""

    compute: bool
    carry: Any = None


class Rule(Protocol):
    """Decides, once a step, whether the transformer runs. A frozen dataclass whose fields are plain data.

    A rule is not asked where a step has to compute: the first and the last step of a generation, the first one of another
    transformer (an expert), and a branch, shape or dtype that was not seen before.
    """

    kind: ClassVar[str]

    @property
    def label(self) -> str:
        """A short name for tables."""
        ...

    @property
    def wants(self) -> frozenset[str]:
        """What it looks at beside latents: `NOISE`, `VIDEO`, or one indicator by its name (`forwards/indicator.py`)."""
        ...

    @property
    def made_for(self) -> str | None:
        """The model that its numbers belong to, as `AttachedModel.label` names it; None for any."""
        ...

    @property
    def looks_back(self) -> int:
        """How many computed forwards it wants to see."""
        ...

    def check(self, steps: int) -> None:
        """Called when a generation of so many steps begins.

        Raises:
            ValueError: this rule does not fit that number of steps.
        """
        ...

    def idle(self, steps: int) -> str | None:
        """Why no step of a schedule of so many can be predicted, which was not asked for, and what to do; else None."""
        ...

    def least(self, steps: int) -> int:
        """How many steps of a schedule of so many it computes at least, those that compute in any case among them."""
        ...

    def decide(self, now: Now, carry: Any) -> Decision:
        """`now` is the first branch of the step that may be predicted; the other branches follow."""
        ...
