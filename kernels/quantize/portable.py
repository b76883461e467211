"""Quantization in Triton: a pass over k for its mean (and one over v for its largest values), then one over each tensor.

The functions on tiles are shared with `prep`, which reads its rows through an index.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_accel.kernels import hardware
from diffusers_accel.kernels.pool import pool
from diffusers_accel.kernels.quantize.quantized import (
    FP8_MAX,
    FP8_TOKENS,
    INT8_MAX,
    KEY_GROUP,
    SMALLEST,
    Quantized,
    mean_of_blocks,
)
from diffusers_accel.kernels.rows import rows_at, rows_in_eights

TOKENS = KEY_GROUP  # of one program, so that a group of keys is in one place


def refuses(device: torch.device, dtype: torch.dtype, precision: str) -> str | None:
    """Why this implementation cannot run there, or None."""
    reason = hardware.refuses(device, dtype)
    if reason is None and precision == "int8_fp8" and device.type == "cuda" and hardware.capability(device) < 89:
        found = "ROCm" if torch.version.hip is not None else hardware.capability(device) / 10
        return f"FP8 (e4m3) needs CUDA and compute capability 8.9 or newer, found {found}"
    return reason


def quantize(
    q: Tensor, k: Tensor, v: Tensor, precision: str, block: int, valid: Tensor | None, k_mean: Tensor | None
) -> Quantized:
    """The codes and scales; the arguments have been checked by the caller."""
    batch, queries, heads, dim = q.shape
    keys, key_heads = k.shape[1:3]
    if k_mean is None:
        k_mean = mean_of_blocks(pool(k, block, valid, impl="portable"), keys, block, valid)
    result = empty(q.shape, keys, q.dtype, precision, k_mean.contiguous(), v)
    sizes = {"DIM": dim, "PADDED_DIM": triton.next_power_of_2(dim), "TOKENS": TOKENS, "num_warps": 4}
    chunks = triton.cdiv(keys, TOKENS)
    with hardware.on(q.device):
        quantize_queries_kernel[(triton.cdiv(queries, TOKENS) * heads * batch,)](
            q, result.k_mean, result.q, result.q_scale, result.offset, *q.stride(), queries, heads,
            INT8_MAX=INT8_MAX, SMALLEST=SMALLEST, HEAD_GROUP=heads // key_heads, EIGHTS=rows_in_eights(q), **sizes,
        )  # fmt: skip
        quantize_keys_kernel[(chunks * key_heads * batch,)](
            k, result.k_mean, valid, result.k, result.k_scale, *k.stride(), keys, key_heads, block,
            INT8_MAX=INT8_MAX, SMALLEST=SMALLEST, EIGHTS=rows_in_eights(k), **sizes,
        )  # fmt: skip
        if result.v_scale is not None:
            largest = torch.empty(batch, chunks, key_heads, dim, dtype=torch.float32, device=v.device)
            largest_values_kernel[(chunks * key_heads * batch,)](
                v, valid, largest, *v.stride(), keys, key_heads, block, EIGHTS=rows_in_eights(v), **sizes,
            )  # fmt: skip
            result.v_scale.copy_(fp8_scale(largest))
            quantize_values_kernel[(chunks * key_heads * batch,)](
                v, valid, result.v_scale, result.v, *v.stride(), result.v.stride(3), keys, key_heads, block,
                EIGHTS=rows_in_eights(v), **sizes,
            )  # fmt: skip
    return result


def empty(
    shape: tuple[int, ...], keys: int, dtype: torch.dtype, precision: str, k_mean: Tensor, v: Tensor | None = None
) -> Quantized:
    """Room for the codes and scales of q of this shape; `v` is what stays as it is, None has room for that, too."""
    batch, queries, heads, dim = shape
    key_heads = k_mean.shape[1]

    def room(*size: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(size, dtype=of, device=k_mean.device)

    v_scale = None
    if precision == "int8_fp8":
        v_scale = room(batch, key_heads, dim)
        channels = room(batch, key_heads, dim, triton.cdiv(keys, FP8_TOKENS) * FP8_TOKENS, of=torch.float8_e4m3fn)
        v = channels[..., :keys].permute(0, 3, 1, 2)
    return Quantized(
        precision,
        dtype,
        room(*shape, of=torch.int8),
        room(batch, keys, key_heads, dim, of=torch.int8),
        room(batch, keys, key_heads, dim, of=dtype) if v is None else v,
        room(batch, heads, queries),
        room(batch, key_heads, triton.cdiv(keys, KEY_GROUP)),
        v_scale,
        k_mean,
        room(batch, heads, queries),
    )


def fp8_scale(largest: Tensor) -> Tensor:
    """The scales `[B, H, D]` of v from the largest values of its chunks, `[B, chunks, H, D]`, inf where one is not finite."""
    largest = largest.amax(1)
    return torch.where(largest < torch.inf, largest.clamp(min=SMALLEST) / FP8_MAX, torch.nan)


@triton.jit
def size_of(x):
    """|x|, infinite for NaN, which the maximum of a GPU would leave out."""
    return tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf"))


@triton.jit
def int8_scale(largest, INT8_MAX: tl.constexpr, SMALLEST: tl.constexpr):
    """The scale of groups with such a largest size; NaN where that is infinite."""
    return tl.where(largest < float("inf"), tl.maximum(largest, SMALLEST) / INT8_MAX, float("nan"))


@triton.jit
def int8_codes(x, scale):
    """The nearest codes, halves upwards; 0 where the scale is NaN."""
    return tl.where(scale == scale, tl.floor(x * (1 / scale) + 0.5), 0.0).to(tl.int8)


@triton.jit
def existing(token, tokens, block, valid_ptr):
    """Which tokens exist: those within the sequence and, unless `valid_ptr` is None, at the start of their block."""
    exists = token < tokens
    if valid_ptr is not None:
        exists = exists & (token % block < tl.load(valid_ptr + token // block, mask=exists, other=0))
    return exists


@triton.jit
def store_queries(
    q, mean, codes_ptr, scale_ptr, offset_ptr, batch, token, head, queries, heads,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, INT8_MAX: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Codes `[B, S, H, DIM]` of some queries of a head, a scale for each, and its product with the keys' mean."""
    column = tl.arange(0, PADDED_DIM)
    inside = (token[:, None] < queries) & (column[None, :] < DIM)
    scale = int8_scale(tl.max(size_of(q), 1), INT8_MAX, SMALLEST)
    codes_at = codes_ptr + ((batch * queries + token[:, None]) * heads + head) * DIM + column[None, :]
    tl.store(codes_at, int8_codes(q, scale[:, None]), mask=inside)
    line = (batch * heads + head) * queries + token
    tl.store(scale_ptr + line, scale, mask=token < queries)
    tl.store(offset_ptr + line, tl.sum(q * mean[None, :], 1), mask=token < queries)


