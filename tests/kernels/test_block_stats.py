"""Block statistics against a map that is held in full, which the operator itself never does."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_accel.kernels.block_stats import block_stats, reference
from diffusers_accel.kernels.merge import merge
from tests.kernels.oracle import SIMPLE

everywhere = pytest.mark.parametrize(("impl", "device"), SIMPLE)
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def inputs(
    queries: int, keys: int, dim: int, dtype: torch.dtype, device: str, batch: int = 2, heads: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """q and k with scores of a few nats, and their lse."""
    torch.manual_seed(queries)
    q = (2 * torch.randn(batch, queries, heads, dim)).to(device, dtype)
    k = torch.randn(batch, keys, heads, dim).to(device, dtype)
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * dim**-0.5
    return q, k, scores.logsumexp(-1).float()


def shares(q: Tensor, k: Tensor, lse: Tensor, scale: float | None = None) -> Tensor:
    """The map in fp64."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double()) * (q.shape[3] ** -0.5 if scale is None else scale)
    return (scores - lse.double()[..., None]).exp()


def tiles(p: Tensor, block_q: int, block_k: int) -> list[list[Tensor]]:
    return [list(rows.split(block_k, 3)) for rows in p.split(block_q, 2)]


def per_tile(p: Tensor, block_q: int, block_k: int, figure: Any) -> Tensor:
    return torch.stack(
        [torch.stack([figure(tile) for tile in rows], -1) for rows in tiles(p, block_q, block_k)], -2
    )  # fmt: skip


def assert_stats(found: Any, p: Tensor, block_q: int, block_k: int, epsilon: float = 1e-3) -> None:
    """Holds the three figures to those of the map: scores of up to 2**5 nats are off by 2**5 roundings of fp32."""
    error = 2**6 * torch.finfo(torch.float32).eps
    total = per_tile(p, block_q, block_k, lambda tile: tile.sum((2, 3)))
    largest = per_tile(p, block_q, block_k, lambda tile: tile.amax((2, 3)))
    torch.testing.assert_close(found.total.double(), total, rtol=error, atol=0)
    torch.testing.assert_close(found.largest.double(), largest, rtol=error, atol=0)
    low, high = (
        per_tile(p, block_q, block_k, lambda tile, at=at: (tile < at).sum((2, 3)))
        for at in (epsilon * (1 - error), epsilon * (1 + error))
    )
    assert ((low <= found.small) & (found.small <= high)).all()
    assert (high - low).sum() <= 2  # few entries are too close to call
    assert found.total.dtype == found.largest.dtype == torch.float32 and found.small.dtype == torch.int32
    assert all(x.is_contiguous() for x in found)


