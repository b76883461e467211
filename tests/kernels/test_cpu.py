"""The CPU implementation computes what the pattern names and nothing else: counted, not timed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_accel.kernels.attention import attention, cpu
from diffusers_accel.kernels.pattern import BlockPattern
from tests.kernels.oracle import assert_attention, qkv, random_pattern


class Counter:
    """Stands before the fused operator: how often it was called, and with how many (query, key) token pairs."""

    def __init__(self) -> None:
        self.calls = 0
        self.pairs = 0
        self.largest_copy = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
        assert min(q.shape) > 0 and min(k.shape) > 0, "the fused operator kills the process on an empty dimension"
        self.calls += 1
        self.pairs += q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        if k._base is None or k._base.shape != STORE:
            self.largest_copy = max(self.largest_copy, 2 * k.numel() * k.element_size())
        return EXACT(q, k, v, **options)


EXACT = cpu.exact_attention
STORE = (3, 1, 1024, 4, 64)  # q, k and v of these tests are views of one tensor of this shape


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Counter:
    counter = Counter()
    monkeypatch.setattr(cpu, "exact_attention", counter)
    return counter


def inputs() -> tuple[Tensor, ...]:
    return torch.stack(qkv(1, *STORE[2:3] * 2, *STORE[3:], torch.float32, "cpu")).unbind(0)


def window(blocks: int, width: int) -> Tensor:
    """Every query block reads the `width` blocks around it, shifted inwards at the ends: `[1, 4, blocks, blocks]`."""
    first = (torch.arange(blocks) - width // 2).clamp(0, blocks - width)[:, None]
    key = torch.arange(blocks)
    return ((key >= first) & (key < first + width)).expand(1, STORE[3], -1, -1)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.6])
def test_exactly_the_named_pairs_are_computed(counter: Counter, density: float) -> None:
    q, k, v = inputs()
    pattern = random_pattern(1, 4, 1024, 1024, (128, 64), density, "cpu", seed=5)
    out = attention(q, k, v, pattern, impl="cpu")
    assert counter.pairs == int(pattern.token_mask().sum()) == pattern.computed_blocks * 128 * 64
    assert_attention(out, q, k, v, pattern.token_mask())


def test_ragged_tails_are_not_computed(counter: Counter) -> None:
    q, k, v = qkv(2, 200, 333, 3, 16, torch.float32, "cpu")
    pattern = random_pattern(1, 3, 200, 333, (64, 32), 0.4, "cpu", seed=1)
    attention(q, k, v, pattern, impl="cpu")
    assert counter.pairs == 2 * int(pattern.token_mask().sum())


def test_a_window_is_three_calls_and_no_copy(counter: Counter) -> None:
    """Both ends share one list among several rows; all rows between are one strided view, for all heads."""
    q, k, v = inputs()
    pattern = BlockPattern.from_mask(window(16, 5), 1024, 1024, 64, 64)
    out = attention(q, k, v, pattern, impl="cpu")
    assert (counter.calls, counter.largest_copy) == (3, 0)
    assert_attention(out, q, k, v, pattern.token_mask())


def test_heads_that_differ_do_not_share_calls(counter: Counter) -> None:
    q, k, v = inputs()
    mask = window(16, 5).clone()
    mask[:, 1] = True
    out = attention(q, k, v, BlockPattern.from_mask(mask, 1024, 1024, 64, 64), impl="cpu")
    assert (counter.calls, counter.largest_copy) == (2 * 3 + 1, 0)  # heads 0 and 2..3, and the dense one
    assert_attention(out, q, k, v, mask.repeat_interleave(64, 2).repeat_interleave(64, 3))


def test_gathered_copies_stay_small(counter: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    pattern = random_pattern(1, 4, 1024, 1024, (64, 64), 0.5, "cpu")
    block = 2 * 64 * 64 * 4  # bytes of the keys and values of one
    monkeypatch.setattr(cpu, "GATHER_BYTES", 4 * block)
    out = attention(q, k, v, pattern, impl="cpu")
    assert 0 < counter.largest_copy < 4 * block + int(pattern.counts.max()) * block  # a row of blocks more at most
    assert_attention(out, q, k, v, pattern.token_mask())


def test_the_lists_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs()
    pattern = random_pattern(1, 4, 1024, 1024, (128, 128), 0.3, "cpu")
    first = attention(q, k, v, pattern, impl="cpu")
    monkeypatch.setattr(Tensor, "tolist", None)  # a second reading would fail
    second = attention(q, k, v, pattern, impl="cpu")
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 2),
    shared=st.booleans(),
    heads=st.integers(1, 3),
    queries=st.integers(1, 150),
    keys=st.integers(1, 150),
    blocks=st.sampled_from([(16, 16), (32, 16), (7, 13), (128, 64)]),
    kind=st.sampled_from(["random", "band", "stripe"]),
    cut=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_pattern_is_masked_attention(
    batch: int,
    shared: bool,
    heads: int,
    queries: int,
    keys: int,
    blocks: tuple[int, int],
    kind: str,
    cut: bool,
    seed: int,
) -> None:
    q, k, v = qkv(batch, queries, keys, heads, 8, torch.float32, "cpu", seed)
    rows, columns = -(-queries // blocks[0]), -(-keys // blocks[1])
    mask = torch.rand(1 if shared else batch, heads, rows, columns) < 0.4
    distance = torch.arange(columns)[None] - torch.arange(rows)[:, None]
    if kind == "band":
        mask = (distance.abs() <= seed % 3).expand(mask.shape)
    elif kind == "stripe":
        mask = mask[:, :, :1].expand(mask.shape)
    valid = torch.randint(0, blocks[1] + 1, (columns,), dtype=torch.int32) if cut else None
    pattern = BlockPattern.from_mask(mask, queries, keys, *blocks, valid)
    assert_attention(attention(q, k, v, pattern, impl="cpu"), q, k, v, pattern.token_mask())
