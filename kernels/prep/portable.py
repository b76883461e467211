"""Preparation in one Triton pass over q, k and v; before it one over k for its mean, and v for FP8, where codes are made."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_accel.kernels import hardware
from diffusers_accel.kernels.prep import Prepared
from diffusers_accel.kernels.quantize.portable import (
    empty,
    fp8_scale,
    refuses,
    size_of,
    store_keys,
    store_queries,
    store_values,
)
from diffusers_accel.kernels.quantize.quantized import INT8_MAX, KEY_GROUP, SMALLEST, Quantized, mean_of_blocks
from diffusers_accel.kernels.rows import rows_at, rows_in_eights

__all__ = ["prep", "refuses"]


def prep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    key_rows: Tensor | None,
    heads: int,
    precision: str,
    pooled: bool,
    block: int,
    k_mean: Tensor | None,
) -> Prepared:
    """The launch's heads; the arguments have been checked by the caller."""
    batch, queries, model_heads, dim = q.shape
    keys = k.shape[1]

    def per_block(tokens: int) -> Tensor:
        return torch.empty(batch, triton.cdiv(tokens, block), heads, dim, dtype=torch.float32, device=q.device)

    def per_token(x: Tensor) -> Tensor:
        return torch.empty(batch, x.shape[1], heads, dim, dtype=x.dtype, device=x.device)

    measured = precision != "input" and k_mean is None
    q_means = per_block(queries) if pooled else None
    k_means = per_block(keys) if pooled or measured else None
    largest = per_block(keys) if precision == "int8_fp8" else None
    sizes = {"DIM": dim, "PADDED_DIM": triton.next_power_of_2(dim), "BLOCK": block, "TOKENS": KEY_GROUP, "num_warps": 8}
    # Rows of their own count the key heads; those that queries take count the heads, of which some share a key head.
    key_heads = model_heads if key_rows is None else k.shape[2]
    sizes["HEAD_GROUP"] = key_heads // k.shape[2]
    sizes["EIGHTS"] = rows_in_eights(q) and rows_in_eights(k) and rows_in_eights(v)
    with hardware.on(q.device):
        if measured or largest is not None:
            measure_kernel[(triton.cdiv(keys, block) * heads * batch,)](
                k, v, rows if key_rows is None else key_rows, k_means if measured else None, largest,
                *k.stride(), *v.stride(), keys, heads, key_heads, **sizes,
            )  # fmt: skip
        codes: Quantized | None = None
        if precision == "input":
            outs = per_token(q), per_token(k), per_token(v)
        else:
            if k_mean is None:
                assert k_means is not None
                k_mean = mean_of_blocks(k_means, keys, block, None)
            codes = empty((batch, queries, heads, dim), keys, q.dtype, precision, k_mean.contiguous())
            outs = codes.q, codes.k, codes.v
            if codes.v_scale is not None and largest is not None:
                codes.v_scale.copy_(fp8_scale(largest))
        scales = (codes.q_scale, codes.k_scale, codes.v_scale, codes.offset) if codes else (None,) * 4
        prep_kernel[(triton.cdiv(max(queries, keys), block) * heads * batch,)](
            q, k, v, rows, key_rows, codes and codes.k_mean, *outs, *scales, q_means, None if measured else k_means,
            *q.stride(), *k.stride(), *v.stride(), outs[2].stride(3), queries, keys, heads, model_heads, key_heads,
            INT8_MAX=INT8_MAX, SMALLEST=SMALLEST, **sizes,
        )  # fmt: skip
    return Prepared(codes or outs, (q_means, k_means) if q_means is not None and k_means is not None else None)


