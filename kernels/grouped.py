"""Grouped queries: k and v may have fewer heads than q. Query head h of H reads key head h // (H // H_k)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffusers_accel.kernels.pattern import head_index


def check_key_heads(name: str, x: Tensor, heads: int) -> None:
    """x `[B, S, H_k, D]` has heads that divide the `heads` of q; other shapes than that are not looked at."""
    if x.dim() == 4 and 0 not in x.shape and heads % x.shape[2]:
        raise ValueError(
            f"{name} must have a number of heads that divides the {heads} of q, so that as many heads of q read each "
            f"of them, found {x.shape[2]} in {list(x.shape)}"
        )


def each_query_head(x: Tensor, heads: int, dim: int = 2) -> Tensor:
    """The head that each of the `heads` of q reads, of those in `dim` of x: x itself where they are as many, else a copy."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)


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
