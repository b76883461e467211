"""Which query block each program of an attention kernel takes: the longest rows of a pattern first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_accel.kernels.pattern import BlockPattern


def launch_order(pattern: BlockPattern) -> Tensor:
    """int32 `[rows * heads * query blocks]`: the pattern's query blocks, in the order in which programs are to take them.

    An entry is a place in the flattened counts `[rows, heads, query blocks]`. Made once per pattern and kept with it, on
    its device, without waiting for that.
    """
    return pattern.derived(_longest_first)


def _longest_first(pattern: BlockPattern) -> Tensor:
    length_class = torch.frexp(pattern.counts.flatten().float()).exponent  # of 2**(c - 1) to 2**c - 1 blocks; 0 of none
    # A byte, because a radix sort passes over its keys once for each.
    return (32 - length_class).to(torch.uint8).sort(stable=True).indices.int()


@triton.jit
def placed_program(order_ptr, queries, heads, list_rows, BLOCK_Q: tl.constexpr, BLOCK_M: tl.constexpr):
    """The tile of BLOCK_M queries, the head and the batch row (both int64) of this program.

    `order_ptr` None: cdiv(queries, BLOCK_M) programs for each head of each batch row, as they lie. Else there are
    cdiv(queries, BLOCK_Q) * (BLOCK_Q // BLOCK_M) programs for each; the last query block of a head may be shorter, then
    the tile of its last programs begins behind the queries. The order is of `list_rows` batch rows, all or 1; if it is 1,
    each batch row has it, one after the other.
    """
    if order_ptr is None:
        # Consecutive programs share a head, so that they sweep the same keys through L2.
        tiles = tl.cdiv(queries, BLOCK_M)
        tile = tl.program_id(0) % tiles
        line = tl.program_id(0) // tiles
        batch = line // heads
    else:
        parts: tl.constexpr = BLOCK_Q // BLOCK_M
        query_blocks = tl.cdiv(queries, BLOCK_Q)
        entries = list_rows * heads * query_blocks
        taken = tl.program_id(0) // parts
        place = tl.load(order_ptr + taken % entries)
        tile = place % query_blocks * parts + tl.program_id(0) % parts
        line = place // query_blocks
        batch = line // heads + taken // entries
    return tile, (line % heads).to(tl.int64), batch.to(tl.int64)
