"""Selection by scores that somebody else has made: the same rules as by means."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel.kernels.select import select, select_by_scores
from tests.kernels.oracle import SIMPLE

everywhere = pytest.mark.parametrize(("impl", "device"), SIMPLE)
BUDGETS: list[dict[str, Any]] = [{"density": 0.3}, {"density": 0.3, "per": "row"}, {"top_p": 0.62}]


def inputs(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means of blocks and their scores [2, 3, rows, columns], on the CPU."""
    generator = torch.Generator().manual_seed(rows * columns)
    q, k = (1.5 * torch.randn(2, blocks, 3, 16, generator=generator) for blocks in (rows, columns))
    return q, k, torch.einsum("bqhd,bkhd->bhqk", q, k) / 4


@everywhere
@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_scores_of_means_choose_as_the_means(impl: str, device: str, budget: dict[str, Any]) -> None:
    q, k, scores = inputs(7, 9)
    sizes: dict[str, Any] = {"queries": 7, "keys": 9, "block_q": 1, "block_k": 1, **budget}
    for min_blocks, always, competing in ((0, None, None), (2, torch.eye(7, 9, dtype=torch.bool), (1, 6))):
        sizes |= {"min_blocks": min_blocks, "competing": competing}
        by_means = select(q, k, always=always, impl="reference", **sizes)
        there = None if always is None else always.to(device)
        by_scores = select_by_scores(scores.to(device), always=there, impl=impl, **sizes)
        by_scores.check()
        assert torch.equal(by_scores.mask().cpu(), by_means.mask())
        assert by_scores.blocks.shape == by_means.blocks.shape


@everywhere
def test_what_counts_are_the_scores_of_a_row(impl: str, device: str) -> None:
    """Not of means: scores that no two vectors of a few channels could have. A constant beside them changes nothing."""
    scores = torch.eye(40).roll(7, 1)[None, None].to(device) * 5 + torch.arange(40.0, device=device)[:, None]
    sizes: dict[str, Any] = {"queries": 40, "keys": 40, "block_q": 1, "block_k": 1, "impl": impl}
    for budget in ({"density": 1 / 40, "per": "row"}, {"density": 39 / 1600}, {"top_p": 0.5}):
        mask = select_by_scores(scores, **sizes, **budget).mask()[0, 0].cpu()
        assert torch.equal(mask, torch.eye(40, dtype=torch.bool).roll(7, 1))


def test_views_may_be_given() -> None:
    _, _, scores = inputs(7, 9)
    view = torch.stack([scores.mT, scores.mT], -1)[..., 0].mT
    sizes: dict[str, Any] = {"queries": 7, "keys": 9, "block_q": 1, "block_k": 1, "density": 0.4}
    assert torch.equal(select_by_scores(view, **sizes).mask(), select_by_scores(scores, **sizes).mask())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": 300}, r"scores must be \[B, H, 3, 3\] \(300 queries in blocks of 128, 300 keys"),
        ({"scores": torch.ones(2, 3)}, r"scores must be .*, found \[2, 3\]"),
        ({"scores": torch.ones(1, 0, 2, 3)}, r"found \[1, 0, 2, 3\]"),
        ({"scores": torch.ones(1, 1, 2, 3).half()}, "scores must be torch.float32, found torch.float16"),
        ({"block_k": 0}, "must be positive, found 200 in blocks of 128 and 300 in blocks of 0"),
        ({"density": None}, "either density or top_p"),
        ({"min_blocks": 9}, r"min_blocks must be an int in 0\.\.3"),
        ({"competing": (0, 3)}, "0 <= first < stop <= 2"),
        ({"always": torch.ones(3, 3, dtype=torch.bool)}, r"always must be bool \[2, 3\]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"scores": torch.ones(1, 1, 2, 3), "queries": 200, "keys": 300, "density": 0.5}
    select_by_scores(**good)
    with pytest.raises(ValueError, match=message):
        select_by_scores(**{**good, **change})
