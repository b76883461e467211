"""The rest stage: what happens to the keys that are not read?

The rest of a head is told which blocks are read and says what the others give: attention over them, with its log-sum-exp, from
a `Reader` that attends, or held since an earlier step. Attention over the selected blocks is merged with that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.methods.select import Select
from diffusers_accel.methods.stage import Stage
from diffusers_accel.methods.uses import Tensors, Uses

Partial = tuple[Tensor, Tensor]  # attention over some of the keys: out [B, queries, H, D], lse fp32 [B, H, queries]


class Reader(Protocol):
    """What attends for the heads of a group: kernels, or a search that looks at some of the queries only."""

    def attend(self, pattern: BlockPattern, heads: Sequence[int] | None = None) -> Partial:
        """Attention over the blocks of a pattern, which is one of these heads (places in the group; None: all)."""
        ...

    def pooled(self, pattern: BlockPattern) -> Partial:
        """Attention over the means of the key blocks that a pattern leaves out, each with the weight of its tokens."""
        ...


@dataclass
class CacheEntry:
    """What the heads of a group remember of an earlier step.

    Args:
        pattern: the blocks that they read.
        selected: step at which these were selected.
        refreshed: per head, the step at which what is kept was computed; empty where nothing is kept.
        out: [B, S, heads, D], attention over the blocks that are not read; None where nothing is kept.
        lse: fp32 [B, heads, S], of the same.
    """

    pattern: BlockPattern
    selected: int
    refreshed: list[int]
    out: Tensor | None = None
    lse: Tensor | None = None


class RefreshDecision(NamedTuple):
    """A group at one step: what it has held since an earlier one, and which of its heads make what is held anew (empty where
    nothing is kept)."""

    step: int
    held: CacheEntry | None
    refresh: list[bool]


class Read(NamedTuple):
    """What a group reads at a step.

    Args:
        pattern: its blocks.
        shared: whether the pattern stays with the layer, so that what is derived of it is worth keeping.
    """

    pattern: BlockPattern
    shared: bool


@dataclass(frozen=True)
class Rest(Stage, ABC):
    """Members are frozen dataclasses, each in a file of `rests/`; their fields are what a plan file says of them.

    Class attributes:
        kind: the name in plan files.
        remembers: an output and its log-sum-exp are kept from step to step, which takes memory.
        reads: it asks its reader for more than what was selected.
        changes_nothing: unread keys give nothing, so that what was read is the output as it is.
    """

    given_as: ClassVar[str] = "Method(select=..., rest=...)"
    kind: ClassVar[str]
    remembers: ClassVar[bool] = False
    reads: ClassVar[bool] = False
    changes_nothing: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """For tables, such as "cached 3"; "" for what goes without saying."""
        return ""

    @property
    def period(self) -> int | None:
        """Steps from refresh to refresh, as far as that is known ahead; None where nothing is refreshed."""
        return None

    @property
    def unmeasured(self) -> str | None:
        """Why a search cannot measure its error, or None."""
        return None

    @property
    def representative(self) -> Rest:
        """One of the same kind that costs as much per call, whenever it refreshes."""
        return self

    @property
    def with_gate(self) -> Rest | None:
        """The same with a gate, which a plan brings, in place of its period; None where there is nothing to refresh."""
        return None

    def refuses(self, select: Select) -> str | None:
        """Why it does not go with a selection, or None."""
        return None

    def expected_density(self, density: float | None) -> float | None:
        """The share of the blocks that is computed in the mean over the schedule, where a selection reads `density` of them."""
        return density

    def check(self, uses: Uses, tensors: Tensors) -> None:
        """Checks that a plan has the tensors that it reads, and that they fit.

        Raises:
            FileError: begins with the path of what is wrong.
        """
        return None

    def depends(self, call: AttentionCall) -> Hashable:
        """On what its gate depends; None: on nothing, as there is none."""
        return None

    def gate(self, place: tuple[str, int], heads: Sequence[int], tensors: Tensors) -> Tensor | None:
        """bool [segments, heads] on the CPU: at which equal segments of the schedule heads refresh, where a plan says it.

        Args:
            place: transformer and layer.
            heads: their numbers in the model.
        """
        return None

    def refresh_share(self, gate: Tensor | None) -> float:
        """At what share of the steps a head refreshes whose gate, bool [segments], is this."""
        return 0.0

    def due(self, held: CacheEntry, now: tuple[int, int], gate: Tensor | None, before: int | None) -> list[bool]:
        """Which heads refresh at this step.

        Args:
            now: (step, steps).
            gate: of the heads, see `gate`.
            before: the step at which the layer attended last; None: the one before this.
        """
        return []

    @abstractmethod
    def unread(self, read: Read, decision: RefreshDecision, reader: Reader) -> tuple[Partial | None, CacheEntry]:
        """Attention of the group's heads over what they do not read, None where that is nothing, and what they remember."""
