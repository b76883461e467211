"""What merging means: each part weighs as much as the keys that it saw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this implementation cannot run there, or None."""
    return None if dtype.is_floating_point else f"needs a floating-point dtype, found {dtype}"


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Weighs the parts' out by the softmax over their lse; in fp32 (fp64 for fp64)."""
    outs, lses = torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])
    unread = (lses == -torch.inf).all(0)
    weights = lses.softmax(0).masked_fill(unread, 0).transpose(2, 3)[..., None]
    wide = torch.promote_types(outs.dtype, torch.float32)
    return (weights * outs.to(wide)).sum(0).to(outs.dtype).contiguous(), lses.logsumexp(0)
