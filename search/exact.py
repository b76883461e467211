"""The best choice there is, by an integer program (HiGHS, through `scipy.optimize.milp`).

Options that no better choice can take are left out: with a price on cost, every option has a reduced error, and where that is
larger than what the choice at hand may be off by, the option is in no better choice (reduced-cost fixing; the price is the slope
of the hulls at the limit, at which the relaxation has its bound). To have few left, the most promising ones are solved alone
before (the core of Balas and Zemel 1980): with a better choice at hand fewer options remain.
"""

from __future__ import annotations

import time

import numpy as np

from diffusers_accel.extras import install
from diffusers_accel.search.knapsack import SLACK, Array, bound_and_price

SECONDS = 20.0  # for the solver, after which what was found goes on, with its bound
CORE = 400  # options beside those of the choice at hand
UNITS = 1e3  # of the largest possible gain: the solver takes differences below 1e-6 for none


def check_solver() -> None:
    """Refuses where scipy is missing, before anything was measured. Raises ImportError."""
    try:
        import scipy.optimize  # noqa: F401  # of the extra `eval`
    except ImportError as error:
        raise ImportError(f"exact: expected scipy, found none; {install('eval')}, or leave exact out") from error


def improved(error: Array, cost: Array, limit: float, choice: Array, seconds: float = SECONDS) -> tuple[Array, float]:
    """The choice with the least total error at a total cost of at most `limit`, and a bound that no choice falls below.

    Args:
        error, cost, limit: as of `knapsack`.
        choice: what that has found.
        seconds: for the solver. Where they do not suffice, the better of its choice and the given one, and its bound.

    Returns:
        int [items], and a number that equals the total error where the choice is proven to be the best.
    """
    items, end = np.arange(len(error)), time.monotonic() + seconds
    bound, price = bound_and_price(error, cost, limit)
    priced = error + price * cost
    reduced = priced - priced.min(1, keepdims=True)
    for core in (True, False):
        total = float(error[items, choice].sum())
        room = total - bound
        if room <= total * (SLACK - 1):
            return choice, total
        promising = np.partition(reduced, CORE, None)[CORE] if core and reduced.size > CORE else np.inf
        open_ = reduced <= min(room * SLACK, promising)
        open_[items, choice] = True
        left = end - time.monotonic()
        choice, least = _solved(error, cost, limit * SLACK, choice, open_, room, left / 3 if core else left)
    return choice, max(bound, least)


def _solved(
    error: Array, cost: Array, limit: float, choice: Array, open_: Array, room: float, seconds: float
) -> tuple[Array, float]:
    """The best choice of open options, or the given one where no better one is found, and what none of theirs falls below."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    items, total = np.arange(len(error)), float(error[np.arange(len(error)), choice].sum())
    several = np.flatnonzero(open_.sum(1) > 1)
    if not len(several):
        return choice, total
    row, option = np.nonzero(open_[several])
    item = several[row]
    # Relative to the given choice, so that what is compared is of the size of what can be gained.
    gain = (error[item, option] - error[item, choice[item]]) * (UNITS / room)
    spent = cost[item, option] - cost[item, choice[item]]
    unit = float(np.abs(spent).max()) or 1.0
    left = (limit - float(cost[items, choice].sum())) / unit
    one_each = csr_array((np.ones(len(item)), (row, np.arange(len(item)))), (len(several), len(item)))
    solved = milp(
        gain,
        integrality=np.ones(len(item)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint((spent / unit)[None], -np.inf, left)],
        options={"time_limit": max(0.0, seconds), "mip_rel_gap": 0.0},
    )
    dual = -np.inf if solved.mip_dual_bound is None else float(solved.mip_dual_bound)
    if solved.x is not None:
        taken = np.flatnonzero(solved.x > 0.5)
        other = choice.copy()
        other[item[taken]] = option[taken]
        found = float(error[items, other].sum())
        if found < total and float(cost[items, other].sum()) <= limit:
            reached = (found - total) * UNITS / room
            return other, found if solved.status == 0 and reached - dual <= 1 else min(
                found, total + dual * room / UNITS
            )
    return choice, total if solved.status == 0 and -dual <= 1 else min(total, total + dual * room / UNITS)
