"""What is remembered of the forwards of a generation, and what is counted for the report."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffusers_accel.forwards.calls import OutputForm
from diffusers_accel.forwards.rule import Computed


@dataclass(frozen=True)
class Glimpse:
    """What a rule looks at of a forward beside its latents, as of `Now`."""

    noise: float | None = None
    indicator: Tensor | None = None


@dataclass
class Stream:
    """One output of a branch: its last computed forwards (oldest first) and the latents of the last step that ran."""

    computed: tuple[Computed, ...] = ()
    before: Tensor | None = None

    def fits(self, x: Tensor) -> bool:
        """Whether a forward on these latents continues the computed ones."""
        before = self.before
        if before is None or not self.computed:
            return False
        return (x.shape, x.dtype, x.device) == (before.shape, before.dtype, before.device)

    @property
    def kept(self) -> list[Tensor | None]:
        """All that it holds; some tensors stand twice in it."""
        return [self.before, *(tensor for each in self.computed for tensor in (each.x, each.v, each.guide))]


@dataclass
class Branch:
    """One branch of guidance: its outputs, in which forms they were asked for (by `return_dict`), and what was seen of its last
    forward."""

    streams: tuple[Stream, ...] = ()
    forms: dict[bool, OutputForm] = field(default_factory=dict)
    seen: Glimpse = Glimpse()

    def fits(self, xs: Sequence[Tensor]) -> bool:
        """Whether a forward on these latents continues the computed ones."""
        streams = self.streams
        return len(xs) == len(streams) > 0 and all(each.fits(x) for each, x in zip(streams, xs, strict=True))

    @property
    def kept(self) -> list[Tensor | None]:
        return [self.seen.indicator, *(tensor for stream in self.streams for tensor in stream.kept)]


@dataclass
class Generation:
    """One call of the pipeline, as far as it has come: it ends where another one begins, by the pipeline's own timesteps or,
    without a pipeline, where the step goes back or a branch runs a second time at one step."""

    transformer: str
    steps: int
    timesteps: weakref.ref[Tensor] | None
    step: int = -1
    run: int = -1  # how many steps ran before this one
    branches: dict[str, Branch] = field(default_factory=dict)
    ran: set[str] = field(default_factory=set)  # branches of this step
    compute: bool | None = None  # the decision of this step, once it is made
    carry: Any = None  # the rule's
    guide: tuple[Tensor, ...] | None = None  # what the first branch of this step has given, where that is wanted
    guided: bool = False  # whether another branch has been kept that can be told by it

    def continues(self, branch: str, now: tuple[int, int], timesteps: Tensor | None) -> bool:
        """Whether a forward that begins now belongs to this generation."""
        step, steps = now
        known = self.timesteps() if self.timesteps is not None else None
        if steps != self.steps or step < self.step or known is not timesteps:
            return False
        return step > self.step or branch not in self.ran

    def enter(self, transformer: str, branch: str, step: int) -> None:
        """A forward begins."""
        if transformer != self.transformer:  # an expert hands over: what it knew is of no use to the next one
            self.transformer, self.carry, self.compute = transformer, None, None
            self.branches.clear()
        if step != self.step:
            self.step, self.run, self.compute, self.guide = step, self.run + 1, None, None
            self.ran.clear()
        self.ran.add(branch)

    @property
    def bytes(self) -> int:
        """Of all that is kept; what two hold counts once."""
        held = [*(self.guide or ()), *(tensor for branch in self.branches.values() for tensor in branch.kept)]
        tensors = {id(tensor): tensor for tensor in held if tensor is not None}
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


@dataclass
class ForwardsTally:
    """What the forwards of one transformer have done since patching or `clear`."""

    computed: int = 0
    predicted: int = 0
    why: Counter[str] = field(default_factory=Counter)  # reason to compute -> forwards
    steps: list[int] = field(default_factory=list)  # computed steps of the last generation
    branches: set[str] = field(default_factory=set)  # that have run
    cache_bytes: int = 0  # most that was kept at once
