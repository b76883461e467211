"""Attention to the means of what a pattern does not read: alone, and merged with what it reads."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel.kernels.attention import attention
from diffusers_accel.kernels.merge import merge
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.pool import pool
from diffusers_accel.kernels.pooled import choices, pooled
from tests.kernels.oracle import SIMPLE, assert_close, eager, qkv, random_pattern

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
everywhere = pytest.mark.parametrize(("impl", "device"), SIMPLE)
dtypes = pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
dims = pytest.mark.parametrize("dim", [64, 96, 128])


def means(x: Tensor, pattern: BlockPattern) -> Tensor:
    return pool(x, pattern.block_k, pattern.valid, impl="reference")


def unread(pattern: BlockPattern) -> Tensor:
    """Which means each query weighs, bool `[B|1, H, S, K]`."""
    mask = ~pattern.mask() & (pattern.key_lengths() > 0)
    return mask.repeat_interleave(pattern.block_q, 2)[:, :, : pattern.queries]


def plainly(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float) -> tuple[Tensor, Tensor]:
    """Each mean as often as its block has tokens, in the dtype of q: no logarithm of a length anywhere."""
    lengths = pattern.key_lengths()
    k, v = (x.to(q.dtype).repeat_interleave(lengths, 1) for x in (k, v))
    mask = unread(pattern).expand(q.shape[0], -1, -1, -1)
    return eager(q, k, v, mask.repeat_interleave(lengths, 3), scale)


def assert_pooled(
    found: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float | None = None
) -> None:
    """Holds (out, lse) to fp64, of means that have been rounded to the dtype of q or not, by the error of that dtype."""
    out, lse = found
    scale = q.shape[3] ** -0.5 if scale is None else scale
    exact, exact_lse = plainly(q.double(), k.double(), v.double(), pattern, scale)
    rough, rough_lse = plainly(q, k, v, pattern, scale)
    assert out.dtype == q.dtype and out.shape == q.shape and out.is_contiguous()
    assert lse.dtype == F32 and lse.shape == exact_lse.shape and lse.is_contiguous()
    empty = exact_lse == -torch.inf
    assert torch.equal(lse == -torch.inf, empty)
    assert torch.equal((out == 0).all(-1).transpose(1, 2), empty)
    assert_close(out, exact, rough)
    assert_close(lse.masked_fill(empty, 0), exact_lse.masked_fill(empty, 0), rough_lse.masked_fill(empty, 0))


def alike(x: Tensor, block: int) -> Tensor:
    """Every token of a block is its first one."""
    return x[:, torch.arange(x.shape[1], device=x.device) // block * block]


@everywhere
@dtypes
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "blocks", "density"),
    [
        (300, 300, 128, (128, 128), 0.4),
        (300, 400, 96, (128, 64), 0.3),
        (100, 1500, 64, (64, 16), 0.5),  # more means than a tile holds
        (257, 63, 72, (128, 64), 0.5),
        (200, 330, 64, (32, 20), 0.2),
        (200, 330, 160, (128, 64), 0.4),
        (100, 1500, 256, (64, 16), 0.5),
    ],
)
def test_each_mean_counts_for_its_tokens(
    impl: str,
    device: str,
    dtype: torch.dtype,
    queries: int,
    keys: int,
    dim: int,
    blocks: tuple[int, int],
    density: float,
) -> None:
    q, k, v = qkv(2, queries, keys, 2, dim, dtype, device, seed=keys)
    pattern = random_pattern(2, 2, queries, keys, blocks, density, device, seed=dim)
    k, v = means(k, pattern), means(v, pattern)
    assert_pooled(pooled(q, k, v, pattern, impl=impl), q, k, v, pattern)
    k, v = k.to(dtype), v.to(dtype)
    assert_pooled(pooled(q, k, v, pattern, scale=0.3, impl=impl), q, k, v, pattern, 0.3)


@everywhere
@dims
def test_blocks_of_equal_keys_are_dense_attention(impl: str, device: str, dim: int) -> None:
    """With ragged ends, blocks that `valid` cuts, and one pattern for two batch rows; values differ within a block."""
    q, k, v = qkv(2, 200, 300, 2, dim, F32, device)
    k = alike(k, 64)
    valid = torch.tensor([64, 20, 64, 0, 44], dtype=torch.int32, device=device)
    for existing in (None, valid):
        pattern = random_pattern(1, 2, 200, 300, (64, 64), 0.4, device, seed=2)
        pattern = BlockPattern.from_mask(pattern.mask(), 200, 300, 64, 64, existing)
        read = attention(q, k, v, pattern, impl="reference")
        rest = pooled(q, means(k, pattern), means(v, pattern), pattern, impl=impl)
        every = BlockPattern.full(2, 200, 300, 64, 64, existing, device)
        out, lse = merge([read, rest], impl="reference")
        dense, dense_lse = attention(q, k, v, every, impl="reference")
        torch.testing.assert_close(out, dense, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, dense_lse, rtol=1e-6, atol=1e-6)


@everywhere
@dtypes
@dims
def test_no_mass_is_lost(impl: str, device: str, dtype: torch.dtype, dim: int) -> None:
    """Values of 1 give 1, whatever is read; the lengths of short blocks are in it."""
    q, k, v = qkv(1, 150, 300, 2, dim, dtype, device)
    valid = torch.tensor([64, 1, 30, 0, 40], dtype=torch.int32, device=device)
    mask = torch.rand(1, 2, 3, 5, generator=torch.Generator().manual_seed(dim)) < 0.4
    pattern = BlockPattern.from_mask(mask.to(device), 150, 300, 64, 64, valid)
    ones = torch.ones_like(v)
    read = attention(q, k, ones, pattern, impl="reference")
    rest = pooled(q, means(k, pattern), means(ones, pattern), pattern, impl=impl)
    out, _ = merge([read, rest], impl="reference")
    assert (out - 1).abs().max() <= 4 * torch.finfo(dtype).eps


@everywhere
@dims
def test_a_pattern_that_reads_nothing_or_everything(impl: str, device: str, dim: int) -> None:
    q, k, v = qkv(1, 130, 200, 2, dim, F32, device)
    mask = torch.zeros(1, 2, 3, 4, dtype=torch.bool, device=device)
    mask[:, 1] = True
    pattern = BlockPattern.from_mask(mask, 130, 200, 64, 64)
    k_means, v_means = means(k, pattern), means(v, pattern)
    out, lse = pooled(q, k_means, v_means, pattern, impl=impl)
    assert_pooled((out, lse), q, k_means, v_means, pattern)
    assert (out[:, :, 1] == 0).all() and (lse[:, 1] == -torch.inf).all()
    assert (out[:, :, 0] != 0).all() and lse[:, 0].isfinite().all()
    read = attention(q, k, v, pattern, impl="reference")
    whole, whole_lse = merge([read, (out, lse)], impl="reference")
    torch.testing.assert_close(whole[:, :, 1], read[0][:, :, 1])
    torch.testing.assert_close(whole_lse[:, 0], lse[:, 0])


@everywhere
def test_what_is_read_or_missing_is_never_weighed(impl: str, device: str) -> None:
    """Means of blocks that a query reads, or of which nothing exists, hold NaN, and so does what lies behind them."""
    q, k, v = qkv(1, 128, 300, 2, 64, F32, device)
    valid = torch.tensor([64, 20, 64, 0, 17], dtype=torch.int32, device=device)
    mask = torch.zeros(1, 2, 2, 5, dtype=torch.bool, device=device)
    mask[..., 2] = True
    pattern = BlockPattern.from_mask(mask, 128, 300, 64, 64, valid)
    clean = means(k, pattern), means(v, pattern)
    store = torch.full((2, 1, 40, 2, 64), torch.nan, device=device)
    for into, x in zip(store, clean):
        into[:, :5] = x
        into[:, 2:4] = torch.nan
    found = pooled(q, *store[:, :, :5], pattern, impl=impl)
    assert_pooled(found, q, *clean, pattern)


@everywhere
def test_scores_beyond_the_range_of_floats(impl: str, device: str) -> None:
    q, k, v = qkv(1, 64, 640, 1, 64, F32, device)
    pattern = BlockPattern.from_mask(torch.zeros(1, 1, 1, 10, dtype=torch.bool, device=device), 64, 640, 64, 64)
    k_means, v_means = 100 * means(k, pattern), means(v, pattern)
    out, lse = pooled(100 * q, k_means, v_means, pattern, impl=impl)
    scores = torch.einsum("bqhd,bkhd->bhqk", 100 * q.double(), k_means.double()) / 8 + math.log(64)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-3)
    assert out.isfinite().all() and lse.abs().max() > 100


@everywhere
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_query_heads_share_key_heads(impl: str, device: str, key_heads: int) -> None:
    q, _, _ = qkv(2, 100, 100, 4, 64, BF16, device)
    _, k, v = qkv(2, 100, 300, key_heads, 64, BF16, device, seed=1)
    pattern = random_pattern(2, 4, 100, 300, (32, 32), 0.5, device)
    k, v = means(k, pattern), means(v, pattern)
    found = pooled(q, k, v, pattern, impl=impl)
    repeated = (x.repeat_interleave(4 // key_heads, 2) for x in (k, v))
    for ours, theirs in zip(found, pooled(q, *repeated, pattern, impl=impl)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@everywhere
def test_any_strides(impl: str, device: str) -> None:
    q, k, v = qkv(2, 100, 200, 3, 64, F32, device)
    pattern = random_pattern(1, 3, 100, 200, (32, 32), 0.5, device)
    k, v = means(k, pattern), means(v, pattern)
    expected = pooled(q, k, v, pattern, impl=impl)
    for axes in ((1, 2), (1, 3)):
        strided = (x.transpose(*axes).contiguous().transpose(*axes) for x in (q, k, v))
        for ours, theirs in zip(pooled(*strided, pattern, impl=impl), expected):
            torch.testing.assert_close(ours, theirs)


def test_what_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    q, _, _ = qkv(2, 100, 100, 6, 16, F16, "cpu")
    good: dict[str, Any] = {
        "q": q, "k_means": torch.zeros(2, 3, 2, 16), "v_means": torch.zeros(2, 3, 2, 16),
        "pattern": BlockPattern.full(6, 100, 300),
    }  # fmt: skip
    cases: list[tuple[dict[str, Any], str]] = [
        ({"q": q[0]}, r"q must be \[B, S, H, D\].*found \[100, 6, 16\]"),
        ({"k_means": torch.zeros(2, 3, 4, 16)}, r"k_means must have .* divides the 6 of q.*found 4 in \[2, 3, 4, 16\]"),
        ({"k_means": torch.zeros(2, 3, 2)}, r"k_means must be \[2, 3, 6, 16\].*found \[2, 3, 2\]"),
        ({"k_means": torch.zeros(2, 4, 2, 16)}, r"k_means must be \[2, 3, 2, 16\] \(300 keys in blocks of 128\)"),
        ({"v_means": torch.zeros(2, 3, 3, 16)}, r"v_means must be \[2, 3, 2, 16\].*found \[2, 3, 3, 16\]"),
        ({"v_means": torch.zeros(2, 3, 2, 16).double()}, r"must be torch.float32 or torch.float16.*torch.float64"),
        ({"pattern": BlockPattern.full(5, 100, 300)}, "1 batch rows and 5 heads, q has 2 and 6"),
        ({"pattern": BlockPattern.full(6, 99, 300)}, "99 queries and 300 keys, found 100 and 300"),
        ({"pattern": BlockPattern.full(6, 100, 300).to("meta")}, "the pattern is on meta, q on cpu"),
        ({"scale": 0.0}, "scale must be positive"),
        ({"impl": "cpu"}, "one of portable, reference"),
    ]
    pooled(**good)
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            pooled(**{**good, **change})
    wrong = BlockPattern(torch.full((1, 6, 1, 1), 7, dtype=torch.int32), torch.ones(1, 6, 1).int(), 100, 300)
    monkeypatch.setenv("DIFFUSERS_ACCEL_CHECKS", "1")
    with pytest.raises(ValueError, match=r"key blocks 0\.\.2, found 7\.\.7"):
        pooled(**{**good, "pattern": wrong})


@pytest.mark.interpreter
def test_what_the_portable_kernel_refuses() -> None:
    reasons = [
        next(iter(choices("cpu", F32, *inputs))).reason for inputs in ((256, 128), (128, 24), (264, 128), (20, 16))
    ]
    assert reasons[0] is None
    assert "blocks of queries in multiples of 16, found 24" in str(reasons[1])
    assert all("head dims up to 256 in multiples of 8" in str(reason) for reason in reasons[2:])
