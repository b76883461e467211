"""Which heads compute a part of their attention anew at a step, and which reuse what an earlier step left of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Gate:
    """When each head recomputes what is cached of it; at all other steps it reuses that.

    Made by `every`, `table` or `never`. A head of which nothing is cached computes, whatever its gate says.

    Args:
        interval: every head recomputes at steps 0, n, 2n, ...; None without such an interval.
        flags: bool `[steps, layers, heads]` on the cpu, True recomputes; None without a table.
    """

    interval: int | None = None
    flags: Tensor | None = None

    def __post_init__(self) -> None:
        if self.interval is not None and self.flags is not None:
            raise ValueError("a gate has an interval or a table, found both")
        if self.interval is not None and self.interval < 1:
            raise ValueError(f"the interval of a gate is a positive number of steps, found {self.interval}")
        flags = self.flags
        if flags is not None and (flags.dtype != torch.bool or flags.dim() != 3 or 0 in flags.shape):
            raise ValueError(
                f"the table of a gate must be bool [steps, layers, heads], found {flags.dtype} {list(flags.shape)}"
            )

    @classmethod
    def every(cls, interval: int) -> Gate:
        """Every head recomputes at steps 0, n, 2n, ...; 1 never reuses."""
        return cls(interval=interval)

    @classmethod
    def table(cls, flags: Tensor) -> Gate:
        """Head h of layer l recomputes at step s where `flags[s, l, h]`, bool `[steps, layers, heads]`; they are copied."""
        return cls(flags=flags.detach().cpu().clone())

    @classmethod
    def never(cls) -> Gate:
        """Nothing that is cached is recomputed."""
        return cls()

    def recomputes(self, step: int, layer: int, heads: int) -> tuple[int, ...]:
        """The heads of a layer of `heads` heads that recompute at a step, ascending.

        Raises:
            ValueError: the step is negative, or the table has no such step or layer, or another number of heads.
        """
        self._check(step, layer, heads)
        if self.flags is not None:
            return _true(self.flags[step, layer])
        return tuple(range(heads)) if self.interval is not None and step % self.interval == 0 else ()

    def reusable(self, step: int, layer: int, heads: int) -> tuple[int, ...]:
        """The heads that may reuse at some step after this one: those worth caching now, ascending.

        Raises:
            ValueError: as `recomputes`.
        """
        self._check(step, layer, heads)
        if self.flags is not None:
            return _true(~self.flags[step + 1 :, layer].all(0))
        return () if self.interval == 1 else tuple(range(heads))

    def _check(self, step: int, layer: int, heads: int) -> None:
        if step < 0:
            raise ValueError(f"steps count from 0, found {step}")
        if self.flags is None:
            return
        steps, layers, expected = self.flags.shape
        if step >= steps or not 0 <= layer < layers or heads != expected:
            raise ValueError(
                f"the gate is a table of {steps} steps, {layers} layers and {expected} heads, found step {step}, "
                f"layer {layer} and {heads} heads; calibrate it for this model and schedule"
            )


def _true(flags: Tensor) -> tuple[int, ...]:
    return tuple(flags.nonzero()[:, 0].tolist())
