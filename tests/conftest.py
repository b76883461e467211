"""What every test shares."""

from __future__ import annotations

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-arch", action="store_true", help="compile every variant for every compute capability")
    parser.addoption("--slow", action="store_true", help="run tests that take minutes or fetch packages")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `slow` are skipped without --slow, tests marked `gpu` where torch sees no GPU; each with the reason."""
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes and fetches packages: run with --slow"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device, torch sees none"))
