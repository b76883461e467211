"""Preparation in one pass equals gathering, pooling and quantizing one after the other."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel.kernels.attention import PRECISIONS, attention, quantized_attention
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.prep import Prepared, prep
from diffusers_accel.kernels.quantize import Quantized
from tests.kernels.oracle import SIMPLE, qkv

everywhere = pytest.mark.parametrize(("impl", "device"), SIMPLE)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
HEADS = 4  # of the model


def launch_rows(queries: int, keys: int, heads: tuple[int, ...], device: str) -> Tensor:
    """Rows of heads in orders of their own, which keep what has no key at the end."""
    generator = torch.Generator().manual_seed(queries)
    orders = torch.stack([torch.randperm(keys, generator=generator) for _ in heads])
    orders = torch.cat([orders, torch.arange(keys, queries).expand(len(heads), -1)], 1)
    return (orders * HEADS + torch.tensor(heads)[:, None]).T.flatten().to(device)


def apart(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, heads: int) -> list[Tensor]:
    """q, k, v of the launch in fp32, head by head and token by token."""
    outs = []
    for x in (q, k, v):
        flat = x.float().reshape(x.shape[0], -1, x.shape[3])
        outs.append(flat[:, rows[: x.shape[1] * heads]].reshape(x.shape[0], x.shape[1], heads, -1))
    return outs


def block_means(x: Tensor, block: int) -> Tensor:
    return torch.stack([part.double().mean(1) for part in x.split(block, 1)], 1).float()


@everywhere
@every_precision
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "block"), [(300, 300, 64, 128), (200, 63, 96, 64), (130, 129, 128, 128)]
)
def test_one_pass_is_as_three(
    impl: str, device: str, precision: str, dtype: torch.dtype, queries: int, keys: int, dim: int, block: int
) -> None:
    q, k, v = qkv(2, queries, keys, HEADS, dim, torch.float32, device, seed=dim)
    q, k, v = (x.to(dtype) for x in (q, k + 3, v))
    heads = (2, 0, 3)
    rows = launch_rows(queries, keys, heads, device)
    found = prep(q, k, v, rows, len(heads), precision=precision, block=block, impl=impl)
    expected = apart(q, k, v, rows, len(heads))
    assert found.means is not None
    for means, x in zip(found.means, expected):
        torch.testing.assert_close(means, block_means(x, block), rtol=1e-5, atol=1e-5)
    if precision == "input":
        assert isinstance(found.operands, tuple)
        for a, b in zip(found.operands, expected):
            assert a.dtype == dtype and a.is_contiguous() and torch.equal(a.float(), b)
        return
    assert isinstance(found.operands, Quantized)
    x = found.operands
    assert x.precision == precision and x.dtype == dtype
    torch.testing.assert_close(x.k_mean, expected[1].mean(1), rtol=1e-5, atol=1e-5)
    found_q, found_k, found_v = x.dequantize()
    assert ((found_q - expected[0]).abs() <= expected[0].abs().amax(3, keepdim=True) / 253).all()
    largest = (expected[1] - x.k_mean[:, None]).abs().amax((1, 3), keepdim=True)
    assert ((found_k - (expected[1] - x.k_mean[:, None])).abs() <= largest / 253).all()
    step = expected[2].abs() * 2**-4 + expected[2].abs().amax(1, keepdim=True) * 2**-18
    assert ((found_v - expected[2]).abs() <= (0.0 if precision == "int8" else 1.001 * step)).all()


@pytest.mark.parametrize(("impl", "device"), [case for case in SIMPLE if "portable" in str(case.id)])
@every_precision
@pytest.mark.parametrize("index", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["given mean", "own mean"])
@pytest.mark.parametrize("pooled", [True, False], ids=["pooled", "not pooled"])
def test_the_kernel_has_the_codes_of_the_reference(
    impl: str, device: str, precision: str, index: torch.dtype, given: bool, pooled: bool
) -> None:
    q, k, v = qkv(2, 200, 150, HEADS, 64, torch.float16, device)
    rows = launch_rows(200, 150, (1, 3), device).to(index)
    mean = torch.ones(2, 2, 64, device=device) if given else None
    options: dict[str, Any] = {"precision": precision, "k_mean": mean, "pooled": pooled}
    found, expected = (prep(q, k, v, rows, 2, **options, impl=each) for each in (impl, "reference"))
    torch.testing.assert_close(found.means, expected.means)
    assert (found.means is None) == (not pooled)
    if precision == "input":
        for a, b in zip(found.operands, expected.operands):
            assert torch.equal(a, b)
        return
    for field in fields(Quantized):
        a, b = getattr(found.operands, field.name), getattr(expected.operands, field.name)
        if not isinstance(a, Tensor):
            assert a == b
        elif a.dtype in (torch.int8, torch.float8_e4m3fn):
            wrong = a.float() - b.float()
            assert (wrong.abs() <= (1 if a.dtype == torch.int8 else b.float().abs() / 8)).all()
            assert (wrong != 0).float().mean() < 1e-3
        else:
            torch.testing.assert_close(a, b)


@everywhere
@every_precision
def test_what_is_prepared_is_attended(impl: str, device: str, precision: str) -> None:
    """A permutation of the keys changes no attention, so that the heads of the launch come out as from the model."""
    q, k, v = qkv(1, 260, 260, HEADS, 64, torch.float16, device)
    rows = launch_rows(260, 260, (3, 1), device)
    prepared = prep(q, k, v, rows, 2, precision=precision, impl=impl)
    pattern = BlockPattern.full(2, 260, 260, device=device)
    if isinstance(prepared.operands, Quantized):
        out, lse = quantized_attention(prepared.operands, pattern)
    else:
        out, lse = attention(*prepared.operands, pattern)
    exact, exact_lse = attention(q.float(), k.float(), v.float(), impl="reference")
    back = torch.zeros(1, 260 * HEADS, 64, device=device).index_copy_(1, rows, out.flatten(1, 2).float())
    back = back.unflatten(1, (260, HEADS))[:, :, [1, 3]]
    allowed = {"input": 2e-3, "int8": 2e-2, "int8_fp8": 6e-2}[precision]
    assert (back - exact[:, :, [1, 3]]).norm() <= allowed * exact[:, :, [1, 3]].norm()
    sums = lse.sum(2), exact_lse[:, [3, 1]].sum(2)  # which know no order
    torch.testing.assert_close(*sums, rtol=1e-3, atol=0.0)


@everywhere
@every_precision
@pytest.mark.parametrize(("queries", "keys", "key_heads"), [(100, 300, 4), (300, 100, 2), (130, 257, 1), (200, 200, 2)])
def test_keys_by_a_table_of_their_own(
    impl: str, device: str, precision: str, queries: int, keys: int, key_heads: int
) -> None:
    """More keys than queries, or heads that share one of the keys: as if both had been laid out for each head before."""
    q, k, v = qkv(2, queries, keys, HEADS, 64, torch.float16, device)
    k, v = k[:, :, :key_heads] + 2, v[:, :, :key_heads]
    heads, generator = (3, 0, 1), torch.Generator().manual_seed(keys)
    orders = [torch.stack([torch.randperm(each, generator=generator) for _ in heads]) for each in (queries, keys)]
    read = [head // (HEADS // key_heads) for head in heads]
    rows, key_rows = (
        (order * of + torch.tensor(numbers)[:, None]).T.flatten().to(device)
        for order, of, numbers in zip(orders, (HEADS, key_heads), (heads, read), strict=True)
    )
    found = prep(q, k, v, rows, 3, key_rows=key_rows, precision=precision, impl=impl)

    def laid_out(x: Tensor, order: Tensor, numbers: Any) -> Tensor:
        return torch.stack([x[:, places, head] for places, head in zip(order.to(device), numbers, strict=True)], 2)

    laid = laid_out(q, orders[0], heads), laid_out(k, orders[1], read), laid_out(v, orders[1], read)
    size = max(queries, keys)
    straight = torch.arange(size * 3, device=device)
    expected = prep(*laid, straight[: queries * 3], 3, key_rows=straight[: keys * 3], precision=precision, impl=impl)
    for a, b in zip(values(found), values(expected)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    if isinstance(found.operands, tuple):
        for a, b in zip(found.operands, laid):
            assert torch.equal(a, b)
    assert found.means is not None
    for means, x in zip(found.means, laid):
        torch.testing.assert_close(means, block_means(x, 128), rtol=1e-4, atol=1e-4)


@everywhere
@every_precision
def test_any_strides(impl: str, device: str, precision: str) -> None:
    q, k, v = qkv(2, 100, 100, HEADS, 64, torch.bfloat16, device)
    strided = torch.stack([q, k, v], 2).transpose(1, 3).contiguous().transpose(1, 3).unbind(2)
    assert not strided[0].is_contiguous()
    rows = launch_rows(100, 100, (0, 2, 1), device)
    found, expected = (prep(*x, rows, 3, precision=precision, impl=impl) for x in (strided, (q, k, v)))
    for a, b in zip(values(found), values(expected)):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def values(prepared: Prepared) -> tuple[Tensor, ...]:
    x = prepared.operands
    return (*(x.dequantize() if isinstance(x, Quantized) else x), *(prepared.means or ()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "int4"}, "precision must be one of input, int8, int8_fp8, found 'int4'"),
        ({"q": torch.zeros(70, 2, 8)}, r"q must be \[B, S, H, D\].*found \[70, 2, 8\]"),
        (
            {"k": torch.zeros(1, 71, 2, 8), "v": torch.zeros(1, 71, 2, 8)},
            r"k and v must have 1\.\.70 tokens, as many as q or fewer, found 71",
        ),
        ({"key_rows": torch.arange(139)}, r"key_rows must be int64 \[140\] on cpu \(70 places of 2 heads\).*\[139\]"),
        ({"key_rows": torch.arange(140).int()}, r"key_rows must be int64 \[140\].*found torch.int32"),
        ({"v": torch.zeros(1, 69, 2, 8)}, r"v must be .*found \[1, 69, 2, 8\]"),
        ({"v": torch.zeros(1, 70, 2, 8).half()}, "v must be torch.float32 on cpu.*float16"),
        ({"block": 96}, "block must be a multiple of 64 tokens, found 96"),
        ({"rows": torch.arange(141)}, r"rows must be int64 or int32 \[140\] on cpu \(70 places of 2 heads\).*\[141\]"),
        ({"rows": torch.zeros(140)}, "rows must be .*found torch.float32"),
        ({"k_mean": torch.zeros(1, 8)}, r"k_mean must be float32 \[1, 2, 8\] on cpu, found torch.float32 \[1, 8\]"),
        ({"impl": "cpu"}, "one of portable, reference, found 'cpu'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = dict.fromkeys("qkv", torch.zeros(1, 70, 2, 8)) | {"rows": torch.arange(140), "heads": 2}
    prep(**good)
    with pytest.raises(ValueError, match=message):
        prep(**good | change)


def test_checks_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 70, 2, 8)
    monkeypatch.setenv("DIFFUSERS_ACCEL_CHECKS", "1")
    prep(q, q, q, torch.arange(140), 2)
    with pytest.raises(ValueError, match=r"rows of q must lie in 0\.\.139, found 1\.\.140"):
        prep(q, q, q, torch.arange(1, 141), 2)
    with pytest.raises(ValueError, match=r"rows of k must lie in 0\.\.99, found 40\.\.139"):
        prep(q, q[:, :50], q[:, :50], torch.arange(139, -1, -1), 2)
    with pytest.raises(ValueError, match=r"rows of k must lie in 0\.\.139, found 2\.\.141"):
        prep(q, q, q, torch.arange(140), 2, key_rows=torch.arange(2, 142))
