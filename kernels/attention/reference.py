"""What block-sparse attention means, in plain PyTorch. Every other implementation is held to this one."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from diffusers_accel.kernels.attention.epilogue import Epilogue
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.quantize import Quantized


def refuses(
    device: torch.device, dtype: torch.dtype, head_dim: int, blocks: tuple[int, int], precision: str
) -> str | None:
    """Why this implementation cannot run there, or None."""
    return None if dtype.is_floating_point else f"needs a floating-point dtype, found {dtype}"


def attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern | None, scale: float, end: Epilogue | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention of each query block over the existing tokens of its key blocks, in fp32 (fp64 for fp64)."""
    batch, queries, heads, dim = q.shape
    if pattern is None:
        pattern = BlockPattern.full(heads, queries, k.shape[1], device=q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(batch, queries, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.full((batch, heads, queries), -torch.inf, dtype=torch.float32, device=q.device)
    group = heads // k.shape[2]
    reads = pattern.mask().expand(batch, -1, -1, -1)
    token = torch.arange(pattern.keys, device=q.device)
    exists = token % pattern.block_k < pattern.key_lengths()[token // pattern.block_k]
    for b, h, i in product(range(batch), range(heads), range(pattern.query_blocks)):
        rows = slice(i * pattern.block_q, (i + 1) * pattern.block_q)
        seen = torch.nonzero(reads[b, h, i][token // pattern.block_k] & exists)[:, 0]
        if len(seen) == 0:
            continue
        scores = scale * (q[b, rows, h].to(wide) @ k[b, seen, h // group].to(wide).T)
        out[b, rows, h] = (scores.softmax(-1) @ v[b, seen, h // group].to(wide)).to(q.dtype)
        lse[b, h, rows] = scores.logsumexp(-1).float()
    return (out, lse) if end is None else end.apply(out, lse, impl="reference")


def quantized_attention(
    x: Quantized, pattern: BlockPattern | None, scale: float, end: Epilogue | None = None
) -> tuple[Tensor, Tensor]:
    """Exact attention of the dequantized q, k, v. Its log-sum-exp is that of the true keys: their mean is added back."""
    out, lse = attention(*x.dequantize(), pattern, scale)
    out, lse = out.to(x.dtype), lse + scale * x.offset
    return (out, lse) if end is None else end.apply(out, lse, impl="reference")
