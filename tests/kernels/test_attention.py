"""Every implementation of attention, held to the same meaning."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel.kernels.attention import PRECISIONS, attention, choices, quantized_attention
from diffusers_accel.kernels.dense import dense
from diffusers_accel.kernels.merge import merge
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.quantize import quantize
from tests.kernels.oracle import ATTENTION, assert_attention, assert_close, eager, qkv, random_pattern

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
everywhere = pytest.mark.parametrize(("impl", "device"), ATTENTION)


@everywhere
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize(("tokens", "dim"), [(63, 128), (100, 96), (300, 64)])
def test_reading_everything_is_plain_attention(
    impl: str, device: str, dtype: torch.dtype, tokens: int, dim: int
) -> None:
    q, k, v = qkv(1, tokens, tokens, 1, dim, dtype, device)
    sdpa = torch.nn.functional.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)))
    rough, _ = eager(q, k, v, torch.ones(1, 1, 1, tokens, dtype=torch.bool, device=device), dim**-0.5)
    for pattern in (None, BlockPattern.full(1, tokens, tokens, device=device)):
        found = attention(q, k, v, pattern, impl=impl)
        assert_close(found[0], sdpa.transpose(1, 2), rough)
        assert_attention(found, q, k, v)


@everywhere
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "blocks", "density"),
    [
        (300, 300, 128, (128, 128), 0.4),
        (300, 300, 96, (128, 64), 0.3),
        (100, 500, 64, (64, 128), 0.5),
        (257, 63, 72, (128, 64), 0.7),
        (200, 330, 64, (32, 32), 0.2),
        (200, 330, 160, (128, 64), 0.4),
        (100, 257, 256, (64, 128), 0.6),
    ],
)
def test_random_patterns_are_masked_attention(
    impl: str,
    device: str,
    dtype: torch.dtype,
    queries: int,
    keys: int,
    dim: int,
    blocks: tuple[int, int],
    density: float,
) -> None:
    q, k, v = qkv(1, queries, keys, 3, dim, dtype, device, seed=queries)
    pattern = random_pattern(1, 3, queries, keys, blocks, density, device, seed=dim)
    assert_attention(attention(q, k, v, pattern, impl=impl), q, k, v, pattern.token_mask())


@everywhere
@pytest.mark.parametrize("rows", [1, 2], ids=["shared", "per-batch"])
def test_batch_rows_share_a_pattern_or_have_their_own(impl: str, device: str, rows: int) -> None:
    q, k, v = qkv(2, 200, 270, 3, 64, F32, device)
    pattern = random_pattern(rows, 3, 200, 270, (64, 64), 0.5, device, seed=4)
    assert_attention(attention(q, k, v, pattern, impl=impl), q, k, v, pattern.token_mask())


@everywhere
def test_queries_that_read_nothing_give_zero_and_minus_infinity(impl: str, device: str) -> None:
    q, k, v = qkv(1, 300, 300, 2, 64, F32, device)
    mask = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    mask[0, 0, 1] = mask[0, 1] = False
    out, lse = attention(q, k, v, BlockPattern.from_mask(mask.to(device), 300, 300), impl=impl)
    assert (out[0, 128:256, 0] == 0).all() and (out[0, :, 1] == 0).all()
    assert (lse[0, 0, 128:256] == -torch.inf).all() and (lse[0, 1] == -torch.inf).all()
    assert lse[0, 0, :128].isfinite().all() and (out[0, 256:, 0] != 0).any()


@everywhere
def test_padding_and_unread_blocks_are_never_weighed(impl: str, device: str) -> None:
    """Keys past the sequence, past `valid` inside a block, and in blocks that nobody reads hold NaN."""
    queries, keys, heads = 130, 300, 2
    store = torch.full((2, 1, keys + 90, heads, 64), torch.nan, device=device)
    q, *kv = qkv(1, queries, keys, heads, 64, F32, device)
    valid = torch.tensor([64, 20, 64, 0, 17], dtype=torch.int32)
    exists = torch.cat([torch.arange(64) < n for n in valid])[:keys].to(device)
    mask = torch.ones(1, heads, 2, 5, dtype=torch.bool)
    mask[..., 2] = False
    unread = torch.arange(keys, device=device) // 64 == 2
    for i in range(2):
        store[i, :, :keys] = kv[i].masked_fill((~exists | unread)[:, None, None], torch.nan)
    k, v = store[:, :, :keys]
    pattern = BlockPattern.from_mask(mask.to(device), queries, keys, 128, 64, valid.to(device))
    found = attention(q, k, v, pattern, impl=impl)
    seen = (exists & ~unread).expand(1, heads, queries, keys)
    assert torch.equal(pattern.token_mask(), seen)
    assert_attention(found, q, *(x.masked_fill(~seen[0, 0, 0, :, None, None], 0) for x in kv), seen)


@everywhere
def test_a_listed_block_without_tokens_is_as_unread(impl: str, device: str) -> None:
    """`from_mask` leaves such blocks out; a pattern that was built by hand may name them, also alone."""
    q, k, v = qkv(1, 64, 128, 1, 64, F32, device)
    blocks = torch.tensor([[[[0, 1], [1, 0]]]], dtype=torch.int32, device=device)
    counts = torch.tensor([[[2, 1]]], dtype=torch.int32, device=device)
    valid = torch.tensor([64, 0], dtype=torch.int32, device=device)
    pattern = BlockPattern(blocks, counts, 64, 128, 32, 64, valid)
    assert_attention(attention(q, k, v, pattern, impl=impl), q, k, v, pattern.token_mask())


@everywhere
def test_merged_parts_of_the_keys_are_the_whole(impl: str, device: str) -> None:
    q, k, v = qkv(1, 200, 300, 2, 64, BF16, device)
    whole = random_pattern(1, 2, 200, 300, (64, 64), 0.7, device, seed=2).mask()
    first = torch.rand(whole.shape, generator=torch.Generator().manual_seed(3)).to(device) < 0.5
    patterns = [BlockPattern.from_mask(mask, 200, 300, 64, 64) for mask in (whole & first, whole & ~first, whole)]
    *parts, _ = (attention(q, k, v, pattern, impl=impl) for pattern in patterns)
    assert_attention(merge(parts), q, k, v, patterns[-1].token_mask())


def halves(mask: Tensor, of: BlockPattern) -> tuple[BlockPattern, BlockPattern, BlockPattern]:
    """Of what a pattern reads the blocks of a mask, all others, and all."""
    whole = of.mask()
    sizes = of.queries, of.keys, of.block_q, of.block_k
    one, other, both = (BlockPattern.from_mask(each, *sizes) for each in (whole & mask, whole & ~mask, whole))
    return one, other, both


@everywhere
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
def test_a_part_is_merged_at_the_end(impl: str, device: str, precision: str, dtype: torch.dtype) -> None:
    """Some queries read nothing in one part, in the other, or in both; some rows are runs of keys, others are not."""
    if impl == "portable" and dtype == F32 and precision != "input":
        pytest.skip("quantized products are of fp16 and bf16")
    q, k, v = qkv(2, 200, 300, 3, 72, dtype, device)
    k = k + 2  # so that the mean of the keys counts
    whole = random_pattern(1, 3, 200, 300, (64, 64), 0.9, device, seed=2)
    mask = torch.rand(whole.mask().shape, generator=torch.Generator().manual_seed(3)).to(device) < 0.5
    mask[0, 0, 0], mask[0, 0, 1] = True, False
    empty = whole.mask()
    empty[0, 1, 2] = False
    first, second, both = halves(mask, BlockPattern.from_mask(empty, 200, 300, 64, 64))
    assert (both.counts == 0).any() and (first.counts[both.counts > 0] == 0).any()
    part = attention(q, k, v, second, precision=precision, impl=impl)
    found = attention(q, k, v, first, precision=precision, impl=impl, merged_with=part)
    if precision == "input":
        assert_attention(found, q, k, v, both.token_mask())
    apart = merge([attention(q, k, v, first, precision=precision, impl=impl), part], impl="reference")
    assert torch.equal(found[1] == -torch.inf, apart[1] == -torch.inf)
    assert (found[1] - apart[1]).nan_to_num().abs().max() < 1e-5
    assert (found[0].float() - apart[0].float()).abs().max() < 4 * torch.finfo(dtype).eps * apart[0].abs().max()


@everywhere
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("density", [0.3, 1.0])
def test_an_output_goes_to_its_rows(impl: str, device: str, precision: str, index: torch.dtype, density: float) -> None:
    """Heads 4, 0 and 3 of 5, each in an order of its own; the other heads stay what they were, with a part and without."""
    q, k, v = qkv(2, 200, 300, 3, 64, BF16, device)
    pattern = random_pattern(1, 3, 200, 300, (64, 64), density, device, seed=7)
    assert (pattern.counts == 0).any() == (density < 1)
    generator = torch.Generator().manual_seed(1)
    orders = torch.stack([torch.randperm(200, generator=generator) for _ in range(3)], 1)
    rows = (orders * 5 + torch.tensor([4, 0, 3])).flatten().to(device, index)
    part = attention(q, k, v, BlockPattern.full(3, 200, 300, 64, 64, device=device), impl=impl)
    for merged_with in (None, part):
        plain = attention(q, k, v, pattern, precision=precision, impl=impl, merged_with=merged_with)
        out = torch.full((2, 200, 5, 64), 7.0, dtype=BF16, device=device)
        found = attention(q, k, v, pattern, precision=precision, impl=impl, merged_with=merged_with, out=out, rows=rows)
        assert found[0] is out and torch.equal(found[1], plain[1])
        assert torch.equal(out.flatten(1, 2)[:, rows.long()], plain[0].flatten(1, 2))
        assert (out[:, :, [1, 2]] == 7).all()


def test_where_an_output_goes_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(1, 100, 100, 2, 16, F32, "cpu")
    out, lse = attention(q, k, v)
    rows = torch.arange(200).int()
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"merged_with": (out[:, :99], lse)},
            r"out of merged_with must be torch.float32 \[1, 100, 2, 16\].*\[1, 99, 2, 16\]",
        ),
        ({"merged_with": (out, lse.half())}, r"lse of merged_with must be torch.float32 \[1, 2, 100\].*float16"),
        ({"rows": rows}, "found rows without out"),
        ({"out": out}, "found out without rows"),
        ({"out": out.transpose(1, 2), "rows": rows}, r"out must be a contiguous .*with other strides"),
        (
            {"out": out[..., :8].clone(), "rows": rows},
            r"out must be a contiguous \[1, S, heads, 16\], found \[1, 100, 2, 8\]",
        ),
        ({"out": out.half(), "rows": rows}, r"out must be torch.float32 .*float16"),
        ({"out": out, "rows": rows[1:]}, r"rows must be int64 or int32 \[200\] on cpu \(100 places of 2 heads\)"),
        ({"out": out, "rows": rows.float()}, r"rows must be int64 or int32"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            attention(q, k, v, **arguments)
        with pytest.raises(ValueError, match=message):
            quantized_attention(quantize(q, k, v, "int8"), **arguments)
    monkeypatch.setenv("DIFFUSERS_ACCEL_CHECKS", "1")
    with pytest.raises(ValueError, match=r"rows of out must lie in 0\.\.199, found 1\.\.200"):
        attention(q, k, v, out=out, rows=rows + 1)


@everywhere
@pytest.mark.parametrize("layout", ["heads first", "fused projection", "last dimension not 1"])
def test_any_strides(impl: str, device: str, layout: str) -> None:
    pattern = random_pattern(1, 2, 200, 200, (64, 64), 0.5, device)
    q, k, v = qkv(1, 200, 200, 2, 64, F32, device)
    strided: tuple[Tensor, ...]
    if layout == "heads first":
        strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "fused projection":
        strided = torch.stack([q, k, v], 2).unbind(2)
    else:
        strided = tuple(x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
    assert not strided[1].is_contiguous()
    assert_attention(attention(*strided, pattern, impl=impl), q, k, v, pattern.token_mask())


@everywhere
def test_scale(impl: str, device: str) -> None:
    q, k, v = qkv(1, 63, 100, 1, 64, F32, device)
    assert_attention(attention(q, k, v, scale=0.3, impl=impl), q, k, v, scale=0.3)


@pytest.mark.parametrize("dim", [1, 40, 80, 160, 256])
def test_cpu_takes_any_head_dim(dim: int) -> None:
    q, k, v = qkv(1, 100, 100, 2, dim, F32, "cpu")
    pattern = random_pattern(1, 2, 100, 100, (32, 32), 0.5, "cpu")
    assert_attention(attention(q, k, v, pattern, impl="cpu"), q, k, v, pattern.token_mask())


def test_auto_takes_the_first_that_can() -> None:
    q, k, v = qkv(1, 32, 32, 1, 8, torch.float64, "cpu")
    usable = [c.name for c in choices("cpu", torch.float64, 8) if c.reason is None]
    assert usable == ["reference"]
    out, _ = attention(q, k, v)
    torch.testing.assert_close(out, attention(q, k, v, impl="reference")[0], rtol=0, atol=0)
    assert next(c for c in choices("cpu", torch.float32, 8) if c.reason is None).name == "cpu"


def test_an_explicit_implementation_is_obeyed_or_refused() -> None:
    q, k, v = qkv(1, 32, 32, 1, 8, torch.float64, "cpu")
    with pytest.raises(ValueError, match=r"(?s)impl='cpu'.*cpu: takes float16.*portable: .*reference: usable"):
        attention(q, k, v, impl="cpu")
    with pytest.raises(ValueError, match="one of cpu, portable, .*reference.*, found 'fast'"):
        attention(q, k, v, impl="fast")


def test_arguments_that_do_not_fit_are_named() -> None:
    q, k, v = qkv(2, 100, 130, 2, 16, F32, "cpu")
    pattern = BlockPattern.full(2, 100, 130)
    cases = [
        ((q[0], k, v, None), r"q must be \[B, S, H, D\].*\[100, 2, 16\]"),
        ((q, k[..., :8], v, None), r"k must be \[2, 130, 2, 16\].*found \[2, 130, 2, 8\]"),
        ((q, k, v[:, :0], None), r"v must be .*found \[2, 0, 2, 16\]"),
        ((q, k, v.half(), None), r"v must be torch.float32 on cpu.*float16"),
        ((q, k, v, BlockPattern.full(3, 100, 130)), r"1 batch rows and 3 heads, q has 2 and 2"),
        ((q, k, v, BlockPattern.full(2, 100, 131)), r"100 queries and 131 keys, found 100 and 130"),
        ((q, k, v, pattern.to("meta")), r"the pattern is on meta, q on cpu"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            attention(*arguments)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be positive"):
            attention(q, k, v, scale=scale)


def test_checks_are_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(1, 128, 128, 1, 16, F32, "cpu")
    wrong = BlockPattern(torch.full((1, 1, 1, 1), 7, dtype=torch.int32), torch.ones(1, 1, 1).int(), 128, 128)
    monkeypatch.setenv("DIFFUSERS_ACCEL_CHECKS", "1")
    with pytest.raises(ValueError, match=r"key blocks 0\.\.0, found 7\.\.7"):
        attention(q, k, v, wrong)


def test_the_environment_says_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv(1, 130, 130, 1, 64, BF16, "cpu")
    usual, slow = (attention(q, k, v, impl=impl)[0] for impl in ("cpu", "reference"))
    assert not torch.equal(usual, slow)
    monkeypatch.setenv("DIFFUSERS_ACCEL_KERNEL", "reference")
    found = choices("cpu", BF16, 64)
    assert [choice.name for choice in found if choice.reason is None] == ["reference"]
    assert found[0].reason == "DIFFUSERS_ACCEL_KERNEL=reference asks for another"
    assert dense(q, k, v)[0].isfinite().all()  # which is another operator
    ours, theirs = (attention(q, k, v, precision="int8", impl=impl)[0] for impl in ("auto", "reference"))
    assert torch.equal(ours, theirs)
    assert torch.equal(attention(q, k, v)[0], slow)
    assert torch.equal(attention(q, k, v, impl="cpu")[0], usual)
    monkeypatch.setenv("DIFFUSERS_ACCEL_KERNEL", "portable")
    if os.environ.get("TRITON_INTERPRET") != "1":
        with pytest.raises(
            ValueError, match=r"cannot run impl='portable'[\s\S]*DIFFUSERS_ACCEL_KERNEL=portable asks for it"
        ):
            attention(q, k, v)
    monkeypatch.setenv("DIFFUSERS_ACCEL_KERNEL", "fast")
    with pytest.raises(ValueError, match="DIFFUSERS_ACCEL_KERNEL must be auto or one of cpu, .*found 'fast'"):
        attention(q, k, v)
