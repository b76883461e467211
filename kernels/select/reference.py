"""What selection means, in plain PyTorch; fast enough to be what runs on a CPU. Nothing in it reads the device."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_accel.kernels.grouped import each_query_head


def refuses(device: torch.device, key_blocks: int) -> str | None:
    """Why this implementation cannot run there, or None."""
    return None


def softmax_map(q_means: Tensor, k_means: Tensor, scale: float) -> Tensor:
    """The row softmax of the pooled scores: fp32 `[B, H, Q, K]`."""
    k_means = each_query_head(k_means, q_means.shape[2])
    return (scale * torch.einsum("bqhd,bkhd->bhqk", q_means, k_means)).softmax(-1)


def cut(
    weights: Tensor,
    always: Tensor | None,
    rows: range,
    columns: range,
    blocks: tuple[int, int],
    rule: str,
    amount: float,
    min_blocks: int,
    capacity: int,
) -> tuple[Tensor, Tensor]:
    """The lists and counts of a pattern of `blocks` query and key blocks: `weights` are of the `rows` and `columns` that
    compete, all else is read whole."""
    square = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
    ranks = weights if always is None else weights.masked_fill(always[..., *square], torch.inf)
    mask = torch.ones(*weights.shape[:2], *blocks, dtype=torch.bool, device=weights.device)
    mask[..., *square] = kept(weights, ranks, rule, amount, min_blocks)
    return lists(mask, capacity)


def kept(weights: Tensor, ranks: Tensor, rule: str, amount: float, min_blocks: int) -> Tensor:
    """The competing pairs that are kept, bool `[B, H, rows, columns]`; the rank of a forced pair is infinite."""
    ranked, order = ranks.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(ranks.shape[-1], device=ranks.device)
    if rule == "head":
        threshold = ranks.flatten(2).kthvalue(int(amount), -1).values
        first = ranked >= threshold[..., None, None]
    elif rule == "row":
        first = (place < amount).expand(order.shape)
    else:
        weight_before = torch.nn.functional.pad(weights.gather(-1, order).cumsum(-1)[..., :-1], (1, 0))
        first = weight_before < amount
    first = first | (place < min_blocks) | (ranked == torch.inf)
    return torch.zeros_like(first).scatter_(-1, order, first)


def lists(mask: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Ascending ids, int32 `[B, H, Q, capacity]`, 0 past the counts, and counts, int32 `[B, H, Q]`, of a block mask."""
    # Unread entries are all scattered into one slot past the end, which is cut off.
    slot = torch.where(mask, mask.cumsum(-1) - 1, capacity)
    ids = torch.arange(mask.shape[3], dtype=torch.int32, device=mask.device).expand(mask.shape)
    blocks = ids.new_zeros(*mask.shape[:3], capacity + 1).scatter_(-1, slot, ids)[..., :capacity]
    return blocks.contiguous(), mask.sum(-1, dtype=torch.int32)
