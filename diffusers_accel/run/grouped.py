"""Grouped queries: several heads that share one head of keys and values (GQA)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffusers_accel.kernels.pattern import head_index


def key_heads(heads: Sequence[int], of: int, keys: int) -> tuple[int, ...]:
    """Which head of the keys each of these heads reads, in a model of `of` heads with `keys` heads of keys."""
    return tuple(head // (of // keys) for head in heads)


def of_heads(x: Tensor, heads: Sequence[int], of: int) -> Tensor:
    """Keys or values for these heads of a model of `of` heads, one for each; itself where that is what it holds.

    Args:
        x: [..., S, key heads, D], all key heads of the model.
    """
    keys = x.shape[-2]
    if keys == of and len(heads) == of and tuple(heads) == tuple(range(of)):
        return x
    return x.index_select(-2, head_index(key_heads(heads, of, keys), x.device))
