"""BlockPattern: what it holds, what it counts and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_accel.kernels.pattern import BlockPattern


def block_mask(rows: int, heads: int, queries: int, keys: int, seed: int, density: float = 0.5) -> torch.Tensor:
    return torch.rand(rows, heads, queries, keys, generator=torch.Generator().manual_seed(seed)) < density


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 2),
    heads=st.integers(1, 3),
    queries=st.integers(1, 200),
    keys=st.integers(1, 200),
    blocks=st.sampled_from([(16, 16), (64, 32), (128, 64), (7, 13)]),
    seed=st.integers(0, 99),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)
def test_a_mask_and_its_lists_say_the_same(
    rows: int, heads: int, queries: int, keys: int, blocks: tuple[int, int], seed: int, density: float
) -> None:
    mask = block_mask(rows, heads, -(-queries // blocks[0]), -(-keys // blocks[1]), seed, density)
    pattern = BlockPattern.from_mask(mask, queries, keys, *blocks)
    pattern.check()
    assert torch.equal(pattern.mask(), mask)
    assert pattern.computed_blocks == int(mask.sum())
    assert pattern.density == pytest.approx(mask.double().mean().item())
    row, column = torch.arange(queries) // blocks[0], torch.arange(keys) // blocks[1]
    assert torch.equal(pattern.token_mask(), mask[:, :, row][..., column])


def test_full_reads_everything() -> None:
    pattern = BlockPattern.full(3, 300, 500, 128, 64)
    assert pattern.blocks.shape == (1, 3, 3, 8) and pattern.density == 1.0
    assert bool(pattern.token_mask().all()) and pattern.token_mask().shape == (1, 3, 300, 500)


def test_valid_cuts_blocks_and_drops_empty_ones() -> None:
    valid = torch.tensor([64, 10, 0, 64], dtype=torch.int32)
    pattern = BlockPattern.full(1, 64, 250, 64, 64, valid)
    assert pattern.blocks.tolist() == [[[[0, 1, 3]]]]
    assert pattern.key_lengths().tolist() == [64, 10, 0, 58]  # the last block ends with the sequence
    token = torch.arange(250)
    seen = (token < 74) | (token >= 192)
    assert torch.equal(pattern.token_mask()[0, 0, 0], seen)


def test_cat_joins_heads_of_unequal_capacity_and_batch() -> None:
    sparse, dense = block_mask(1, 2, 3, 5, 0, 0.3), block_mask(2, 1, 3, 5, 1, 0.9)
    joined = BlockPattern.cat([BlockPattern.from_mask(m, 300, 600) for m in (sparse, dense)])
    joined.check()
    assert torch.equal(joined.mask(), torch.cat([sparse.expand(2, -1, -1, -1), dense], 1))
    assert joined.computed_blocks == 2 * int(sparse.sum()) + int(dense.sum())


def test_cat_refuses_patterns_of_other_sequences() -> None:
    full = BlockPattern.full(1, 300, 300)
    with pytest.raises(ValueError, match="agree in keys, found 300 and 400"):
        BlockPattern.cat([full, BlockPattern.full(1, 300, 400)])
    with pytest.raises(ValueError, match="agree in valid"):
        BlockPattern.cat([full, BlockPattern.full(1, 300, 300, valid=torch.tensor([128, 9, 44], dtype=torch.int32))])
    with pytest.raises(ValueError, match="at least one"):
        BlockPattern.cat([])


def test_figures_are_computed_once_and_move_with_the_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = BlockPattern.from_mask(block_mask(1, 2, 4, 4, 3), 512, 512)
    assert pattern.to("cpu") is pattern
    moved = pattern.to("meta")  # whose values cannot be read
    assert moved.computed_blocks == pattern.computed_blocks and moved.density == pattern.density
    assert moved.device.type == "meta"


def test_what_is_derived_is_kept() -> None:
    pattern, calls = BlockPattern.full(1, 64, 64), []
    assert pattern.derived(calls.append) is pattern.derived(calls.append) is None
    assert calls == [pattern]
    assert copy.deepcopy(pattern).density == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 0}, "queries must be a positive int, found 0"),
        ({"block_k": 64.0}, "block_k must be a positive int, found 64.0"),
        ({"queries": 300}, r"blocks must be \[B, H, 3, C\] \(300 queries in blocks of 128\), found \[1, 2, 2, 2\]"),
        ({"blocks": torch.zeros(1, 2, 2, 2)}, "blocks must be int32, found torch.float32"),
        ({"counts": torch.zeros(1, 2, 3).int()}, r"counts must be \[1, 2, 2\], found \[1, 2, 3\]"),
        ({"counts": torch.zeros(1, 2, 2).long()}, "counts must be int32, found torch.int64"),
        ({"counts": torch.zeros(1, 2, 2, device="meta").int()}, "counts is on meta, blocks on cpu"),
        ({"valid": torch.zeros(3).int()}, r"valid must be \[2\] \(256 keys in blocks of 128\), found \[3\]"),
    ],
)
def test_shapes_and_dtypes_are_refused_when_built(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "blocks": torch.zeros(1, 2, 2, 2).int(), "counts": torch.zeros(1, 2, 2).int(), "queries": 256, "keys": 256,
    }  # fmt: skip
    BlockPattern(**good)
    with pytest.raises(ValueError, match=message):
        BlockPattern(**{**good, **change})


@pytest.mark.parametrize(
    ("row", "count", "valid", "message"),
    [
        ([0, 1, 2], 4, None, r"counts must lie in 0\.\.3, found 4\.\.4"),
        ([0, 1, 2], -1, None, r"counts must lie in 0\.\.3, found -1\.\.-1"),
        ([0, 3, 0], 2, None, r"key blocks 0\.\.2, found 0\.\.3"),
        ([-1, 1, 0], 2, None, r"key blocks 0\.\.2, found -1\.\.1"),
        ([1, 0, 0], 2, None, "must ascend"),
        ([1, 1, 0], 2, None, "must ascend"),
        ([0, 1, 2], 2, None, "must be 0 past"),
        ([0, 1, 0], 2, [128, 129, 0], r"valid must lie in 0\.\.128"),
    ],
)
def test_values_are_refused_by_check(row: list[int], count: int, valid: list[int] | None, message: str) -> None:
    pattern = BlockPattern(
        torch.tensor([[[row]]], dtype=torch.int32),
        torch.tensor([[[count]]], dtype=torch.int32),
        128,
        384,
        valid=None if valid is None else torch.tensor(valid, dtype=torch.int32),
    )
    with pytest.raises(ValueError, match=message):
        pattern.check()


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bool \[B, H, 2, 3\], found torch.bool \[1, 1, 2, 4\]"):
        BlockPattern.from_mask(torch.ones(1, 1, 2, 4, dtype=torch.bool), 256, 384)
    with pytest.raises(ValueError, match=r"found torch.float32"):
        BlockPattern.from_mask(torch.ones(1, 1, 2, 3), 256, 384)
