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
    of_keys = rows[: k.shape[1] * heads] if key_rows is None else key_rows
    q, k, v = (
        x.flatten(1, 2).index_select(1, some).unflatten(1, (-1, heads))
        for x, some in ((q, rows), (k, of_keys), (v, of_keys))
    )
    means = (pool(q, block, impl="reference"), pool(k, block, impl="reference")) if pooled else None
    if precision == "input":
        return Prepared((q, k, v), means)
    return Prepared(quantize(q, k, v, precision, block=block, k_mean=k_mean, impl="reference"), means)
