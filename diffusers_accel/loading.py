"""A pipeline by name, as the commands take it: "shapes", a local folder or a hub id, on a device, offloaded or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from diffusers_accel.evals import shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pipeline(name: str, *, dtype: str | None = None, device: str | None = None, offload: str = "none") -> Any:
    """Loads a diffusers pipeline in the host's own way.

    Args:
        name: "shapes" for the small model of this package, else what `DiffusionPipeline.from_pretrained` takes.
        dtype: a name of `DTYPES`; None means bfloat16, on a CPU float32.
        device: as torch names it; None means CUDA (or ROCm) where there is one, else the CPU.
        offload: "none"; "model": one component at a time is on the device; "group": one layer at a time is.

    Raises:
        ValueError: there is no such dtype or device, or nothing to offload from.
        OSError: there is no such pipeline, or it cannot be read.
    """
    target = _device(device)
    if offload != "none" and target.type == "cpu":
        raise ValueError(f"offload {offload!r} moves weights between a GPU and the CPU, found device cpu: leave it out")
    wanted = DTYPES["float32" if target.type == "cpu" else "bfloat16"] if dtype is None else _dtype(dtype)
    pipe = shapes.load_pipeline(wanted) if name == "shapes" else _from_pretrained(name, wanted)
    if offload == "none":
        return pipe.to(target)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=target)
    elif offload == "group":
        pipe.enable_group_offload(onload_device=target, offload_type="leaf_level", use_stream=True)
    else:
        raise ValueError(f"offload: expected none, model or group, found {offload!r}")
    return pipe


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, found {name!r}")
    return DTYPES[name]


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device: expected a name such as cpu, cuda or cuda:1, found {name!r}") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device: torch {torch.__version__} sees no GPU, found {name!r}; install a CUDA or ROCm build of torch"
        )
    return device


def _from_pretrained(name: str, dtype: torch.dtype) -> Any:
    folder = Path(name)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise OSError(f"{folder}: expected the folder of a diffusers pipeline, found no model_index.json in it")
    return DiffusionPipeline.from_pretrained(name, dtype=dtype)
