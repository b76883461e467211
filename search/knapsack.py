"""One option per item with the least total error under a limit on the total cost: the multiple-choice knapsack.

Each item's options have a lower convex hull in the (cost, error) plane. Walking the edges of all hulls together, the least
error per saved cost first, passes through solutions that no other choice of the same cost can beat (Everett 1963). The walk
stops at the first one within the limit, and one item is then improved with what is left. The result is at most one edge away
from the optimum, and a tighter limit never has a smaller error.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
SLACK = 1 + 1e-9  # a sum of many costs may be above the limit by rounding


def knapsack(error: Array, cost: Array, limit: float) -> Array:
    """One option per item with (nearly) the least total error at a total cost of at most `limit`.

    Args:
        error: [items, options], 0 or more; infinity where an option is not allowed.
        cost: [items, options], 0 or more.
        limit: on the sum of costs.

    Returns:
        int [items]: the options.

    Raises:
        ValueError: even the cheapest options cost more than `limit`.
    """
    items = np.arange(len(error))
    choice = cheapest(np.where(error == error.min(1, keepdims=True), cost, np.inf), error)
    edge_item, edge_option, edge_slope, edge_saving = _hull_edges(error, cost, choice)
    order = np.lexsort((edge_item, edge_slope))  # stable: within an item, the edges stay in the order of the walk
    total = float(cost[items, choice].sum())
    left = total - np.cumsum(edge_saving[order])
    if total > limit * SLACK:
        inside = np.flatnonzero(left <= limit * SLACK)
        if not len(inside):
            least = left[-1] if len(left) else total
            raise ValueError(f"a cost of {limit:.6g} is out of reach, the least possible is {least:.6g}")
        for edge in order[: inside[0] + 1]:
            choice[edge_item[edge]] = edge_option[edge]
    return _improve_one(error, cost, choice, limit)


def front(error: Array, cost: Array) -> tuple[Array, Array]:
    """Of all choices on the walk the total cost, descending, and the total error: what `knapsack` finds for any limit, but for
    its last improvement. Arguments as there."""
    items = np.arange(len(error))
    start = cheapest(np.where(error == error.min(1, keepdims=True), cost, np.inf), error)
    item, option, slope, saving = _hull_edges(error, cost, start)
    order = np.lexsort((item, slope))
    total = float(cost[items, start].sum()) - np.cumsum(np.concatenate([[0.0], saving[order]]))
    wrong = float(error[items, start].sum()) + np.cumsum(np.concatenate([[0.0], (slope * saving)[order]]))
    return total, wrong


def bound_and_price(error: Array, cost: Array, limit: float) -> tuple[float, float]:
    """What no choice falls below, and the price of cost at which that is so. Arguments as of `knapsack`.

    It is the optimum of the linear relaxation, in which an item may take shares of several options: the walk, stopped in the
    middle of an edge (Sinha and Zoltners 1979). The price is the slope of that edge, 0 where cost is no object.

    Raises:
        ValueError: as of `knapsack`.
    """
    total, wrong = front(error, cost)
    limit *= SLACK
    over = np.flatnonzero(total > limit)
    if not len(over):
        return float(wrong[0]), 0.0
    last = int(over[-1])
    if last + 1 == len(total):
        raise ValueError(f"a cost of {limit:.6g} is out of reach, the least possible is {total[last]:.6g}")
    price = float((wrong[last + 1] - wrong[last]) / (total[last] - total[last + 1]))
    return float(wrong[last]) + price * float(total[last] - limit), price


def _hull_edges(error: Array, cost: Array, start: Array) -> tuple[Array, Array, Array, Array]:
    """Edges of all items' lower convex hulls, walked from `start` towards lower cost: item, option, slope, saving."""
    items = np.arange(len(error))
    current, steepest = start.copy(), np.zeros(len(error))
    edges: list[tuple[Array, Array, Array, Array]] = []
    while True:
        saving = cost[items, current][:, None] - cost
        rise = error - error[items, current][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            slope = np.where((saving > 0) & np.isfinite(error), rise / saving, np.inf)
        lowest = slope.min(1)
        moving = np.flatnonzero(np.isfinite(lowest))
        if not len(moving):
            break
        # Of several options on one edge the far end, so that the walk makes progress.
        option = np.where(slope == lowest[:, None], saving, -np.inf).argmax(1)
        steepest = np.maximum(steepest, np.where(np.isfinite(lowest), lowest, 0))  # rounding may not reorder a hull
        edges.append((moving, option[moving], steepest[moving], saving[moving, option[moving]]))
        current[moving] = option[moving]
    if not edges:
        empty = np.zeros(0)
        return empty.astype(int), empty.astype(int), empty, empty
    item, option, slope, saving = (np.concatenate(column) for column in zip(*edges))
    return item, option, slope, saving


def _improve_one(error: Array, cost: Array, choice: Array, limit: float) -> Array:
    """Spends what is left of the budget on the one change of one item that lowers the error most."""
    items = np.arange(len(error))
    slack = limit * SLACK - float(cost[items, choice].sum())
    gain = error[items, choice][:, None] - error
    gain[cost - cost[items, choice][:, None] > slack] = 0
    if gain.size and gain.max() > 0:
        item, option = np.unravel_index(int(gain.argmax()), gain.shape)
        choice[item] = option
    return choice


def cheapest(cost: Array, tie: Array) -> Array:
    """Per row the index of the lowest cost, of equal ones the lowest `tie`, then the first."""
    return np.where(cost == cost.min(1, keepdims=True), tie, np.inf).argmin(1)
