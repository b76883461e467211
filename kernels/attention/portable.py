"""Block-sparse attention as one Triton launch for all batch rows, heads and query blocks, on any GPU that Triton knows.

An online softmax over the key blocks that a list names. Pointer loads and index lists only and no autotuning: tile sizes
come from a table, which ahead-of-time compilation checks in the tests.

Quantized operands take the same path. The scores of INT8 q and k are whole numbers in INT32; the scales of a query, of
the tile's keys and of the softmax are one factor per row of the tile, where there is a multiplication in any case. For
FP8 values p is scaled to 0..256: weights down to 4e-6 of the largest still count, the factor cancels in the division by
the sum. The products of a tile are summed by the matrix unit, whose sums of FP8 products are reported to keep 13 bits of
mantissa on Hopper, and added to fp32 accumulators outside it (the two levels of SageAttention2, arXiv 2411.10958).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_accel.kernels import hardware
from diffusers_accel.kernels.attention.epilogue import Epilogue
from diffusers_accel.kernels.attention.launch_order import launch_order, placed_program
from diffusers_accel.kernels.attention.softmax import LOG2_E, P_LOG2, softmax_tile, store_rows
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.quantize import portable as quantize
from diffusers_accel.kernels.quantize.quantized import KEY_GROUP, Quantized
from diffusers_accel.kernels.rows import in_eights, loadable


class Config(NamedTuple):
    """The tile of queries x keys that one program holds, and how it is compiled."""

    block_m: int
    block_n: int
    warps: int
    stages: int


# (lowest compute capability, head dims up to, bytes per element or precision). 128 queries a tile halve the key traffic
# of 64; the rest is what fits into shared memory and registers without spilling. Head dims that are padded need registers
# for it, and so does reading every key, without a list. Of three stages two are on their way while one is computed; with
# two, k and v of a tile would be waited for at once.
CONFIGS: dict[tuple[int, int, int | str], Config] = {
    (80, 64, 2): Config(128, 64, 8, 3),
    (80, 127, 2): Config(128, 32, 8, 3),
    (80, 128, 2): Config(128, 64, 8, 3),
    (80, 64, 4): Config(32, 32, 8, 3),
    (80, 127, 4): Config(16, 16, 8, 3),
    (80, 128, 4): Config(32, 16, 8, 3),
    (80, 256, 2): Config(64, 32, 8, 3),
    (80, 256, 4): Config(16, 16, 8, 3),
    (89, 256, 2): Config(64, 16, 8, 3),
    (90, 127, 2): Config(128, 64, 8, 3),
    (90, 128, 4): Config(16, 16, 8, 3),
    (90, 256, 2): Config(64, 32, 8, 3),
    (100, 256, 2): Config(128, 32, 8, 3),
    (120, 127, 2): Config(128, 32, 8, 3),
    (120, 256, 2): Config(64, 16, 8, 3),
    (80, 128, "int8"): Config(128, 64, 8, 3),
    (80, 256, "int8"): Config(64, 32, 8, 3),
    (90, 256, "int8"): Config(128, 32, 8, 3),
    (120, 256, "int8"): Config(64, 32, 8, 3),
    (89, 64, "int8_fp8"): Config(128, 64, 8, 3),
    (89, 127, "int8_fp8"): Config(128, 64, 8, 3),
    (89, 128, "int8_fp8"): Config(128, 64, 8, 3),
    (89, 256, "int8_fp8"): Config(64, 64, 8, 3),
    (120, 127, "int8_fp8"): Config(128, 32, 8, 3),
}


def config(
    capability: int, head_dim: int, dtype: torch.dtype, blocks: tuple[int, int], precision: str = "input"
) -> Config:
    """The table's row for a compute capability (90 for Hopper), its tile cut to the (block_q, block_k) of the pattern."""
    best = CONFIGS[row(capability, head_dim, dtype, precision)]
    # A tile is a power of two and never crosses the border of a block.
    largest_m, largest_n = (block & -block for block in blocks)
    return best._replace(block_m=min(best.block_m, largest_m), block_n=min(best.block_n, largest_n))


