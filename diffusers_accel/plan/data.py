"""The fields of a plan, for what checks, writes and reads them; `Plan` makes them whole."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffusers_accel.forwards import Forwards
from diffusers_accel.methods import Correct, Method
from diffusers_accel.plan.span import Span
from diffusers_accel.shape import ModelShape


@dataclass(frozen=True, eq=False)
class PlanData:
    """See `Plan`."""

    family: str
    models: dict[str, ModelShape]
    methods: dict[str, Method]
    spans: tuple[Span, ...]
    budget: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    forwards: Forwards | None = None
    correct: Correct | None = None
