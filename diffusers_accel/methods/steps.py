"""A method from step to step: when it selects anew, and what it reads while it does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from diffusers_accel.kernels.pattern import BlockPattern, head_flags
from diffusers_accel.methods.cycle import due
from diffusers_accel.methods.method import Method
from diffusers_accel.methods.rest import CacheEntry, RefreshDecision


def decide(
    method: Method, heads: int, held: CacheEntry | None, now: tuple[int, int], gate: Tensor | None, before: int | None
) -> RefreshDecision:
    """What a group does at a step.

    Args:
        heads: how many it has.
        held: what it remembers; None at the first step.
        now: (step, steps).
        gate: of its heads, see `Rest.gate`.
        before: the step at which the layer attended last; None: the one before this.
    """
    if held is None:
        return RefreshDecision(now[0], None, [True] * heads if method.rest.remembers else [])
    return RefreshDecision(now[0], held, method.rest.due(held, now, gate, before))


def selects(method: Method, decision: RefreshDecision) -> bool:
    """Whether blocks are selected anew at this step."""
    if decision.held is None:
        return True
    if method.rest.remembers:
        return any(decision.refresh)
    return due(decision.step - decision.held.selected, method.select.reselect_every)


def read_blocks(method: Method, decision: RefreshDecision, select: Callable[[], BlockPattern]) -> BlockPattern:
    """What a group reads at this step: what `select` gives, what it has held, or per head the one or the other."""
    held = decision.held
    if held is None:
        return select()
    if not selects(method, decision):
        return held.pattern  # also where the plan's mask has changed since: what is kept is the rest of the held one
    return select() if all(decision.refresh) else mixed(select(), held.pattern, decision.refresh)


def mixed(fresh: BlockPattern, held: BlockPattern, take_fresh: Sequence[bool]) -> BlockPattern:
    """Per head the fresh or the held lists."""
    chosen = head_flags(tuple(take_fresh), fresh.device)
    capacity = max(fresh.blocks.shape[3], held.blocks.shape[3])
    fresh_blocks, held_blocks = (
        torch.nn.functional.pad(each.blocks, (0, capacity - each.blocks.shape[3])) for each in (fresh, held)
    )
    return replace(
        fresh,
        blocks=torch.where(chosen[:, None, None], fresh_blocks, held_blocks),
        counts=torch.where(chosen[:, None], fresh.counts, held.counts),
    )
