"""All that is particular to a model family, mostly data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from diffusers_accel.layout import TokenLayout
from diffusers_accel.shape import ModelShape

Observation = tuple[int, ...]


@dataclass(frozen=True)
class Family:
    """How to find the self-attention of a transformer class and how its tokens lie.

    Args:
        name: as plans spell it, such as "wan".
        transformer: module-qualified name of the transformer class (class names repeat across diffusers' modules).
        attention_call: the global name through which the stock processor calls attention.
        self_attention: transformer -> its self-attention modules with their names, in layer order.
        shape: transformer -> layers, heads and head dim.
        observe: (args, kwargs) of the transformer's forward -> the sizes that `layout` needs. Traced by torch.compile, so
            plain arithmetic on shapes only.
        layout: (transformer's config, observation) -> TokenLayout.
        output_projection: attention module -> its output linear; columns h * head_dim : (h + 1) * head_dim belong to head h.
    """

    name: str
    transformer: str
    attention_call: str
    self_attention: Callable[[nn.Module], list[tuple[str, nn.Module]]]
    shape: Callable[[nn.Module], ModelShape]
    observe: Callable[[tuple[Any, ...], Mapping[str, Any]], Observation]
    layout: Callable[[Any, Observation], TokenLayout]
    output_projection: Callable[[nn.Module], nn.Linear]
