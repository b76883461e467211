"""The numbers of a transformer that a plan must match."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """Self-attention layers, heads of each, and channels of a head."""

    layers: int
    heads: int
    head_dim: int
