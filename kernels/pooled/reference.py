"""What attention to the means of the unread blocks means, in plain PyTorch; fast enough to be what runs on a CPU."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from diffusers_accel.kernels.pattern import BlockPattern


def refuses(device: torch.device, dtype: torch.dtype, head_dim: int, block_q: int) -> str | None:
    """Why this implementation cannot run there, or None."""
    return None if dtype.is_floating_point else f"needs a floating-point dtype, found {dtype}"


def pooled(q: Tensor, k_means: Tensor, v_means: Tensor, pattern: BlockPattern, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each query block to the means of the blocks that it does not list, in fp32 (fp64 for fp64)."""
    batch, queries, heads, dim = q.shape
    group = heads // k_means.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.empty(batch, queries, heads, dim, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=q.device)
    lengths = pattern.key_lengths()
    unread = (~pattern.mask() & (lengths > 0)).expand(batch, -1, -1, -1)
    for b, h in product(range(batch), range(heads)):
        weighed = unread[b, h].repeat_interleave(pattern.block_q, 0)[:queries]
        # A mean that no query of the head weighs may be anything: 0 times NaN is NaN.
        keys, values = (x[b, :, h // group].to(wide) for x in (k_means, v_means))
        values = values.masked_fill(~unread[b, h].any(0)[:, None], 0)
        scores = scale * (q[b, :, h].to(wide) @ keys.T) + lengths.to(wide).log()
        scores = scores.masked_fill(~weighed, -torch.inf)
        some = weighed.any(1, keepdim=True)
        out[b, :, h] = (scores.softmax(1).where(some, 0) @ values).to(q.dtype)
        lse[b, h] = scores.logsumexp(1).float()
    return out, lse
