"""How kernels are told that rows of channels may be read 16 bytes at a time, where 16 does not divide the head dim."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


def rows_in_eights(x: Tensor) -> bool:
    """Whether all strides of x `[B, S, H, D]` that are ever taken are multiples of 8, and channels lie beside each other."""
    taken = (stride for size, stride in zip(x.shape[:3], x.stride(), strict=False) if size > 1)
    return x.stride(3) == 1 and all(stride % 8 == 0 for stride in taken)


def loadable(x: Tensor) -> Tensor:
    """`x`, or a copy that is `rows_in_eights`, for kernels that take no other. D is a multiple of 8."""
    return x if rows_in_eights(x) else x.contiguous()


@triton.jit
def in_eights(stride):
    """The same number, which the compiler then sees to be a multiple of 8; 0 for one that is never taken and is none.

    Of an integer argument it learns by itself only whether 16 divides it, and head dim 72 has no such strides: rows would be
    read two bytes at a time. `tl.multiple_of` is lost on an argument.
    """
    return stride // 8 * 8


@triton.jit
def rows_at(x_ptr, batch, token, head, stride_b, stride_s, stride_h, EIGHTS: tl.constexpr):
    """Where rows of x `[B, S, H, D]` begin. EIGHTS says that x is `rows_in_eights`. `token`, or it and `head`, may be tensors."""
    if EIGHTS:
        stride_b, stride_s, stride_h = in_eights(stride_b), in_eights(stride_s), in_eights(stride_h)
    return x_ptr + batch * stride_b + token * stride_s + head * stride_h
