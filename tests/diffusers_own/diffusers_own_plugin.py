"""Plugin of pytest, loaded by its bare name in a checkout of diffusers: patches what tests build, writes what became of each.

A pipeline is patched where it takes its components, a transformer that is made for no pipeline where it is made.
`DIFFUSERS_OWN_SEAM` says which of the two, and nothing is patched without it; `DIFFUSERS_OWN_RESULT` is the file for the
results, one line of JSON for each test; `DIFFUSERS_OWN_SECONDS` is how long it may take, which the test files share.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers  # noqa: F401  the installed one, before a conftest of the checkout puts its own sources in front
import pytest
import torch
import torch.nn.functional as F

SEAM, RESULT, SECONDS = "DIFFUSERS_OWN_SEAM", "DIFFUSERS_OWN_RESULT", "DIFFUSERS_OWN_SECONDS"
OVER = "the time that was given is over"
_SHARE: dict[str, Any] = {}  # of the time, that of the test file which runs
_CALLS = {"attention": 0}


def pytest_configure(config: Any) -> None:
    for name in ("transformers.transformer_cosmos", "controlnets.controlnet_cosmos"):
        _without_torchvision(importlib.import_module(f"diffusers.models.{name}"))
    seam = os.environ.get(SEAM)
    if not seam:
        return
    from diffusers_accel.attach.site import Site

    _after(Site, "attend", lambda site: _CALLS.update(attention=_CALLS["attention"] + 1))
    {"pipelines": _patch_pipelines, "models": _patch_models}[seam]()


def pytest_runtest_logreport(report: Any) -> None:
    """A line for each test: of its parts (setup, call, teardown) the first that did not pass, else its call."""
    if (report.when != "call" and report.outcome == "passed") or (report.skipped and OVER in str(report.longrepr)):
        return
    _write(report)


def pytest_collectreport(report: Any) -> None:
    """A file that cannot be imported is a test that failed."""
    if report.failed:
        _write(report)


def _write(report: Any) -> None:
    crash = getattr(getattr(report.longrepr, "reprcrash", None), "message", None)
    why = (crash or str(report.longrepr or "")).strip() if report.failed else ""
    line = {"test": report.nodeid, "outcome": report.outcome, "why": why[:2000], "attention": _CALLS["attention"]}
    _CALLS["attention"] = 0
    with Path(os.environ[RESULT]).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def pytest_collection_finish(session: Any) -> None:
    _SHARE["seconds"] = float(os.environ[SECONDS]) / max(1, len({item.path for item in session.items}))


def pytest_runtest_setup(item: Any) -> None:
    """When the share of a test file is over, the rest of it is skipped, which is not written."""
    if item.path != _SHARE.get("file"):
        _SHARE.update(file=item.path, until=time.monotonic() + _SHARE["seconds"])
    if time.monotonic() > _SHARE["until"]:
        _SHARE["over"] = True
        pytest.skip(OVER)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if _SHARE.get("over"):
        terminalreporter.write_line(OVER)


def _after(owner: type, name: str, do: Callable[[Any], object]) -> None:
    """Lets `do(self)` follow a method, whose signature stays what it is."""
    stock = vars(owner)[name]

    @functools.wraps(stock)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = stock(self, *args, **kwargs)
        do(self)
        return out

    setattr(owner, name, method)


def _without_torchvision(module: Any) -> None:
    """Cosmos resizes its mask of padding by torchvision: where that is not installed, torch does it, also without a patch."""

    def resize(image: torch.Tensor, size: list[int], interpolation: str) -> torch.Tensor:
        return F.interpolate(image, size=size, mode=interpolation)

    if not hasattr(module, "transforms"):
        functional, modes = SimpleNamespace(resize=resize), SimpleNamespace(NEAREST="nearest")
        module.transforms = SimpleNamespace(functional=functional, InterpolationMode=modes)


def _patch_pipelines() -> None:
    from diffusers import DiffusionPipeline

    from diffusers_accel.families import COMPONENTS, family_of

    def dense(pipe: Any) -> None:
        parts = [getattr(pipe, name, None) for name in COMPONENTS]
        if any(part is not None and family_of(type(part)) for part in parts):
            _patch(pipe)

    _after(DiffusionPipeline, "register_modules", dense)


def _patch_models() -> None:
    from diffusers_accel.families import FAMILIES

    for name in FAMILIES:
        module, _, attribute = name.rpartition(".")
        cls = getattr(importlib.import_module(module), attribute)
        _after(cls, "__init__", lambda model, cls=cls: _patch(model) if type(model) is cls else None)


def _patch(subject: Any) -> None:
    """Patches what is not patched yet: pipelines share transformers."""
    from diffusers_accel import patch

    try:
        patch(subject, "dense")
    except ValueError as error:
        if "patched already" not in str(error):
            raise
