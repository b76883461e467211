"""What a stage may know about where it is called."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from diffusers_accel.layout import TokenLayout


@dataclass(frozen=True)
class Context:
    """One group of heads of one self-attention layer.

    Args:
        layout: the geometry of the running call.
        transformer: the pipeline's name of the model, "transformer" or "transformer_2".
        layer: index of the self-attention layer in that model.
        heads: which heads of the layer are meant, in the order of the result.
        tensors: the plan's side file, by name.
        now: (step, steps) of the running call, None where nobody says.
    """

    layout: TokenLayout
    transformer: str
    layer: int
    heads: tuple[int, ...]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    now: tuple[int, int] | None = None
