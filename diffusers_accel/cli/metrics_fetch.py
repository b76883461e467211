"""`diffusers-accel metrics fetch`."""

from __future__ import annotations

from typing import Annotated

import typer


def metrics_fetch(
    name: Annotated[str, typer.Argument(help="A metric whose weights can be had, such as lpips.")],
) -> None:
    """Fetch the published weights of a metric into the user's cache, checked by sha256."""
    from diffusers_accel.evals.metrics import METRICS
    from diffusers_accel.files import quoted
    from diffusers_accel.support.suggest import did_you_mean
    from diffusers_accel.support.terminal import say

    fetches = {each.name: each.fetch for each in METRICS.values() if each.fetch}
    if name not in fetches:
        expected = f"a metric with weights to fetch ({', '.join(fetches)})"
        raise ValueError(f"expected {expected}, found {quoted(name)}{did_you_mean(name, fetches)}")
    fetches[name](say)