@triton.jit
def gathered(
    x_ptr, row, exists, model_heads, batch, stride_b, stride_s, stride_h, stride_d,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, HEAD_GROUP: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """The rows of x, seen as `[S * model_heads]` rows, of which those that do not exist are 0.

    HEAD_GROUP of these heads share one of x.
    """
    column = tl.arange(0, PADDED_DIM)
    # 32 bits are enough for a number of rows and much faster to divide.
    token, head = (
        (row.to(tl.int32) // model_heads).to(tl.int64),
        (row.to(tl.int32) % model_heads // HEAD_GROUP).to(tl.int64),
    )
    at = rows_at(x_ptr, batch, token, head, stride_b, stride_s, stride_h, EIGHTS)
    inside = exists[:, None] & (column[None, :] < DIM)
    return tl.load(at[:, None] + column[None, :] * stride_d, mask=inside, other=0.0)


@triton.jit
def measure_kernel(
    k_ptr, v_ptr, rows_ptr, k_means_ptr, largest_ptr,
    k_stride_b, k_stride_s, k_stride_h, k_stride_d, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
    keys, heads, model_heads,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    HEAD_GROUP: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """One block of one head of the launch: the mean of its keys, the largest size in each channel of its values.

    `k_means_ptr` None and `largest_ptr` None leave one of these out.
    """
    blocks = tl.cdiv(keys, BLOCK)
    head = (tl.program_id(0) % heads).to(tl.int64)
    at = tl.program_id(0) // heads % blocks
    batch = (tl.program_id(0) // heads // blocks).to(tl.int64)
    column = tl.arange(0, PADDED_DIM)
    total = tl.zeros((PADDED_DIM,), tl.float32)
    largest = tl.zeros((PADDED_DIM,), tl.float32)
    for start in range(at * BLOCK, tl.minimum((at + 1) * BLOCK, keys), TOKENS):
        token = start + tl.arange(0, TOKENS)
        row = tl.load(rows_ptr + token.to(tl.int64) * heads + head, mask=token < keys, other=0)
        if k_means_ptr is not None:
            k = gathered(
                k_ptr, row, token < keys, model_heads, batch, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
                DIM, PADDED_DIM, HEAD_GROUP, EIGHTS,
            )  # fmt: skip
            total += tl.sum(k.to(tl.float32), 0)
        if largest_ptr is not None:
            v = gathered(
                v_ptr, row, token < keys, model_heads, batch, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
                DIM, PADDED_DIM, HEAD_GROUP, EIGHTS,
            )  # fmt: skip
            largest = tl.maximum(largest, tl.max(size_of(v.to(tl.float32)), 0))
    line = ((batch * blocks + at) * heads + head) * DIM + column
    if k_means_ptr is not None:
        tl.store(k_means_ptr + line, total / tl.minimum(keys - at * BLOCK, BLOCK), mask=column < DIM)
    if largest_ptr is not None:
        tl.store(largest_ptr + line, largest, mask=column < DIM)


@triton.jit
def prep_kernel(
    q_ptr, k_ptr, v_ptr, rows_ptr, key_rows_ptr, mean_ptr, q_out_ptr, k_out_ptr, v_out_ptr,
    q_scale_ptr, k_scale_ptr, v_scale_ptr, offset_ptr, q_means_ptr, k_means_ptr,
    q_stride_b, q_stride_s, q_stride_h, q_stride_d, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
    v_stride_b, v_stride_s, v_stride_h, v_stride_d, v_out_stride_d,
    queries, keys, heads, model_heads, key_heads,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    INT8_MAX: tl.constexpr, SMALLEST: tl.constexpr, HEAD_GROUP: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """One block of one head of the launch: its queries, and its keys and values, where there are any.

    `key_rows_ptr` None: keys take the rows that queries take. `mean_ptr` None leaves them what they are, `v_scale_ptr` None the
    values; a `q_means_ptr` or `k_means_ptr` of None: these means are not wanted, or are there.
    """
    blocks = tl.cdiv(tl.maximum(queries, keys), BLOCK)
    head = (tl.program_id(0) % heads).to(tl.int64)
    at = tl.program_id(0) // heads % blocks
    batch = (tl.program_id(0) // heads // blocks).to(tl.int64)
    column = tl.arange(0, PADDED_DIM)
    if mean_ptr is not None:
        mean = tl.load(mean_ptr + (batch * heads + head) * DIM + column, mask=column < DIM, other=0.0)
    q_total = tl.zeros((PADDED_DIM,), tl.float32)
    k_total = tl.zeros((PADDED_DIM,), tl.float32)
    for start in range(at * BLOCK, tl.minimum((at + 1) * BLOCK, tl.maximum(queries, keys)), TOKENS):
        token = start + tl.arange(0, TOKENS)
        row = tl.load(rows_ptr + token.to(tl.int64) * heads + head, mask=token < queries, other=0)
        if start < queries:
            q = gathered(
                q_ptr, row, token < queries, model_heads, batch, q_stride_b, q_stride_s, q_stride_h, q_stride_d,
                DIM, PADDED_DIM, 1, EIGHTS,
            )  # fmt: skip
            if q_means_ptr is not None:
                q_total += tl.sum(q.to(tl.float32), 0)
            if mean_ptr is None:
                q_out_at = q_out_ptr + ((batch * queries + token[:, None]) * heads + head) * DIM + column[None, :]
                tl.store(q_out_at, q, mask=(token[:, None] < queries) & (column[None, :] < DIM))
            else:
                store_queries(
                    q.to(tl.float32), mean, q_out_ptr, q_scale_ptr, offset_ptr, batch, token, head, queries, heads,
                    DIM, PADDED_DIM, INT8_MAX, SMALLEST,
                )  # fmt: skip
        if start < keys:
            if key_rows_ptr is not None:
                row = tl.load(key_rows_ptr + token.to(tl.int64) * heads + head, mask=token < keys, other=0)
            inside = (token[:, None] < keys) & (column[None, :] < DIM)
            out_at = ((batch * keys + token[:, None]) * heads + head) * DIM + column[None, :]
            k = gathered(
                k_ptr, row, token < keys, key_heads, batch, k_stride_b, k_stride_s, k_stride_h, k_stride_d,
                DIM, PADDED_DIM, HEAD_GROUP, EIGHTS,
            )  # fmt: skip
            if k_means_ptr is not None:
                k_total += tl.sum(k.to(tl.float32), 0)
            if mean_ptr is None:
                tl.store(k_out_ptr + out_at, k, mask=inside)
            else:
                store_keys(
                    k.to(tl.float32), mean, inside, k_out_ptr, k_scale_ptr, batch, start // TOKENS, token, head, keys, heads,
                    DIM, PADDED_DIM, INT8_MAX, SMALLEST,
                )  # fmt: skip
            v = gathered(
                v_ptr, row, token < keys, key_heads, batch, v_stride_b, v_stride_s, v_stride_h, v_stride_d,
                DIM, PADDED_DIM, HEAD_GROUP, EIGHTS,
            )  # fmt: skip
            if v_scale_ptr is None:
                tl.store(v_out_ptr + out_at, v, mask=inside)
            else:
                store_values(
                    v.to(tl.float32), v_scale_ptr, v_out_ptr, v_out_stride_d, batch, token, head, heads, DIM, PADDED_DIM,
                )  # fmt: skip
    if q_means_ptr is not None:
        query_blocks = tl.cdiv(queries, BLOCK)
        if at < query_blocks:
            q_line = ((batch * query_blocks + at) * heads + head) * DIM + column
            tl.store(q_means_ptr + q_line, q_total / tl.minimum(queries - at * BLOCK, BLOCK), mask=column < DIM)
    if k_means_ptr is not None:
        key_blocks = tl.cdiv(keys, BLOCK)
        if at < key_blocks:
            k_line = ((batch * key_blocks + at) * heads + head) * DIM + column
            tl.store(k_means_ptr + k_line, k_total / tl.minimum(keys - at * BLOCK, BLOCK), mask=column < DIM)
