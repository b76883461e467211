"""Block means in one Triton pass over the tokens."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_accel.kernels import hardware
from diffusers_accel.kernels.rows import rows_at, rows_in_eights


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this implementation cannot run there, or None."""
    return hardware.refuses(device, dtype)


def pool(x: Tensor, block: int, valid: Tensor | None) -> Tensor:
    """Mean of each block; the arguments have been checked by the caller."""
    batch, tokens, heads, dim = x.shape
    blocks = triton.cdiv(tokens, block)
    means = torch.empty(batch, blocks, heads, dim, dtype=torch.float32, device=x.device)
    with hardware.on(x.device):
        pool_kernel[(blocks * heads * batch,)](
            x, means, valid, *x.stride(), tokens, heads, block,
            DIM=dim, PADDED_DIM=triton.next_power_of_2(dim), BLOCK=32, EIGHTS=rows_in_eights(x), num_warps=4,
        )  # fmt: skip
    return means


@triton.jit
def pool_kernel(
    x_ptr, means_ptr, valid_ptr, stride_b, stride_s, stride_h, stride_d, tokens, heads, block,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    """One block of one head, BLOCK tokens at a time. `valid_ptr` None has every token."""
    head = tl.program_id(0) % heads
    blocks = tl.cdiv(tokens, block)
    at = tl.program_id(0) // heads % blocks
    batch = (tl.program_id(0) // heads // blocks).to(tl.int64)
    length = tl.minimum(tokens - at * block, block)
    if valid_ptr is not None:
        length = tl.minimum(length, tl.load(valid_ptr + at))
    column = tl.arange(0, PADDED_DIM)
    total = tl.zeros((PADDED_DIM,), tl.float32)
    for start in range(0, length, BLOCK):
        token = start + tl.arange(0, BLOCK)
        inside = (token[:, None] < length) & (column[None, :] < DIM)
        place = at.to(tl.int64) * block + token[:, None]
        x_at = rows_at(x_ptr, batch, place, head.to(tl.int64), stride_b, stride_s, stride_h, EIGHTS)
        x = tl.load(x_at + column[None, :] * stride_d, mask=inside, other=0.0)
        total += tl.sum(x.to(tl.float32), 0)
    mean = total / tl.maximum(length, 1).to(tl.float32)
    tl.store(means_ptr + ((batch * blocks + at) * heads + head) * DIM + column, mean, mask=column < DIM)
