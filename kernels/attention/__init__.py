"""Block-sparse attention: one meaning, several implementations and precisions behind one signature."""

from __future__ import annotations

import contextlib
import os
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.kernels import ranking
from diffusers_accel.kernels.attention.epilogue import Part, epilogue
from diffusers_accel.kernels.checks import check_pattern, check_qkv, score_scale
from diffusers_accel.kernels.choice import Choice, Operator
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.quantize import PRECISIONS as QUANTIZED
from diffusers_accel.kernels.quantize import Quantized, quantize

__all__ = [
    "IMPLEMENTATIONS",
    "PRECISIONS",
    "Choice",
    "attention",
    "choices",
    "chosen",
    "none_skips",
    "quantized_attention",
]

IMPLEMENTATIONS = tuple(ranking.IMPLEMENTATIONS["attention"])
VARIABLE = "DIFFUSERS_ACCEL_KERNEL"  # in the environment: what `auto` means
# In what the products are computed: the type of q, k, v; scores in INT8; scores in INT8 and weighted values in FP8.
PRECISIONS = ("input", *QUANTIZED)


def _order(
    device: torch.device, dtype: torch.dtype, head_dim: int, blocks: tuple[int, int], precision: str
) -> tuple[str, ...]:
    return ranking.order("attention", device, precision, head_dim)


_operator = Operator(__name__, IMPLEMENTATIONS, _order, ranking.IMPLEMENTATIONS["attention"])


def choices(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    blocks: tuple[int, int] = (128, 128),
    precision: str = "input",
) -> list[Choice]:
    """Every implementation with its verdict for such q, k, v, (block_q, block_k) and precision.

    First those that `auto` tries, fastest first, then those that have to be asked for (`opt_in` says why). It takes the first
    that is `automatic`.
    """
    _check_precision(precision)
    found = _operator.choices(torch.device(device), dtype, head_dim, blocks, precision)
    if (asked := _meant("auto")) == "auto":
        return found
    other = f"{VARIABLE}={asked} asks for another"
    return [Choice(x.name, x.reason if x.name == asked else x.reason or other) for x in found]


def chosen(
    device: torch.device | str,
    dtype: torch.dtype,
    head_dim: int,
    blocks: tuple[int, int] = (128, 128),
    precision: str = "input",
) -> str:
    """The implementation that `auto` means for such q, k, v: pass it as `impl`, and it is what runs.

    Raises:
        ValueError: none can run, or the environment asks for one that cannot.
    """
    _check_precision(precision)
    module = _chosen("auto", torch.device(device), dtype, head_dim, blocks, precision)
    return module.__name__.rpartition(".")[2]


