"""The methods among which a search chooses for each head."""

from __future__ import annotations

from collections.abc import Sequence

from diffusers_accel.methods import DENSE, AxisOrder, Band, Method, Skip, Stripe

DENSITIES = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5)


def candidates(densities: Sequence[float] = DENSITIES, *, stripes: bool = True) -> tuple[Method, ...]:
    """Sparse-vDiT's five modes (arXiv 2506.03065), the sparse ones at each of several densities.

    The paper fixes one density per mode for a whole model and names over- and under-sparsified heads as its limitation; here
    a head may take the narrow band where that is enough and the wide one where it is not. Order: dense, skip, then band,
    multi-diagonal (band in "hwf" order) and calibrated stripe from sparse to dense.

    Args:
        densities: shares of key blocks, each in (0, 1].
        stripes: offer calibrated stripes; without them the probe spends all its rows on errors.

    Returns:
        2 + 2 * len(densities) methods, or 2 + 3 * len(densities) with stripes; the first is dense.
    """
    ordered = sorted(set(densities))
    if not ordered:
        raise ValueError("candidates need at least one density, found none")
    sparse = [Method(select=Band(density)) for density in ordered]
    sparse += [Method(order=AxisOrder("hwf"), select=Band(density)) for density in ordered]
    if stripes:
        sparse += [Method(select=Stripe(density, calibrated=True)) for density in ordered]
    return (DENSE, Method(select=Skip()), *sparse)


def check_candidates(methods: Sequence[Method]) -> tuple[Method, ...]:
    """`methods` as a tuple, once it is clear that the first one and only that is dense and that none repeats."""
    if not methods or not methods[0].dense or any(method.dense for method in methods[1:]):
        raise ValueError(
            f"the first candidate, and no other, must be dense, found {[method.label for method in methods]}; "
            "start from diffusers_accel.search.candidates.candidates()"
        )
    if len(methods) < 2:
        raise ValueError("a search needs something to choose from, found only the dense candidate")
    if len(set(methods)) < len(methods):
        raise ValueError(f"a candidate is given twice in {[method.label for method in methods]}")
    return tuple(methods)
