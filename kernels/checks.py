"""What every operator on q, k and v asks of its arguments.

Reads shapes, dtypes and devices; values only of a pattern, where the environment asks for it.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from diffusers_accel.kernels.grouped import check_key_heads
from diffusers_accel.kernels.pattern import BlockPattern


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q `[B, S_q, H, D]`, k and v `[B, S_k, H_k, D]`, H_k divides H, of one dtype and device; else ValueError."""
    if q.dim() != 4 or 0 in q.shape:
        raise ValueError(f"q must be [B, S, H, D] without an empty dimension, found {list(q.shape)}")
    batch, _, heads, dim = q.shape
    check_key_heads("k", k, heads)
    expected = (batch, *(k.shape[1:3] if k.dim() == 4 else ("S_k", heads)), dim)
    for name, x in (("k", k), ("v", v)):
        if tuple(x.shape) != expected or 0 in x.shape:
            raise ValueError(f"{name} must be {list(expected)} to fit q {list(q.shape)}, found {list(x.shape)}")
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(f"{name} must be {q.dtype} on {q.device} as q is, found {x.dtype} on {x.device}")


def check_pattern(pattern: BlockPattern | None, q: Tensor, keys: int) -> None:
    """A pattern for the batch rows, heads, queries and device of q `[B, S_q, H, D]` and so many keys, or None."""
    if pattern is None:
        return
    if pattern.blocks.shape[0] not in (1, q.shape[0]) or pattern.heads != q.shape[2]:
        raise ValueError(
            f"the pattern describes {pattern.blocks.shape[0]} batch rows and {pattern.heads} heads, "
            f"q has {q.shape[0]} and {q.shape[2]}; a pattern needs all heads and 1 or all batch rows"
        )
    if (pattern.queries, pattern.keys) != (q.shape[1], keys):
        raise ValueError(
            f"the pattern describes {pattern.queries} queries and {pattern.keys} keys, "
            f"found {q.shape[1]} and {keys}; it must be built for these lengths"
        )
    if pattern.device != q.device:
        raise ValueError(f"the pattern is on {pattern.device}, q on {q.device}: move it once with pattern.to(q.device)")
    if os.environ.get("DIFFUSERS_ACCEL_CHECKS") == "1":
        pattern.check()


def check_row_numbers(
    name: str, rows: Tensor, places: int, heads: int, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Numbers of rows, of one of these dtypes, `[places * heads]`."""
    if rows.shape != (places * heads,) or rows.dtype not in dtypes or rows.device != device:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} must be {wanted} [{places * heads}] on {device} ({places} places of {heads} heads), "
            f"found {rows.dtype} {list(rows.shape)} on {rows.device}"
        )


def check_rows(name: str, rows: Tensor, size: int) -> None:
    """Rows within the `size` rows of a tensor, where the environment asks for it: that waits for the device."""
    if os.environ.get("DIFFUSERS_ACCEL_CHECKS") != "1":
        return
    lowest, highest = (int(end) for end in torch.aminmax(rows))
    if lowest < 0 or highest >= size:
        raise ValueError(f"rows of {name} must lie in 0..{size - 1}, found {lowest}..{highest}")


def check_k_mean(k_mean: Tensor | None, shape: tuple[int, int, int], device: torch.device) -> None:
    """k_mean fp32 `[B, H, D]`, or None."""
    if k_mean is not None and (k_mean.shape, k_mean.dtype, k_mean.device) != (shape, torch.float32, device):
        raise ValueError(
            f"k_mean must be float32 {list(shape)} on {device}, "
            f"found {k_mean.dtype} {list(k_mean.shape)} on {k_mean.device}"
        )


def score_scale(scale: float | None, head_dim: int) -> float:
    """The factor of the scores: 1 / sqrt(D) for None; anything but a positive finite number is refused."""
    scale = head_dim**-0.5 if scale is None else float(scale)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, found {scale}")
    return scale