def none_skips(device: torch.device | str, dtype: torch.dtype, head_dim: int, precision: str = "input") -> str | None:
    """Why `auto` has nothing there but the reference, which skips nothing, with every other's reason; None if it has."""
    with contextlib.suppress(ValueError):  # none at all, which is told below
        if chosen(device, dtype, head_dim, precision=precision) != "reference":
            return None
    found = choices(device, dtype, head_dim, precision=precision)
    return "; ".join(f"{option.name}: {option.verdict}" for option in found if option.name != "reference")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern | None = None,
    *,
    scale: float | None = None,
    precision: str = "input",
    impl: str = "auto",
    merged_with: Part | None = None,
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention that computes only the block pairs of `pattern`. Inference only: the outputs carry no gradient.

    Args:
        q: `[B, S_q, H, D]`, fp16, bf16 or fp32, any strides.
        k, v: `[B, S_k, H_k, D]`, dtype and device of q; H_k divides H, and query head h reads key head
            h // (H // H_k).
        pattern: which key blocks each query block reads, on the device of q; None reads all.
        scale: positive factor of the scores; None means 1 / sqrt(D).
        precision: one of `PRECISIONS`. All but `input` first `quantize`, which reads every key that exists, also in
            blocks that no query reads.
        impl: `auto` takes the fastest that can run, in the order of `kernels/ranking.py`; a name of `IMPLEMENTATIONS` is
            obeyed or refused.
        merged_with: (out, lse) of attention over keys that the pattern does not read, as this function returns them; what is
            returned is then of both, as `merge` has it, without the pass over out that it takes.
        out: `[B, S, heads, D]`, contiguous, in the dtype of q: takes the output, and is returned for it.
        rows: with `out`, int64 or int32 `[S_q * H]`: query s of head h goes to row `rows[s * H + h]` of out seen as
            `[S * heads]` rows, each to one of its own. The log-sum-exp stays in its order.

    Returns:
        out `[B, S_q, H, D]` in the dtype of q, and the log-sum-exp of the scaled scores, fp32, natural log,
        `[B, H, S_q]`, both contiguous. A query that reads no key has out 0 and lse -inf.

    Raises:
        ValueError: shapes, dtypes, devices, scale, precision or pattern do not fit, or the implementation asked for
            cannot run; with `DIFFUSERS_ACCEL_CHECKS=1` in the environment also when a value of the pattern or a row is
            out of range.
    """
    _check_precision(precision)
    check_qkv(q, k, v)
    check_pattern(pattern, q, k.shape[1])
    end = epilogue(q.shape, q.dtype, q.device, merged_with, out, rows)
    module = _chosen(impl, q.device, q.dtype, q.shape[3], _blocks(pattern), precision)
    with torch.no_grad():
        if precision == "input":
            return module.attention(q, k, v, pattern, score_scale(scale, q.shape[3]), end)
        block, valid = (pattern.block_k, pattern.valid) if pattern is not None else (128, None)
        by = "reference" if _meant(impl) == "reference" else "auto"
        operands = quantize(q, k, v, precision, block=block, valid=valid, impl=by)
        return module.quantized_attention(operands, pattern, score_scale(scale, q.shape[3]), end)


def quantized_attention(
    operands: Quantized,
    pattern: BlockPattern | None = None,
    *,
    scale: float | None = None,
    impl: str = "auto",
    merged_with: Part | None = None,
    out: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `attention`, of q, k, v that have been quantized; the output is in the dtype that they had."""
    x = operands
    check_pattern(pattern, x.q, x.k.shape[1])
    end = epilogue(x.q.shape, x.dtype, x.q.device, merged_with, out, rows)
    module = _chosen(impl, x.q.device, x.dtype, x.q.shape[3], _blocks(pattern), x.precision)
    with torch.no_grad():
        return module.quantized_attention(x, pattern, score_scale(scale, x.q.shape[3]), end)


def refusal(impl: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why this implementation cannot run exact attention there, or None, whatever the environment asks for."""
    found = _operator.choices(device, dtype, head_dim, (128, 128), "input")
    return next(choice.reason for choice in found if choice.name == impl)


def _meant(impl: str) -> str:
    """What `impl` stands for: `auto` is what the environment names, if it names anything."""
    asked = os.environ.get(VARIABLE) or "auto"
    if asked != "auto" and asked not in IMPLEMENTATIONS:
        raise ValueError(f"{VARIABLE} must be auto or one of {', '.join(IMPLEMENTATIONS)}, found {asked!r}")
    return asked if impl == "auto" else impl


def _chosen(impl: str, *inputs: Any) -> ModuleType:
    """The module that runs; an error says so if it was the environment that asked for what cannot."""
    meant = _meant(impl)
    try:
        return _operator.choose(meant, *inputs)
    except ValueError as error:
        raise ValueError(f"{error}\n{VARIABLE}={meant} asks for it") if meant != impl else error from None


def _blocks(pattern: BlockPattern | None) -> tuple[int, int]:
    return (pattern.block_q, pattern.block_k) if pattern is not None else (128, 128)


def _check_precision(precision: str) -> None:
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, found {precision!r}")
