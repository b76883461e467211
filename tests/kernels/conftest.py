"""Kernel tests: where each implementation can run, poisoned allocations, and formats that Triton's interpreter has wrong."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Triton decides when it is imported whether it interprets, so those tests have a process of their own."""
    for item in items:
        if item.get_closest_marker("interpreter") and not INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="needs TRITON_INTERPRET=1: run `make interpreter`"))
    if not config.getoption("every_arch"):
        kept, others = _in_turn(items)
        items[:] = kept
        config.hook.pytest_deselected(items=others)


def _in_turn(items: list[pytest.Item]) -> tuple[list[pytest.Item], list[pytest.Item]]:
    """The tests that run, and those of other architectures than the one whose turn it is."""
    variants: dict[tuple[Any, ...], list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("arch_in_turn"):
            given = item.callspec.params  # type: ignore[attr-defined]
            others = repr([value for name, value in given.items() if name != "arch"])
            variants.setdefault((item.originalname, others), []).append(item)  # type: ignore[attr-defined]
    turns = {id(of[number % len(of)]) for number, of in enumerate(variants.values())}
    left_out = {id(item) for of in variants.values() for item in of} - turns
    return [item for item in items if id(item) not in left_out], [item for item in items if id(item) in left_out]


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that is allocated without being filled holds NaN, so that a forgotten element shows."""

    def poisoning(allocate: Any) -> Any:
        def allocate_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor: torch.Tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return allocate_nan

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoning(getattr(owner, name)))


@pytest.fixture(autouse=True, scope="session")
def formats_in_the_interpreter() -> None:
    """Triton 3.6's interpreter multiplies the bit patterns of bfloat16 and truncates where GPUs round to nearest even.

    It also loses the carry of a rounding into the exponent of float8.
    """
    if not INTERPRETED:
        return
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    dot = interpreter.InterpreterBuilder.create_dot

    def rounding(data: Any, source: Any, target: Any, mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            narrow = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
            return narrow.view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.float32, tl.float8e4nv):
            return torch.from_numpy(np.ascontiguousarray(data)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        return convert(data, source, target, mode)

    def widening_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        a, b = (
            interpreter.TensorHandle(
                (x.data.astype(np.uint32) << 16).view(np.float32) if x.dtype.scalar == tl.bfloat16 else x.data,
                tl.float32 if x.dtype.scalar == tl.bfloat16 else x.dtype.scalar,
            )
            for x in (a, b)
        )
        return dot(self, a, b, d, *options)

    interpreter._convert_float = rounding
    interpreter.InterpreterBuilder.create_dot = widening_dot


@pytest.fixture(autouse=True)
def large_interpreted_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreted tile takes milliseconds whatever its size, so fp32 gets the size that a GPU has no room for."""
    if INTERPRETED:
        from diffusers_accel.kernels.attention import portable

        for key, config in portable.CONFIGS.items():
            monkeypatch.setitem(portable.CONFIGS, key, config._replace(block_m=128, block_n=64))
