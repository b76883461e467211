"""The mean error of each head, over the video's tokens and a search's prompts, is taken off its output.

Part of what a sparse head does wrong is alike for all queries: one constant vector, which is taken to change little from prompt
to prompt and from step to step of a span. So one vector for each head and span is measured, and subtracted at the cost of one
addition. How much that is worth says docs/search.md; no paper is known to do it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from diffusers_accel.files import FileError, quoted
from diffusers_accel.methods.correct import Correct
from diffusers_accel.methods.uses import Tensors, planned
from diffusers_accel.shape import ModelShape


@dataclass(frozen=True)
class MeanError(Correct):
    """Each head's mean error in the span that runs is subtracted from its output at the queries of the video. It is the tensor
    `mean_error/<transformer>` of the plan, fp32 [spans, layers, heads, head_dim]."""

    kind: ClassVar[str] = "mean_error"

    @property
    def label(self) -> str:
        return "mean error"

    @staticmethod
    def tensor(transformer: str) -> str:
        """The name of a transformer's tensor."""
        return f"mean_error/{transformer}"

    def check(self, transformer: str, shape: ModelShape, spans: int, tensors: Tensors) -> None:
        name, wanted = self.tensor(transformer), (spans, shape.layers, shape.heads, shape.head_dim)
        if name not in tensors:
            found = quoted(sorted(tensors))[1:-1] or "none"
            raise FileError(
                f"tensors: expected {quoted(name)}, which the correction reads, found {found}; search the plan again, or "
                'set its "correct" to null'
            )
        tensor = tensors[name]
        if tensor.dtype != torch.float32 or tuple(tensor.shape) != wanted:
            raise FileError(
                f"tensors.{name}: expected float32 [{spans} spans, {shape.layers} layers, {shape.heads} heads, "
                f"{shape.head_dim} channels], found {tensor.dtype} {list(tensor.shape)}"
            )
        if not bool(tensor.isfinite().all()):
            raise FileError(f"tensors.{name}: expected finite numbers, found NaN or infinity")

    def offset(self, span: int, place: tuple[str, int], tensors: Tensors) -> Tensor:
        transformer, layer = place
        return -planned(tensors, self.tensor(transformer), self.label)[span, layer]
