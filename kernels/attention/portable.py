"""Block-sparse attention as one Triton launch for all batch rows, heads and query blocks, on any GPU that Triton knows.

FlashAttention-2's online softmax (Dao 2023, arXiv 2307.08691) over the key blocks that a list names. Pointer loads and
index lists only and no autotuning: tile sizes come from a table, which ahead-of-time compilation checks in the tests.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_accel.kernels import launch
from diffusers_accel.kernels.pattern import BlockPattern

LOG2_E = 1.4426950408889634


class Config(NamedTuple):
    """The tile of queries x keys that one program holds, and how it is compiled."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# (lowest compute capability, head dims up to, bytes per element). 128 queries a tile halve the key traffic of 64; the
# rest is what fits into shared memory and registers without spilling. Head dims that are padded need registers for it.
CONFIGS = {
    (80, 64, 2): Config(128, 64, 8, 3),
    (80, 127, 2): Config(128, 32, 8, 3),
    (80, 128, 2): Config(128, 64, 8, 3),
    (80, 64, 4): Config(32, 32, 8, 2),
    (80, 127, 4): Config(16, 16, 8, 2),
    (80, 128, 4): Config(32, 16, 8, 2),
    (89, 128, 2): Config(128, 64, 8, 2),
    (90, 127, 2): Config(128, 64, 8, 3),
    (90, 128, 2): Config(128, 64, 8, 3),
    (120, 127, 2): Config(128, 32, 8, 3),
    (120, 128, 2): Config(128, 64, 8, 2),
}


def config(capability: int, head_dim: int, dtype: torch.dtype, blocks: tuple[int, int]) -> Config:
    """The table's row for a compute capability (90 for Hopper), its tile cut to the (block_q, block_k) of the pattern."""
    dim = min(top for _, top, size in CONFIGS if size == dtype.itemsize and top >= head_dim)
    arch = max(arch for arch, top, size in CONFIGS if (top, size) == (dim, dtype.itemsize) and arch <= capability)
    best = CONFIGS[arch, dim, dtype.itemsize]
    # A tile is a power of two and never crosses the border of a block.
    largest_m, largest_n = (block & -block for block in blocks)
    return best._replace(block_m=min(best.block_m, largest_m), block_n=min(best.block_n, largest_n))


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int, blocks: tuple[int, int]) -> str | None:
    """Why this implementation cannot run there, or None."""
    reason = launch.refuses(device, dtype)
    if reason is not None:
        return reason
    if head_dim > 128 or head_dim % 8:
        return f"takes head dims up to 128 in multiples of 8, found {head_dim}"
    if blocks[0] % 16 or blocks[1] % 16:
        return f"takes pattern blocks in multiples of 16, found {blocks[0]} queries x {blocks[1]} keys"
    return None


