"""From checkpoints to the shipped folder in the host's own format."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers

from diffusers_accel.evals.shapes.latents import trained_autoencoder
from diffusers_accel.evals.shapes.models import build_scheduler
from diffusers_accel.evals.shapes.transformer import Denoiser
from diffusers_accel.evals.shapes.weights_folder import RECORD, WEIGHTS, folder_hashes

MAX_BYTES = 16_000_000


def build_pipeline(folder: Path) -> diffusers.WanPipeline:
    """The stock pipeline of the averaged weights in a training folder's checkpoints, in fp32."""
    held = torch.load(folder / "transformer.pt", map_location="cpu", weights_only=True)
    model = Denoiser()
    model.load_state_dict(held["average"]["values"])
    return diffusers.WanPipeline(
        tokenizer=model.tokenizer,
        text_encoder=model.text_encoder.eval(),
        transformer=model.transformer.eval(),
        vae=trained_autoencoder(folder),
        scheduler=build_scheduler(),
    )


def log_summary(path: Path, rows: int = 20) -> list[dict[str, float]]:
    """About `rows` evenly spaced rows of a training log, the last one included."""
    log = [json.loads(line) for line in path.read_text().splitlines()]
    picks = np.unique(np.linspace(0, len(log) - 1, rows).round().astype(int))
    return [log[i] for i in picks]


def training_record(folder: Path, weights: Path, commands: list[str], quality: dict[str, Any]) -> dict[str, Any]:
    """What is needed to know these weights and to make their like again."""
    held = {n: torch.load(folder / f"{n}.pt", map_location="cpu", weights_only=True) for n in ("autoencoder", "transformer")}
    return {
        "files": folder_hashes(weights),
        "commands": commands,
        "training": {
            name: {
                "steps": h["step"],
                "minutes": round(h["seconds"] / 60, 1),
                "seed": h["seed"],
                "log": log_summary(folder / f"{name}.jsonl"),
            }
            for name, h in held.items()
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
        "quality": quality,
    }


def export(folder: Path, out: Path = WEIGHTS, commands: list[str] | None = None, quality: dict[str, Any] | None = None) -> Path:
    """Write the pipeline in bf16 with its record to `out`; a reader sees the old folder or the new one, never half of one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    build_pipeline(folder).to(torch.bfloat16).save_pretrained(part, safe_serialization=True)
    size = sum(p.stat().st_size for p in part.rglob("*") if p.is_file())
    if size > MAX_BYTES:
        raise ValueError(f"expected at most {MAX_BYTES} bytes of weights, found {size} in {part}; make the model smaller")
    record = training_record(folder, part, commands or [], quality or {})
    (part / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    part.chmod(0o755)
    old = out.with_name(f".{out.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    part.rename(out)
    shutil.rmtree(old, ignore_errors=True)
    return out
