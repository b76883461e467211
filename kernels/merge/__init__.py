"""Attention over several disjoint sets of keys, joined into attention over their union."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusers_accel.kernels.choice import Operator

__all__ = ["merge"]

_operator = Operator(__name__, ("portable", "reference"))


def merge(parts: Sequence[tuple[Tensor, Tensor]], *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """The attention over the union of disjoint key sets, from the (out, lse) of each.

    Args:
        parts: at least one pair of out `[B, S, H, D]` and lse `[B, H, S]` (fp32, natural log), all of one shape, dtype
            and device, as `attention` returns them. A query that read nothing in a part has lse -inf there.
        impl: `auto`, `portable` or `reference`; an explicit one is obeyed or refused.

    Returns:
        out and lse of the union, shaped and typed as the parts; 0 and -inf where no part read a key.

    Raises:
        ValueError: the parts do not fit each other, or the implementation asked for cannot run.
    """
    if not parts:
        raise ValueError("merge needs at least one (out, lse) pair")
    out, lse = parts[0]
    if out.dim() != 4 or lse.shape != (out.shape[0], out.shape[2], out.shape[1]) or lse.dtype != torch.float32:
        raise ValueError(
            f"merge needs out [B, S, H, D] and lse [B, H, S] in fp32, found {list(out.shape)} and "
            f"{list(lse.shape)} in {lse.dtype}"
        )
    for i, (other, other_lse) in enumerate(parts):
        for name, x, first in (("out", other, out), ("lse", other_lse, lse)):
            if x.shape != first.shape or x.dtype != first.dtype or x.device != out.device:
                raise ValueError(
                    f"{name} of part {i} must be {list(first.shape)}, {first.dtype} on {out.device} as in part 0, "
                    f"found {list(x.shape)}, {x.dtype} on {x.device}"
                )
    with torch.no_grad():
        return _operator.choose(impl, out.device, out.dtype).merge(parts)
