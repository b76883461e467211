"""What quantization means, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_accel.kernels.grouped import each_query_head
from diffusers_accel.kernels.pattern import block_lengths
from diffusers_accel.kernels.pool import pool
from diffusers_accel.kernels.quantize.quantized import (
    FP8_MAX,
    FP8_TOKENS,
    INT8_MAX,
    KEY_GROUP,
    SMALLEST,
    Quantized,
    mean_of_blocks,
)


def refuses(device: torch.device, dtype: torch.dtype, precision: str) -> str | None:
    """Why this implementation cannot run there, or None."""
    return None if dtype.is_floating_point else f"needs a floating-point dtype, found {dtype}"


def quantize(
    q: Tensor, k: Tensor, v: Tensor, precision: str, block: int, valid: Tensor | None, k_mean: Tensor | None
) -> Quantized:
    """The codes and scales, computed in fp32; the arguments have been checked by the caller."""
    keys = k.shape[1]
    if k_mean is None:
        k_mean = mean_of_blocks(pool(k, block, valid, impl="reference"), keys, block, valid)
    wide_q, wide_k, wide_v = q.float(), k.float() - k_mean[:, None], v.float()
    if valid is not None:
        token = torch.arange(keys, device=k.device)
        missing = token % block >= block_lengths(keys, block, valid, k.device)[token // block]
        wide_k, wide_v = (x.masked_fill(missing[:, None, None], 0) for x in (wide_k, wide_v))

    q_scale = scale_of(wide_q, (3,), INT8_MAX)
    groups = torch.nn.functional.pad(wide_k, (0, 0, 0, 0, 0, -keys % KEY_GROUP)).unflatten(1, (-1, KEY_GROUP))
    k_scale = scale_of(groups, (2, 4), INT8_MAX)
    v_scale = None
    if precision == "int8_fp8":
        v_scale = scale_of(wide_v, (1,), FP8_MAX)
        # Tokens beside each other and filled up: see Quantized.
        channels = torch.nn.functional.pad((wide_v * (1 / v_scale)).permute(0, 2, 3, 1), (0, -keys % FP8_TOKENS))
        v = channels.contiguous().to(torch.float8_e4m3fn)[..., :keys].permute(0, 3, 1, 2)
    return Quantized(
        precision,
        q.dtype,
        int8(wide_q, q_scale),
        int8(groups, k_scale).flatten(1, 2)[:, :keys].contiguous(),
        v,
        q_scale.squeeze(3).transpose(1, 2).contiguous(),
        k_scale[:, :, 0, :, 0].transpose(1, 2).contiguous(),
        None if v_scale is None else v_scale[:, 0],
        k_mean,
        torch.einsum("bshd,bhd->bhs", wide_q, each_query_head(k_mean, q.shape[2], 1)).contiguous(),
    )


def scale_of(x: Tensor, dims: tuple[int, ...], largest_code: float) -> Tensor:
    """The scale of the groups that `dims` span, kept as dimensions of 1: the largest value has the largest code."""
    largest = x.abs().amax(dims, keepdim=True)  # NaN if one of them is
    scale = largest.clamp(min=SMALLEST) / largest_code
    return torch.where(largest == torch.inf, torch.nan, scale)


def int8(x: Tensor, scale: Tensor) -> Tensor:
    """The nearest codes, halves upwards; 0 where there is none."""
    return (x * (1 / scale) + 0.5).floor().nan_to_num().to(torch.int8)
