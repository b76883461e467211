"""Attention as two products, which the CPU implementation takes for short rows of bf16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusers_accel.kernels.attention import attention, cpu, products
from tests.kernels.oracle import assert_attention, qkv, random_pattern

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


@pytest.fixture(autouse=True)
def bf16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


def heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def test_who_computes_what(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows of bf16 where the CPU multiplies it; all else is the fused attention's."""
    assert products.faster(128, BF16)
    assert not (products.faster(128, F32) or products.faster(128, F16) or products.faster(products.LONG, BF16))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert not products.faster(128, BF16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not products.faster(128, BF16)


@pytest.mark.parametrize("dim", [16, 72, 128])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (63, 100), (128, 700)])
def test_it_is_attention(dim: int, queries: int, keys: int) -> None:
    q, k, v = qkv(3, queries, keys, 1, dim, BF16, "cpu")
    out, lse = products.attention(*heads_first(q, k, v), scale=0.2)
    assert_attention((out.transpose(1, 2).contiguous(), lse), q, k, v, scale=0.2)


def test_scores_of_many_keys_are_computed_a_few_queries_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    workspace = products.workspace

    def noted(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nonlocal largest
        found = workspace(name, shape, dtype)
        largest = max(largest, found.nbytes if name == "scores" else 0)
        return found

    monkeypatch.setattr(products, "workspace", noted)
    monkeypatch.setattr(products, "SCORE_BYTES", 4 * 64 * 300)
    q, k, v = qkv(1, 200, 300, 1, 16, BF16, "cpu")
    out, lse = products.attention(*heads_first(q, k, v), scale=0.25)
    assert 0 < largest <= 2 * products.SCORE_BYTES < 4 * 200 * 300
    assert_attention((out.transpose(1, 2).contiguous(), lse), q, k, v)


def test_scores_far_from_zero_are_no_trouble() -> None:
    q, k, v = qkv(1, 32, 90, 1, 16, BF16, "cpu")
    for far in (300.0, -300.0):
        shifted = torch.cat([k, torch.full_like(k[..., :1], far)], -1)
        of_one = torch.cat([q, torch.ones_like(q[..., :1])], -1)
        values = torch.cat([v, v[..., :1]], -1)
        out, lse = products.attention(*heads_first(of_one, shifted, values), scale=1.0)
        assert_attention((out.transpose(1, 2).contiguous(), lse), of_one, shifted, values, scale=1.0)


@pytest.mark.parametrize("kind", ["random", "window", "one list"])
def test_patterns_take_it(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    calls: list[object] = []
    found = products.attention
    monkeypatch.setattr(products, "attention", lambda *args, **more: calls.append(args) or found(*args, **more))
    monkeypatch.setattr(cpu, "fused_attention", None)
    q, k, v = qkv(2, 700, 700, 2, 64, BF16, "cpu")
    pattern = random_pattern(1, 2, 700, 700, (64, 64), 0.4, "cpu", seed=3)
    if kind != "random":
        distance = torch.arange(11)[:, None] - torch.arange(11)
        mask = (distance.abs() <= 1) if kind == "window" else (torch.arange(11) % 3 == 0).expand(11, 11)
        pattern = type(pattern).from_mask(mask.expand(1, 2, -1, -1), 700, 700, 64, 64)
    assert_attention(attention(q, k, v, pattern, impl="cpu"), q, k, v, pattern.token_mask())
    assert calls


def test_workspaces_are_kept_by_each_thread_and_outlive_inference_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.inference_mode():
        first = products.workspace("test", (4, 5), F32)
    assert first.shape == (4, 5) and first.fill_(1.0).is_contiguous()  # an inference tensor could not be written here
    again = products.workspace("test", (2, 3), F32)
    assert again.data_ptr() == first.data_ptr()
    assert products.workspace("test", (2, 3), BF16).data_ptr() != first.data_ptr()
    monkeypatch.setattr(products, "KEPT_BYTES", 0)
    assert products.workspace("test", (100,), F32).data_ptr() != products.workspace("test", (100,), F32).data_ptr()
