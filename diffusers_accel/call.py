"""One call of attention: what is known of it when it begins, handed down from the model's processor to the kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from diffusers_accel.layout import TokenLayout

DenseAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """Where and when some heads of one self-attention layer attend.

    Args:
        layout: how the tokens lie.
        transformer: the pipeline's name of the model, "transformer" or "transformer_2".
        layer: number of the self-attention layer in that model.
        heads: numbers in the model of the heads that are meant, in the order of the result: what a plan's tensors are indexed by.
            q and the output hold these and no others, at places 0, 1, ...
        branch: the pass of guidance that runs, such as "cond": what is kept of an earlier step is that branch's alone.
        rows: (start, stop) of the model's batch rows that q, k and v hold.
        now: (step, steps) of the running generation, of the steps that run; None where nobody says.
        sigma: noise level of that step in flow matching, from 1 (noise alone) to 0; None where nobody says, or the scheduler has
            another measure.
        dense: the attention that the user has chosen for the model, q [B, queries, H, D], k and v [B, keys, H_k, D] -> out like
            q, for any number of heads of which the key heads are a divisor. None where only masks are asked for.
    """

    layout: TokenLayout
    transformer: str = ""
    layer: int = 0
    heads: tuple[int, ...] = (0,)
    branch: str = ""
    rows: tuple[int, int] = (0, 1)
    now: tuple[int, int] | None = None
    sigma: float | None = None
    dense: DenseAttention | None = None

    def of(self, heads: Sequence[int]) -> AttentionCall:
        """The same for some of the heads."""
        return self if self.heads == heads else replace(self, heads=tuple(heads))

    @property
    def place(self) -> tuple[str, int]:
        """Which layer of which transformer."""
        return self.transformer, self.layer

    @cached_property
    def stream(self) -> tuple[str, tuple[int, int]]:
        """Of which branch and batch rows: what is kept is theirs alone."""
        return self.branch, self.rows
