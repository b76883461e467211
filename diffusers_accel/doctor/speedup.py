"""Amdahl's law, for heads that read less and for forwards that do not run."""

from __future__ import annotations


def speedup(share: float, density: float, *, efficiency: float = 1.0, dense: float = 0.0) -> float:
    """End-to-end speed-up by Amdahl's law: 1 / (1 - f + f (dense + (1 - dense) density / efficiency)).

    Args:
        share: self-attention's share f of the dense time, 0..1.
        density: of the sparse calls, 0..1.
        efficiency: dense time x density / sparse time.
        dense: share of the calls that stay dense, 0..1.
    """
    return 1 / (1 - share + share * (dense + (1 - dense) * density / efficiency))
