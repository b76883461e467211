"""What unread keys gave at an earlier step is kept and merged in: FlashBlock's residual reuse.

FlashBlock (arXiv 2602.05305) denoises a block of tokens against a long history: attention over the history (external, as it
says) hardly changes from step to step, so its output and log-sum-exp are kept and merged with the block's own attention,
which is fresh. A bidirectional model has no history. There external is what a sparse selection leaves out, which the paper
shows as residual reuse: a refresh step computes what is selected and what is not, and is exactly dense; the steps after it
compute the selected blocks and merge what is kept of the others. The selection is frozen in between, so that both always make
up all keys.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.files import FileError
from diffusers_accel.kernels.pattern import BlockPattern, head_index
from diffusers_accel.methods.blocks import FOREVER, segment_of
from diffusers_accel.methods.cycle import due, refresh_share
from diffusers_accel.methods.rest import CacheEntry, Partial, Read, Reader, RefreshDecision, Rest
from diffusers_accel.methods.select import Select
from diffusers_accel.methods.uses import Tensors, Uses, planned

USUAL = 3  # steps from refresh to refresh


@dataclass(frozen=True)
class Kept(Rest):
    """Keep the output and LSE of the unselected blocks.

    Args:
        refresh_every: refresh at every n-th step, counted from the last refresh; 1 would never reuse. None: never after the
            first step of a schedule.
        gated: refresh a head where the plan's tensor "refresh/<transformer>" says so (uint8 [segments, layers, heads], 1 =
            refresh at the beginning of that segment, of equal segments of the schedule): what `search.gates.calibrate_gates`
            found from how fast what a head keeps drifts. `refresh_every` is then not used and stays at its default.
    """

    refresh_every: int | None = USUAL
    gated: bool = False
    kind: ClassVar[str] = "kept"
    remembers: ClassVar[bool] = True
    reads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        whole = isinstance(self.refresh_every, int) and not isinstance(self.refresh_every, bool)
        if self.refresh_every is not None and not (whole and self.refresh_every >= 2):
            raise ValueError(
                f"refresh_every is a number of steps, expected 2 or more, found {self.refresh_every!r}; None (null in a file) "
                "refreshes at the first step of a schedule alone"
            )
        if self.gated and self.refresh_every != USUAL:
            raise ValueError(
                f"heads with a gate take their refresh steps from the plan: leave refresh_every out, found {self.refresh_every}"
            )

    @property
    def label(self) -> str:
        if self.gated:
            return "cached gated"
        return "cached" if self.refresh_every is None else f"cached {self.refresh_every}"

    @property
    def period(self) -> int:
        return self.refresh_every or FOREVER

    @property
    def unmeasured(self) -> str | None:
        if not self.gated:
            return None
        return "a gate is not searched, but calibrated for a plan that was: search.gates.calibrate_gates"

    @property
    def representative(self) -> Rest:
        return Kept(None)

    @property
    def with_gate(self) -> Rest:
        return Kept(gated=True)

    def refuses(self, select: Select) -> str | None:
        if select.reads_all or select.reads_nothing:
            return f'"{select.kind}" leaves no blocks whose attention could be kept: leave the rest out'
        if select.reselect_every > 1:
            return (
                "what is kept keeps its selection until it refreshes: leave reselect_every at 1, found "
                f"{select.reselect_every}"
            )
        return None

    def expected_density(self, density: float | None) -> float | None:
        return None if density is None or self.gated else density + (1 - density) * refresh_share(self.period)

    def check(self, uses: Uses, tensors: Tensors) -> None:
        if not self.gated:
            return
        name = gate_name(uses.transformer)
        gate = uses.tensor(tensors, name)
        uses.check_size(name, gate, torch.uint8, "segments, layers, heads", place=1)
        if int(gate.max()) > 1:
            raise FileError(
                f"tensors.{name}: expected 1 where a head refreshes and 0 elsewhere, found {int(gate.max())}"
            )

    def depends(self, call: AttentionCall) -> Hashable:
        return call.place if self.gated else None

    def gate(self, place: tuple[str, int], heads: Sequence[int], tensors: Tensors) -> Tensor | None:
        if not self.gated:
            return None
        transformer, layer = place
        gate = planned(tensors, gate_name(transformer), "what is kept with a gate")
        return gate[:, layer, list(heads)].bool().cpu()

    def refresh_share(self, gate: Tensor | None) -> float:
        if gate is None:
            return refresh_share(self.period)
        return float(gate.double().mean()) if len(gate) else 0.0

    def due(self, held: CacheEntry, now: tuple[int, int], gate: Tensor | None, before: int | None) -> list[bool]:
        if gate is not None:
            return [bool(each) for each in gate[_begun(now, len(gate), before)].any(0)]
        return [due(now[0] - last, self.period) for last in held.refreshed]

    def unread(self, read: Read, decision: RefreshDecision, reader: Reader) -> tuple[Partial | None, CacheEntry]:
        held = _renewed(read, decision, reader)
        assert held.out is not None and held.lse is not None
        return (held.out, held.lse), held


def gate_name(transformer: str) -> str:
    """Of the tensor that says when heads refresh."""
    return f"refresh/{transformer}"


def _begun(now: tuple[int, int], segments: int, before: int | None = None) -> slice:
    """Which of `segments` equal segments of the schedule have begun since the step `before` (None: the one before this): none
    if this step goes on with that one's segment, several where a call has fewer steps than segments, or steps were predicted.
    """
    step, steps = now
    before = segment_of((step - 1 if before is None else before, steps), segments) if step else -1
    return slice(before + 1, segment_of(now, segments) + 1)


def _renewed(read: Read, decision: RefreshDecision, reader: Reader) -> CacheEntry:
    """What is held after this step: where heads refresh, their unread blocks are computed."""
    held, step = decision.held, decision.step
    heads = [head for head, now in enumerate(decision.refresh) if now]
    if len(heads) == len(decision.refresh):
        # A pattern that stays is complemented once; lists that stay with another would only take memory.
        unread = read.pattern.derived(BlockPattern.complement) if read.shared else read.pattern.complement()
        return CacheEntry(read.pattern, step, [step] * len(heads), *reader.attend(unread))
    assert held is not None and held.out is not None and held.lse is not None
    if heads:
        index = head_index(tuple(heads), read.pattern.device)
        out, lse = reader.attend(read.pattern.take(heads).complement(), heads)
        held.out.index_copy_(2, index, out)
        held.lse.index_copy_(1, index, lse)
    return replace(
        held,
        pattern=read.pattern,
        selected=held.selected if read.pattern is held.pattern else step,
        refreshed=[step if now else last for now, last in zip(decision.refresh, held.refreshed, strict=True)],
    )
