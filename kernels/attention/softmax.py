"""The online softmax of the Triton kernels: what a tile of scores adds to a row, and what is written at its end.

FlashAttention-2's (Dao 2023, arXiv 2307.08691), in powers of two. A row carries the largest score so far (`top`), the sum
of its weights relative to that (`total`), and their sum of values, which the kernels hold.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from diffusers_accel.kernels.quantize.quantized import P_MAX

LOG2_E = 1.4426950408889634
# Binary logarithm of the largest weight, which is 1 where the weights are not in FP8.
P_LOG2 = {"input": 0.0, "int8": 0.0, "int8_fp8": math.log2(P_MAX)}


@triton.jit
def softmax_tile(
    scores, factor, total, top, exists, P_LOG2: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr = True
):  # fmt: skip
    """The weights `[M, N]` of a tile, what they and earlier ones shrink by, and the row's new `total` and `top`.

    `factor` `[M]`, positive, turns products into scores in powers of two; if SCALED it may be NaN or 0 where nothing of a
    tile exists. `exists` `[N]` counts only if MASKED. Products are masked before they are scaled, so that a multiplication
    and the subtraction of the maximum remain one instruction.
    """
    if MASKED:
        scores = tl.where(exists[None, :], scores, float("-inf"))
    largest = tl.max(scores, 1)
    if MASKED and SCALED:
        factor = tl.where(largest == float("-inf"), 1.0, factor)
    higher = tl.maximum(top, largest * factor)
    shift = higher
    if MASKED:
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: any finite maximum will do
    p = tl.math.exp2(scores * factor[:, None] - (shift - P_LOG2)[:, None])
    shrink = tl.math.exp2(top - shift)
    return p, shrink, total * shrink + tl.sum(p, 1), higher


@triton.jit
def store_rows(
    acc, total, top, out_ptr, lse_ptr, v_scale_ptr, offset_ptr, part_out_ptr, part_lse_ptr, rows_ptr,
    batch, row, head, queries, heads, out_rows, qk_scale,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, P_LOG2: tl.constexpr, HEAD_GROUP: tl.constexpr,
):  # fmt: skip
    """Write the output `[B, S, H, DIM]` and the log-sum-exp `[B, H, S]` of the rows; 0 and -inf of those that read nothing.

    Pointers that are None leave out what they are for. A part, laid out as these, is attention over other keys, with which the
    rows are merged. `rows_ptr`: the output goes to these of the `out_rows` rows that each batch row has there.
    """
    column = tl.arange(0, PADDED_DIM)
    line = (batch * heads + head) * queries + row
    seen = total != 0  # NaN included
    total = tl.where(seen, total, 1.0)
    acc *= (1 / total)[:, None]  # a division per row, not per element
    lse = (top + tl.math.log2(total) - P_LOG2) * 0.6931471805599453
    if v_scale_ptr is not None:
        key_head, key_heads = head // HEAD_GROUP, heads // HEAD_GROUP
        v_scale_at = v_scale_ptr + (batch * key_heads + key_head) * DIM + column
        acc *= tl.load(v_scale_at, mask=column < DIM, other=0.0)[None, :]
    if offset_ptr is not None:
        offset = tl.load(offset_ptr + line, mask=row < queries, other=0.0)
        lse += qk_scale * 0.6931471805599453 * offset
    acc = tl.where(seen[:, None], acc, 0.0)  # a scale that is not a number is not theirs
    lse = tl.where(seen, lse, float("-inf"))
    place = (batch * queries + row) * heads + head
    inside = (row[:, None] < queries) & (column[None, :] < DIM)
    if part_out_ptr is not None:
        part = tl.load(part_out_ptr + place[:, None] * DIM + column[None, :], mask=inside, other=0.0)
        part_lse = tl.load(part_lse_ptr + line, mask=row < queries, other=float("-inf"))
        highest = tl.maximum(lse, part_lse)
        shift = tl.where(highest == float("-inf"), 0.0, highest)
        own, other = tl.exp(lse - shift), tl.exp(part_lse - shift)
        both = tl.where(own + other == 0, 1.0, own + other)
        acc = acc * (own / both)[:, None] + part.to(tl.float32) * (other / both)[:, None]
        lse = highest + tl.log(both)
    if rows_ptr is not None:
        place = tl.load(rows_ptr + row.to(tl.int64) * heads + head, mask=row < queries, other=0) + batch * out_rows
    tl.store(out_ptr + place[:, None] * DIM + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + line, lse, mask=row < queries)
