"""Selection of block pairs: each rule against a loop that spells it out, ties, floors, forced pairs and text."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.select import select
from tests.kernels.oracle import SIMPLE

everywhere = pytest.mark.parametrize(("impl", "device"), SIMPLE)
BUDGETS: list[dict[str, Any]] = [
    {"density": 0.3},
    {"density": 0.3, "per": "row"},
    {"top_p": 0.62},
]
budgets = pytest.mark.parametrize("budget", BUDGETS, ids=["head", "row", "top_p"])


@pytest.fixture(autouse=True)
def poisoned_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh lists hold ids that no pattern may name, so that an entry that nobody writes shows in `check`."""
    allocate = torch.empty

    def poisoning(*args: Any, **kwargs: Any) -> Tensor:
        tensor: Tensor = allocate(*args, **kwargs)
        return tensor.fill_(10**6) if tensor.dtype == torch.int32 else tensor

    monkeypatch.setattr(torch, "empty", poisoning)


def means(batch: int, rows: int, columns: int, heads: int, device: str, dim: int = 16, seed: int = 0) -> list[Tensor]:
    """Gaussian means whose scores spread by a few nats, so that the map has peaks and flat rows."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (1.5 * torch.randn(batch, blocks, heads, dim, generator=generator)).to(device) for blocks in (rows, columns)
    ]


def chosen(q: Tensor, k: Tensor, **options: Any) -> BlockPattern:
    """The checked pattern for one token a block."""
    pattern = select(q, k, queries=q.shape[1], keys=k.shape[1], block_q=1, block_k=1, **options)
    pattern.check()
    return pattern


def oracle(
    q: Tensor,
    k: Tensor,
    density: float | None = None,
    top_p: float | None = None,
    per: str = "head",
    always: Tensor | None = None,
    competing: tuple[int, int] | None = None,
    competing_queries: tuple[int, int] | None = None,
    min_blocks: int = 1,
    scale: float | None = None,
) -> Tensor:
    """The mask that the rules describe, on the CPU, pair by pair; q and k lie on the CPU."""
    batch, rows, heads, dim = q.shape
    columns = k.shape[1]
    forced = torch.zeros(heads, rows, columns, dtype=torch.bool) if always is None else always.cpu()
    forced = forced.expand(heads, rows, columns)
    asking = competing_queries or competing
    row_range = range(*asking) if asking else range(rows)
    column_range = range(*competing) if competing else range(columns)
    mask = torch.ones(batch, heads, rows, columns, dtype=torch.bool)
    for b, h in product(range(batch), range(heads)):
        scores = (q[b, :, h] @ k[b, :, h].T) * (dim**-0.5 if scale is None else scale)
        weights = scores[row_range.start : row_range.stop, column_range.start : column_range.stop].softmax(-1).tolist()
        ranks = {
            (i, j): math.inf if forced[h, i, j] else weights[i - row_range.start][j - column_range.start]
            for i, j in product(row_range, column_range)
        }
        kappa = math.floor((1 - (density or 1)) * len(ranks) + 1e-9)
        threshold = sorted(ranks.values())[kappa - 1] if kappa else 0.0
        for i in row_range:
            order = sorted(column_range, key=lambda j: (-ranks[i, j], j))
            heavier = 0.0
            for place, j in enumerate(order):
                if top_p is not None:
                    keep = heavier < top_p or top_p == 1
                elif per == "row":
                    keep = place < max(1, round((density or 1) * len(order)))
                else:
                    keep = ranks[i, j] >= threshold
                mask[b, h, i, j] = keep or place < min_blocks or ranks[i, j] == math.inf
                heavier += weights[i - row_range.start][j - column_range.start]
    return mask


def diagonal(rows: int, columns: int) -> Tensor:
    return torch.eye(rows, columns, dtype=torch.bool)


@everywhere
@budgets
@pytest.mark.parametrize("min_blocks", [0, 1, 3])
def test_a_loop_chooses_the_same(impl: str, device: str, budget: dict[str, Any], min_blocks: int) -> None:
    q, k = means(2, 5, 9, 2, "cpu", seed=min_blocks)
    pattern = chosen(q.to(device), k.to(device), min_blocks=min_blocks, impl=impl, **budget)
    assert torch.equal(pattern.mask().cpu(), oracle(q, k, min_blocks=min_blocks, **budget))


@everywhere
@budgets
@pytest.mark.parametrize("per_head", [False, True])
def test_forced_pairs_and_text_as_a_loop_has_them(
    impl: str, device: str, budget: dict[str, Any], per_head: bool
) -> None:
    q, k = means(1, 8, 9, 2, "cpu", seed=3)
    always = diagonal(8, 9)
    always[:, 2] = True
    if per_head:
        always = torch.stack([always, torch.zeros_like(always)])
    pattern = chosen(q.to(device), k.to(device), always=always.to(device), competing=(1, 7), impl=impl, **budget)
    mask = pattern.mask().cpu()
    assert torch.equal(mask, oracle(q, k, always=always, competing=(1, 7), **budget))
    assert mask[..., always.expand(2, 8, 9)].all() if not per_head else mask[:, 0, always[0]].all()
    assert mask[:, :, [0, 7]].all() and mask[..., [0, 7, 8]].all()


@everywhere
@budgets
@pytest.mark.parametrize("competing", [(3, 8), None])
def test_queries_may_compete_elsewhere_than_keys(
    impl: str, device: str, budget: dict[str, Any], competing: tuple[int, int] | None
) -> None:
    """As where a history of keys alone stands in front."""
    q, k = means(2, 5, 9, 2, "cpu", seed=4)
    always = torch.cat([torch.zeros(5, 3, dtype=torch.bool), diagonal(5, 6)], 1)
    options: dict[str, Any] = {"competing": competing, "competing_queries": (0, 4), **budget}
    pattern = chosen(q.to(device), k.to(device), always=always.to(device), impl=impl, **options)
    assert torch.equal(pattern.mask().cpu(), oracle(q, k, always=always, **options))


@pytest.mark.parametrize("seed", range(12))
@budgets
def test_any_range_floor_and_forced_pairs(seed: int, budget: dict[str, Any]) -> None:
    torch.manual_seed(seed)
    rows, columns = (int(x) for x in torch.randint(3, 14, (2,)))
    stop = int(torch.randint(1, min(rows, columns) + 1, ()))
    first = int(torch.randint(stop, ()))
    options: dict[str, Any] = {"competing": (first, stop) if seed % 3 else None, "scale": (None, 0.2, 3.0)[seed % 3]}
    options["min_blocks"] = int(torch.randint((stop - first if seed % 3 else columns) + 1, ()))
    options["always"] = (None, torch.rand(rows, columns) < 0.1, torch.rand(3, rows, columns) < 0.3)[seed % 3]
    q, k = means(2, rows, columns, 3, "cpu", seed=seed)
    assert torch.equal(chosen(q, k, **options, **budget).mask(), oracle(q, k, **options, **budget))


@pytest.mark.parametrize(
    ("blocks", "dropped", "kept"),
    [(990, 0.6, 392_041), (990, 0.8, 196_021), (990, 0.9, 98_011), (630, 0.75, 99_226), (252, 0.75, 15_877)],
)
def test_the_paper_s_counts(blocks: int, dropped: float, kept: int) -> None:
    q, k = means(1, blocks, blocks, 1, "cpu")
    pattern = chosen(q, k, density=1 - dropped, min_blocks=0)
    assert chosen(q, k, density=round(1 - dropped, 2), min_blocks=0).computed_blocks == pattern.computed_blocks
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 4).softmax(-1).flatten()
    threshold = weights.sort().values[-kept]
    ties = int((weights == threshold).sum()) - 1  # of about a million numbers, two may be the same float
    assert ties <= 2 and pattern.computed_blocks == kept + ties


@everywhere
def test_equal_weights_rank_by_block_id(impl: str, device: str) -> None:
    q = torch.ones(1, 2, 1, 1, device=device)
    k = torch.tensor([0.0, 2.0, 1.0, 2.0, -1.0, 2.0, 1.0, 2.0], device=device)[None, :, None, None]
    rows = chosen(q, k, density=0.25, per="row", impl=impl).mask()[0, 0]
    assert rows.nonzero()[:, 1].tolist() == [1, 3, 1, 3]
    three = chosen(q, k, density=0.1, per="row", min_blocks=3, impl=impl).mask()[0, 0, 0]
    assert three.nonzero()[:, 0].tolist() == [1, 3, 5]
    # Each of the four largest holds 0.204: two reach 0.4.
    heavy = chosen(q, k, top_p=0.4, impl=impl).mask()[0, 0]
    assert heavy.nonzero()[:, 1].tolist() == [1, 3, 1, 3]
    # kappa = 12 of 16: the threshold is one of eight equal weights, and all of them stay.
    ties = chosen(q, k, density=0.25, impl=impl).mask()[0, 0]
    assert ties.nonzero()[:, 1].tolist() == [1, 3, 5, 7, 1, 3, 5, 7]


@everywhere
def test_rows_starve_without_a_floor_only(impl: str, device: str) -> None:
    q, k = means(1, 6, 8, 2, "cpu", dim=16, seed=1)
    q[:, 2] = 0  # reads all alike, and so nothing as much as the peaks of other rows
    q, k = (4 * q).to(device), k.to(device)
    bare = chosen(q, k, density=0.125, min_blocks=0, impl=impl)
    assert (bare.counts[:, :, 2] == 0).all()
    for min_blocks in (1, 3):
        filled = chosen(q, k, density=0.125, min_blocks=min_blocks, impl=impl)
        assert (filled.counts >= min_blocks).all()
        assert filled.mask()[bare.mask()].all()
        assert torch.equal(filled.counts, bare.counts.clamp(min=min_blocks))
        assert filled.mask()[0, 0, 2].nonzero()[:, 0].tolist() == list(range(min_blocks))


@everywhere
@pytest.mark.parametrize("budget", [{"density": 1}, {"density": 1.0, "per": "row"}, {"top_p": 1.0}], ids=str)
def test_all_is_all(impl: str, device: str, budget: dict[str, Any]) -> None:
    q, k = means(1, 4, 5, 2, device)
    pattern = chosen(200 * q, k, min_blocks=0, impl=impl, **budget)  # most weights are 0 in fp32
    assert pattern.density == 1.0


@everywhere
def test_forced_pairs_count_towards_the_budget(impl: str, device: str) -> None:
    q, k = means(1, 8, 8, 1, device, seed=5)
    always = diagonal(8, 8).to(device)
    assert chosen(q, k, density=0.25, min_blocks=0, impl=impl).computed_blocks == 17  # 64 - 48 + 1
    assert chosen(q, k, density=0.25, always=always, min_blocks=0, impl=impl).computed_blocks == 17
    assert chosen(q, k, density=0.25, per="row", always=always, impl=impl).counts.unique().tolist() == [2]
    # More forced pairs than the budget has: they are all kept, and nothing else.
    wide = torch.zeros(8, 8, dtype=torch.bool, device=device)
    wide[:, 3:6] = True
    for budget in ({"density": 0.125}, {"density": 0.125, "per": "row"}, {"top_p": 1e-6}):
        assert torch.equal(chosen(q, k, always=wide, impl=impl, **budget).mask()[0, 0], wide)


@everywhere
@budgets
def test_batch_rows_select_for_themselves(impl: str, device: str, budget: dict[str, Any]) -> None:
    q, k = means(2, 6, 6, 2, device)
    both = chosen(q, k, impl=impl, **budget)
    for b in range(2):
        alone = chosen(q[b : b + 1], k[b : b + 1], impl=impl, **budget)
        assert torch.equal(both.blocks[b], alone.blocks[0]) and torch.equal(both.counts[b], alone.counts[0])


@everywhere
def test_means_may_be_views(impl: str, device: str) -> None:
    q, k = (x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3) for x in means(1, 5, 6, 2, device, dim=20))
    strided = torch.stack([k, k], -1)[..., 0]
    plain = chosen(q.contiguous(), k.contiguous(), density=0.5, impl=impl)
    assert torch.equal(chosen(q, strided, density=0.5, impl=impl).mask(), plain.mask())


@everywhere
def test_a_map_of_many_tiles(impl: str, device: str) -> None:
    q, k = means(1, 70, 67, 1, "cpu", seed=7)
    pattern = chosen(q.to(device), k.to(device), density=0.1, min_blocks=0, impl=impl)
    assert torch.equal(pattern.mask().cpu(), oracle(q, k, density=0.1, min_blocks=0))


@everywhere
@budgets
def test_nan_makes_no_list_that_a_kernel_may_not_be_given(impl: str, device: str, budget: dict[str, Any]) -> None:
    q, k = means(1, 5, 6, 2, device)
    q[:, 1], k[:, 4, 1] = torch.nan, torch.nan  # a row of one head, all of the other's
    pattern = chosen(q, k, always=diagonal(5, 6).to(device), impl=impl, **budget)
    assert torch.equal(chosen(q, k, impl=impl, **budget).counts > 0, pattern.counts > 0)


def test_lists_have_room_for_what_may_come() -> None:
    q, k = means(1, 8, 8, 2, "cpu")
    always = diagonal(8, 8)
    assert chosen(q, k, density=0.25, per="row").blocks.shape == (1, 2, 8, 2)
    assert chosen(q, k, density=0.25, per="row", min_blocks=3).blocks.shape == (1, 2, 8, 3)
    for options in ({"per": "row", "always": always}, {"per": "row", "competing": (0, 7)}, {"min_blocks": 0}):
        assert chosen(q, k, density=0.25, **options).blocks.shape == (1, 2, 8, 8)


def test_tokens_become_blocks() -> None:
    q, k = means(1, 3, 5, 2, "cpu")
    pattern = select(q, k, queries=300, keys=257, block_k=64, density=0.5)
    assert (pattern.queries, pattern.keys, pattern.block_q, pattern.block_k) == (300, 257, 128, 64)


@budgets
def test_nothing_is_read_from_the_device(budget: dict[str, Any]) -> None:
    q, k = means(2, 8, 8, 2, "meta")  # whose values cannot be read
    always = diagonal(8, 8).to("meta")
    options: dict[str, Any] = {"always": always, "competing": (1, 7), "impl": "reference"}
    pattern = select(q, k, queries=1000, keys=1000, **options, **budget)
    assert pattern.blocks.shape == (2, 2, 8, 8) and pattern.device.type == "meta"


@pytest.mark.interpreter
@budgets
def test_the_portable_path_asks_for_no_value(budget: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = means(1, 6, 6, 1, "cpu")
    always = diagonal(6, 6)

    def refuse(*_: Any) -> None:
        raise AssertionError("a value was read on the host")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "nonzero", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy"):
            patch.setattr(torch.Tensor, name, refuse)
        patch.setattr(torch, "tensor", refuse)
        launches = record_launches(patch)
        select(q, k, queries=6, keys=6, block_q=1, block_k=1, always=always, impl="portable", **budget)
    expected = ["map_kernel", *["histogram_kernel"] * 4, "lists_kernel"]
    assert launches == (expected if budget == BUDGETS[0] else [expected[0], expected[-1]])


def record_launches(patch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for the kernels, whose interpreter reads values, and notes which would have been launched."""
    from diffusers_accel.kernels.select import portable

    launched: list[str] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *args, **kwargs: launched.append(self.name)

    for name in ("map_kernel", "histogram_kernel", "lists_kernel"):
        patch.setattr(portable, name, Recorder(name))
    return launched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": None}, "either density or top_p, found density None and top_p None"),
        ({"top_p": 0.5}, "either density or top_p, found density 0.5 and top_p 0.5"),
        ({"density": 0.0}, r"density must lie in \(0, 1\], found 0.0"),
        ({"density": math.nan}, r"density must lie in \(0, 1\], found nan"),
        ({"density": None, "top_p": 1.5}, r"top_p must lie in \(0, 1\], found 1.5"),
        ({"density": None, "top_p": 0.5, "per": "row"}, "leave it at its default with top_p, found 'row'"),
        ({"per": "top"}, "per must be one of head, row, found 'top'"),
        ({"min_blocks": 5}, r"min_blocks must be an int in 0\.\.4, the competing key blocks, found 5"),
        ({"min_blocks": 3, "competing": (1, 3)}, r"min_blocks must be an int in 0\.\.2"),
        ({"min_blocks": 1.0}, r"min_blocks must be an int in 0\.\.4.*found 1.0"),
        ({"competing": (2, 2)}, r"0 <= first < stop <= 3.*found \(2, 2\)"),
        ({"competing": (0, 4)}, r"0 <= first < stop <= 3, the blocks that queries and keys both have"),
        ({"competing_queries": (0, 4)}, r"competing_queries must be .* 0 <= first < stop <= 3, the query blocks"),
        ({"competing": (0, 5), "competing_queries": (0, 3)}, r"competing must be .* <= 4, the key blocks"),
        ({"always": diagonal(3, 3)}, r"always must be bool \[3, 4\] or \[2, 3, 4\] on cpu, found torch.bool \[3, 3\]"),
        ({"always": diagonal(3, 4).int()}, "found torch.int32"),
        ({"scale": -1.0}, "scale must be positive and finite, found -1.0"),
        ({"scale": math.inf}, "scale must be positive and finite, found inf"),
        ({"queries": 400}, r"q_means must be \[1, 4, 2, 16\] \(400 queries in blocks of 128\), found \[1, 3, 2, 16\]"),
        ({"block_k": 0}, "keys and its block must be positive, found 500 in blocks of 0"),
        ({"keys": 513}, r"k_means must be \[1, 5, 2, 16\] \(513 keys in blocks of 128\), found \[1, 4, 2, 16\]"),
        ({"impl": "cpu"}, "one of portable, reference"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    q, k = means(1, 3, 4, 2, "cpu")
    good: dict[str, Any] = {"queries": 300, "keys": 500, "density": 0.5}
    select(q, k, **good)
    with pytest.raises(ValueError, match=message):
        select(q, k, **{**good, **change})


def test_means_that_do_not_fit_are_named() -> None:
    q, k = means(1, 3, 4, 2, "cpu")
    sizes: dict[str, Any] = {"queries": 300, "keys": 500, "density": 0.5}
    with pytest.raises(ValueError, match=r"q_means must be \[B, Q, H, D\]"):
        select(q[0], k, **sizes)
    with pytest.raises(ValueError, match=r"k_means must be \[1, 4, 2, 16\].*found \[1, 3, 2, 16\]"):
        select(q, k[:, :3], **sizes)
    with pytest.raises(ValueError, match="k_means must be torch.float32 on cpu, found torch.float16 on cpu"):
        select(q, k.half(), **sizes)
    with pytest.raises(ValueError, match="q_means must be torch.float32"):
        select(q.double(), k, **sizes)
    with pytest.raises(ValueError, match="competing must be"):
        select(q, k, **sizes, competing=(3, 1))
