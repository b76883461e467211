"""q, k, v in eight bits: symmetric INT8 for the scores and, where asked for, FP8 for the values.

SageAttention's scheme (Zhang et al., arXiv 2410.02367 and 2411.10958): keys less their mean, one scale per group of
tokens. Here each query has its own scale, because a factor per row costs the kernel nothing, and the shift of the LSE
that the keys' mean makes is kept, because parts of attention are merged by it. What is kept is in `quantized.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_accel.kernels.checks import check_k_mean, check_qkv
from diffusers_accel.kernels.choice import Operator
from diffusers_accel.kernels.quantize.quantized import KEY_GROUP, PRECISIONS, Quantized

__all__ = ["KEY_GROUP", "PRECISIONS", "Quantized", "quantize"]

_operator = Operator(__name__, ("portable", "reference"))


def quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    precision: str,
    *,
    block: int = 128,
    valid: Tensor | None = None,
    k_mean: Tensor | None = None,
    impl: str = "auto",
) -> Quantized:
    """The operands of attention in eight bits. Every key that exists is read, also one that no query will read.

    Args:
        q: `[B, S_q, H, D]`, fp16, bf16 or fp32, any strides.
        k, v: `[B, S_k, H_k, D]`, dtype and device of q; H_k divides H.
        precision: one of `PRECISIONS`: `int8` is INT8 q and k beside v as it is, `int8_fp8` has v in FP8 (e4m3) too.
        block: tokens per key block, which `valid` counts in.
        valid: int32 `[key blocks]`, how many tokens at the start of each key block exist; None means all. The others
            weigh in no scale and no mean; their codes are 0.
        k_mean: fp32 `[B, H_k, D]`, what is subtracted from the keys; None means their mean. The result is exact in any
            case: a mean of an earlier step saves a pass over k, zeros turn the smoothing off.
        impl: `auto`, `portable` or `reference`; an explicit one is obeyed or refused.

    Returns:
        The codes with their scales. A group of values of which one is NaN or infinite has scale NaN.

    Raises:
        ValueError: shapes, dtypes, devices or names do not fit, or the implementation asked for cannot run.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, found {precision!r}")
    check_qkv(q, k, v)
    batch, _, _, dim = q.shape
    if block < 1:
        raise ValueError(f"block must be a positive number of tokens, found {block}")
    blocks = -(-k.shape[1] // block)
    if valid is not None and (valid.shape != (blocks,) or valid.dtype != torch.int32 or valid.device != q.device):
        raise ValueError(
            f"valid must be int32 [{blocks}] on {q.device} ({k.shape[1]} keys in blocks of {block}), "
            f"found {valid.dtype} {list(valid.shape)} on {valid.device}"
        )
    check_k_mean(k_mean, (batch, k.shape[2], dim), q.device)
    with torch.no_grad():
        return _operator.choose(impl, q.device, q.dtype, precision).quantize(q, k, v, precision, block, valid, k_mean)