def row(capability: int, head_dim: int, dtype: torch.dtype, precision: str) -> tuple[int, int, int | str]:
    """Which row of the table is meant: the fewest channels that suffice, and of these the newest that the GPU reaches."""
    kind = dtype.itemsize if precision == "input" else precision
    archs = {(top, arch) for arch, top, of in CONFIGS if of == kind and top >= head_dim}
    dim = min(archs)[0]
    fitting = [arch for top, arch in archs if top == dim]
    return max((arch for arch in fitting if arch <= capability), default=min(fitting)), dim, kind


def refuses(
    device: torch.device, dtype: torch.dtype, head_dim: int, blocks: tuple[int, int], precision: str
) -> str | None:
    """Why this implementation cannot run there, or None."""
    reason = hardware.refuses(device, dtype) if precision == "input" else quantize.refuses(device, dtype, precision)
    if reason is not None:
        return reason
    if head_dim > 256 or head_dim % 8:
        return f"takes head dims up to 256 in multiples of 8, found {head_dim}"
    if blocks[0] % 16 or blocks[1] % 16:
        return f"takes pattern blocks in multiples of 16, found {blocks[0]} queries x {blocks[1]} keys"
    if precision != "input" and dtype == torch.float32:
        return f"{precision} takes float16 and bfloat16, found {dtype}"
    if precision == "int8_fp8" and blocks[1] % 32:
        return f"{precision} takes pattern blocks of keys in multiples of 32, found {blocks[1]}"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern | None, scale: float, end: Epilogue | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the blocks of the pattern; the arguments have been checked by the caller."""
    return attend_pattern(loadable(q), loadable(k), loadable(v), pattern, scale, None, end)


def quantized_attention(
    x: Quantized, pattern: BlockPattern | None, scale: float, end: Epilogue | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of codes; the arguments have been checked by the caller."""
    v = x.v if x.precision == "int8_fp8" else loadable(x.v)  # FP8 lies with the tokens beside each other
    return attend_pattern(loadable(x.q), loadable(x.k), v, pattern, scale, x, end)


