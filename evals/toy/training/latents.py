"""Training clips encoded ahead of time into one growing file, read as a memory map while it is still written."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from diffusers_accel.evals.toy.render import Scene, render, training_scene
from diffusers_accel.evals.toy.training.autoencoder import encode_mean, to_video
from diffusers_accel.evals.toy.training.models import LATENT_CHANNELS, build_autoencoder
from diffusers_accel.evals.toy.training.run_state import load_run
from diffusers_accel.files import read_json, write_json

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

SHAPE = (LATENT_CHANNELS, 17, 32, 32)  # of one 33 x 128 x 128 clip
RECORD_BYTES = int(np.prod(SHAPE)) * 2


def trained_autoencoder(folder: Path) -> AutoencoderKLWan:
    """The averaged autoencoder of a finished run, with its measured latent statistics, in eval mode."""
    held = load_run(folder, "autoencoder")
    if held is None or "latents_mean" not in held:
        raise FileNotFoundError(
            f"expected a finished autoencoder in {folder}, found none; run the autoencoder command first"
        )
    vae = build_autoencoder(held["latents_mean"], held["latents_std"])
    vae.load_state_dict(held["average"]["values"])
    return vae.eval()


def clip_scene(seed: int, index: int) -> Scene:
    """The scene of record `index` of a file encoded with `seed`."""
    return training_scene(np.random.default_rng([seed, 1, index]))


def check_latents(folder: Path, seed: int) -> None:
    """Raises ValueError unless latents.json says that latents.bin shows the scenes of `seed` as this version draws them."""
    path = folder / "latents.json"
    found = read_json(path) if path.exists() else "no latents.json"
    if found != (expected := _record(seed)):
        raise ValueError(
            f"expected {folder / 'latents.bin'} to show the scenes of {expected}, found {found}: captions and clips would not "
            "belong together. Give the seed that it was encoded with, or remove it and run the latents command"
        )


def _record(seed: int) -> dict[str, Any]:
    scenes = "\n".join(repr(clip_scene(seed, index)) for index in range(20))
    return {"seed": seed, "scenes": hashlib.sha256(scenes.encode()).hexdigest()}


def encode_latents(folder: Path, clips: int, seed: int) -> Path:
    """Append normalised float16 latents of training clips to latents.bin until it holds `clips`; resumes where it ended."""
    vae, path = trained_autoencoder(folder), folder / "latents.bin"
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    done = path.stat().st_size // RECORD_BYTES if path.exists() else 0
    if done == 0:
        write_json(folder / "latents.json", _record(seed))
    check_latents(folder, seed)
    with path.open("r+b" if path.exists() else "wb") as file:
        file.truncate(done * RECORD_BYTES)  # an interrupted write
        file.seek(0, os.SEEK_END)
        started = time.monotonic()
        for index in range(done, clips):
            video = to_video(render(clip_scene(seed, index)))[None]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                latent = encode_mean(vae, video)[0].float()
            file.write(((latent - mean) / std).to(torch.float16).numpy().tobytes())
            file.flush()
            if (index + 1) % 100 == 0:
                print(
                    f"{index + 1}/{clips} clips, {(time.monotonic() - started) / (index + 1 - done):.2f} s each",
                    flush=True,
                )
    return path


def open_latents(path: Path) -> np.ndarray:
    """The whole records written so far: float16 `[N, 8, 17, 32, 32]`."""
    count = path.stat().st_size // RECORD_BYTES if path.exists() else 0
    if count == 0:
        raise FileNotFoundError(f"expected encoded clips in {path}, found none; run the latents command first")
    return np.memmap(path, np.float16, "r", shape=(count, *SHAPE))
