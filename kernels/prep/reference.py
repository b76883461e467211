"""What preparing means: gather, pool, quantize, one after the other in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusers_accel.kernels.pool import pool
from diffusers_accel.kernels.prep import Prepared
from diffusers_accel.kernels.quantize import quantize


def refuses(device: torch.device, dtype: torch.dtype, precision: str) -> str | None:
    """Why this implementation cannot run there, or None."""
    return None if dtype.is_floating_point else f"needs a floating-point dtype, found {dtype}"


def prep(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    key_rows: Tensor | None,
    heads: int,
    precision: str,
    pooled: bool,
    block: int,
    k_mean: Tensor | None,
) -> Prepared:
    """The launch's heads; the arguments have been checked by the caller."""

    def gathered(x: Tensor) -> Tensor:
        of = rows[: x.shape[1] * heads] if key_rows is None else key_rows
        if key_rows is None and x.shape[2] != q.shape[2]:  # the row of the key head that the query head reads
            of = of // q.shape[2] * x.shape[2] + of % q.shape[2] // (q.shape[2] // x.shape[2])
        return x.flatten(1, 2).index_select(1, of).unflatten(1, (-1, heads))

    k, v = gathered(k), gathered(v)
    q = q.flatten(1, 2).index_select(1, rows).unflatten(1, (-1, heads))
    means = (pool(q, block, impl="reference"), pool(k, block, impl="reference")) if pooled else None
    if precision == "input":
        return Prepared((q, k, v), means)
    return Prepared(quantize(q, k, v, precision, block=block, k_mean=k_mean, impl="reference"), means)
