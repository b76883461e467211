"""A training folder that begins with exported weights instead of random ones."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5EncoderModel

from diffusers_accel.evals.toy.training.run_state import Average, RunState
from diffusers_accel.evals.toy.training.transformer import Denoiser
from diffusers_accel.evals.toy.weights_folder import verify_weights, weights_digest
from diffusers_accel.files import encode_line, write_whole


def start_training(folder: Path, weights: Path, seed: int) -> Path:
    """Write checkpoints of the exported `weights` into a new folder: a finished autoencoder, a transformer at step 0.

    The optimizer's state is not exported and starts anew. The record that came with the weights becomes part of the next
    one, so that it still tells how they were made.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"expected a new or empty folder, found files in {folder}; give another --out")
    record = verify_weights(weights)
    vae = AutoencoderKLWan.from_pretrained(weights / "vae", local_files_only=True)
    model = Denoiser()
    model.text_encoder.load_state_dict(UMT5EncoderModel.from_pretrained(weights / "text_encoder").float().state_dict())
    model.transformer.load_state_dict(WanTransformer3DModel.from_pretrained(weights / "transformer").state_dict())

    run = RunState(folder, "autoencoder", 0, seed)
    log = record["autoencoder"]["log"]
    write_whole(run.log_path, b"".join(encode_line(row) for row in log))
    run.step, run.seconds = log[-1]["step"], 60 * log[-1]["minutes"]
    run.save(average=Average(vae, 1).state(), latents_mean=vae.config.latents_mean, latents_std=vae.config.latents_std)
    earlier = {"weights": weights_digest(record), **{k: v for k, v in record["transformer"].items() if k != "log"}}
    RunState(folder, "transformer", 0, seed).save(
        model=model.state_dict(), average=Average(model, 1).state(), started_from=json.dumps(earlier)
    )
    return folder
