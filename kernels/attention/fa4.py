"""Block-sparse attention by FlashAttention-4, the kernels in CuTe DSL of the package flash-attn-4, which take lists of blocks.

Written to its interface in 4.0.0b36 (`flash_attn.cute`): lists `[B|1, H, Q, C]` of the key blocks that are read whole and of
those that a function masks, ascending, with their counts; every block size that its tiles allow is one of `BLOCKS`. Where the
keys end within a block it masks by itself, in either list. A log-sum-exp is natural, and a query block without key blocks has
out 0 and lse -inf. None of that is documented, so a trial on the device asks for it. Not yet run on a GPU.
"""

from __future__ import annotations

import importlib
import inspect
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.extras import install
from diffusers_accel.kernels import hardware
from diffusers_accel.kernels.attention import reference
from diffusers_accel.kernels.attention.epilogue import Epilogue
from diffusers_accel.kernels.pattern import BlockPattern, block_lengths

PACKAGE = "flash-attn-4"
# Major compute capability -> queries x keys of a list's block. A program of Blackwell's holds two tiles of 128 queries.
BLOCKS = {9: (128, 128), 10: (256, 128)}
# How the package is called; a release that takes other names is refused.
ARGUMENTS = ("softmax_scale", "pack_gqa", "mask_mod", "aux_tensors", "block_sparse_tensors", "return_lse")


