"""The text encoder trained alone, on captions only: each word has to know whose it is before a clip can show it.

Left to the video's loss, its attention hardened into one by content alone, its logits far larger than any position bias,
which reads "a red circle ... and a blue square ..." as a bag of words. So attention starts anew by position and is asked
what the captions say. Embeddings of captions with one object stay as the transformer knows them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from diffusers_accel.evals.toy.render import training_scene
from diffusers_accel.evals.toy.training.denoiser import Probe
from diffusers_accel.evals.toy.training.models import aim_text_heads
from diffusers_accel.evals.toy.training.run_state import Average, RunState, scheduled_lr
from diffusers_accel.evals.toy.training.transformer import Denoiser, describe_caption, load_probe

if TYPE_CHECKING:
    from diffusers_accel.evals.toy.render import Scene

CAPTIONS = 24  # of each of the two kinds, with one object and with two, in a step
LR = 1e-3
KEEP_WEIGHT = 3.0  # of the squared change, relative to the embeddings', where there is one object


def train_text(folder: Path, steps: int, seed: int) -> Path:
    """Give the checkpoint of a transformer in `folder` a text encoder that tells objects apart; returns its path.

    The optimizers of that run begin anew.
    """
    run = RunState(folder, "transformer", 0, seed)
    if (held := run.resume()) is None:
        raise FileNotFoundError(f"expected a checkpoint in {run.path}, found none; run the transformer command first")
    torch.manual_seed(seed)
    model = Denoiser()
    model.load_state_dict(held["average"]["values"])
    before = copy.deepcopy(model)
    probe = Probe(model.transformer)
    load_probe(probe, held, run.path)
    aim_text_heads(model.text_encoder)
    parameters = [*model.text_encoder.parameters(), *probe.text.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LR, betas=(0.9, 0.98))
    for step in range(steps):
        rng = np.random.default_rng([seed, 4, step])
        scenes = [_scene(rng, objects) for objects in (1, 2) for _ in range(CAPTIONS)]
        captions = [scene.caption for scene in scenes]
        rows, _ = model.encode(captions)
        told = probe.text_loss(rows, torch.from_numpy(np.stack([describe_caption(scene) for scene in scenes])))
        with torch.no_grad():
            kept, _ = before.encode(captions[:CAPTIONS])
        change = (rows[:CAPTIONS] - kept).square().sum() / kept.square().sum()
        for group in optimizer.param_groups:
            group["lr"] = scheduled_lr(LR, step / steps, step, warmup=50)
        optimizer.zero_grad()
        (told + KEEP_WEIGHT * change).backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"text step {step + 1}  told {told.item():.4f}  changed {change.item():.4f}", flush=True)
    held |= {"model": model.state_dict(), "average": Average(model, 1).state(), "probe": probe.state_dict()}
    held.pop("optimizers", None)
    run.save(**held)
    return run.path


def _scene(rng: np.random.Generator, objects: int) -> Scene:
    while True:
        scene = training_scene(rng)
        if len(scene.actors) == objects:
            return scene
