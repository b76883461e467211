"""The kernel of `gluon`: producer and consumers, each a function of its own, and the barriers between them.

FlashAttention-3's two overlaps (Shah et al. 2024, arXiv 2407.08608). Within a consumer, the softmax of a tile runs while the
matrix unit still multiplies the weights and values of the tile before. Between the two consumers, each hands the matrix
unit to the other as soon as it has issued the products of a tile, so that one's softmax runs under the other's products.

The tiles of a row are read last to first. Lists ascend, so the one tile that the end of the keys may cut comes before the
loop, whose tiles then need no mask.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from diffusers_accel.kernels.attention.softmax import softmax_tile

CONSUMERS = gl.constexpr(2)
ROWS = gl.constexpr(64)  # queries of a consumer: the rows of one instruction of the matrix unit
# Of a thread, out of 65,536 for three groups of 128: they have to be multiples of 8.
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)


def rows(x: Tensor, tokens: int) -> TensorDescriptor:
    """How TMA reads or writes that many tokens of a head of `x` `[B, S, H, D]`, which `loadable` has seen."""
    if 0 in x.stride():  # one head or batch row stands for all: whether TMA takes such steps is not documented
        x = x.clone(memory_format=torch.contiguous_format)
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, tokens, 1, x.shape[3]], layout)


@gluon.jit
def attention_kernel(
    q_rows, k_rows, v_rows, out_rows, lse_ptr, blocks_ptr, counts_ptr, valid_ptr,
    heads, queries, keys, list_rows, capacity, qk_scale,
    BLOCK_Q: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr, HEAD_GROUP: gl.constexpr,
):  # fmt: skip
    """128 queries of one head. `*_rows` are TMA descriptors of `[B, S, H, D]`; a tile of keys is one box of theirs.

    `blocks_ptr` None reads every key; `valid_ptr` None has whole key blocks. HEAD_GROUP heads of q share one of k and v.
    """
    BLOCK_N: gl.constexpr = k_rows.block_shape[1]
    DIM: gl.constexpr = k_rows.block_shape[3]
    # Consecutive programs share a head, so that they sweep the same keys through L2.
    row_tiles = gl.cdiv(queries, CONSUMERS * ROWS)
    row = gl.program_id(0) % row_tiles * CONSUMERS * ROWS
    line = gl.program_id(0) // row_tiles
    batch, head = line // heads, line % heads

    if blocks_ptr is None:
        count = gl.cdiv(keys, BLOCK_K)
        last = count - 1
    else:
        list_line = gl.cast(gl.where(list_rows > 1, batch, 0) * heads + head, gl.int64)
        list_line = list_line * gl.cdiv(queries, BLOCK_Q) + row // BLOCK_Q
        count = gl.load(counts_ptr + list_line)
        blocks_ptr += list_line * capacity
        last = gl.load(blocks_ptr + count - 1, mask=count > 0, other=0)
    # Without the tiles of the last block that lie behind the end; not positive where nothing is read.
    tiles = count * (BLOCK_K // BLOCK_N) - gl.maximum((last + 1) * BLOCK_K - keys, 0) // BLOCK_N

    q_tiles = gl.allocate_shared_memory(q_rows.dtype, [CONSUMERS, 1, ROWS, 1, DIM], q_rows.layout)
    q_full = barriers(1, CONSUMERS)
    turn = barriers(1, CONSUMERS)
    k_ring = (
        gl.allocate_shared_memory(k_rows.dtype, [STAGES, 1, BLOCK_N, 1, DIM], k_rows.layout),
        barriers(1, STAGES),
        barriers(CONSUMERS, STAGES),
    )
    v_ring = (
        gl.allocate_shared_memory(v_rows.dtype, [STAGES, 1, BLOCK_N, 1, DIM], v_rows.layout),
        barriers(1, STAGES),
        barriers(CONSUMERS, STAGES),
    )
    fence_async_shared()  # TMA reports to the barriers
    lists = (blocks_ptr, valid_ptr, tiles)
    where = (batch, head, row, heads, queries, keys)
    gl.warp_specialize(
        [
            (attend, (out_rows, lse_ptr, q_tiles, q_full, turn, k_ring, v_ring, lists, where, qk_scale, 0, BLOCK_K, STAGES)),
            (attend, (out_rows, lse_ptr, q_tiles, q_full, turn, k_ring, v_ring, lists, where, qk_scale, 1, BLOCK_K, STAGES)),
            (load, (q_rows, k_rows, v_rows, q_tiles, q_full, k_ring, v_ring, lists, where, BLOCK_K, STAGES, HEAD_GROUP)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def barriers(arrivals: gl.constexpr, SLOTS: gl.constexpr):
    """`SLOTS` barriers, each of which `arrivals` arrivals complete."""
    made = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(made.index(i), count=arrivals)
    return made


@gluon.jit
def slot(tile, STAGES: gl.constexpr):
    """Where a ring holds a tile, and the parity of the times that this place was filled before."""
    return tile % STAGES, tile // STAGES % 2


@gluon.jit
def key_tile(lists, tile, BLOCK_K: gl.constexpr, BLOCK_N: gl.constexpr):
    """The block of keys that a tile is part of, and its first key in there. Tiles count from the last."""
    blocks_ptr, valid_ptr, tiles = lists
    PARTS: gl.constexpr = BLOCK_K // BLOCK_N
    place = tiles - 1 - tile
    block = place // PARTS
    if blocks_ptr is not None:
        block = gl.load(blocks_ptr + block)
    return block, place % PARTS * BLOCK_N


@gluon.jit
def load(
    q_rows, k_rows, v_rows, q_tiles, q_full, k_ring, v_ring, lists, where,
    BLOCK_K: gl.constexpr, STAGES: gl.constexpr, HEAD_GROUP: gl.constexpr,
):  # fmt: skip
    """The producer: brings q, then the tiles of k and v in the order in which they are multiplied."""
    batch, head, row, heads, queries, keys = where
    blocks_ptr, valid_ptr, tiles = lists
    BLOCK_N: gl.constexpr = k_rows.block_shape[1]
    for consumer in gl.static_range(CONSUMERS):
        full = q_full.index(consumer)
        mbarrier.expect(full, q_rows.block_type.nbytes)
        tma.async_copy_global_to_shared(q_rows, [batch, row + consumer * ROWS, head, 0], full, q_tiles.index(consumer))
    if tiles > 0:
        key_head = head // HEAD_GROUP
        block, offset = key_tile(lists, 0, BLOCK_K, BLOCK_N)
        key = block * BLOCK_K + offset
        load_tile(k_rows, k_ring, 0, batch, key, key_head, STAGES)
        for tile in range(1, tiles):
            block, offset = key_tile(lists, tile, BLOCK_K, BLOCK_N)
            load_tile(k_rows, k_ring, tile, batch, block * BLOCK_K + offset, key_head, STAGES)
            load_tile(v_rows, v_ring, tile - 1, batch, key, key_head, STAGES)
            key = block * BLOCK_K + offset
        load_tile(v_rows, v_ring, tiles - 1, batch, key, key_head, STAGES)


@gluon.jit
def load_tile(rows, ring, tile, batch, key, key_head, STAGES: gl.constexpr):
    """Brings one tile as soon as both consumers have left its place. Keys behind the last are 0."""
    held, full, empty = ring
    stage, phase = slot(tile, STAGES)
    mbarrier.wait(empty.index(stage), phase ^ 1)  # of a new barrier, the phase before the first counts as over
    mbarrier.expect(full.index(stage), rows.block_type.nbytes)
    tma.async_copy_global_to_shared(rows, [batch, key, key_head, 0], full.index(stage), held.index(stage))


@gluon.jit
def attend(
    out_rows, lse_ptr, q_tiles, q_full, turn, k_ring, v_ring, lists, where, qk_scale,
    CONSUMER: gl.constexpr, BLOCK_K: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 queries of the row. Its output leaves through the place of its q in shared memory."""
    batch, head, row, heads, queries, keys = where
    blocks_ptr, valid_ptr, tiles = lists
    k_held, k_full, k_empty = k_ring
    v_held, v_full, v_empty = v_ring
    BLOCK_N: gl.constexpr = k_held.shape[2]
    DIM: gl.constexpr = k_held.shape[4]
    DTYPE: gl.constexpr = k_held.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUT, 2)
    OF_SCORES: gl.constexpr = gl.SliceLayout(1, SCORES)
    OF_OUT: gl.constexpr = gl.SliceLayout(1, OUT)

    none = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
    acc = gl.full([ROWS, DIM], 0.0, gl.float32, OUT)
    total = gl.full([ROWS], 0.0, gl.float32, OF_SCORES)
    top = gl.full([ROWS], float("-inf"), gl.float32, OF_SCORES)
    factor = gl.full([ROWS], qk_scale, gl.float32, OF_SCORES)
    column = gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    q_tile = q_tiles.index(CONSUMER)
    q = q_tile.reshape([ROWS, DIM])
    mine, others = turn.index(CONSUMER), turn.index(1 - CONSUMER)
    mbarrier.wait(q_full.index(CONSUMER), 0)  # also where nothing is read: the output is written in its place

    if tiles > 0:
        mbarrier.wait(k_full.index(0), 0)
        mbarrier.wait(mine, 1 - CONSUMER)  # the first begins
        k = k_held.index(0).reshape([BLOCK_N, DIM]).permute([1, 0])
        scores = warpgroup_mma(q, k, none, use_acc=False, is_async=True)
        mbarrier.arrive(others)
        scores = warpgroup_mma_wait(0, deps=[scores])
        gl.thread_barrier()  # one thread arrives for four warps, each of which has waited for itself only
        mbarrier.arrive(k_empty.index(0))
        block, offset = key_tile(lists, 0, BLOCK_K, BLOCK_N)
        tokens = keys - block * BLOCK_K - offset
        if valid_ptr is not None:
            tokens = gl.minimum(tokens, gl.load(valid_ptr + block) - offset)
        weights, shrink, total, top = softmax_tile(scores, factor, total, top, column < tokens, 0.0, True)
        p = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
        stage, phase = slot(1, STAGES)
        mbarrier.wait(k_full.index(stage), phase, pred=tiles > 1)

        for tile in range(1, tiles):
            stage, phase = slot(tile, STAGES)
            v_stage, v_phase = slot(tile - 1, STAGES)
            mbarrier.wait(v_full.index(v_stage), v_phase)
            mbarrier.wait(mine, (tile + 1 - CONSUMER) % 2)
            k = k_held.index(stage).reshape([BLOCK_N, DIM]).permute([1, 0])
            scores = warpgroup_mma(q, k, none, use_acc=False, is_async=True)
            acc = warpgroup_mma(p, v_held.index(v_stage).reshape([BLOCK_N, DIM]), acc, is_async=True)
            mbarrier.arrive(others)
            scores = warpgroup_mma_wait(1, deps=[scores])
            gl.thread_barrier()
            mbarrier.arrive(k_empty.index(stage))
            tokens = BLOCK_N
            if valid_ptr is not None:
                block, offset = key_tile(lists, tile, BLOCK_K, BLOCK_N)
                tokens = gl.load(valid_ptr + block) - offset
            weights, shrink, total, top = softmax_tile(
                scores, factor, total, top, column < tokens, 0.0, valid_ptr is not None
            )
            next_p = gl.convert_layout(weights.to(DTYPE), WEIGHTS)
            # Before the wait for acc, and not where k is read: ptxas keeps its order across the loop of a wait, and would
            # otherwise put the wait for acc above the softmax.
            next_stage, next_phase = slot(tile + 1, STAGES)
            mbarrier.wait(k_full.index(next_stage), next_phase, pred=tile + 1 < tiles)
            acc, p = warpgroup_mma_wait(0, deps=[acc, p])  # with p, whose registers are read until here
            gl.thread_barrier()
            mbarrier.arrive(v_empty.index(v_stage))
            acc = acc * gl.convert_layout(shrink, OF_OUT, assert_trivial=True)[:, None]
            p = next_p

        v_stage, v_phase = slot(tiles - 1, STAGES)
        mbarrier.wait(v_full.index(v_stage), v_phase)
        acc = warpgroup_mma(p, v_held.index(v_stage).reshape([BLOCK_N, DIM]), acc, is_async=True)
        acc, p = warpgroup_mma_wait(0, deps=[acc, p])

    seen = total != 0  # NaN included
    total = gl.where(seen, total, 1.0)
    lse = gl.where(seen, (top + gl.log2(total)) * 0.6931471805599453, float("-inf"))
    token = row + CONSUMER * ROWS + gl.arange(0, ROWS, OF_SCORES)
    lse_ptr += gl.cast(batch * heads + head, gl.int64) * queries
    gl.store(lse_ptr + token, lse, mask=token < queries)
    acc = acc / gl.convert_layout(total, OF_OUT, assert_trivial=True)[:, None]
    gl.thread_barrier()  # all four warps have multiplied their last q
    q.store(acc.to(DTYPE))
    fence_async_shared()
    gl.thread_barrier()
    tma.async_copy_shared_to_global(out_rows, [batch, row + CONSUMER * ROWS, head, 0], q_tile)
    tma.store_wait(0)
