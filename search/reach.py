"""What a budget can be at most, and when it is refused before its time."""

from __future__ import annotations

from diffusers_accel.search.budget import Budget

SHARE_MARGIN = 0.1  # by so much attention's measured share is raised before a budget is refused before its time


class OutOfReach(ValueError):
    """No plan keeps the budget; the message says what can be reached."""


def check_reach(budget: Budget, share: float, open_share: float, of: str) -> None:
    """Refuses a budget that no plan can keep, as far as that is clear before any candidate was timed or measured.

    Sparse attention that took no time at all would make a generation 1 / (1 - share x open share) times as fast. The share
    is one measurement of a noisy machine, so it is raised by `SHARE_MARGIN` of itself first: what is refused would have to be
    that far off.

    Args:
        share: attention's share of the time of `of`, 0..1; of a step, without what comes before and after the steps, it is an
            upper bound for that of a generation.
        open_share: share of the steps at which heads may be sparse, 0..1.
        of: "a step" or "a generation", for the message.

    Raises:
        OutOfReach: see above.
    """
    if budget.kind == "density" and budget.value < 1 - open_share - 1e-9:
        raise OutOfReach(density_out_of_reach(budget, 1 - open_share))
    if budget.kind == "speedup" and budget.value > largest_speedup((1 + SHARE_MARGIN) * share, open_share):
        most = largest_speedup(share, open_share)
        stays = f" and {1 - open_share:.0%} of the steps stay dense" if open_share < 1 else ""
        raise OutOfReach(
            f"a speed-up of {budget.value:g} is out of reach: self-attention takes {share:.0%} of {of} here{stays}, so that "
            f"{most:.2f} is the most even if it took no time at all; ask for less{', or for fewer dense steps' if stays else ''}"
        )


def largest_speedup(share: float, open_share: float) -> float:
    """Of a generation of which attention takes `share`, if at `open_share` of the steps it took no time."""
    return faster(share, 1 - open_share)


def faster(share: float, ratio: float) -> float:
    """How many times as fast a generation is of which attention takes `share`, if that takes `ratio` of its time."""
    share = min(share, 1.0)
    left = 1 - share + share * ratio
    return 1 / left if left > 0 else float("inf")


def attention_ratio(share: float, speedup: float) -> float:
    """The share of dense attention's time that may be left for a generation, of which it takes `share`, to be `speedup` times as
    fast."""
    return 1 - (1 - 1 / speedup) / share


def density_out_of_reach(budget: Budget, least: float) -> str:
    """The message for a density that is too small, given that of the sparsest plan."""
    found = f"the sparsest plan has {least:.3f}"
    return f"a density of {budget.value:g} is out of reach: {found}; allow more, or fewer dense steps"
