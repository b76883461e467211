"""Selection in a few Triton launches that never wait for the device: the map, four histograms for the share of a head, the lists.

A weight lies in 0..1, and the bits of a float from 0 on, read as an int, order as the floats do. So the kappa-th smallest
of a head is found by its bits, eight at a time: a histogram of the leading eight over the whole map says in which bucket
it lies and how far into it, the next histogram splits that bucket, and after four the value is known exactly. In a row,
which one program holds in registers, the same is done by bisection, one bit at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_accel.kernels import hardware

LARGEST_ROW = 4096  # key blocks that one program holds without spilling; half a million tokens in blocks of 128
LEVELS = 4
MAP_TILE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 16}
MAP_OPTIONS = {"num_warps": 8, "num_stages": 2}
BUCKETS = tl.constexpr(256)
INFINITY = tl.constexpr(0x7F800000)  # the bits of an infinite float, which is the rank of a forced pair


def refuses(device: torch.device, key_blocks: int) -> str | None:
    """Why this implementation cannot run there, or None."""
    reason = hardware.refuses(device, torch.float32)
    if reason is None and key_blocks > LARGEST_ROW:
        return f"takes up to {LARGEST_ROW} key blocks, found {key_blocks}"
    return reason


def cut(
    weights: Tensor,
    always: Tensor | None,
    rows: range,
    columns: range,
    blocks: tuple[int, int],
    rule: str,
    amount: float,
    min_blocks: int,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """The lists and counts of a pattern; the arguments have been checked by the caller."""
    batch, heads = weights.shape[:2]
    query_blocks, key_blocks = blocks
    height, width = len(rows), len(columns)
    device = weights.device
    weights = weights.contiguous()
    forced, forced_stride = None, 0
    if always is not None:
        forced = always[..., rows.start : rows.stop, columns.start : columns.stop].contiguous().view(torch.uint8)
        forced_stride = height * width if always.dim() == 3 else 0
    ids = torch.empty(batch, heads, query_blocks, capacity, dtype=torch.int32, device=device)
    counts = torch.empty(batch, heads, query_blocks, dtype=torch.int32, device=device)
    padded = triton.next_power_of_2(key_blocks)
    with hardware.on(device):
        histograms = None
        if rule == "head":
            histograms = torch.zeros(batch * heads, LEVELS, BUCKETS.value, dtype=torch.int32, device=device)
            for level in range(LEVELS):
                histogram_kernel[(triton.cdiv(height * width, 4096) * heads * batch,)](
                    weights, forced, histograms, forced_stride, heads, height * width, amount,
                    LEVEL=level, LEVELS=LEVELS, BLOCK=4096, num_warps=8,
                )  # fmt: skip
        lists_kernel[(query_blocks * heads * batch,)](
            weights, forced, histograms, ids, counts, forced_stride, heads, query_blocks, key_blocks,
            rows.start, columns.start, height, width, amount, min_blocks, capacity,
            RULE=rule, LEVELS=LEVELS, PADDED=padded, num_warps=row_warps(padded),
        )  # fmt: skip
    return ids, counts


def row_warps(padded: int) -> int:
    """Warps for a row of that many key blocks: 16 a thread at most, as long as the warps last."""
    return min(max(padded // 512, 1), 16)


def softmax_map(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """The row softmax of the pooled scores: fp32 `[B, H, Q, K]`."""
    batch, height, heads, dim = q.shape
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    weights = torch.empty(batch, heads, height, k.shape[1], dtype=torch.float32, device=q.device)
    with hardware.on(q.device):
        map_kernel[(triton.cdiv(height, MAP_TILE["BLOCK_M"]) * heads * batch,)](
            q, k, weights, *q.stride()[:3], *k.stride()[:3], heads, height, k.shape[1], scale,
            DIM=dim, HEAD_GROUP=heads // k.shape[2], **MAP_TILE, **MAP_OPTIONS,
        )  # fmt: skip
    return weights


@triton.jit
def map_kernel(
    q_ptr, k_ptr, map_ptr, q_stride_b, q_stride_s, q_stride_h, k_stride_b, k_stride_s, k_stride_h,
    heads, height, width, scale,
    DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HEAD_GROUP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of one head's map, contiguous `[B, heads, height, width]`; HEAD_GROUP heads of q share one of k."""
    tiles = tl.cdiv(height, BLOCK_M)
    line = (tl.program_id(0) // tiles).to(tl.int64)
    row = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    q_ptr += line // heads * q_stride_b + line % heads * q_stride_h
    k_ptr += line // heads * k_stride_b + line % heads // HEAD_GROUP * k_stride_h
    map_ptr += (line * height + row[:, None]) * width
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, width, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for d in range(0, DIM, BLOCK_D):
            at = d + tl.arange(0, BLOCK_D)
            q_at = q_ptr + row[:, None] * q_stride_s + at[None, :]
            k_at = k_ptr + column[None, :] * k_stride_s + at[:, None]
            q = tl.load(q_at, mask=(row[:, None] < height) & (at[None, :] < DIM), other=0.0)
            k = tl.load(k_at, mask=(column[None, :] < width) & (at[:, None] < DIM), other=0.0)
            scores = tl.dot(q, k, scores, input_precision="ieee")
        scores = tl.where(column[None, :] < width, scores * scale, float("-inf"))
        tl.store(map_ptr + column[None, :], scores, mask=(row[:, None] < height) & (column[None, :] < width))
        higher = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(scores - higher[:, None]), 1)
        top = higher
    # The scores that other threads of this program stored are read again.
    tl.debug_barrier()
    for start in range(0, width, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        inside = (row[:, None] < height) & (column[None, :] < width)
        scores = tl.load(map_ptr + column[None, :], mask=inside, other=float("-inf"))
        tl.store(map_ptr + column[None, :], tl.exp(scores - top[:, None]) / total[:, None], mask=inside)


@triton.jit
def load_ranks(map_ptr, forced_ptr, entry, inside):
    """The ranks of some entries of a head's map, as ints: the bits of the weight, infinity if forced, -1 if not inside."""
    rank = tl.load(map_ptr + entry, mask=inside, other=0.0).to(tl.int32, bitcast=True)
    if forced_ptr is not None:
        rank = tl.where(tl.load(forced_ptr + entry, mask=inside, other=0) != 0, INFINITY, rank)
    return tl.where(inside, rank, -1)


@triton.jit
def narrowed(histograms_ptr, kappa, LEVELS: tl.constexpr):
    """The leading 8 * LEVELS bits of the kappa-th smallest rank of a head."""
    leading = 0
    left = kappa
    for level in tl.static_range(LEVELS):
        upto = tl.cumsum(tl.load(histograms_ptr + level * BUCKETS + tl.arange(0, BUCKETS)), 0)
        before = upto < left
        leading = leading * BUCKETS + tl.sum(before.to(tl.int32), 0)
        left = left - tl.max(tl.where(before, upto, 0), 0)
    return leading


@triton.jit
def histogram_kernel(
    map_ptr, forced_ptr, histograms_ptr, forced_stride_h, heads, entries, kappa,
    LEVEL: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Adds BLOCK entries of one head to the histogram of their LEVEL-th eight bits, where all bits before agree."""
    parts = tl.cdiv(entries, BLOCK)
    line = (tl.program_id(0) // parts).to(tl.int64)
    entry = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    histograms_ptr += line * LEVELS * BUCKETS
    if forced_ptr is not None:
        forced_ptr += line % heads * forced_stride_h
    rank = load_ranks(map_ptr + line * entries, forced_ptr, entry, entry < entries)
    counted = rank >= 0
    if LEVEL > 0:
        counted = counted & (rank >> (32 - 8 * LEVEL) == narrowed(histograms_ptr, kappa, LEVEL))
    found = tl.histogram(rank >> (24 - 8 * LEVEL) & 255, BUCKETS, mask=counted)
    bucket = LEVEL * BUCKETS + tl.arange(0, BUCKETS)
    tl.atomic_add(histograms_ptr + bucket, found, mask=found > 0, sem="relaxed")


@triton.jit
def best(rank, count):
    """The `count` largest ranks of a row that has as many, those that come first where they are equal."""
    least = 0
    for step in range(31):
        higher = least | (1 << (30 - step))
        least = tl.where(tl.sum((rank >= higher).to(tl.int32), 0) >= count, higher, least)
    room = count - tl.sum((rank > least).to(tl.int32), 0)
    equal = rank == least
    return (rank > least) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= room))


@triton.jit
def heaviest(rank, weight, top_p):
    """The forced ones of a row, and as few of the largest as it takes for all of them to weigh `top_p`."""
    forced = rank == INFINITY
    forced_weight = tl.sum(tl.where(forced, weight, 0.0), 0)
    weight = tl.where(forced, 0.0, weight)
    # The least rank above which there is less than `top_p`.
    least = 0x7FFFFFFF
    for step in range(31):
        lower = least ^ (1 << (30 - step))
        above = forced_weight + tl.sum(tl.where(rank > lower, weight, 0.0), 0)
        least = tl.where(above < top_p, lower, least)
    above = forced_weight + tl.sum(tl.where(rank > least, weight, 0.0), 0)
    equal = rank == least
    equal_before = tl.cumsum(equal.to(tl.int32), 0) - 1
    return forced | (rank > least) | (equal & (above + equal_before * weight < top_p))


@triton.jit
def lists_kernel(
    map_ptr, forced_ptr, histograms_ptr, blocks_ptr, counts_ptr, forced_stride_h, heads, query_blocks, key_blocks,
    first_row, first_column, height, width, amount, min_blocks, capacity,
    RULE: tl.constexpr, LEVELS: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    """The list of one row. Rows and columns outside the competing `height` x `width` are read whole."""
    row = tl.program_id(0) % query_blocks - first_row
    line = (tl.program_id(0) // query_blocks).to(tl.int64)
    block = tl.arange(0, PADDED)
    column = block - first_column
    competes = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    entry = row * width + column
    map_ptr += line * height * width
    if forced_ptr is not None:
        forced_ptr += line % heads * forced_stride_h
    rank = load_ranks(map_ptr, forced_ptr, entry, competes)
    if RULE == "row":  # which includes min_blocks
        kept = best(rank, amount) | (rank == INFINITY)
    else:
        if RULE == "head":
            kept = rank >= narrowed(histograms_ptr + line * LEVELS * BUCKETS, amount, LEVELS)
        else:
            kept = heaviest(rank, tl.load(map_ptr + entry, mask=competes, other=0.0), amount)
        if tl.sum((kept & competes).to(tl.int32), 0) < min_blocks:
            kept = kept | best(rank, min_blocks)
    exists = block < key_blocks
    kept = tl.where(competes, kept, exists)
    upto = tl.cumsum(kept.to(tl.int32), 0)
    count = tl.sum(kept.to(tl.int32), 0)
    # Kept blocks go in front, all others into the slots behind, as zeros.
    slot = tl.where(kept, upto - 1, count + block - upto)
    at = tl.program_id(0).to(tl.int64)
    tl.store(blocks_ptr + at * capacity + slot, tl.where(kept, block, 0), mask=exists & (slot < capacity))
    tl.store(counts_ptr + at, count)
