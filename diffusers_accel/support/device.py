"""A device by name, as the command line takes it."""

from __future__ import annotations

from typing import Any

import torch

from diffusers_accel.files import quoted


def parse_device(name: str | torch.device) -> torch.device:
    """The device that torch knows by this name, whether it is there or not; ValueError where torch knows none."""
    try:
        return torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: expected a name such as cpu, cuda or cuda:1, found {quoted(name)}") from None


def not_there(device: torch.device) -> str | None:
    """Why nothing can run on this device here, or None."""
    if device.type == "cpu":
        return None
    backend: Any = getattr(torch, device.type, None)
    if not (hasattr(backend, "is_available") and backend.is_available()):
        kind = "GPU" if device.type == "cuda" else f"{device.type} device"
        return f"torch {torch.__version__} sees no {kind}"
    count = backend.device_count()
    if device.index is not None and device.index >= count:
        return f"torch sees {count}, numbered from 0"
    return None


def find_device(name: str | None) -> torch.device:
    """The device of this name; None means CUDA (or ROCm) where there is one, else the CPU.

    Raises:
        ValueError: there is no such device.
    """
    device = parse_device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if reason := not_there(device):
        advice = "; install a CUDA or ROCm build of torch" if device.type == "cuda" and device.index is None else ""
        raise ValueError(f"device: {reason}, found {quoted(name)}{advice or '; take another one, such as cpu'}")
    return device
