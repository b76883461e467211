"""What own processors share: projections of a stream into heads."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def heads_of(attn: Any, x: Tensor, linear: Any, norm: Any = None) -> Tensor:
    """x [B, tokens, channels] through a linear map, as heads of an attention module [B, tokens, heads, head_dim], normed."""
    split: Tensor = linear(x).unflatten(2, (attn.heads, -1))
    return split if norm is None else norm(split)
