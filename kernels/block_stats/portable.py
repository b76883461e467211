"""Block statistics in one Triton launch: the first half of an attention kernel, with three figures a tile for an output."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_accel.kernels import hardware
from diffusers_accel.kernels.rows import rows_at, rows_in_eights

LOG2_E = 1.4426950408889634
BLOCKS = (16, 32, 64, 128)


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int, blocks: tuple[int, int]) -> str | None:
    """Why this implementation cannot run there, or None."""
    reason = hardware.refuses(device, dtype)
    if reason is None and not set(blocks) <= set(BLOCKS):
        return f"takes blocks of {', '.join(map(str, BLOCKS))} tokens, found {blocks[0]} queries x {blocks[1]} keys"
    return reason


def block_stats(
    q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, epsilon: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, maximum and number of small entries of each block; the arguments have been checked by the caller."""
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    lse = lse.contiguous()
    rows, columns = triton.cdiv(queries, block_q), triton.cdiv(keys, block_k)
    total = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=q.device)
    largest, small = torch.empty_like(total), torch.empty_like(total, dtype=torch.int32)
    with hardware.on(q.device):
        block_stats_kernel[(rows * heads * batch,)](
            q, k, lse, total, largest, small, *q.stride()[:3], *k.stride()[:3], heads, queries, keys,
            scale * LOG2_E, epsilon, DIM=dim, BLOCK_D=tile_of_dim(dim, q.dtype), BLOCK_Q=block_q, BLOCK_K=block_k,
            HEAD_GROUP=heads // k.shape[2], EIGHTS=rows_in_eights(q) and rows_in_eights(k),
            num_warps=warps(block_q, block_k, q.dtype), num_stages=2,
        )  # fmt: skip
    return total, largest, small


def tile_of_dim(dim: int, dtype: torch.dtype) -> int:
    """How much of the head dim is multiplied at once: fp32 operands wait in registers, others in shared memory."""
    if dtype == torch.float32:
        return 16
    return max(16, triton.next_power_of_2(dim)) if dim <= 128 else 64


def warps(block_q: int, block_k: int, dtype: torch.dtype) -> int:
    """Warps for a tile: the four that a product on Hopper takes, and eight where four have no registers for it."""
    return 8 if block_q * block_k > 64 * 64 or dtype == torch.float32 else 4


@triton.jit
def block_stats_kernel(
    q_ptr, k_ptr, lse_ptr, total_ptr, largest_ptr, small_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h, heads, queries, keys, qk_scale, epsilon,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    HEAD_GROUP: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """One row of blocks of one head; HEAD_GROUP heads of q share one of k. EIGHTS says that both are `rows_in_eights`."""
    rows, columns = tl.cdiv(queries, BLOCK_Q), tl.cdiv(keys, BLOCK_K)
    block_row = tl.program_id(0) % rows
    line = (tl.program_id(0) // rows).to(tl.int64)
    row = block_row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    token = tl.arange(0, BLOCK_K)
    batch, head = line // heads, line % heads
    q_rows = rows_at(q_ptr, batch, row[:, None].to(tl.int64), head, q_stride_b, q_stride_s, q_stride_h, EIGHTS)
    lse = tl.load(lse_ptr + line * queries + row, mask=row < queries, other=float("-inf")) * 1.4426950408889634
    # exp2(scores - inf) is the 0 of a query that does not exist or reads nothing.
    shift = tl.where(lse == float("-inf"), float("inf"), lse)
    height = tl.minimum(queries - block_row * BLOCK_Q, BLOCK_Q)
    at = tl.program_id(0).to(tl.int64) * columns
    for block in range(columns):
        start = block * BLOCK_K
        exists = start + token < keys
        at_keys = (start + token[None, :]).to(tl.int64)
        k_rows = rows_at(k_ptr, batch, at_keys, head // HEAD_GROUP, k_stride_b, k_stride_s, k_stride_h, EIGHTS)
        scores = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        for d in range(0, DIM, BLOCK_D):
            column = d + tl.arange(0, BLOCK_D)
            q = tl.load(q_rows + column[None, :], mask=(row[:, None] < queries) & (column[None, :] < DIM), other=0.0)
            k = tl.load(k_rows + column[:, None], mask=exists[None, :] & (column[:, None] < DIM), other=0.0)
            scores = tl.dot(q, k, scores, input_precision="ieee")
        p = tl.math.exp2(scores * qk_scale - shift[:, None])
        p = tl.where(exists[None, :], p, 0.0)
        entries = height * tl.minimum(keys - start, BLOCK_K)
        tl.store(total_ptr + at + block, tl.sum(p))
        tl.store(largest_ptr + at + block, tl.max(p))
        tl.store(small_ptr + at + block, entries - tl.sum((p >= epsilon).to(tl.int32)))
