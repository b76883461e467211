"""What becomes of attention over a pattern once it is there: it is merged with a part over other keys, and moved to its place."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_accel.kernels.checks import check_row_numbers, check_rows
from diffusers_accel.kernels.merge import merge

Part = tuple[Tensor, Tensor]  # out [B, S_q, H, D] and its log-sum-exp, fp32 [B, H, S_q]


class Epilogue(NamedTuple):
    """Takes (out, lse) of attention; a kernel that does all of it where a row is complete saves a pass for each.

    Args:
        part: attention over other keys, with which it is merged, or None.
        out: `[B, S, heads, D]`, contiguous, that takes the output; None for a new one.
        rows: int64 or int32 `[S_q * H]`: query s of head h goes to row `rows[s * H + h]` of `out` seen as `[S * heads]`
            rows; None together with `out`.
    """

    part: Part | None
    out: Tensor | None
    rows: Tensor | None

    def apply(self, out: Tensor, lse: Tensor, impl: str = "auto") -> Part:
        """The same of what a kernel has written as it lies; `impl` of the merge."""
        if self.part is not None:
            out, lse = merge([(out, lse), self.part], impl=impl)
        if self.out is not None and self.rows is not None:
            self.out.flatten(1, 2).index_copy_(1, self.rows.long(), out.flatten(1, 2))
            out = self.out
        return out, lse


def epilogue(
    shape: torch.Size,
    dtype: torch.dtype,
    device: torch.device,
    part: Part | None,
    out: Tensor | None,
    rows: Tensor | None,
) -> Epilogue | None:
    """What was asked for, checked, of attention whose output is of this shape; None where that is nothing."""
    if part is None and out is None and rows is None:
        return None
    batch, queries, heads, dim = shape
    if part is not None:
        _check("out of merged_with", part[0], shape, dtype, device)
        _check("lse of merged_with", part[1], (batch, heads, queries), torch.float32, device)
    if (out is None) != (rows is None):
        given, missing = ("rows", "out") if out is None else ("out", "rows")
        raise ValueError(f"out and rows say together where the output goes: found {given} without {missing}")
    if out is not None and rows is not None:
        if out.dim() != 4 or (out.shape[0], out.shape[3]) != (batch, dim) or not out.is_contiguous():
            raise ValueError(
                f"out must be a contiguous [{batch}, S, heads, {dim}], found {list(out.shape)}"
                + ("" if out.is_contiguous() else " with other strides")
            )
        _check("out", out, out.shape, dtype, device)
        check_row_numbers("rows", rows, queries, heads, (torch.int64, torch.int32), device)
        check_rows("out", rows, out.shape[1] * out.shape[2])
    return Epilogue(part, out, rows)


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    if x.shape != shape or x.dtype != dtype or x.device != device:
        raise ValueError(
            f"{name} must be {dtype} {list(shape)} on {device}, found {x.dtype} {list(x.shape)} on {x.device}"
        )
