"""What every test shares."""

from __future__ import annotations

import pytest
import torch

# Files with tests of half a minute and more. They come first: of several workers none is left with one of them at the end.
LONG = (
    "test_toy.py",
    "test_probe.py",
    "test_context_parallel.py",
    "test_processes.py",
    "test_mixed.py",
    "test_demo.py",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--every-arch", action="store_true", help="compile every variant for every compute capability")
    parser.addoption("--slow", action="store_true", help="run tests that take minutes or fetch packages")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `slow` are skipped without --slow, tests marked `gpu` where torch sees no GPU; each with the reason. Files
    of long tests come first."""
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("slow"):
            item.add_marker(pytest.mark.skip(reason="takes minutes and fetches packages: run with --slow"))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA or ROCm device, torch sees none"))
