"""What every test of the search shares."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusers_accel.search import plan_search


@pytest.fixture(autouse=True)
def short_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are timed for so short that the times mean nothing."""
    monkeypatch.setattr(plan_search, "COST_SECONDS", 0.05)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each test has a cache of its own, where searches that name no file keep their scores."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder
