"""Training of the toy autoencoder on rendered clips: crops of short clips, of whole clips, then whole frames."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffusers_accel.evals.toy.render import Scene, held_out_scene, render, training_scene
from diffusers_accel.evals.toy.training.models import LATENT_CHANNELS, build_autoencoder
from diffusers_accel.evals.toy.training.run_state import Average, RunState, scheduled_lr

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

# (share of the time budget at which the stage ends, batch, frames, side): crops of 33 x 128 x 128 clips. The causal
# convolutions reach further back than 9 frames, so most of the time goes into whole clips of small crops.
STAGES = ((0.40, 4, 9, 64), (0.92, 2, 33, 64), (1.01, 1, 33, 128))
LATENT_NOISE = 0.1  # the decoder learns to bear the sampler's small errors
LATENT_WEIGHT = 2e-3  # keeps the latents near unit size, so that the noise above means something
PEAK_LR = 1.5e-3


def to_video(frames: np.ndarray) -> torch.Tensor:
    """`[F, H, W, 3]` in 0..1 to `[3, F, H, W]` in -1..1, both float32."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2).mul(2).sub(1)


def crop_window(scene: Scene, rng: np.random.Generator, frames: int, side: int) -> tuple[int, int, int, int, int, int]:
    """A window of `frames` x `side` x `side` of a 33 x 128 x 128 clip, mostly around an object."""
    t0 = int(rng.integers(0, 33 - frames + 1))
    actor = scene.actors[int(rng.integers(len(scene.actors)))]
    x, y, _, _ = actor.state(np.array([(t0 + frames / 2) / 32], np.float32))[:, 0] * 128
    if rng.random() < 0.2:
        x, y = rng.uniform(0, 128, size=2)
    x0, y0 = (int(np.clip(round(c - side / 2 + rng.uniform(-0.3, 0.3) * side), 0, 128 - side)) for c in (x, y))
    return t0, frames, y0, side, x0, side


def encode_mean(vae: AutoencoderKLWan, video: torch.Tensor) -> torch.Tensor:
    """The posterior's mean of `[B, 3, F, H, W]` in -1..1, not normalised."""
    return vae.encode(video, return_dict=False)[0].mode()


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLWan, clips: int = 8, seed: int = 10_000) -> float:
    """Mean PSNR in dB of whole reconstructed clips (33 x 128 x 128) of held-out captions."""
    values = []
    for i in range(clips):
        video = to_video(render(held_out_scene(np.random.default_rng([seed, i]))))[None]
        again = vae.decode(encode_mean(vae, video), return_dict=False)[0]
        values.append(-10 * torch.log10((again - video).float().div(2).square().mean()).item())
    return float(np.mean(values))


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, clips: int = 48, seed: int = 20_000) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per latent channel over whole training clips."""
    latents = []
    for i in range(clips):
        video = to_video(render(training_scene(np.random.default_rng([seed, i]))))[None]
        latents.append(encode_mean(vae, video)[0].flatten(1))
    values = torch.cat(latents, dim=1)
    return values.mean(1).tolist(), values.std(1).tolist()


def train_autoencoder(folder: Path, minutes: float, seed: int, stages: tuple = STAGES, measure: bool = True) -> Path:
    """Train until the time budget is used up, resuming from the folder's checkpoint; returns the checkpoint's path."""
    torch.manual_seed(seed)
    vae = build_autoencoder()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.0)
    average, run = Average(vae, 0.998), RunState(folder, "autoencoder", minutes, seed)
    if held := run.resume():
        vae.load_state_dict(held["model"])
        optimizer.load_state_dict(held["optimizer"])
        average.load(held["average"])

    def save() -> None:
        run.save(model=vae.state_dict(), optimizer=optimizer.state_dict(), average=average.state())

    losses: list[float] = []
    while run.progress < 1:
        _, batch, frames, side = next(s for s in stages if run.progress < s[0])
        rng = np.random.default_rng([seed, run.step])
        scenes = [training_scene(rng) for _ in range(batch)]
        clips = [render(s, window=crop_window(s, rng, frames, side)) for s in scenes]
        video = torch.stack([to_video(c) for c in clips])
        for group in optimizer.param_groups:
            group["lr"] = scheduled_lr(PEAK_LR, run.progress, run.step)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae._encode(video)[:, :LATENT_CHANNELS].float()
            again = vae._decode(mean + LATENT_NOISE * torch.randn_like(mean)).sample.float()
        error = (again - video).square().mean()
        optimizer.zero_grad(set_to_none=True)
        (10 * error + LATENT_WEIGHT * mean.square().mean()).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(vae)
        run.step += 1
        losses.append(error.item())
        if run.step % 100 == 0 or run.progress == 1:
            run.log(mse=float(np.mean(losses)), psnr=-10 * float(np.log10(np.mean(losses) / 4)), side=side)
            losses.clear()
        if run.save_due:
            save()
    trained = {k: v.clone() for k, v in vae.state_dict().items()}
    vae.load_state_dict(average.values)
    vae.eval()
    mean, std = latent_statistics(vae)
    if measure:
        run.log(held_out_psnr=reconstruction_psnr(vae))
    run.save(
        model=trained, optimizer=optimizer.state_dict(), average=average.state(), latents_mean=mean, latents_std=std
    )
    return run.path
