"""The block pairs worth computing, by the softmax of pooled scores, or of any others: a map and three rules to cut it.

DraftAttention (Shen et al. 2025, arXiv 2505.14708) keeps the largest entries of the whole map of a head, so that rows may
end up empty; `per="head", min_blocks=0` does exactly that. Ours are the blocks that every row keeps, the forced pairs, the
two rules by row, and any range of competing blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from types import ModuleType

import torch
from torch import Tensor

from diffusers_accel.kernels.checks import score_scale
from diffusers_accel.kernels.choice import Operator
from diffusers_accel.kernels.grouped import check_key_heads
from diffusers_accel.kernels.pattern import BlockPattern

__all__ = ["PER", "select", "select_by_scores"]

PER = ("head", "row")

Weigh = Callable[[ModuleType, slice, slice], Tensor]  # of the module that runs, the weights of some rows and columns

_operator = Operator(__name__, ("portable", "reference"))


def select(
    q_means: Tensor,
    k_means: Tensor,
    *,
    queries: int,
    keys: int,
    density: float | None = None,
    top_p: float | None = None,
    per: str = "head",
    always: Tensor | None = None,
    competing: tuple[int, int] | None = None,
    competing_queries: tuple[int, int] | None = None,
    min_blocks: int = 1,
    block_q: int = 128,
    block_k: int = 128,
    scale: float | None = None,
    impl: str = "auto",
) -> BlockPattern:
    """The pattern of the block pairs with the largest weights: the row softmax, in fp32, of scale * q_means . k_means.

    Every batch row and head selects for itself, by one of three rules, given by one of `density` and `top_p`:

    * `density`, per "head": of the n weights of a head, all that reach the kappa-th smallest, kappa = (1 - density)
      n rounded down; ties at that value are kept too. A row may get many blocks or none.
    * `density`, per "row": in each row the round(density * columns), at least 1, largest weights.
    * `top_p`: in each row as few of the largest weights as sum up to `top_p`.

    In a row, equal weights rank by ascending block id. Nothing is read from the device, so that nothing waits for it: the
    lists have room for every block (per "row" without forced pairs and whole rows: for those that it keeps).

    Args:
        q_means: fp32 `[B, Q, H, D]`, one mean per query block, as `pool` returns them.
        k_means: fp32 `[B, K, H_k, D]`, one mean per key block; H_k divides H, and query head h reads key head
            h // (H // H_k).
        queries: tokens in the query sequence, of which Q blocks of `block_q`.
        keys: tokens in the key sequence, of which K blocks of `block_k`.
        density: share of the competing pairs that is kept, in (0, 1]; 1 keeps all.
        top_p: share of each row's weight that is kept, in (0, 1]; 1 keeps all.
        per: "head" or "row", of which `density` is the share. With `top_p` it stays at its default.
        always: bool `[Q, K]` or `[H, Q, K]`, pairs that are kept whatever they weigh. Among the competing they rank
            first, and so count towards density, top_p and min_blocks.
        competing: (first, stop), the range of blocks, of queries and of keys alike, that compete (the video). Rows and
            columns outside it (the text) are read whole. None means all blocks.
        competing_queries: the range of the query blocks, where it is another than that of the key blocks.
        min_blocks: how many competing blocks each row keeps at least, the largest ones, 0..columns; 0 allows empty rows.
        block_q: tokens per query block.
        block_k: tokens per key block.
        scale: positive factor of the scores; None means 1 / sqrt(D).
        impl: `auto`, `portable` or `reference`; an explicit one is obeyed or refused.

    Returns:
        A pattern of B batch rows and H heads on the device of the means.

    Raises:
        ValueError: an argument does not fit; the message names expected and found. Or `impl` cannot run.
    """
    _check_means(q_means, k_means, queries, keys, block_q, block_k)
    _, rows, heads, dim = q_means.shape
    scale = score_scale(scale, dim)

    def weigh(module: ModuleType, rows: slice, columns: slice) -> Tensor:
        weights: Tensor = module.softmax_map(q_means[:, rows], k_means[:, columns], scale)
        return weights

    blocks, counts = _cut(
        weigh,
        heads,
        (rows, k_means.shape[1]),
        q_means.device,
        density,
        top_p,
        per,
        always,
        competing,
        competing_queries,
        min_blocks,
        impl,
    )
    return BlockPattern(blocks, counts, queries, keys, block_q, block_k)


def select_by_scores(
    scores: Tensor,
    *,
    queries: int,
    keys: int,
    density: float | None = None,
    top_p: float | None = None,
    per: str = "head",
    always: Tensor | None = None,
    competing: tuple[int, int] | None = None,
    competing_queries: tuple[int, int] | None = None,
    min_blocks: int = 1,
    block_q: int = 128,
    block_k: int = 128,
    impl: str = "auto",
) -> BlockPattern:
    """As `select`, but the weights are the row softmax of scores that somebody else has made.

    Args:
        scores: fp32 `[B, H, Q, K]`, one for each pair of a query and a key block, in the unit of logits.
    """
    _check_scores(scores, queries, keys, block_q, block_k)
    heads, rows, columns = scores.shape[1:]
    blocks, counts = _cut(
        lambda module, rows, columns: scores[..., rows, columns].softmax(-1),
        heads, (rows, columns), scores.device, density, top_p, per, always, competing, competing_queries, min_blocks, impl,
    )  # fmt: skip
    return BlockPattern(blocks, counts, queries, keys, block_q, block_k)


def _cut(
    weigh: Weigh,
    heads: int,
    blocks: tuple[int, int],
    device: torch.device,
    density: float | None,
    top_p: float | None,
    per: str,
    always: Tensor | None,
    competing: tuple[int, int] | None,
    competing_queries: tuple[int, int] | None,
    min_blocks: int,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Lists and counts of the pairs that are kept, for so many query and key blocks."""
    rows, columns = blocks
    _check_always(always, heads, rows, columns, device)
    row_range, column_range = _competing(competing, competing_queries, rows, columns)
    height, width = len(row_range), len(column_range)
    if not isinstance(min_blocks, int) or not 0 <= min_blocks <= width:
        raise ValueError(f"min_blocks must be an int in 0..{width}, the competing key blocks, found {min_blocks!r}")
    rule, amount = _budget(density, top_p, per, height, width)
    capacity = columns
    if rule == "row":
        amount = max(amount, min_blocks)
        if always is None and height == rows:
            capacity = columns - width + int(amount)
    module = _operator.choose(impl, device, columns)
    with torch.no_grad():
        square = slice(row_range.start, row_range.stop), slice(column_range.start, column_range.stop)
        weights = weigh(module, *square)
        lists: tuple[Tensor, Tensor] = module.cut(
            weights, always, row_range, column_range, blocks, rule, amount, min_blocks, capacity
        )
    return lists


