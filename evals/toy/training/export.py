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

from diffusers_accel.evals.toy.training.latents import RECORD_BYTES, trained_autoencoder
from diffusers_accel.evals.toy.training.models import build_scheduler
from diffusers_accel.evals.toy.training.run_state import load_run, read_log
from diffusers_accel.evals.toy.training.transformer import Denoiser
from diffusers_accel.evals.toy.weights_folder import RECORD, folder_hashes, weights_digest
from diffusers_accel.files import read_json

MAX_BYTES = 16_000_000
_MODULE = "python -m diffusers_accel.evals.toy.training"


def build_pipeline(folder: Path) -> diffusers.WanPipeline:
    """The stock pipeline of the averaged weights in a training folder's checkpoints, in fp32."""
    model = Denoiser()
    model.load_state_dict(_run(folder, "transformer")["average"]["values"])
    return diffusers.WanPipeline(
        tokenizer=model.tokenizer,
        text_encoder=model.text_encoder.eval(),
        transformer=model.transformer.eval(),
        vae=trained_autoencoder(folder),
        scheduler=build_scheduler(),
    )


def log_summary(path: Path, rows: int = 20) -> list[dict[str, int | float]]:
    """About `rows` evenly spaced rows of a training log, the last one included."""
    if not (log := read_log(path)):
        raise FileNotFoundError(f"expected the log of a run in {path}, found none; train first")
    picks = np.unique(np.linspace(0, len(log) - 1, rows).round().astype(int))
    return [log[i] for i in picks]


def _run(folder: Path, name: str) -> dict[str, Any]:
    held = load_run(folder, name)
    if held is None:
        raise FileNotFoundError(f"expected a checkpoint of the {name} in {folder}, found none; train it first")
    return held


def training_record(folder: Path, weights: Path, measured: dict[str, Any] | None) -> dict[str, Any]:
    """What is needed to know these weights and to make their like again."""
    runs = {}
    for name in ("autoencoder", "transformer"):
        held = _run(folder, name)
        runs[name] = {
            "command": f"{_MODULE}.train {name} --minutes {held['seconds'] / 60:.0f} --seed {held['seed']}",
            "steps": held["step"],
            "log": log_summary(folder / f"{name}.jsonl"),
        }
    clips = (folder / "latents.bin").stat().st_size // RECORD_BYTES
    seed = held["seed"]
    if earlier := held.get("started_from"):
        runs["transformer"]["started_from"] = json.loads(earlier)
    record: dict[str, Any] = {
        "files": folder_hashes(weights),
        "autoencoder": runs["autoencoder"],
        "latents": {"command": f"{_MODULE}.train latents --clips {clips} --seed {seed}"},
        "transformer": runs["transformer"],
        "export": {"command": f"{_MODULE}.train export"},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }
    if measured is not None:
        found, expected = measured["what"]["weights"], weights_digest(record)
        if found != expected:
            raise ValueError(
                f"expected a measurement of these weights ({expected}), found one of others ({found}); measure again"
            )
        what = measured["what"]
        command = f"{_MODULE}.measure --prompts {what['prompts']} --seed {what['seed']}"
        record["quality"] = {"command": command, "call": what["call"], **measured["summary"]}
    return record


def export_weights(folder: Path, out: Path, measured: Path | None = None) -> Path:
    """Write the pipeline in bf16 with its record to `out`; a reader sees the old folder or the new one, never half of one.

    measured: result file of the measure command on these very weights, whose summary goes into the record.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        build_pipeline(folder).to(torch.bfloat16).save_pretrained(part, safe_serialization=True)
        for file in (part / "model_index.json", part / "tokenizer" / "tokenizer_config.json"):
            # The name of the class that every version of transformers knows.
            file.write_text(file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
        size = sum(p.stat().st_size for p in part.rglob("*") if p.is_file())
        if size > MAX_BYTES:
            raise ValueError(f"expected at most {MAX_BYTES} bytes of weights, found {size}; make the model smaller")
        record = training_record(folder, part, read_json(measured) if measured else None)
        (part / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        part.chmod(0o755)
        for file in part.rglob("*.safetensors"):
            file.chmod(0o644)
        old = out.with_name(f".{out.name}-old")
        shutil.rmtree(old, ignore_errors=True)
        if out.exists():
            out.rename(old)
        part.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out
