"""What quantized q, k, v are, and the few facts that every kernel that makes or reads them shares."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusers_accel.kernels.pattern import block_lengths

PRECISIONS = ("int8", "int8_fp8")
# Keys that share a scale. Attention takes at most so many at once, so that a tile of scores has one factor per row.
KEY_GROUP = 64
INT8_MAX = 127.0
FP8_MAX = 448.0  # of e4m3
# Largest weight of a value, where weights are in FP8. A power of two scales without rounding, and errs a little less than 448.
P_MAX = 256.0
FP8_TOKENS = 16  # of one channel are read at once
# Groups of smaller values than this have the scale of this one, also those of zeros. Its inverse is finite, and the product
# of two such scales with that of the softmax is above the least number of fp32: 0 times a masked score would not be one.
SMALLEST = 1e-15


@dataclass(frozen=True, eq=False)
class Quantized:
    """q, k, v as codes with scales: `code x scale` is the value. Scales and means are fp32 and contiguous.

    Args:
        precision: one of `PRECISIONS`.
        dtype: of the q, k, v that were quantized, and so of the output of attention.
        q: int8 `[B, S_q, H, D]`.
        k: int8 `[B, S_k, H_k, D]`, of the keys less `k_mean`.
        v: `[B, S_k, H_k, D]`, in `dtype`, or float8_e4m3fn whose tokens lie beside each other (stride 1), because the
            matrix units of Hopper take eight-bit operands only along the dimension that is summed over. A channel is
            then stored in a multiple of FP8_TOKENS, filled up with zeros.
        q_scale: `[B, H, S_q]`, per query.
        k_scale: `[B, H_k, ceil(S_k / KEY_GROUP)]`, per group of keys.
        v_scale: `[B, H_k, D]`, per channel, or None where v is in `dtype`.
        k_mean: `[B, H_k, D]`, what was subtracted from each key.
        offset: `[B, H, S_q]`, q . k_mean: by `scale x offset` the scores of the true keys are larger. Softmax does not
            see it, the log-sum-exp does.
    """

    precision: str
    dtype: torch.dtype
    q: Tensor
    k: Tensor
    v: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor | None
    k_mean: Tensor
    offset: Tensor

    def dequantize(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k less its mean, and v, in fp32."""
        q = self.q * self.q_scale.transpose(1, 2)[..., None]
        k_scale = self.k_scale.repeat_interleave(KEY_GROUP, 2)[..., : self.k.shape[1]]
        k = self.k * k_scale.transpose(1, 2)[..., None]
        v = self.v.float() if self.v_scale is None else self.v.float() * self.v_scale[:, None]
        return q, k, v


def mean_of_blocks(means: Tensor, tokens: int, block: int, valid: Tensor | None) -> Tensor:
    """The mean of all tokens that exist, fp32 `[B, H, D]`, from those of their blocks, `[B, blocks, H, D]`."""
    lengths = block_lengths(tokens, block, valid, means.device)[:, None, None]
    return (means * lengths).sum(1) / lengths.sum().clamp(min=1)
