"""What attention needs of q, k, v, from one pass over them: the launch's heads in their orders, block means, and codes.

Each head of a launch may lie in an order of its own, a selection wants the means of blocks in that order, and quantized
products want codes in it. Done apart, each of these reads and writes q, k and v again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_accel.kernels.attention import PRECISIONS
from diffusers_accel.kernels.checks import check_k_mean, check_qkv, check_row_numbers, check_rows
from diffusers_accel.kernels.choice import Operator
from diffusers_accel.kernels.quantize import KEY_GROUP, Quantized

__all__ = ["Prepared", "prep"]

_operator = Operator(__name__, ("portable", "reference"))


@dataclass(frozen=True, eq=False)
class Prepared:
    """Some heads in their orders.

    Args:
        operands: q `[B, S_q, h, D]`, k and v `[B, S_k, h, D]` for `attention`, or their codes for `quantized_attention`.
        means: fp32 `[B, ceil(S_q / block), h, D]`, the mean of each block of queries, as `pool` has it, and
            `[B, ceil(S_k / block), h, D]`, of the keys, with their mean; None where nobody asked for them.
    """

    operands: tuple[Tensor, Tensor, Tensor] | Quantized
    means: tuple[Tensor, Tensor] | None


def prep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    heads: int,
    *,
    key_rows: Tensor | None = None,
    precision: str = "input",
    pooled: bool = True,
    block: int = 128,
    k_mean: Tensor | None = None,
    impl: str = "auto",
) -> Prepared:
    """Gathers the heads of a launch and, in the same pass, pools and quantizes them.

    Args:
        q: `[B, S_q, H, D]`, fp16, bf16 or fp32, any strides, in the model's order.
        k, v: `[B, S_k, H_k, D]`, dtype and device of q; H_k divides H. Without `key_rows` S_k <= S_q.
        rows: int64 or int32 `[S_q * heads]`: place s of launch head j takes row `rows[s * heads + j]` of q seen as
            `[S_q * H]` rows. The first S_k places of keys and values take theirs by the same numbers, which therefore
            must name their S_k tokens. Where queries are grouped, that is the row of the key head that the query head
            reads: heads of a group may lie in different orders, so each gets keys and values of its own.
        heads: h, of the launch; any of the H.
        key_rows: of the dtype of rows, `[S_k * heads]`: what keys and values take instead, of k and v seen as `[S_k * H_k]`
            rows. For calls with fewer queries than keys, or fewer key heads than heads, which come out one for each head.
        precision: one of `attention.PRECISIONS`; all but `input` make codes.
        pooled: whether the means of the blocks are wanted.
        block: tokens per block, a multiple of `KEY_GROUP`.
        k_mean: fp32 `[B, h, D]`, what is subtracted from the keys before they become codes; None means their mean,
            which costs a pass over k of its own.
        impl: `auto`, `portable` or `reference`; an explicit one is obeyed or refused.

    Raises:
        ValueError: shapes, dtypes, devices or names do not fit, or the implementation asked for cannot run; with
            `DIFFUSERS_ACCEL_CHECKS=1` in the environment also when a row lies outside of q or k.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, found {precision!r}")
    check_qkv(q, k, v)
    batch, queries, _, dim = q.shape
    if key_rows is None and k.shape[1] > queries:
        raise ValueError(
            f"k and v must have 1..{queries} tokens, as many as q or fewer, found {k.shape[1]}: give key_rows for more"
        )
    if block < 1 or block % KEY_GROUP:
        raise ValueError(f"block must be a multiple of {KEY_GROUP} tokens, found {block}")
    check_row_numbers("rows", rows, queries, heads, (torch.int64, torch.int32), q.device)
    if key_rows is not None:
        check_row_numbers("key_rows", key_rows, k.shape[1], heads, (rows.dtype,), q.device)
    check_k_mean(k_mean, (batch, heads, dim), q.device)
    check_rows("q", rows, queries * q.shape[2])
    if key_rows is None:
        check_rows("k", rows[: k.shape[1] * heads], k.shape[1] * q.shape[2])
    else:
        check_rows("k", key_rows, k.shape[1] * k.shape[2])
    with torch.no_grad():
        module = _operator.choose(impl, q.device, q.dtype, precision)
        return module.prep(q, k, v, rows, key_rows, heads, precision, pooled, block, k_mean)
