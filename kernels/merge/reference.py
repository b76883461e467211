"""What merging means: each part weighs as much as the keys that it saw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this implementation cannot run there, or None."""
    return None if dtype.is_floating_point else f"needs a floating-point dtype, found {dtype}"


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Softmax over the parts' lse, weighing the parts' out; in fp32 (fp64 for fp64)."""
    lse = torch.stack([part_lse for _, part_lse in parts])
    total = lse.logsumexp(0)
    weights = torch.where(lse == -torch.inf, 0.0, (lse - total).exp()).transpose(2, 3)[..., None]
    wide = torch.promote_types(parts[0][0].dtype, torch.float32)
    out = sum((weight * out.to(wide) for weight, (out, _) in zip(weights, parts)), torch.zeros((), dtype=wide))
    return out.to(parts[0][0].dtype), total
