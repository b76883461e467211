"""Block-sparse attention for Hopper: one warp group loads keys and values by TMA while two compute.

Triton specialises the warps of one shape of kernel (3.6): a single loop, four warps, tiles of 128 queries, and every tile
and vector of a row loaded through a descriptor (single numbers by pointers). Those of keys and values are made by the host.
Those of a row are not, because its tile is split between the two groups that compute, which a descriptor of the host does
not learn. Tiles by pointers, one computed before or after the loop, or a branch or loop within it fail to compile or
silently lose the specialisation, which the tests see in the machine code. So a launch has a mask in every tile or in none:
in every one where the keys end within a block or blocks have holes.

What is computed is `portable`'s, and so is the softmax. Not yet run on a GPU.
"""

from __future__ import annotations

import contextvars
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from diffusers_accel.kernels import hardware
from diffusers_accel.kernels.attention.epilogue import Epilogue
from diffusers_accel.kernels.attention.launch_order import launch_order, placed_program
from diffusers_accel.kernels.attention.softmax import LOG2_E, P_LOG2, softmax_tile, store_rows
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.quantize.quantized import KEY_GROUP, Quantized

QUERIES = 128  # of a tile: 64 for each of the two warp groups that compute


class Config(NamedTuple):
    """The keys of a tile, and how many tiles are loaded ahead."""

    block_n: int
    stages: int


# (channels of a tile, precision). Quantized tiles hold one group of keys, which has one scale.
CONFIGS: dict[tuple[int, str], Config] = {
    (64, "input"): Config(128, 3),
    (128, "input"): Config(128, 2),
    (64, "int8"): Config(64, 4),
    (128, "int8"): Config(64, 4),
    (64, "int8_fp8"): Config(64, 4),
    (128, "int8_fp8"): Config(64, 4),
}


def config(head_dim: int, block_k: int, precision: str = "input") -> Config:
    """The table's row, its tile cut to the keys of a pattern's block: smaller tiles leave room for more of them."""
    best = CONFIGS[padded_dim(head_dim), precision]
    return best if block_k % best.block_n == 0 else Config(64, 3)


def refuses(
    device: torch.device, dtype: torch.dtype, head_dim: int, blocks: tuple[int, int], precision: str
) -> str | None:
    """Why this implementation cannot run there, or None."""
    if (reason := hardware.refuses(device, dtype)) is not None:
        return reason
    if device.type == "cuda" and hardware.capability(device) != 90:
        return f"needs compute capability 9.0 (Hopper), found {hardware.capability(device) / 10}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, found {dtype}"
    step = 8 if precision == "input" else 16  # TMA reads rows of whole 16 bytes
    if not 32 < head_dim <= 128 or head_dim % step:
        return f"takes head dims from {32 + step} to 128 in multiples of {step}, found {head_dim}"
    if blocks[0] % QUERIES or blocks[1] % 64:
        return f"takes pattern blocks in multiples of {QUERIES} queries x 64 keys, found {blocks[0]} queries x {blocks[1]} keys"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern | None, scale: float, end: Epilogue | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the blocks of the pattern; the arguments have been checked by the caller."""
    return attend_pattern(loadable(q), loadable(k), loadable(without_holes(v, pattern)), pattern, scale, None, end)


def quantized_attention(
    x: Quantized, pattern: BlockPattern | None, scale: float, end: Epilogue | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of codes; the arguments have been checked by the caller."""
    v = x.v if x.precision == "int8_fp8" else loadable(without_holes(x.v, pattern))  # no code stands for a hole
    return attend_pattern(loadable(x.q), loadable(x.k), v, pattern, scale, x, end)