@triton.jit
def store_keys(
    k, mean, exists, codes_ptr, scale_ptr, batch, group, token, head, keys, heads,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, INT8_MAX: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Codes `[B, S, H, DIM]` of a group of keys of a head, less their mean, and its scale."""
    column = tl.arange(0, PADDED_DIM)
    k = tl.where(exists, k - mean[None, :], 0.0)
    scale = int8_scale(tl.max(tl.max(size_of(k), 1), 0), INT8_MAX, SMALLEST)
    codes_at = codes_ptr + ((batch * keys + token[:, None]) * heads + head) * DIM + column[None, :]
    tl.store(codes_at, int8_codes(k, scale), mask=(token[:, None] < keys) & (column[None, :] < DIM))
    groups = tl.cdiv(keys, token.shape[0])
    tl.store(scale_ptr + (batch * heads + head) * groups + group, scale)


@triton.jit
def store_values(
    v, scale_ptr, codes_ptr, codes_stride_d, batch, token, head, heads,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """FP8 codes of some values of a head, divided by the scale of their channel, with the tokens beside each other.

    A channel is `codes_stride_d` tokens long, a multiple of 16, and filled up with zeros, so that stores are of 16 bytes.
    """
    column = tl.arange(0, PADDED_DIM)
    line = (batch * heads + head) * DIM + column
    scale = tl.load(scale_ptr + line, mask=column < DIM, other=1.0)
    codes_at = codes_ptr + line[None, :] * codes_stride_d + token[:, None]
    stored = (token[:, None] < codes_stride_d) & (column[None, :] < DIM)
    tl.store(codes_at, (v * (1 / scale)[None, :]).to(tl.float8e4nv), mask=stored)


@triton.jit
def quantize_queries_kernel(
    q_ptr, mean_ptr, codes_ptr, scale_ptr, offset_ptr, stride_b, stride_s, stride_h, stride_d, queries, heads,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TOKENS: tl.constexpr,
    INT8_MAX: tl.constexpr, SMALLEST: tl.constexpr, HEAD_GROUP: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """TOKENS queries of one head, of which HEAD_GROUP share one of the keys."""
    chunks = tl.cdiv(queries, TOKENS)
    head = (tl.program_id(0) % heads).to(tl.int64)
    token = tl.program_id(0) // heads % chunks * TOKENS + tl.arange(0, TOKENS)
    batch = (tl.program_id(0) // heads // chunks).to(tl.int64)
    column = tl.arange(0, PADDED_DIM)
    inside = (token[:, None] < queries) & (column[None, :] < DIM)
    q_at = rows_at(q_ptr, batch, token[:, None].to(tl.int64), head, stride_b, stride_s, stride_h, EIGHTS)
    q = tl.load(q_at + column[None, :] * stride_d, mask=inside, other=0.0).to(tl.float32)
    key_line = batch * (heads // HEAD_GROUP) + head // HEAD_GROUP
    mean = tl.load(mean_ptr + key_line * DIM + column, mask=column < DIM, other=0.0)
    store_queries(
        q, mean, codes_ptr, scale_ptr, offset_ptr, batch, token, head, queries, heads,
        DIM, PADDED_DIM, INT8_MAX, SMALLEST,
    )  # fmt: skip


@triton.jit
def quantize_keys_kernel(
    k_ptr, mean_ptr, valid_ptr, codes_ptr, scale_ptr, stride_b, stride_s, stride_h, stride_d, keys, heads, block,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TOKENS: tl.constexpr,
    INT8_MAX: tl.constexpr, SMALLEST: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """A group of TOKENS keys of one head."""
    groups = tl.cdiv(keys, TOKENS)
    head = (tl.program_id(0) % heads).to(tl.int64)
    group = tl.program_id(0) // heads % groups
    batch = (tl.program_id(0) // heads // groups).to(tl.int64)
    token = group * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, PADDED_DIM)
    exists = existing(token, keys, block, valid_ptr)[:, None] & (column[None, :] < DIM)
    k_at = rows_at(k_ptr, batch, token[:, None].to(tl.int64), head, stride_b, stride_s, stride_h, EIGHTS)
    k = tl.load(k_at + column[None, :] * stride_d, mask=exists, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + (batch * heads + head) * DIM + column, mask=column < DIM, other=0.0)
    store_keys(
        k, mean, exists, codes_ptr, scale_ptr, batch, group, token, head, keys, heads,
        DIM, PADDED_DIM, INT8_MAX, SMALLEST,
    )  # fmt: skip


@triton.jit
def largest_values_kernel(
    v_ptr, valid_ptr, largest_ptr, stride_b, stride_s, stride_h, stride_d, keys, heads, block,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TOKENS: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """The largest size in each channel of a chunk of TOKENS values of one head: `[B, chunks, H, DIM]`."""
    chunks = tl.cdiv(keys, TOKENS)
    head = (tl.program_id(0) % heads).to(tl.int64)
    chunk = tl.program_id(0) // heads % chunks
    batch = (tl.program_id(0) // heads // chunks).to(tl.int64)
    token = chunk * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, PADDED_DIM)
    exists = existing(token, keys, block, valid_ptr)[:, None] & (column[None, :] < DIM)
    v_at = rows_at(v_ptr, batch, token[:, None].to(tl.int64), head, stride_b, stride_s, stride_h, EIGHTS)
    v = tl.load(v_at + column[None, :] * stride_d, mask=exists, other=0.0).to(tl.float32)
    largest_at = largest_ptr + ((batch * chunks + chunk) * heads + head) * DIM + column
    tl.store(largest_at, tl.max(size_of(v), 0), mask=column < DIM)


@triton.jit
def quantize_values_kernel(
    v_ptr, valid_ptr, scale_ptr, codes_ptr, stride_b, stride_s, stride_h, stride_d, codes_stride_d, keys, heads, block,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TOKENS: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """TOKENS values of one head."""
    chunks = tl.cdiv(keys, TOKENS)
    head = (tl.program_id(0) % heads).to(tl.int64)
    token = tl.program_id(0) // heads % chunks * TOKENS + tl.arange(0, TOKENS)
    batch = (tl.program_id(0) // heads // chunks).to(tl.int64)
    column = tl.arange(0, PADDED_DIM)
    exists = existing(token, keys, block, valid_ptr)[:, None] & (column[None, :] < DIM)
    v_at = rows_at(v_ptr, batch, token[:, None].to(tl.int64), head, stride_b, stride_s, stride_h, EIGHTS)
    v = tl.load(v_at + column[None, :] * stride_d, mask=exists, other=0.0).to(tl.float32)
    store_values(v, scale_ptr, codes_ptr, codes_stride_d, batch, token, head, heads, DIM, PADDED_DIM)
