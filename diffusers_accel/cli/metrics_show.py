"""`diffusers-accel metrics show`."""

from __future__ import annotations

from diffusers_accel.cli.output import show


def metrics_show() -> None:
    """Print the metrics of reports, each with unit, range and direction, and what keeps it from being measured here."""
    from diffusers_accel.evals.metrics import METRICS
    from diffusers_accel.evals.metrics.readiness import readiness

    show(readiness(METRICS.values()))
