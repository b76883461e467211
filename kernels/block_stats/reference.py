"""What block statistics mean, in plain PyTorch, a few rows of blocks at a time."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from diffusers_accel.kernels.pattern import block_lengths

# How much of the map is held at once, in fp32: 3 rows of 64-query blocks against 75,600 keys. Never less than one row.
MAP_BYTES = 64 * 2**20


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int, blocks: tuple[int, int]) -> str | None:
    """Why this implementation cannot run there, or None."""
    return None if dtype.is_floating_point else f"needs a floating-point dtype, found {dtype}"


def block_stats(
    q: Tensor, k: Tensor, lse: Tensor, block_q: int, block_k: int, epsilon: float, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum, maximum and number of small entries of each block, computed in fp32 (fp64 for fp64)."""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    lengths = block_lengths(queries, block_q, None, q.device), block_lengths(keys, block_k, None, q.device)
    entries = lengths[0][:, None] * lengths[1]
    rows, columns = entries.shape
    total = torch.empty(batch, heads, rows, columns, dtype=torch.float32, device=q.device)
    largest, small = torch.empty_like(total), torch.empty_like(total, dtype=torch.int32)
    shift = lse.masked_fill(lse == -torch.inf, torch.inf)  # exp(scores - inf) is the 0 of a query that reads nothing
    rows_at_once = max(1, MAP_BYTES // (4 * block_q * keys))
    group = heads // k.shape[2]
    for b, h in product(range(batch), range(heads)):
        transposed = k[b, :, h // group].to(wide).T
        for first in range(0, rows, rows_at_once):
            part = slice(first, first + rows_at_once)
            tokens = slice(first * block_q, (first + rows_at_once) * block_q)
            p = (scale * (q[b, tokens, h].to(wide) @ transposed)).sub_(shift[b, h, tokens, None]).exp_()
            # Padded to whole blocks with zeros, which add nothing to any of the three.
            height = len(entries[part])
            p = torch.nn.functional.pad(p, (0, columns * block_k - keys, 0, height * block_q - len(p)))
            p = p.view(height, block_q, columns, block_k)
            total[b, h, part], largest[b, h, part] = p.sum((1, 3)), p.amax((1, 3))
            small[b, h, part] = entries[part] - (p >= epsilon).sum((1, 3), dtype=torch.int32)
    return total, largest, small
