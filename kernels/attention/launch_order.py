"""Which query block each program of an attention kernel takes, so that none with a long row is left over at the end.

Programs start in their order, each on the first multiprocessor that is free. In the order of the tokens, the rows that read
everything (text) come last in the last head, and all others have finished before them.

Why not simply the longest first: the keys and values of a head are 5 to 60 MB and the L2 cache of an H200 is 50 MB. Taking
rows by length alone would go through the heads again for each length. So only the rows of more than twice the mean length,
which are few, are taken out and come first; then head follows head, each with its longest rows first. In the simulation of
tests/kernels/test_launch_order.py this is done within 2.5 % of an even share (the longest first within 1.5 %), and reads 1.7
to 3.2 times as much from memory as the order of the tokens, where the longest first read 3 to 22 times as much.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_accel.kernels.pattern import BlockPattern

LONG = 2  # times the mean length of all rows


def launch_order(pattern: BlockPattern) -> Tensor:
    """int32 `[rows * heads * query blocks]`: the pattern's query blocks, in the order in which programs are to take them.

    An entry is a place in the flattened counts `[rows, heads, query blocks]`. Made once per pattern and kept with it, on its
    device, without waiting for that: a few small operators and one sort over as many numbers.
    """
    return pattern.derived(_long_rows_then_heads)


def _long_rows_then_heads(pattern: BlockPattern) -> Tensor:
    counts = pattern.counts.flatten(0, 1)
    place = torch.arange(1, len(counts) + 1, dtype=torch.int32, device=counts.device)[:, None]
    # Long rows have keys up to 0, those of each head above those of the head before it; the sort keeps equal ones in place.
    head = place * (pattern.blocks.shape[3] + 1)
    key = head.masked_fill(counts > LONG * counts.mean(dtype=torch.float32), 0) - counts
    return key.flatten().sort(stable=True).indices.int()


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
        # Volatile, so that a kernel may ask again behind its loops: else the answer is kept in registers all the while.
        place = tl.load(order_ptr + taken % entries, volatile=True)
        tile = place % query_blocks * parts + tl.program_id(0) % parts
        line = place // query_blocks
        batch = line // heads + taken // entries
    return tile, (line % heads).to(tl.int64), batch.to(tl.int64)
