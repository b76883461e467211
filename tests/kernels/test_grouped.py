"""Grouped queries: fewer heads of k and v than of q mean what k and v mean whose heads are repeated for each query head."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel.kernels.attention import PRECISIONS, attention, quantized_attention
from diffusers_accel.kernels.block_stats import block_stats
from diffusers_accel.kernels.dense import dense
from diffusers_accel.kernels.merge import merge
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.pool import pool
from diffusers_accel.kernels.pooled import pooled
from diffusers_accel.kernels.prep import prep
from diffusers_accel.kernels.quantize import Quantized, quantize
from diffusers_accel.kernels.select import select
from tests.kernels.oracle import ATTENTION, SIMPLE, assert_attention, qkv, random_pattern

BF16, F32 = torch.bfloat16, torch.float32
HOPPER = pytest.param("hopper", "cpu", id="hopper-interpreted", marks=pytest.mark.interpreter)
GPU = [pytest.param(name, "cuda", id=f"{name}-gpu", marks=pytest.mark.gpu) for name in ("cudnn", "flash")]
everywhere = pytest.mark.parametrize(("impl", "device"), SIMPLE)
grouped = pytest.mark.parametrize("key_heads", [1, 2])
HEADS = 4


def inputs(device: str, key_heads: int, queries: int = 130, keys: int = 200, dtype: torch.dtype = BF16) -> list[Tensor]:
    """q, k and v of two batch rows, then k and v with a head for each of q."""
    q, _, _ = qkv(2, queries, keys, HEADS, 64, dtype, device)
    _, k, v = qkv(2, queries, keys, key_heads, 64, dtype, device, seed=1)
    return [q, k, v, *(x.repeat_interleave(HEADS // key_heads, 2) for x in (k, v))]


def assert_same(found: Any, expected: Any, impl: str) -> None:
    """Bit for bit where the same PyTorch calls are made; a compiler may order sums of one kernel in two ways."""
    exact = {"rtol": 0, "atol": 0} if impl in ("reference", "cpu") else {}
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **exact)


@pytest.mark.parametrize(("impl", "device"), [*ATTENTION, HOPPER])
@grouped
@pytest.mark.parametrize("precision", PRECISIONS)
def test_attention(impl: str, device: str, key_heads: int, precision: str) -> None:
    q, k, v, *repeated = inputs(device, key_heads)
    for pattern in (None, random_pattern(2, HEADS, 130, 200, (128, 64), 0.6, device)):
        found = attention(q, k, v, pattern, precision=precision, impl=impl)
        assert_same(found, attention(q, *repeated, pattern, precision=precision, impl=impl), impl)
        if precision == "input":
            assert_attention(found, q, *repeated, None if pattern is None else pattern.token_mask())


@pytest.mark.parametrize(("impl", "device"), [*ATTENTION, *GPU])
@grouped
def test_dense(impl: str, device: str, key_heads: int) -> None:
    q, k, v, *repeated = inputs(device, key_heads)
    found = dense(q, k, v, impl=impl)
    assert_same(found, dense(q, *repeated, impl=impl), impl)
    assert_attention(found, q, *repeated)


def per_query_head(x: Quantized) -> Quantized:
    """The codes and scales of keys and values, repeated."""
    group = HEADS // x.k.shape[2]
    by_two = {name: getattr(x, name).repeat_interleave(group, 2) for name in ("k", "v")}
    by_one = {name: getattr(x, name) for name in ("k_scale", "v_scale", "k_mean")}
    by_one = {name: None if scale is None else scale.repeat_interleave(group, 1) for name, scale in by_one.items()}
    return dataclasses.replace(x, **by_two, **by_one)


@everywhere
@grouped
@pytest.mark.parametrize("precision", PRECISIONS[1:])
@pytest.mark.parametrize("given_mean", [False, True])
def test_quantize(impl: str, device: str, key_heads: int, precision: str, given_mean: bool) -> None:
    q, k, v, *repeated = inputs(device, key_heads)
    mean = torch.randn(2, key_heads, 64).to(device) if given_mean else None
    many = None if mean is None else mean.repeat_interleave(HEADS // key_heads, 1)
    valid = torch.tensor([128, 50], dtype=torch.int32, device=device)
    found = quantize(q, k, v, precision, valid=valid, k_mean=mean, impl=impl)
    assert found.k.shape[2] == found.v.shape[2] == found.k_scale.shape[1] == key_heads
    ours, theirs = (
        dataclasses.asdict(x)
        for x in (per_query_head(found), quantize(q, *repeated, precision, valid=valid, k_mean=many, impl=impl))
    )
    for name, ours_of in ours.items():
        if isinstance(ours_of, Tensor):
            torch.testing.assert_close(ours_of.float(), theirs[name].float(), rtol=0, atol=0)
    pattern = BlockPattern.full(HEADS, 130, 200, 128, 128, valid, device)
    by = {"impl": "reference"}
    assert_same(
        quantized_attention(found, pattern, **by),
        quantized_attention(per_query_head(found), pattern, **by),
        "reference",
    )


@everywhere
@grouped
@pytest.mark.parametrize("precision", PRECISIONS)
def test_prep_gives_each_query_head_keys_in_its_own_order(
    impl: str, device: str, key_heads: int, precision: str
) -> None:
    q, k, v, *repeated = inputs(device, key_heads, 200, 200)
    heads = [3, 0, 1]
    orders = torch.stack([torch.randperm(200, generator=torch.Generator().manual_seed(h)) for h in heads], 1)
    rows = (orders * HEADS + torch.tensor(heads)).flatten().to(device)
    found, expected = (prep(q, *kv, rows, 3, precision=precision, impl=impl) for kv in ((k, v), repeated))
    for ours, theirs in zip(tensors(found), tensors(expected), strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=0)
    if precision == "input":
        assert isinstance(found.operands, tuple)
        for i, h in enumerate(heads):
            torch.testing.assert_close(
                found.operands[1][:, :, i], k[:, orders[:, i].to(device), h * key_heads // HEADS]
            )


def tensors(prepared: Any) -> list[Tensor]:
    operands = prepared.operands
    operands = vars(operands).values() if isinstance(operands, Quantized) else operands
    return [x for x in (*operands, *prepared.means) if isinstance(x, Tensor)]


@everywhere
@grouped
def test_block_stats(impl: str, device: str, key_heads: int) -> None:
    q, k, v, *repeated = inputs(device, key_heads)
    _, lse = attention(q, *repeated, impl="reference")
    assert_same(block_stats(q, k, lse, impl=impl), block_stats(q, repeated[0], lse, impl=impl), impl)


@everywhere
@grouped
@pytest.mark.parametrize("rule", [{"density": 0.4}, {"density": 0.4, "per": "row"}, {"top_p": 0.7}], ids=str)
def test_select(impl: str, device: str, key_heads: int, rule: dict[str, Any]) -> None:
    q, k, v, *repeated = inputs(device, key_heads, 300, 500)
    sizes = {"queries": 300, "keys": 500, "block_q": 32, "block_k": 32, "competing": (1, 9)}
    means = pool(q, 32, impl=impl), pool(k, 32, impl=impl)
    found, expected = (
        select(means[0], x, **sizes, **rule, impl=impl) for x in (means[1], pool(repeated[0], 32, impl=impl))
    )
    assert torch.equal(found.mask(), expected.mask())
    assert not torch.equal(found.mask()[:, 0], found.mask()[:, 1])  # queries select for themselves


@everywhere
@grouped
def test_what_is_not_read_is_pooled(impl: str, device: str, key_heads: int) -> None:
    q, k, v, *repeated = inputs(device, key_heads)
    pattern = random_pattern(2, HEADS, 130, 200, (64, 64), 0.5, device)
    whole = []
    for keys, values in ((k, v), repeated):
        means = pool(keys, 64, impl=impl), pool(values, 64, impl=impl)
        parts = attention(q, keys, values, pattern, impl=impl), pooled(q, *means, pattern, impl=impl)
        whole.append(merge(parts, impl=impl))
    assert_same(*whole, impl)


def test_heads_that_cannot_be_grouped_are_named() -> None:
    q, k, v = torch.zeros(1, 40, 6, 8), torch.zeros(1, 50, 4, 8), torch.zeros(1, 50, 3, 8)
    pattern, lse = BlockPattern.full(6, 40, 50), torch.zeros(1, 6, 40)
    means, rows = (pool(x) for x in (q, k)), torch.zeros(240, dtype=torch.int64)
    calls = [
        lambda: attention(q, k, k, pattern),
        lambda: dense(q, k, k),
        lambda: quantize(q, k, k, "int8"),
        lambda: prep(q, k[:, :40], k[:, :40], rows, 6),
        lambda: block_stats(q, k, lse),
        lambda: select(*means, queries=40, keys=50, density=0.5),
        lambda: pooled(q, pool(k), pool(k), pattern),
        lambda: attention(v, q[:, :, :6], q),  # more heads of keys than of queries
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"must have a number of heads that divides the [63] of q.*found [46] in"):
            call()
    with pytest.raises(ValueError, match=r"v must be \[1, 50, 3, 8\] to fit q \[1, 40, 6, 8\], found \[1, 50, 2, 8\]"):
        attention(q, v, v[:, :, :2])
    with pytest.raises(ValueError, match=r"k_mean must be float32 \[1, 3, 8\]"):
        quantize(q, v, v, "int8", k_mean=torch.zeros(1, 6, 8))
    operands = quantize(q, v, v, "int8")
    with pytest.raises(ValueError, match="1 batch rows and 3 heads, q has 1 and 6"):
        quantized_attention(operands, BlockPattern.full(3, 40, 50))