def refuses(
    device: torch.device, dtype: torch.dtype, head_dim: int, blocks: tuple[int, int], precision: str
) -> str | None:
    """Why this implementation cannot run there, or None. On such a GPU the first call compiles a kernel, and waits for it."""
    if precision != "input":
        return f"computes in the type of q, k and v only, found precision {precision}"
    if device.type != "cuda" or torch.version.hip is not None:
        return f"runs on CUDA devices, found {device.type if torch.version.hip is None else 'ROCm'}"
    capability = hardware.capability(device)
    if capability // 10 not in BLOCKS:
        return f"needs compute capability 9.x or 10.x, found {capability / 10}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"takes float16 and bfloat16, found {dtype}"
    if not 8 <= head_dim <= 128 or head_dim % 8:
        return f"takes head dims from 8 to 128 in multiples of 8, found {head_dim}"
    if blocks != (expected := BLOCKS[capability // 10]):
        return (
            f"takes pattern blocks of {expected[0]} queries x {expected[1]} keys on compute capability {capability / 10}, "
            f"found {blocks[0]} queries x {blocks[1]} keys"
        )
    return unfit() or fails(device, dtype, head_dim, blocks)


def unfit() -> str | None:
    """Why the package cannot be called, or None."""
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return f"needs {PACKAGE}: {install('fa4')}"
    try:
        taken = inspect.signature(importlib.import_module("flash_attn.cute").flash_attn_func).parameters
    except Exception as error:  # whatever a build that does not fit raises is the reason
        return f"{PACKAGE} {version} cannot be imported: {' '.join(str(error).split()) or type(error).__name__}"
    if absent := [name for name in ARGUMENTS if name not in taken]:
        return f"{PACKAGE} {version} takes no {', '.join(absent)}: {install('fa4', newer=True)}"
    return None


def fails(device: torch.device, dtype: torch.dtype, head_dim: int, blocks: tuple[int, int]) -> str | None:
    """Why it is not right on a few tokens there, or None: lists, a ragged end, holes, an empty row, scale, log-sum-exp."""
    random = torch.Generator().manual_seed(0)
    queries, keys = 2 * blocks[0] - 40, 3 * blocks[1] - 40
    q, k, v = (torch.randn(1, n, 2, head_dim, generator=random).to(device, dtype) for n in (queries, keys, keys))
    mask = torch.tensor([[[[1, 0, 1], [0, 0, 0]], [[0, 1, 0], [1, 1, 1]]]], dtype=torch.bool, device=device)
    holes = torch.tensor([blocks[1], blocks[1] - 56, blocks[1] - 40], dtype=torch.int32, device=device)
    try:
        for valid in (None, holes):
            pattern = BlockPattern.from_mask(mask, queries, keys, *blocks, valid)
            found, expected = (each(q, k, v, pattern, head_dim**-0.5) for each in (attention, reference.attention))
            for name, x, y in zip(("output", "log-sum-exp"), found, expected, strict=True):
                if x.shape != y.shape or x.dtype != y.dtype:
                    return f"returned {list(x.shape)} in {x.dtype} as {name} of a trial, expected {list(y.shape)} in {y.dtype}"
                error = (x.float() - y.float()).masked_fill(x == y, 0).abs().max().item()  # -inf is equal to itself
                if not error < 0.05:  # NaN compares as False
                    return f"erred by {error:.3g} in the {name} of a trial, expected < 0.05"
    except torch.OutOfMemoryError:
        raise  # passes, while a refusal is for good
    except Exception as error:  # as above
        return f"failed on {queries} queries and {keys} keys: {' '.join(str(error).split()) or type(error).__name__}"
    return None


def attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern | None, scale: float, end: Epilogue | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the blocks of the pattern, its end apart; the arguments have been checked by the caller."""
    from diffusers_accel.kernels.attention.hopper import loadable, without_holes  # which has Triton imported

    call = importlib.import_module("flash_attn.cute").flash_attn_func
    with hardware.on(q.device):
        out, lse = call(loadable(q), loadable(k), loadable(without_holes(v, pattern)), **options(pattern, scale))
    return (out, lse) if end is None else end.apply(out, lse)


def options(pattern: BlockPattern | None, scale: float) -> dict[str, Any]:
    """How the package is called, but for q, k and v."""
    # Heads that share keys have lists of their own, so they cannot be packed into one tile.
    called: dict[str, Any] = {"softmax_scale": scale, "pack_gqa": False, "return_lse": True}
    if pattern is None:
        return called
    tensors = importlib.import_module("flash_attn.cute.block_sparsity").BlockSparseTensorsTorch
    called["block_sparse_tensors"] = tensors(**pattern.derived(lists), block_size=(pattern.block_q, pattern.block_k))
    if pattern.valid is not None:
        called |= {"mask_mod": existing_only(), "aux_tensors": [pattern.derived(existing)]}
    return called


def lists(pattern: BlockPattern) -> dict[str, Tensor]:
    """Its lists as the package takes them: blocks with holes are masked, all others, the ragged last one too, read whole."""
    blocks, counts = pattern.blocks.contiguous(), pattern.counts.contiguous()
    if pattern.valid is None:
        masked, whole = (torch.zeros_like(counts), blocks), (counts, blocks)
    else:
        has_all = pattern.key_lengths() == block_lengths(pattern.keys, pattern.block_k, None, pattern.device)
        read = torch.arange(blocks.shape[3], device=pattern.device) < counts[..., None]
        masked, whole = (_taken(blocks, read & (has_all[blocks.long()] == which)) for which in (False, True))
    return {
        "mask_block_cnt": masked[0],
        "mask_block_idx": masked[1],
        "full_block_cnt": whole[0],
        "full_block_idx": whole[1],
    }


def _taken(blocks: Tensor, which: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and lists of these entries alone, in their order; the others lie behind them."""
    first = which.int().argsort(dim=-1, descending=True, stable=True)
    return which.sum(-1, dtype=torch.int32), blocks.gather(-1, first)


def existing(pattern: BlockPattern) -> Tensor:
    """int32 `[keys]`: 1 where a token exists."""
    token = torch.arange(pattern.keys, device=pattern.device)
    return (token % pattern.block_k < pattern.key_lengths()[token // pattern.block_k]).int()


@cache
def existing_only() -> Any:
    """The package's mask: one score at a time, 1-element vectors of its place, true where that key's `existing` is."""
    cutlass, cute, utils = (importlib.import_module(x) for x in ("cutlass", "cutlass.cute", "flash_attn.cute.utils"))

    @cute.jit
    def mask(batch, head, query, key, lengths, tensors):  # type: ignore[no-untyped-def]  # which the compiler would read
        exists = tensors[0]
        found = utils.scalar_to_ssa(exists[key[0]], cutlass.Int32)
        return found != utils.scalar_to_ssa(0, cutlass.Int32)

    return mask
