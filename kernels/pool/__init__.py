"""The mean of each block of tokens, from which methods estimate what a block pair is worth."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_accel.kernels.choice import Operator

__all__ = ["pool"]

_operator = Operator(__name__, ("portable", "reference"))


def pool(x: Tensor, block: int = 128, valid: Tensor | None = None, *, impl: str = "auto") -> Tensor:
    """Mean of each block of `block` consecutive tokens, over the tokens that exist.

    Args:
        x: `[B, S, H, D]`, any strides; the last block may be shorter.
        block: tokens per block.
        valid: int32 `[blocks]`, how many tokens at the start of each block exist; None means all.
        impl: `auto`, `portable` or `reference`; an explicit one is obeyed or refused.

    Returns:
        `[B, blocks, H, D]` in fp32; 0 for a block of which no token exists.

    Raises:
        ValueError: shapes do not fit, or the implementation asked for cannot run.
    """
    if x.dim() != 4 or 0 in x.shape or block < 1:
        raise ValueError(f"pool needs x [B, S, H, D] and a positive block, found {list(x.shape)} and {block}")
    blocks = -(-x.shape[1] // block)
    if valid is not None and (valid.shape != (blocks,) or valid.dtype != torch.int32 or valid.device != x.device):
        raise ValueError(
            f"valid must be int32 [{blocks}] on {x.device} ({x.shape[1]} tokens in blocks of {block}), "
            f"found {valid.dtype} {list(valid.shape)} on {valid.device}"
        )
    with torch.no_grad():
        return _operator.choose(impl, x.device, x.dtype).pool(x, block, valid)