def attention(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention over the blocks of the pattern; the arguments have been checked by the caller."""
    batch, queries, heads, dim = q.shape
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    blocks = counts = valid = None
    block_q, block_k, capacity, list_rows = 128, 128, 0, 1
    if pattern is not None:
        blocks, counts, valid = pattern.blocks.contiguous(), pattern.counts.contiguous(), pattern.valid
        block_q, block_k, capacity, list_rows = pattern.block_q, pattern.block_k, blocks.shape[3], blocks.shape[0]
    tile = config(launch.capability(q.device), dim, q.dtype, (block_q, block_k))
    tiles = triton.cdiv(queries, tile.block_m)
    with launch.on(q.device):
        attention_kernel[(batch * heads * tiles,)](
            q,
            k,
            v,
            out,
            lse,
            blocks,
            counts,
            valid,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            heads,
            queries,
            k.shape[1],
            list_rows,
            capacity,
            scale * LOG2_E,
            DIM=dim,
            PADDED_DIM=max(16, triton.next_power_of_2(dim)),
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out, lse


@triton.jit
def attend_tile(
    acc, total, top, q, k_ptr, v_ptr, k_stride, v_stride, tokens, qk_scale,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over BLOCK_N keys, of which the first `tokens` exist (all, unless MASKED)."""
    token = tl.arange(0, BLOCK_N)
    column = tl.arange(0, PADDED_DIM)
    k_at = k_ptr + token[None, :] * k_stride + column[:, None]
    v_at = v_ptr + token[:, None] * v_stride + column[None, :]
    exists = token < tokens
    if MASKED:
        k = tl.load(k_at, mask=exists[None, :] & (column[:, None] < DIM), other=0.0)
    elif DIM < PADDED_DIM:
        k = tl.load(k_at, mask=column[:, None] < DIM, other=0.0)
    else:
        k = tl.load(k_at)
    scores = tl.dot(q, k, input_precision="ieee")
    if MASKED:
        scores = tl.where(exists[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * qk_scale)
    if MASKED:  # nothing seen yet: any finite maximum will do
        shift = tl.where(higher == float("-inf"), 0.0, higher)
    else:
        shift = higher
    p = tl.math.exp2(scores * qk_scale - shift[:, None])
    shrink = tl.math.exp2(top - shift)
    total = total * shrink + tl.sum(p, 1)
    if MASKED:
        v = tl.load(v_at, mask=exists[:, None] & (column[None, :] < DIM), other=0.0)
    elif DIM < PADDED_DIM:
        v = tl.load(v_at, mask=column[None, :] < DIM, other=0.0)
    else:
        v = tl.load(v_at)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    return acc, total, higher


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, blocks_ptr, counts_ptr, valid_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, v_stride_b, v_stride_s, v_stride_h,
    heads, queries, keys, list_rows, capacity, qk_scale,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head. `blocks_ptr` None reads every key; `valid_ptr` None has whole key blocks."""
    # Consecutive programs share a head, so that they sweep the same keys through L2.
    tiles = tl.cdiv(queries, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    k_ptr += batch * k_stride_b + head * k_stride_h
    v_ptr += batch * v_stride_b + head * v_stride_h

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, PADDED_DIM)
    inside = (row[:, None] < queries) & (column[None, :] < DIM)
    q_at = q_ptr + batch * q_stride_b + head * q_stride_h + row[:, None].to(tl.int64) * q_stride_s + column[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)

    acc = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    PARTS: tl.constexpr = BLOCK_K // BLOCK_N
    whole_blocks = keys // BLOCK_K
    if blocks_ptr is None:
        count = tl.cdiv(keys, BLOCK_K)
        whole = whole_blocks
    else:
        query_blocks = tl.cdiv(queries, BLOCK_Q)
        line = (tl.where(list_rows > 1, batch, 0) * heads + head) * query_blocks + tile * BLOCK_M // BLOCK_Q
        count = tl.load(counts_ptr + line)
        blocks_ptr += line * capacity
        whole = count
        # Ids ascend, so only the last can be the ragged one.
        if count > 0:
            whole = tl.where(tl.load(blocks_ptr + count - 1) < whole_blocks, count, count - 1)
    if valid_ptr is not None:
        whole = 0

    for step in range(whole * PARTS):
        block = step // PARTS
        if blocks_ptr is not None:
            block = tl.load(blocks_ptr + block)
        start = (block * BLOCK_K + step % PARTS * BLOCK_N).to(tl.int64)
        acc, total, top = attend_tile(
            acc, total, top, q, k_ptr + start * k_stride_s, v_ptr + start * v_stride_s, k_stride_s, v_stride_s, BLOCK_N,
            qk_scale, DIM, PADDED_DIM, BLOCK_N, False,
        )  # fmt: skip
    for step in range(whole * PARTS, count * PARTS):
        block = step // PARTS
        if blocks_ptr is not None:
            block = tl.load(blocks_ptr + block)
        tokens = tl.minimum(keys - block * BLOCK_K, BLOCK_K)
        if valid_ptr is not None:
            tokens = tl.minimum(tokens, tl.load(valid_ptr + block))
        start = (block * BLOCK_K + step % PARTS * BLOCK_N).to(tl.int64)
        acc, total, top = attend_tile(
            acc, total, top, q, k_ptr + start * k_stride_s, v_ptr + start * v_stride_s, k_stride_s, v_stride_s,
            tokens - step % PARTS * BLOCK_N, qk_scale, DIM, PADDED_DIM, BLOCK_N, True,
        )  # fmt: skip

    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    lse = tl.where(seen, (top + tl.math.log2(tl.where(seen, total, 1.0))) * 0.6931471805599453, float("-inf"))
    out_at = out_ptr + ((batch * queries + row[:, None]) * heads + head) * DIM + column[None, :]
    tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + (batch * heads + head) * queries + row, lse, mask=row < queries)
