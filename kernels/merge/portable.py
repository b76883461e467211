"""Merging of partial attention in one Triton pass: every part is read once, in fp32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from diffusers_accel.kernels import hardware


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this implementation cannot run there, or None."""
    return hardware.refuses(device, dtype)


def merge(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The merged (out, lse); the parts have been checked by the caller."""
    outs = tuple(out.contiguous() for out, _ in parts)
    lses = tuple(lse.contiguous() for _, lse in parts)
    out, lse = torch.empty_like(outs[0]), torch.empty_like(lses[0])
    batch, tokens, heads, dim = out.shape
    with hardware.on(out.device):
        merge_kernel[(triton.cdiv(tokens, 32) * heads * batch,)](
            outs, lses, out, lse, tokens, heads, DIM=dim, PADDED_DIM=triton.next_power_of_2(dim), BLOCK=32, num_warps=4
        )
    return out, lse


@triton.jit
def merge_kernel(
    part_outs, part_lses, out_ptr, lse_ptr, tokens, heads,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK tokens of one head. All outs are contiguous `[B, S, H, DIM]`, all lses `[B, H, S]`."""
    tiles = tl.cdiv(tokens, BLOCK)
    token = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    head = tl.program_id(0) // tiles % heads
    batch = (tl.program_id(0) // tiles // heads).to(tl.int64)
    column = tl.arange(0, PADDED_DIM)
    lse_at = (batch * heads + head) * tokens + token
    out_at = ((batch * tokens + token[:, None]) * heads + head) * DIM + column[None, :]
    inside = (token[:, None] < tokens) & (column[None, :] < DIM)

    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    for i in tl.static_range(len(part_lses)):
        top = tl.maximum(top, tl.load(part_lses[i] + lse_at, mask=token < tokens, other=float("-inf")))
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, PADDED_DIM), tl.float32)
    for i in tl.static_range(len(part_lses)):
        lse = tl.load(part_lses[i] + lse_at, mask=token < tokens, other=float("-inf"))
        weight = tl.exp(lse - shift)
        total += weight
        acc += weight[:, None] * tl.load(part_outs[i] + out_at, mask=inside, other=0.0).to(tl.float32)

    seen = total > 0
    safe = tl.where(seen, total, 1.0)
    tl.store(out_ptr + out_at, (acc / safe[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + lse_at, tl.where(seen, shift + tl.log(safe), float("-inf")), mask=token < tokens)
