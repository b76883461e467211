"""What every Triton implementation asks of a device. Holds no kernel and does not import Triton."""

from __future__ import annotations

import contextlib
import os

import torch


def refuses(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no Triton kernel of this project can run there, or None."""
    if device.type != "cuda" and not (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"runs on CUDA and ROCm devices (on a cpu only with TRITON_INTERPRET=1, for tests), found {device.type}"
    if device.type == "cuda" and capability(device) < 80:
        return f"needs compute capability 8.0 or newer, found {capability(device) / 10}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes float16, bfloat16 and float32, found {dtype}"
    return None


def capability(device: torch.device) -> int:
    """Compute capability as a number, 90 for Hopper; 80, whose tiles are small, for what is not CUDA."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Makes `device` the current one: Triton launches there, whichever device the tensors are on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
