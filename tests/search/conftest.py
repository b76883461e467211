"""What every test of the search shares."""

from __future__ import annotations

import pytest

from diffusers_accel.search import plan_search


@pytest.fixture(autouse=True)
def short_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are timed for so short that the times mean nothing."""
    monkeypatch.setattr(plan_search, "COST_SECONDS", 0.05)