def _check_scores(scores: Tensor, queries: int, keys: int, block_q: int, block_k: int) -> None:
    if min(queries, keys, block_q, block_k) < 1:
        found = f"{queries} in blocks of {block_q} and {keys} in blocks of {block_k}"
        raise ValueError(f"queries, keys and their blocks must be positive, found {found}")
    expected = [-(-queries // block_q), -(-keys // block_k)]
    if scores.dim() != 4 or 0 in scores.shape or list(scores.shape[2:]) != expected:
        raise ValueError(
            f"scores must be [B, H, {expected[0]}, {expected[1]}] ({queries} queries in blocks of {block_q}, {keys} keys in "
            f"blocks of {block_k}), found {list(scores.shape)}"
        )
    if scores.dtype != torch.float32:
        raise ValueError(f"scores must be torch.float32, found {scores.dtype}")


def _check_means(q_means: Tensor, k_means: Tensor, queries: int, keys: int, block_q: int, block_k: int) -> None:
    if q_means.dim() != 4 or 0 in q_means.shape:
        raise ValueError(f"q_means must be [B, Q, H, D] without an empty dimension, found {list(q_means.shape)}")
    batch, _, heads, dim = q_means.shape
    check_key_heads("k_means", k_means, heads)
    key_heads = k_means.shape[2] if k_means.dim() == 4 else heads
    sides = (
        ("q_means", q_means, "queries", queries, block_q, heads),
        ("k_means", k_means, "keys", keys, block_k, key_heads),
    )
    for name, means, tokens_name, tokens, block, of in sides:
        if min(tokens, block) < 1:
            raise ValueError(f"{tokens_name} and its block must be positive, found {tokens} in blocks of {block}")
        expected = [batch, -(-tokens // block), of, dim]
        if list(means.shape) != expected:
            raise ValueError(
                f"{name} must be {expected} ({tokens} {tokens_name} in blocks of {block}), found {list(means.shape)}"
            )
        if means.dtype != torch.float32 or means.device != q_means.device:
            raise ValueError(
                f"{name} must be torch.float32 on {q_means.device}, found {means.dtype} on {means.device}; "
                "pool returns means in fp32"
            )


def _check_always(always: Tensor | None, heads: int, rows: int, columns: int, device: torch.device) -> None:
    if always is None:
        return
    shapes = ([rows, columns], [heads, rows, columns])
    if list(always.shape) not in shapes or always.dtype != torch.bool or always.device != device:
        raise ValueError(
            f"always must be bool {shapes[0]} or {shapes[1]} on {device}, "
            f"found {always.dtype} {list(always.shape)} on {always.device}"
        )


def _competing(
    keys: tuple[int, int] | None, queries: tuple[int, int] | None, rows: int, columns: int
) -> tuple[range, range]:
    """The rows and the columns that compete: of `queries` and `keys`, or of `keys` alike."""
    if queries is None:
        if keys is None:
            return range(rows), range(columns)
        _check_range("competing", keys, min(rows, columns), "the blocks that queries and keys both have")
        return range(*keys), range(*keys)
    _check_range("competing_queries", queries, rows, "the query blocks")
    if keys is None:
        return range(*queries), range(columns)
    _check_range("competing", keys, columns, "the key blocks")
    return range(*queries), range(*keys)


def _check_range(name: str, found: tuple[int, int], blocks: int, which: str) -> None:
    first, stop = found
    if not 0 <= first < stop <= blocks:
        raise ValueError(f"{name} must be (first, stop) with 0 <= first < stop <= {blocks}, {which}, found {found}")


def _budget(density: float | None, top_p: float | None, per: str, height: int, width: int) -> tuple[str, float]:
    """The rule that runs and its number: "head" and kappa, "row" and blocks a row, or "top_p" and the share."""
    if (density is None) == (top_p is None):
        raise ValueError(f"give either density or top_p, found density {density} and top_p {top_p}")
    if per not in PER:
        raise ValueError(f"per must be one of {', '.join(PER)}, found {per!r}")
    if top_p is not None and per != PER[0]:
        raise ValueError(f"per says of what density is the share: leave it at its default with top_p, found {per!r}")
    for name, share in (("density", density), ("top_p", top_p)):
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"{name} must lie in (0, 1], found {share}")
    if top_p is not None:
        # Weights that round to 0 add nothing to a sum but are asked for: all is not a matter of sums.
        return ("row", width) if top_p == 1 else ("top_p", float(top_p))
    assert density is not None
    if per == "row":
        return "row", max(1, round(density * width))
    # Of the density as it is written: 1 - 0.9 is less than 0.1 in binary, and a pair too many would be kept.
    kappa = int((1 - Fraction(str(density))) * height * width)
    return ("row", width) if kappa == 0 else ("head", kappa)
