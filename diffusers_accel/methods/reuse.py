"""The reuse stage: what of an earlier step still holds?

FlashBlock (arXiv 2602.05305) denoises a block of tokens against a long history: attention over the history (the external
part) hardly changes from step to step, so its output and log-sum-exp are kept and merged with the block's own, fresh part.
A bidirectional model has no history. There the external part is what a sparse selection leaves out, which the paper shows
as residual reuse: a refresh step computes both parts and is exactly dense, the steps after it compute the selected blocks
and merge the kept rest. The selection is frozen in between, so that the parts always make up the whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from diffusers_accel.methods.context import Context


@dataclass(frozen=True)
class Reuse:
    """Keep the output and LSE of the unselected blocks.

    Args:
        every: refresh at every n-th step, counted from the last refresh; 1 would never reuse.
        gated: refresh a head where the plan's tensor "refresh/<transformer>" says so (uint8 [parts, layers, heads], 1 =
            refresh at the beginning of that part, for equal parts of the schedule): what `search.gates.calibrate_gates` found
            from how fast each head's part drifts. `every` is then not used and stays at its default.
    """

    every: int = 3
    gated: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 2:
            raise ValueError(f"Reuse.every is a number of steps, expected 2 or more, found {self.every!r}")
        if self.gated and self.every != 3:
            raise ValueError(
                f"a gated reuse takes its refresh steps from the plan: leave every out, found {self.every}"
            )

    def gate(self, ctx: Context) -> Tensor | None:
        """bool [parts, heads] on the CPU: where the heads of `ctx` refresh; None without a gate."""
        if not self.gated:
            return None
        name = f"refresh/{ctx.transformer}"
        if name not in ctx.tensors:
            raise ValueError(f"a gated reuse needs the tensor {name!r} of a searched plan, found {sorted(ctx.tensors)}")
        return ctx.tensors[name][:, ctx.layer, list(ctx.heads)].bool().cpu()

    @property
    def label(self) -> str:
        return "cached gated" if self.gated else f"cached {self.every}"


def part_of(now: tuple[int, int], parts: int) -> int:
    """Which of `parts` equal parts of the schedule the step belongs to."""
    step, steps = now
    return min(step * parts // steps, parts - 1)


def begun(now: tuple[int, int], parts: int, before: int | None = None) -> slice:
    """Which of `parts` equal parts of the schedule have begun since the step `before` (None: the one before this): none if this
    step goes on with that one's part, several where a call has fewer steps than there are parts, or steps were predicted."""
    step, steps = now
    before = part_of((step - 1 if before is None else before, steps), parts) if step else -1
    return slice(before + 1, part_of(now, parts) + 1)


def refreshes(
    every: int, gate: Tensor | None, now: tuple[int, int], refreshed: list[int], before: int | None = None
) -> list[bool]:
    """Which heads refresh at this step: those with a flag in a part that has begun since the step `before`, at which the layer
    attended last (None: the one before this), or by the step at which they last did."""
    if gate is not None:
        return [bool(each) for each in gate[begun(now, len(gate), before)].any(0)]
    return [now[0] - last >= every for last in refreshed]