def without_holes(v: Tensor, pattern: BlockPattern | None) -> Tensor:
    """`v`, a copy with zeros where no token exists if there are such places: a weight of 0 does not hide a NaN."""
    if pattern is None or pattern.valid is None:
        return v
    token = torch.arange(pattern.keys, device=v.device)
    exists = token % pattern.block_k < pattern.valid[token // pattern.block_k]
    return v.masked_fill(~exists[None, :, None, None], 0)


def loadable(x: Tensor) -> Tensor:
    """`x`, copied if TMA cannot read it: it wants channels beside each other and rows that begin at whole 16 bytes."""
    steps = (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:3]))
    fits = x.stride(3) == 1 and min(x.stride()[:3]) > 0 and all(step % 16 == 0 for step in steps)
    return x if fits else x.clone(memory_format=torch.contiguous_format)  # also where only its beginning is odd


def padded_dim(head_dim: int) -> int:
    """Channels of a tile; those that do not exist are loaded as 0."""
    return 64 if head_dim <= 64 else 128


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
    keys = k.shape[1]
    dtype, precision = (q.dtype, "input") if scales is None else (scales.dtype, scales.precision)
    part, out, rows = end or Epilogue(None, None, None)
    out = torch.empty(q.shape, dtype=dtype, device=q.device) if out is None else out
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    # Each head's begin at whole 16 bytes.
    q_scale = None if scales is None else torch.nn.functional.pad(scales.q_scale, (0, -queries % 4))
    blocks = counts = valid = order = None
    block_q, block_k, capacity, list_rows = 128, 128, 0, 1
    if pattern is not None:
        blocks, counts, valid = pattern.blocks.contiguous(), pattern.counts.contiguous(), pattern.valid
        block_q, block_k, capacity, list_rows = pattern.block_q, pattern.block_k, blocks.shape[3], blocks.shape[0]
        order = launch_order(pattern)
    tile, padded = config(dim, block_k, precision), padded_dim(dim)
    k_rows = TensorDescriptor.from_tensor(k, [1, tile.block_n, 1, padded])
    if precision == "int8_fp8":
        v_rows = TensorDescriptor.from_tensor(v.permute(0, 2, 3, 1), [1, 1, padded, tile.block_n])
    else:
        v_rows = TensorDescriptor.from_tensor(v, [1, tile.block_n, 1, padded])
    grid = (batch * heads * triton.cdiv(queries, block_q) * (block_q // QUERIES),)
    masked = valid is not None or keys % block_k != 0

    def run() -> None:
        triton.set_allocator(lambda size, align, stream: torch.empty(size, dtype=torch.int8, device=q.device))
        attention_kernel[grid](
            q,
            k_rows,
            v_rows,
            out,
            lse,
            q_scale,
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
            0 if q_scale is None else q_scale.stride(1),
            heads,
            queries,
            keys,
            list_rows,
            capacity,
            out.shape[1] * out.shape[2],
            scale * LOG2_E,
            DIM=dim,
            PADDED_DIM=padded,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            BLOCK_M=QUERIES,
            BLOCK_N=tile.block_n,
            KEY_GROUP=KEY_GROUP,
            P_LOG2=P_LOG2[precision],
            MASKED=masked,
            STAGES=tile.stages,
            HEAD_GROUP=heads // k.shape[2],
            num_warps=4,
            num_stages=tile.stages,
        )

    with hardware.on(q.device):
        contextvars.copy_context().run(run)  # the allocator of the descriptors is this launch's alone
    return out, lse


@triton.jit
def attention_kernel(
    q_ptr, k_rows, v_rows, out_ptr, lse_ptr, q_scale_ptr, k_scale_ptr, v_scale_ptr, offset_ptr,
    part_out_ptr, part_lse_ptr, rows_ptr,
    blocks_ptr, counts_ptr, valid_ptr, order_ptr, q_stride_b, q_stride_s, q_stride_h, q_scale_stride,
    heads, queries, keys, list_rows, capacity, out_rows, qk_scale,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEY_GROUP: tl.constexpr, P_LOG2: tl.constexpr, MASKED: tl.constexpr,
    STAGES: tl.constexpr, HEAD_GROUP: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries of one head. `blocks_ptr` None reads every key; `valid_ptr` None has whole key blocks.

    Keys come by descriptors of `[1, BLOCK_N, 1, PADDED_DIM]`, and so do values, but in FP8 by `[1, 1, PADDED_DIM, BLOCK_N]`,
    as their tokens lie beside each other. Scales and `offset_ptr` None have values and no codes; `v_scale_ptr` is None too
    where only q and k are codes. MASKED: a tile may have keys that do not exist. HEAD_GROUP heads of q share one of k and v.
    """
    tile, head, batch = placed_program(order_ptr, queries, heads, list_rows, BLOCK_Q, BLOCK_M)
    key_head, key_heads = head // HEAD_GROUP, heads // HEAD_GROUP
    at_batch, at_head = batch.to(tl.int32), key_head.to(tl.int32)  # as descriptors take them
    q_ptr += batch * q_stride_b + head * q_stride_h
    q_rows = tl.make_tensor_descriptor(q_ptr, [queries, DIM], [q_stride_s, 1], [BLOCK_M, PADDED_DIM])

    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    q = q_rows.load([tile * BLOCK_M, 0])
    factor = tl.full((BLOCK_M,), qk_scale, tl.float32)
    if q_scale_ptr is not None:
        q_scale_ptr += (batch * heads + head) * q_scale_stride
        q_scales = tl.make_tensor_descriptor(q_scale_ptr, [queries], [1], [BLOCK_M])
        factor *= q_scales.load([tile * BLOCK_M])
        k_scale_ptr += (batch * key_heads + key_head) * tl.cdiv(keys, KEY_GROUP)

    acc = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)

    PARTS: tl.constexpr = BLOCK_K // BLOCK_N
    if blocks_ptr is None:
        count = tl.cdiv(keys, BLOCK_K)
    else:
        query_blocks = tl.cdiv(queries, BLOCK_Q)
        list_line = (tl.where(list_rows > 1, batch, 0) * heads + head) * query_blocks + tile * BLOCK_M // BLOCK_Q
        count = tl.load(counts_ptr + list_line)
        if BLOCK_M < BLOCK_Q:
            count = tl.where(tile * BLOCK_M < queries, count, 0)
        blocks_ptr += list_line * capacity
    for step in tl.range(0, count * PARTS, num_stages=STAGES, warp_specialize=True):
        block = step // PARTS
        if blocks_ptr is not None:
            block = tl.load(blocks_ptr + block)
        start = block * BLOCK_K + step % PARTS * BLOCK_N
        tokens = keys - start
        if valid_ptr is not None:
            tokens = tl.minimum(tokens, tl.load(valid_ptr + block) - step % PARTS * BLOCK_N)
        scaled = factor
        k = k_rows.load([at_batch, start, at_head, 0]).reshape(BLOCK_N, PADDED_DIM)
        if k_scale_ptr is None:
            scores = tl.dot(q, k.T)
        else:
            scores = tl.dot(q, k.T, out_dtype=tl.int32).to(tl.float32)
            # A tile may lie behind the last group, where nothing is read that counts.
            scaled *= tl.load(k_scale_ptr + tl.minimum(start // KEY_GROUP, tl.cdiv(keys, KEY_GROUP) - 1))
        exists = tl.arange(0, BLOCK_N) < tokens
        p, shrink, total, top = softmax_tile(
            scores, scaled, total, top, exists, P_LOG2, MASKED, k_scale_ptr is not None
        )
        acc = acc * shrink[:, None]
        if P_LOG2 == 0.0:
            v = v_rows.load([at_batch, start, at_head, 0]).reshape(BLOCK_N, PADDED_DIM)
            acc = tl.dot(p.to(v.dtype), v, acc)
        else:
            v = v_rows.load([at_batch, at_head, 0, start]).reshape(PADDED_DIM, BLOCK_N)
            acc += tl.dot(p.to(v.dtype), v.T)

    store_rows(
        acc, total, top, out_ptr, lse_ptr, v_scale_ptr, offset_ptr, part_out_ptr, part_lse_ptr, rows_ptr,
        batch, row, head, queries, heads, out_rows, qk_scale, DIM, PADDED_DIM, P_LOG2, HEAD_GROUP,
    )  # fmt: skip
