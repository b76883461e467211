"""Block-sparse attention for Hopper as FlashAttention-3 schedules it: one warp group loads, two compute by turns.

What is computed is `hopper`'s, whose softmax it shares; how is in `gluon_kernel`, written in Gluon, the language below
Triton that says itself which warps do what. Not yet run on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from diffusers_accel.kernels import hardware
from diffusers_accel.kernels.attention.epilogue import Epilogue
from diffusers_accel.kernels.attention.hopper import QUERIES, loadable, without_holes
from diffusers_accel.kernels.attention.softmax import LOG2_E
from diffusers_accel.kernels.pattern import BlockPattern

VERSION = "3.6"  # of Triton: Gluon is experimental, and its names and their meaning may change


class Config(NamedTuple):
    """The keys of a tile, and how many tiles of k and of v shared memory holds."""

    block_n: int
    stages: int


CONFIGS: dict[int, Config] = {64: Config(128, 3), 128: Config(128, 2)}  # by head dim


def config(head_dim: int, block_k: int) -> Config:
    """The table's row, its tile cut to the keys of a pattern's block: smaller tiles leave room for more of them."""
    best = CONFIGS[head_dim]
    return best if block_k % best.block_n == 0 else Config(64, 4)


def refuses(
    device: torch.device, dtype: torch.dtype, head_dim: int, blocks: tuple[int, int], precision: str
) -> str | None:
    """Why this implementation cannot run there, or None."""
    if device.type != "cuda":
        return f"runs on CUDA devices, found {device.type}"
    if hardware.capability(device) != 90:
        return f"needs compute capability 9.0 (Hopper), found {hardware.capability(device) / 10}"
    if triton.__version__.split(".")[:2] != VERSION.split("."):
        return f"is written for the Gluon of Triton {VERSION}, found Triton {triton.__version__}"
    if precision != "input":
        return f"takes precision input, found {precision}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, found {dtype}"
    if head_dim not in CONFIGS:
        return f"takes head dims {' and '.join(map(str, CONFIGS))}, found {head_dim}"
    if blocks[0] % QUERIES or blocks[1] % 64:
        return f"takes pattern blocks in multiples of {QUERIES} queries x 64 keys, found {blocks[0]} queries x {blocks[1]} keys"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern | None, scale: float, end: Epilogue | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the blocks of the pattern, its end apart; the arguments have been checked by the caller."""
    # Imported here, as it needs the Gluon that `refuses` looks for.
    from diffusers_accel.kernels.attention.gluon_kernel import attention_kernel, rows

    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    blocks = counts = valid = None
    block_q, block_k, capacity, list_rows = 128, 128, 0, 1
    if pattern is not None:
        blocks, counts, valid = pattern.blocks.contiguous(), pattern.counts.contiguous(), pattern.valid
        block_q, block_k, capacity, list_rows = pattern.block_q, pattern.block_k, blocks.shape[3], blocks.shape[0]
    tile = config(dim, block_k)
    with hardware.on(q.device):
        attention_kernel[(batch * heads * triton.cdiv(queries, QUERIES),)](
            rows(loadable(q), QUERIES // 2),
            rows(loadable(k), tile.block_n),
            rows(loadable(without_holes(v, pattern)), tile.block_n),
            rows(out, QUERIES // 2),
            lse,
            blocks,
            counts,
            valid,
            heads,
            queries,
            keys,
            list_rows,
            capacity,
            scale * LOG2_E,
            BLOCK_Q=block_q,
            BLOCK_K=block_k,
            STAGES=tile.stages,
            HEAD_GROUP=heads // k.shape[2],
            num_warps=4,
        )
    return (out, lse) if end is None else end.apply(out, lse)
