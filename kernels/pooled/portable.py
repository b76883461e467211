"""Attention to the means of the unread blocks as one Triton launch, on any GPU that Triton knows.

The products are those of attention: means are rounded to the dtype of q and multiplied in the matrix units. A program
sweeps all key blocks, and those that its query block lists are masked: they are few where this operator is of use, and
there is one mean where attention has a block of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_accel.kernels import hardware
from diffusers_accel.kernels.attention.softmax import LOG2_E, softmax_tile, store_rows
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.rows import loadable, rows_at


class Config(NamedTuple):
    """The tile of queries x key blocks that one program holds, and how it is compiled."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# (lowest compute capability, head dims up to, bytes per element): tiles for which nothing spills at any such head dim. Larger
# tiles of queries read the means less often, where there are registers for them. With two stages Hopper waits for all copies
# before each product; in fp32 three would spill.
CONFIGS: dict[tuple[int, int, int], Config] = {
    (80, 128, 2): Config(64, 32, 4, 3),
    (90, 128, 2): Config(128, 64, 8, 3),
    (120, 128, 2): Config(64, 32, 4, 3),
    (80, 128, 4): Config(16, 16, 4, 2),
    (80, 256, 2): Config(64, 32, 8, 3),
    (90, 256, 2): Config(64, 64, 8, 3),
    (120, 256, 2): Config(64, 32, 8, 3),
    (80, 256, 4): Config(32, 16, 8, 2),
}


def config(capability: int, head_dim: int, dtype: torch.dtype, block_q: int) -> Config:
    """The table's row for a compute capability (90 for Hopper), its tile cut to the queries of a pattern's block."""
    size = dtype.itemsize
    rows = [(dim, -arch) for arch, dim, of in CONFIGS if of == size and arch <= capability and dim >= head_dim]
    dim, arch = min(rows)  # the fewest channels that suffice, and of these the newest that the GPU reaches
    best = CONFIGS[-arch, dim, size]
    # A tile is a power of two and never crosses the border of a block.
    return best._replace(block_m=min(best.block_m, block_q & -block_q))


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int) -> str | None:
    """Why this implementation cannot run there, or None."""
    reason = hardware.refuses(device, dtype)
    if reason is not None:
        return reason
    if head_dim > 256 or head_dim % 8:
        return f"takes head dims up to 256 in multiples of 8, found {head_dim}"
    if block_q % 16:
        return f"takes pattern blocks of queries in multiples of 16, found {block_q}"
    return None


def pooled(q: Tensor, k_means: Tensor, v_means: Tensor, pattern: BlockPattern, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to the means of the blocks that are not listed; the arguments have been checked by the caller."""
    batch, queries, heads, dim = q.shape
    q = loadable(q)
    k_means, v_means = (x.to(q.dtype).contiguous() for x in (k_means, v_means))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    read = pattern.mask().contiguous().view(torch.uint8)
    tile = config(hardware.capability(q.device), dim, q.dtype, pattern.block_q)
    with hardware.on(q.device):
        pooled_kernel[(triton.cdiv(queries, tile.block_m) * heads * batch,)](
            q, k_means, v_means, read, pattern.key_lengths(), out, lse, *q.stride()[:3],
            heads, queries, pattern.key_blocks, read.shape[0], scale * LOG2_E,
            DIM=dim, PADDED_DIM=padded_dim(dim), BLOCK_Q=pattern.block_q, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n,
            HEAD_GROUP=heads // k_means.shape[2], num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse


def padded_dim(head_dim: int) -> int:
    """Channels of a tile: the least power of two that the matrix units take."""
    return max(16, triton.next_power_of_2(head_dim))


@triton.jit
def pooled_kernel(
    q_ptr, k_ptr, v_ptr, read_ptr, lengths_ptr, out_ptr, lse_ptr, q_stride_b, q_stride_s, q_stride_h,
    heads, queries, key_blocks, mask_rows, qk_scale,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_GROUP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head, all of one query block. Means are contiguous `[B, key_blocks, heads // HEAD_GROUP, DIM]`."""
    tiles = tl.cdiv(queries, BLOCK_M)
    tile = tl.program_id(0) % tiles
    head = (tl.program_id(0) // tiles % heads).to(tl.int64)
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, PADDED_DIM)
    inside = (row[:, None] < queries) & (column[None, :] < DIM)
    q_at = rows_at(q_ptr, batch, row[:, None].to(tl.int64), head, q_stride_b, q_stride_s, q_stride_h, True)
    q = tl.load(q_at + column[None, :], mask=inside, other=0.0)

    key_heads = heads // HEAD_GROUP
    first = (batch * key_blocks * key_heads + head // HEAD_GROUP) * DIM
    k_ptr += first
    v_ptr += first
    query_blocks = tl.cdiv(queries, BLOCK_Q)
    line = (tl.where(mask_rows > 1, batch, 0) * heads + head) * query_blocks + tile * BLOCK_M // BLOCK_Q
    read_ptr += line * key_blocks

    acc = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    factor = tl.full((BLOCK_M,), 1.0, tl.float32)
    for start in range(0, key_blocks, BLOCK_N):
        block = start + tl.arange(0, BLOCK_N)
        length = tl.load(lengths_ptr + block, mask=block < key_blocks, other=0)
        weighed = (length > 0) & (tl.load(read_ptr + block, mask=block < key_blocks, other=1) == 0)
        # What is not weighed is not loaded: it may hold NaN, which a weight of 0 does not hide.
        k_at = k_ptr + block[None, :] * key_heads * DIM + column[:, None]
        v_at = v_ptr + block[:, None] * key_heads * DIM + column[None, :]
        k = tl.load(k_at, mask=weighed[None, :] & (column[:, None] < DIM), other=0.0)
        scores = (
            tl.dot(q, k, input_precision="ieee") * qk_scale
            + tl.math.log2(tl.maximum(length, 1).to(tl.float32))[None, :]
        )
        p, shrink, total, top = softmax_tile(scores, factor, total, top, weighed, 0.0, True)
        v = tl.load(v_at, mask=weighed[:, None] & (column[None, :] < DIM), other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")

    store_rows(
        acc, total, top, out_ptr, lse_ptr, None, None, None, None, None, batch, row, head, queries, heads, 0, qk_scale,
        DIM, PADDED_DIM, 0.0, HEAD_GROUP,
    )  # fmt: skip
