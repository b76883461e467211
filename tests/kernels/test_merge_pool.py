"""Merging of partial attention and block means."""

from __future__ import annotations

import pytest
import torch

from diffusers_accel.kernels.merge import merge
from diffusers_accel.kernels.pool import pool
from tests.kernels.oracle import SIMPLE, assert_close

everywhere = pytest.mark.parametrize(("impl", "device"), SIMPLE)
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def parts(count: int, dtype: torch.dtype, device: str, dim: int = 64) -> list[tuple[torch.Tensor, torch.Tensor]]:
    torch.manual_seed(count)
    outs = torch.randn(count, 2, 75, 3, dim).to(device, dtype)
    return list(zip(outs, (4 * torch.randn(count, 2, 3, 75)).to(device)))


@everywhere
@dtypes
@pytest.mark.parametrize(("count", "dim"), [(1, 64), (2, 128), (3, 96)])
def test_parts_weigh_by_their_mass(impl: str, device: str, dtype: torch.dtype, count: int, dim: int) -> None:
    given = parts(count, dtype, device, dim)
    out, lse = merge(given, impl=impl)
    mass = torch.stack([lse.double().exp() for _, lse in given])
    weights = (mass / mass.sum(0)).transpose(2, 3)[..., None]
    exact = sum(w * o.double() for w, (o, _) in zip(weights, given))
    rough = sum(w.to(dtype) * o for w, (o, _) in zip(weights, given))
    assert out.dtype == dtype and out.is_contiguous() and lse.is_contiguous()
    assert_close(out, exact, rough)
    assert_close(lse, mass.sum(0).log(), torch.logsumexp(torch.stack([lse for _, lse in given]), 0))


@everywhere
def test_a_part_that_read_nothing_does_not_weigh(impl: str, device: str) -> None:
    (first, first_lse), (second, second_lse) = parts(2, torch.float32, device)
    first_lse[0, 0], first[0, :, 0] = -torch.inf, 0.0
    first_lse[1, 1], first[1, :, 1], second_lse[1, 1], second[1, :, 1] = -torch.inf, 0.0, -torch.inf, 0.0
    out, lse = merge([(first, first_lse), (second, second_lse)], impl=impl)
    torch.testing.assert_close(out[0, :, 0], second[0, :, 0])
    torch.testing.assert_close(lse[0, 0], second_lse[0, 0])
    assert (out[1, :, 1] == 0).all() and (lse[1, 1] == -torch.inf).all()
    assert out.isfinite().all()


@everywhere
def test_masses_beyond_the_range_of_floats_merge(impl: str, device: str) -> None:
    (first, lse), (second, _) = parts(2, torch.float32, device)
    out, merged = merge([(first, lse + 500), (second, lse + 500)], impl=impl)
    torch.testing.assert_close(out, (first + second) / 2)
    torch.testing.assert_close(merged, lse + 500 + torch.log(torch.tensor(2.0)))


def test_parts_that_do_not_fit_are_named() -> None:
    (out, lse), _ = parts(2, torch.float32, "cpu")
    with pytest.raises(ValueError, match="at least one"):
        merge([])
    with pytest.raises(ValueError, match=r"lse \[B, H, S\] in fp32, found \[2, 75, 3, 64\] and \[2, 75, 3\]"):
        merge([(out, lse.transpose(1, 2))])
    with pytest.raises(ValueError, match=r"out of part 1 must be .*found \[2, 74, 3, 64\]"):
        merge([(out, lse), (out[:, 1:], lse)])
    with pytest.raises(ValueError, match=r"out of part 1 must be .*torch.float16"):
        merge([(out, lse), (out.half(), lse)])


@everywhere
@dtypes
@pytest.mark.parametrize(("tokens", "block", "dim"), [(63, 128, 64), (300, 128, 96), (100, 20, 128)])
def test_pool_is_the_mean_of_each_block(
    impl: str, device: str, dtype: torch.dtype, tokens: int, block: int, dim: int
) -> None:
    torch.manual_seed(tokens)
    x = torch.randn(2, 2, tokens, 3, dim).to(device, dtype)[:, 0]  # a view, with gaps
    means = pool(x, block, impl=impl)
    chunks = x.double().split(block, 1)
    exact = torch.stack([chunk.mean(1) for chunk in chunks], 1)
    assert means.dtype == torch.float32 and means.shape == (2, len(chunks), 3, dim)
    # A sum of n terms in fp32, in any order, errs by at most n roundings of the sum of their sizes.
    bound = block * torch.finfo(torch.float32).eps * torch.stack([chunk.abs().mean(1) for chunk in chunks], 1)
    assert ((means - exact).abs() <= bound).all()


@everywhere
def test_pool_never_weighs_padding(impl: str, device: str) -> None:
    valid = torch.tensor([64, 10, 0, 5], dtype=torch.int32)
    token = torch.arange(200)
    exists = (token % 64 < valid[token // 64]).to(device)
    x = torch.randn(1, 200, 2, 64).to(device).masked_fill(~exists[:, None, None], torch.nan)
    means = pool(x, 64, valid.to(device), impl=impl)
    torch.testing.assert_close(means[:, 1], x[:, 64:74].mean(1))
    torch.testing.assert_close(means[:, 3], x[:, 192:197].mean(1))
    assert (means[:, 2] == 0).all()


def test_pool_names_what_does_not_fit() -> None:
    x = torch.randn(1, 200, 2, 64)
    with pytest.raises(ValueError, match=r"valid must be int32 \[4\] on cpu \(200 tokens in blocks of 64\)"):
        pool(x, 64, torch.ones(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"x \[B, S, H, D\] and a positive block, found \[200, 2, 64\] and 64"):
        pool(x[0], 64)
    with pytest.raises(ValueError, match="one of portable, reference"):
        pool(x, 64, impl="cpu")
