"""What tells one pipeline, and what it is called with, from another, so that measurements of two are never mixed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin
from PIL.Image import Image
from torch import nn

from diffusers_accel.families import Family

WHOLE, SAMPLE = 1 << 16, 256  # numbers of a matrix that are hashed: all up to so many, else about so many

Found = Mapping[str, tuple[nn.Module, Family]]


def model_name(pipe: Any) -> str:
    """The hub id that the pipeline was loaded from, or the name of its folder: a plan is shared, a path is private."""
    name = str(getattr(pipe.config, "_name_or_path", None) or "")
    return Path(name).name if Path(name).is_absolute() or Path(name).is_dir() else name


def fingerprint(found: Found) -> str:
    """Tells one set of transformers' weights from another: a hash of types, shapes and a sample of every parameter."""
    digest = hashlib.sha256()
    for name, (module, _) in found.items():
        _add_module(digest, name, module)
    return digest.hexdigest()[:16]


def components(pipe: Any, found: Found) -> str:
    """Tells what else of a pipeline makes its frames from another's: its other models, their types, its scheduler's settings."""
    digest = hashlib.sha256()
    for name, component in sorted(getattr(pipe, "components", {}).items()):
        if isinstance(component, nn.Module) and name not in found:
            _add_module(digest, name, component)
        elif isinstance(component, ConfigMixin):
            settings = {key: plain(value) for key, value in dict(component.config).items() if not key.startswith("_")}
            digest.update(f"{name} {type(component).__name__} {json.dumps(settings, sort_keys=True)}".encode())
    return digest.hexdigest()[:16]


def _add_module(digest: Any, name: str, module: nn.Module) -> None:
    digest.update(f"{name} {type(module).__name__}".encode())
    for path, parameter in module.named_parameters():
        digest.update(f"{path} {parameter.dtype} {list(parameter.shape)}".encode())
        if not parameter.is_meta:
            digest.update(_sample(parameter.detach()))


def _sample(weights: torch.Tensor) -> bytes:
    """Vectors (norms, biases) and LoRA's small matrices whole, of others a few numbers, spread over all of them."""
    try:
        step = 1 if weights.dim() < 2 or weights.numel() <= WHOLE else -(-weights.numel() // SAMPLE)
        return weights.reshape(-1)[::step].float().cpu().numpy().tobytes()
    except (NotImplementedError, RuntimeError, TypeError) as error:  # quantized weights that cannot be cut
        return f"{type(weights).__name__}: {type(error).__name__}".encode()


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