def attend_pattern(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern | None,
    scale: float,
    scales: Quantized | None,
    end: Epilogue | None,
) -> tuple[Tensor, Tensor]:
    """One launch for all rows of the pattern; `scales` None says that q, k, v are values."""
    batch, queries, heads, dim = q.shape
    dtype, precision = (q.dtype, "input") if scales is None else (scales.dtype, scales.precision)
    part, out, rows = end or Epilogue(None, None, None)
    out = torch.empty(q.shape, dtype=dtype, device=q.device) if out is None else out
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    blocks = counts = valid = order = None
    block_q, block_k, capacity, list_rows = 128, 128, 0, 1
    if pattern is not None:
        blocks, counts, valid = pattern.blocks.contiguous(), pattern.counts.contiguous(), pattern.valid
        block_q, block_k, capacity, list_rows = pattern.block_q, pattern.block_k, blocks.shape[3], blocks.shape[0]
        order = launch_order(pattern)
    tile = config(hardware.capability(q.device), dim, dtype, (block_q, block_k), precision)
    tiles = triton.cdiv(queries, tile.block_m)
    if order is not None:
        tiles = triton.cdiv(queries, block_q) * (block_q // tile.block_m)
    with hardware.on(q.device):
        attention_kernel[(batch * heads * tiles,)](
            q,
            k,
            v,
            out,
            lse,
            None if scales is None else scales.q_scale,
            None if scales is None else scales.k_scale,
            None if scales is None else scales.v_scale,
            None if scales is None else scales.offset,
            None if part is None else part[0].contiguous(),
            None if part is None else part[1].contiguous(),
            rows,
            blocks,
            counts,
            valid,
            order,
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride(),
            heads,
            queries,
            k.shape[1],
            list_rows,
            capacity,
            out.shape[1] * out.shape[2],
            scale * LOG2_E,
            DIM=dim,
            PADDED_DIM=padded_dim(dim, precision),
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            KEY_GROUP=KEY_GROUP,
            P_LOG2=P_LOG2[precision],
            HEAD_GROUP=heads // k.shape[2],
            num_warps=tile.warps,
            num_stages=tile.stages,
        )
    return out, lse


def padded_dim(head_dim: int, precision: str = "input") -> int:
    """Channels of a tile: the least power of two that the matrix units take, 16 values or 32 codes."""
    return max(16 if precision == "input" else 32, triton.next_power_of_2(head_dim))


@triton.jit
def attend_tile(
    acc, total, top, q, factor, k_ptr, v_ptr, k_scale_ptr, k_stride, v_stride_s, v_stride_d, start, tokens,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_N: tl.constexpr, KEY_GROUP: tl.constexpr, P_LOG2: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over BLOCK_N keys from `start`, of which the first `tokens` exist (all, unless MASKED).

    `factor` turns the products of each query into scores in powers of two, but for the scale of the keys, if they have one.
    """
    token = tl.arange(0, BLOCK_N)
    column = tl.arange(0, PADDED_DIM)
    k_at = k_ptr + start * k_stride + token[None, :] * k_stride + column[:, None]
    v_at = v_ptr + start * v_stride_s + token[:, None] * v_stride_s + column[None, :] * v_stride_d
    exists = token < tokens
    if MASKED:
        k = tl.load(k_at, mask=exists[None, :] & (column[:, None] < DIM), other=0.0)
    elif DIM < PADDED_DIM:
        k = tl.load(k_at, mask=column[:, None] < DIM, other=0.0)
    else:
        k = tl.load(k_at)
    if k_scale_ptr is None:
        scores = tl.dot(q, k, input_precision="ieee")
    else:
        scores = tl.dot(q, k, out_dtype=tl.int32).to(tl.float32)
        if MASKED:  # a tile may lie behind the last group
            factor *= tl.load(k_scale_ptr + start // KEY_GROUP, mask=tokens > 0, other=0.0)
        else:
            factor *= tl.load(k_scale_ptr + start // KEY_GROUP)
    p, shrink, total, top = softmax_tile(scores, factor, total, top, exists, P_LOG2, MASKED)
    if MASKED:
        if P_LOG2 != 0.0:  # in whole pieces of FP8_TOKENS: the codes of what does not exist are 0
            exists = token < tl.cdiv(tokens, 16) * 16
        v = tl.load(v_at, mask=exists[:, None] & (column[None, :] < DIM), other=0.0)
    elif DIM < PADDED_DIM:
        v = tl.load(v_at, mask=column[None, :] < DIM, other=0.0)
    else:
        v = tl.load(v_at)
    if P_LOG2 == 0.0:
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
    else:
        # Not a sum of its own, which the compiler would move into the matrix unit.
        acc = tl.fma(acc, shrink[:, None], tl.dot(p.to(v.dtype), v))
    return acc, total, top


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, offset_ptr,
    part_out_ptr, part_lse_ptr, rows_ptr,
    blocks_ptr, counts_ptr, valid_ptr, order_ptr,
    q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    v_stride_b, v_stride_s, v_stride_h, v_stride_d,
    heads, queries, keys, list_rows, capacity, out_rows, qk_scale,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEY_GROUP: tl.constexpr, P_LOG2: tl.constexpr, HEAD_GROUP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head. `blocks_ptr` None reads every key; `valid_ptr` None has whole key blocks.

    Scales and `offset_ptr` None have values and no codes; `v_scale_ptr` is None too where only q and k are codes.
    HEAD_GROUP heads of q share one of k and v.
    """
    tile, head, batch = placed_program(order_ptr, queries, heads, list_rows, BLOCK_Q, BLOCK_M)
    # The launch sees to it. Of an integer the compiler itself learns only whether 16 divides it, and head dim 72 has no such
    # strides: its rows would be read two bytes at a time.
    q_stride_b, q_stride_s, q_stride_h = in_eights(q_stride_b), in_eights(q_stride_s), in_eights(q_stride_h)
    k_stride_b, k_stride_s, k_stride_h = in_eights(k_stride_b), in_eights(k_stride_s), in_eights(k_stride_h)
    v_stride_b, v_stride_h = in_eights(v_stride_b), in_eights(v_stride_h)
    if P_LOG2 == 0.0:
        v_stride_s = in_eights(v_stride_s)
    key_head, key_heads = head // HEAD_GROUP, heads // HEAD_GROUP
    k_ptr += batch * k_stride_b + key_head * k_stride_h
    v_ptr += batch * v_stride_b + key_head * v_stride_h

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.arange(0, PADDED_DIM)
    inside = (row[:, None] < queries) & (column[None, :] < DIM)
    q_at = q_ptr + batch * q_stride_b + head * q_stride_h + row[:, None].to(tl.int64) * q_stride_s + column[None, :]
    q = tl.load(q_at, mask=inside, other=0.0)
    line = (batch * heads + head) * queries + row
    factor = tl.full((BLOCK_M,), qk_scale, tl.float32)
    if q_scale_ptr is not None:
        factor *= tl.load(q_scale_ptr + line, mask=row < queries, other=0.0)
        k_scale_ptr += (batch * key_heads + key_head) * tl.cdiv(keys, KEY_GROUP)

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
        list_line = (tl.where(list_rows > 1, batch, 0) * heads + head) * query_blocks + tile * BLOCK_M // BLOCK_Q
        count = tl.load(counts_ptr + list_line)
        if BLOCK_M < BLOCK_Q:
            count = tl.where(tile * BLOCK_M < queries, count, 0)
        blocks_ptr += list_line * capacity
        whole = count
        # Ids ascend, so only the last can be the ragged one.
        if count > 0:
            whole = tl.where(tl.load(blocks_ptr + count - 1) < whole_blocks, count, count - 1)
    if valid_ptr is not None:
        whole = 0

    # The next id is loaded a tile ahead: were it loaded where it is used, each wait of the pipeline would be for all tiles.
    following = 0
    if blocks_ptr is not None:
        following = tl.load(blocks_ptr, mask=capacity > 0, other=0)
    for step in range(whole * PARTS):
        block = step // PARTS
        if blocks_ptr is not None:
            block = following
            following = tl.load(blocks_ptr + tl.minimum((step + 1) // PARTS, capacity - 1))
        start = (block * BLOCK_K + step % PARTS * BLOCK_N).to(tl.int64)
        acc, total, top = attend_tile(
            acc, total, top, q, factor, k_ptr, v_ptr, k_scale_ptr, k_stride_s, v_stride_s, v_stride_d, start, BLOCK_N,
            DIM, PADDED_DIM, BLOCK_N, KEY_GROUP, P_LOG2, False,
        )  # fmt: skip
    for step in range(whole * PARTS, count * PARTS):
        block = step // PARTS
        if blocks_ptr is not None:
            block = following
            following = tl.load(blocks_ptr + tl.minimum((step + 1) // PARTS, capacity - 1))
        tokens = tl.minimum(keys - block * BLOCK_K, BLOCK_K)
        if valid_ptr is not None:
            tokens = tl.minimum(tokens, tl.load(valid_ptr + block))
        start = (block * BLOCK_K + step % PARTS * BLOCK_N).to(tl.int64)
        acc, total, top = attend_tile(
            acc, total, top, q, factor, k_ptr, v_ptr, k_scale_ptr, k_stride_s, v_stride_s, v_stride_d, start,
            tokens - step % PARTS * BLOCK_N, DIM, PADDED_DIM, BLOCK_N, KEY_GROUP, P_LOG2, True,
        )  # fmt: skip

    # Asked again: these numbers would otherwise take registers through the loops.
    tile, head, batch = placed_program(order_ptr, queries, heads, list_rows, BLOCK_Q, BLOCK_M)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    store_rows(
        acc, total, top, out_ptr, lse_ptr, v_scale_ptr, offset_ptr, part_out_ptr, part_lse_ptr, rows_ptr,
        batch, row, head, queries, heads, out_rows, qk_scale, DIM, PADDED_DIM, P_LOG2, HEAD_GROUP,
    )  # fmt: skip
