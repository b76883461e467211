"""What tells one pipeline, and what it is called with, from another, so that measurements of two are never mixed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import nn

from diffusers_accel.families import Family

Found = Mapping[str, tuple[nn.Module, Family]]


def model_name(pipe: Any) -> str:
    """The hub id that the pipeline was loaded from, or the name of its folder: a plan is shared, a path is private."""
    name = str(getattr(pipe.config, "_name_or_path", None) or "")
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name


def fingerprint(found: Found) -> str:
    """Tells one set of weights from another: a hash of the vectors (norms, biases) and of LoRA's matrices."""
    digest = hashlib.sha256()
    for name, (module, _) in found.items():
        for path, parameter in module.named_parameters():
            if parameter.is_meta or (parameter.dim() > 1 and "lora_" not in path):
                continue
            digest.update(f"{name}.{path}".encode())
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def plain(value: Any) -> Any:
    """`value` as JSON data that is equal for equal values: tensors, arrays and images by their hash."""
    if isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {list(value.shape)} sha256 {hashlib.sha256(data).hexdigest()[:16]}"
    if isinstance(value, np.ndarray):
        return plain(torch.from_numpy(value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, Image):
        return plain(np.array(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return f"{type(value).__module__}.{type(value).__qualname__}"