@everywhere
@dtypes
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "blocks"),
    [(63, 63, 64, (64, 64)), (130, 100, 96, (32, 64)), (100, 200, 20, (64, 128)), (64, 64, 128, (16, 16))],
)
def test_figures_are_those_of_the_map(
    impl: str, device: str, dtype: torch.dtype, queries: int, keys: int, dim: int, blocks: tuple[int, int]
) -> None:
    q, k, lse = inputs(queries, keys, dim, dtype, device)
    found = block_stats(q, k, lse, block_q=blocks[0], block_k=blocks[1], impl=impl)
    assert found.total.shape == (2, 2, -(-queries // blocks[0]), -(-keys // blocks[1]))
    assert_stats(found, shares(q, k, lse), *blocks)
    # Each query has shares that sum up to 1.
    lengths = torch.tensor([min(blocks[0], queries - at) for at in range(0, queries, blocks[0])], device=device)
    torch.testing.assert_close(found.total.sum(-1), lengths.float().expand(2, 2, -1), rtol=1e-5, atol=0)


@everywhere
@pytest.mark.parametrize("epsilon", [1e-6, 0.02, 3.0])
def test_scale_and_epsilon(impl: str, device: str, epsilon: float) -> None:
    q, k, lse = inputs(80, 80, 32, torch.float32, device)
    found = block_stats(q, k, lse, block_q=32, block_k=32, epsilon=epsilon, scale=0.1, impl=impl)
    assert_stats(found, shares(q, k, lse, 0.1), 32, 32, epsilon)


@everywhere
def test_a_query_that_reads_nothing_has_no_share(impl: str, device: str) -> None:
    q, k, lse = inputs(70, 70, 64, torch.float32, device)
    lse[0, 1, :40] = -torch.inf
    found = block_stats(q, k, lse, block_q=32, block_k=32, impl=impl)
    assert (found.total[0, 1, 0] == 0).all() and (found.largest[0, 1, 0] == 0).all()
    assert found.small[0, 1, 0].tolist() == [1024, 1024, 192]
    p = shares(q, k, lse.masked_fill(lse == -torch.inf, torch.inf))
    assert_stats(found, p, 32, 32)


@everywhere
def test_a_share_of_more_keys_than_are_given(impl: str, device: str) -> None:
    q, k, lse = inputs(48, 96, 64, torch.float32, device)
    whole = block_stats(q, k, lse, block_q=16, block_k=32, impl=impl)
    part = block_stats(q, k[:, 32:64], lse, block_q=16, block_k=32, impl=impl)
    for a, b in zip(part, whole):
        torch.testing.assert_close(a, b[..., 1:2])


@everywhere
def test_tokens_may_be_views_in_any_order(impl: str, device: str) -> None:
    q, k, lse = inputs(72, 72, 64, torch.float16, device)
    order = torch.randperm(72, device=device)
    q_view, k_view = (torch.stack([x, x], -1)[..., 0][:, order] for x in (q, k))
    found = block_stats(q_view, k_view, lse[..., order].mT.contiguous().mT, block_q=32, block_k=32, impl=impl)
    assert_stats(found, shares(q, k, lse)[:, :, order][..., order], 32, 32)


@everywhere
def test_what_does_not_exist_is_not_read(impl: str, device: str) -> None:
    q, k, lse = inputs(128, 128, 64, torch.float32, device)
    q[:, 75:], k[:, 75:], lse[..., 75:] = torch.nan, torch.nan, torch.nan
    found = block_stats(q[:, :75], k[:, :75], lse[..., :75], block_q=64, block_k=64, impl=impl)
    assert_stats(found, shares(q[:, :75], k[:, :75], lse[..., :75]), 64, 64)


@everywhere
def test_a_multi_diagonal_map_collapses_where_frames_run_fastest(impl: str, device: str) -> None:
    # Every token attends to those at its own place in each frame: in frame-major order a diagonal for every frame.
    frames, height, width = 16, 2, 3
    place = torch.arange(height * width).repeat(frames)
    k = torch.nn.functional.one_hot(place, 16).float()[None, :, None].to(device)
    q = 100 * k
    lse = torch.full((1, 1, len(place)), 25 + math.log(frames), device=device)
    collapsed = set()
    for axes in permutations(range(3)):
        order = torch.arange(len(place)).view(frames, height, width).permute(axes).flatten().to(device)
        total, largest, small = block_stats(q[:, order], k[:, order], lse, block_q=16, block_k=16, impl=impl)
        torch.testing.assert_close(total.sum(-1), torch.full_like(total[..., 0], 16))
        on_diagonal = torch.eye(6, dtype=torch.bool, device=device)
        if (total[0, 0][~on_diagonal] < 1e-3).all():
            collapsed.add("".join("FHW"[axis] for axis in axes))
            torch.testing.assert_close(largest[0, 0][on_diagonal], torch.full((6,), 1 / 16, device=device))
            assert torch.equal(small[0, 0], torch.where(on_diagonal, 0, 256).int())
    assert collapsed == {"HWF", "WHF"}


class LargestTensor(TorchDispatchMode):
    """The size in bytes of the largest tensor that any operation under it makes."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.bytes = max(self.bytes, out.untyped_storage().nbytes())
        return out


def test_the_map_is_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, lse = inputs(1000, 700, 8, torch.float32, "cpu", batch=1, heads=1)
    at_once = block_stats(q, k, lse, impl="reference")
    monkeypatch.setattr(reference, "MAP_BYTES", 2 * 64 * 700 * 4)
    with LargestTensor() as largest:
        streamed = block_stats(q, k, lse, impl="reference")
    assert largest.bytes == 2 * 64 * 704 * 4  # two rows of blocks, padded to whole ones
    monkeypatch.setattr(reference, "MAP_BYTES", 1)
    for a, b, c in zip(at_once, streamed, block_stats(q, k, lse, impl="reference")):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_the_lse_of_merged_parts_will_do() -> None:
    q, k, lse = inputs(96, 96, 32, torch.float32, "cpu")
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 32**-0.5
    parts = [(torch.zeros_like(q), part.logsumexp(-1)) for part in scores.split((50, 46), 3)]
    found = block_stats(q, k, merge(parts, impl="reference")[1], block_q=32, block_k=32, impl="reference")
    assert_stats(found, shares(q, k, lse), 32, 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(100, 2, 8)}, r"q must be \[B, S, H, D\].*found \[100, 2, 8\]"),
        (
            {"k": torch.zeros(1, 50, 3, 8)},
            r"k must have a number of heads that divides the 2 of q.*found 3 in \[1, 50, 3, 8\]",
        ),
        ({"k": torch.zeros(1, 50, 2, 8).half()}, "k must be torch.float32 on cpu as q is, found torch.float16"),
        (
            {"lse": torch.zeros(1, 100, 2)},
            r"lse must be torch.float32 \[1, 2, 100\].*found torch.float32 \[1, 100, 2\]",
        ),
        ({"lse": torch.zeros(1, 2, 100).bfloat16()}, "found torch.bfloat16"),
        ({"block_q": 0}, "at least one token, found 0 queries x 64 keys"),
        ({"epsilon": 0.0}, "epsilon must be positive and finite, found 0.0"),
        ({"epsilon": math.nan}, "epsilon must be positive and finite, found nan"),
        ({"scale": -0.1}, "scale must be positive and finite, found -0.1"),
        ({"impl": "cpu"}, "one of portable, reference"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "q": torch.zeros(1, 100, 2, 8), "k": torch.zeros(1, 50, 2, 8), "lse": torch.zeros(1, 2, 100),
    }  # fmt: skip
    block_stats(**good)
    with pytest.raises(ValueError, match=message):
        block_stats(**{**good, **change})


@pytest.mark.interpreter
def test_blocks_that_are_no_tile_are_refused() -> None:
    q, k, lse = inputs(60, 60, 16, torch.float32, "cpu")
    with pytest.raises(ValueError, match="takes blocks of 16, 32, 64, 128 tokens, found 48 queries x 64 keys"):
        block_stats(q, k, lse, block_q=48, impl="portable")
    # Left to itself, the operator takes what can run.
    assert_stats(block_stats(q, k, lse, block_q=48), shares(q, k, lse), 48, 64)
