"""Inputs, the exact answer and how far from it an implementation may be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusers_accel.kernels.pattern import BlockPattern

# Where each implementation is tried. Marks take a case to the process or machine that can run it.
ATTENTION = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("portable", "cpu", id="portable-interpreted", marks=pytest.mark.interpreter),
    pytest.param("portable", "cuda", id="portable-gpu", marks=pytest.mark.gpu),
    pytest.param("reference", "cuda", id="reference-gpu", marks=pytest.mark.gpu),
]
SIMPLE = [case for case in ATTENTION if case.id != "cpu"]  # merge and pool have nothing to skip on a CPU


def qkv(
    batch: int, queries: int, keys: int, heads: int, dim: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian q, k, v, the same on every device."""
    torch.manual_seed(seed)
    shapes = ((batch, queries, heads, dim), (batch, keys, heads, dim), (batch, keys, heads, dim))
    q, k, v = (torch.randn(shape).to(device, dtype) for shape in shapes)
    return q, k, v


def random_pattern(
    batch: int, heads: int, queries: int, keys: int, blocks: tuple[int, int], density: float, device: str, seed: int = 0
) -> BlockPattern:
    """A random pattern in which any query block may read nothing."""
    torch.manual_seed(seed)
    mask = torch.rand(batch, heads, -(-queries // blocks[0]), -(-keys // blocks[1])) < density
    return BlockPattern.from_mask(mask.to(device), queries, keys, *blocks)


def eager(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Masked softmax attention in the dtype of the inputs, all scores at once; a NaN outside the mask does not count."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    p = scores.softmax(-1).masked_fill(~mask, 0)
    read = mask.any(2)[..., None].transpose(1, 2)  # [B, S_k, H, 1]: keys that nobody reads
    return torch.einsum("bhqk,bkhd->bqhd", p, v.masked_fill(~read, 0)), lse


def assert_attention(
    found: tuple[Tensor, Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> None:
    """Holds (out, lse) to fp64 attention over a token mask `[B, H, S_q, S_k]`.

    An implementation may err as much as twice what eager attention in the same dtype does, and a rounding of the result.
    """
    out, lse = found
    batch, queries, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    mask = torch.ones(1, 1, 1, k.shape[1], dtype=torch.bool, device=q.device) if mask is None else mask
    mask = mask.expand(batch, heads, queries, k.shape[1])
    exact, exact_lse = eager(q.double(), k.double(), v.double(), mask, scale)
    rough, rough_lse = eager(q, k, v, mask, scale)
    assert out.dtype == q.dtype and out.shape == q.shape and out.is_contiguous()
    assert lse.dtype == torch.float32 and lse.shape == (batch, heads, queries) and lse.is_contiguous()
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert torch.equal((out == 0).all(-1).transpose(1, 2), empty)
    assert_close(out, exact, rough)
    # A dot product is rounded by what it sums: where terms cancel, that is more than a rounding of the score.
    terms = torch.einsum("bqhd,bkhd->bhqk", q.double().abs(), k.double().abs()) * abs(scale)
    terms = torch.where(mask, terms, 0).amax()
    found_lse, exact_lse, rough_lse = (x.masked_fill(empty, 0) for x in (lse, exact_lse, rough_lse))
    assert_close(found_lse, exact_lse, rough_lse, terms)


def assert_close(found: Tensor, exact: Tensor, rough: Tensor, size: Tensor | None = None) -> None:
    """`found` errs at most twice as much as `rough`, plus one rounding of `size` (default: the largest value).

    The rounding is that of the dtype of `rough`.
    """
    size = exact.abs().max() if size is None else size
    budget = 2 * (rough.double() - exact).abs().max() + torch.finfo(rough.dtype).eps * size
    error = (found.double() - exact).abs().max()  # NaN compares as False and fails
    assert error <= budget, f"largest error {error:.3g}, budget {budget:.3g}"
