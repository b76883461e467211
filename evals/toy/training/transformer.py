"""Training of the toy denoiser and its text encoder by flow matching on encoded clips."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from diffusers_accel.evals.toy.render import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene, training_scene
from diffusers_accel.evals.toy.training.denoiser import (
    OBJECT_FEATURES,
    SHORT_TEXT_ROWS,
    Probe,
    prepare_for_training,
    set_inputs,
)
from diffusers_accel.evals.toy.training.latents import check_latents, clip_scene, open_latents
from diffusers_accel.evals.toy.training.models import build_text_encoder, build_tokenizer, build_transformer
from diffusers_accel.evals.toy.training.run_state import Average, RunState, scheduled_lr

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class Part(NamedTuple):
    """What one step trains on: clips of its batch, latent frames of each, stride of the token grid."""

    clips: int
    frames: int
    stride: int


# Share of the time budget at which a stage ends, and the parts of clips that its steps take in turn: first what a caption
# asks for (many clips, coarse places of some frames), then the geometry (of all frames), then whole clips; whole frames at
# some times throughout.
STAGES = (
    (0.55, (Part(16, 5, 2), Part(16, 5, 2), Part(5, 6, 1))),
    (0.80, (Part(8, 17, 2), Part(5, 6, 1))),
    (1.01, (Part(3, 17, 1), Part(5, 6, 1))),
)
CAPTIONS = 32  # of a step that only the text encoder's probe sees
PEAK_LR = 1e-3
MUON_RATE = 3.0  # Muon's learning rate over AdamW's, with steps matched to AdamW's size
TEXT_RATE = 0.2  # the text encoder's: faster, its attention hardens before it tells objects apart
DROP_CAPTION = 0.1
NOISIEST = 0.94  # noise share from which on the caption decides
EARLY = 0.3  # share of the steps that train there
LATE_SHIFT = 3.0  # of the other noise levels: below the sampler's, as outlines are decided below its median
NEAR_WEIGHT = 4.0  # of an object's tokens in the loss, over the background's
PROBE_WEIGHT = 0.2  # of the probe's loss


class Denoiser(torch.nn.Module):
    """The two trained modules of the pipeline behind them both: text encoder and transformer."""

    def __init__(self, **sizes: int) -> None:
        super().__init__()
        self.tokenizer: PreTrainedTokenizerFast = build_tokenizer()
        self.text_encoder = build_text_encoder(len(self.tokenizer))
        self.transformer = build_transformer(**sizes)

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Text embeddings `[B, SHORT_TEXT_ROWS, C]`, zero after the real rows as in the stock call, and the real rows."""
        ids = self.tokenizer(captions, padding="max_length", max_length=SHORT_TEXT_ROWS, return_tensors="pt")
        ids = ids.to(self.text_encoder.device)
        rows = self.text_encoder(ids.input_ids, ids.attention_mask).last_hidden_state
        return rows * ids.attention_mask[..., None], ids.attention_mask.sum(1)


def build_optimizers(model: Denoiser, probe: Probe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the transformer's blocks, AdamW for everything else; each group with its `rate` of the common
    learning rate."""
    matrices = [p for p in model.transformer.blocks.parameters() if p.ndim == 2]
    text = [*model.text_encoder.parameters()]
    chosen = {id(p) for p in [*matrices, *text]}
    rest = [p for p in [*model.parameters(), *probe.parameters()] if id(p) not in chosen]
    return [
        torch.optim.Muon(
            [{"params": matrices, "rate": MUON_RATE}], lr=PEAK_LR, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(
            [{"params": rest, "rate": 1.0}, {"params": text, "rate": TEXT_RATE}],
            lr=PEAK_LR,
            betas=(0.9, 0.98),
            weight_decay=0.01,
        ),
    ]


def sample_sigmas(batch: int, generator: torch.Generator) -> torch.Tensor:
    """Noise shares `[B]`, stratified over the batch, a share of `EARLY` of them from `NOISIEST` to 1.

    Below `NOISIEST` an object shows through the noise; only above it the model learns to place and move one by the caption
    alone, which is what a sampler begins with.
    """
    u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
    early = NOISIEST + (1 - NOISIEST) * u / EARLY
    late = (u - EARLY) / (1 - EARLY)
    return torch.where(u < EARLY, early, LATE_SHIFT * late / (1 + (LATE_SHIFT - 1) * late))


class Places(NamedTuple):
    """Token indices of the part of a clip that a step trains on."""

    frames: NDArray[np.int64]
    rows: NDArray[np.int64]
    columns: NDArray[np.int64]


def sample_places(rng: np.random.Generator, shape: tuple[int, int, int], frames: int, stride: int) -> Places:
    """Ascending indices into a token grid; the first frame is always among them, as all positions are relative to it."""
    picked = np.concatenate([[0], 1 + np.sort(rng.choice(shape[0] - 1, frames - 1, replace=False))])
    rows, columns = (np.arange(int(rng.integers(stride)), n, stride) for n in shape[1:])
    return Places(picked, rows, columns)


def latent_time(frames: NDArray[np.int64]) -> NDArray[np.float32]:
    """Times (0..1 over the clip) at the middle of latent frames: each holds two frames, the first one only one."""
    time: NDArray[np.float32] = (np.maximum(2 * frames - 0.5, 0) / 32).astype(np.float32)
    return time


def describe_objects(scene: Scene, frames: NDArray[np.int64]) -> NDArray[np.float32]:
    """What the probe asks for, `[frames, 2 objects, OBJECT_FEATURES]`, NaN where there is no second object.

    x, y, radius, the colour's channels, and 1 for the object's own shape of four, each scaled to a variance near 1; cosine
    and sine of its angle times its corners, so that they return when the object looks as it did.
    """
    told = np.full((len(frames), 2, OBJECT_FEATURES), np.nan, np.float32)
    for index, actor in enumerate(scene.actors):
        x, y, radius, angle = actor.state(latent_time(frames))
        told[:, index, :3] = np.stack([8 * (x - 0.5), 8 * (y - 0.5), 25 * (radius - 0.18)], axis=1)
        told[:, index, 3:6] = 3 * (np.array(COLORS[actor.color]) - 0.5)
        told[:, index, 6:10] = 2 * np.array([actor.shape == name for name in SHAPES])
        phase = SHAPES[actor.shape][0] * angle
        told[:, index, 10:] = np.stack([np.cos(phase), np.sin(phase)], axis=1)
    return told


def describe_caption(scene: Scene) -> NDArray[np.int64]:
    """What the probe asks of the text rows of a scene's caption, `[SHORT_TEXT_ROWS, len(CAPTION_CLASSES)]`, -1 past its end."""
    names = (list(COLORS), list(SHAPES), list(MOTIONS))
    asked = [list(BACKGROUNDS).index(scene.background)]
    for actor in (*scene.actors, None)[:2]:
        traits = (actor.color, actor.shape, actor.motion) if actor else (None, None, None)
        asked += [n.index(t) if t else len(n) for n, t in zip(names, traits, strict=True)]
    lengths = [len(actor.phrase.split()) for actor in scene.actors]
    whose = [1] * lengths[0] + [0] + [2] * sum(lengths[1:])  # between them "and", or "on" after the only one
    rows = len(scene.caption.split()) + 1  # and the end of text
    told = np.full((SHORT_TEXT_ROWS, 1 + len(asked)), -1)
    told[:rows, 0], told[: len(whose), 0], told[:rows, 1:] = 0, whose, asked
    return told


def loss_weights(scene: Scene, places: Places, grid: tuple[int, int, int]) -> NDArray[np.float32]:
    """Weights of the tokens at the given places, `[frames, rows, columns]`: `NEAR_WEIGHT` around the objects, elsewhere 1.

    Without them the background, four fifths of all tokens, drowns what shows an outline.
    """
    y, x = ((p + 0.5) / n for p, n in zip(places[1:], grid[1:], strict=True))
    near = np.zeros(tuple(len(p) for p in places), bool)
    for actor in scene.actors:
        ax, ay, radius, _ = (v[:, None, None] for v in actor.state(latent_time(places.frames)))
        near |= np.hypot(x - ax, y[:, None] - ay) < 1.5 * radius + 0.5 / grid[1]  # all corners, and half a token
    return np.where(near, NEAR_WEIGHT, 1).astype(np.float32)


def take(latent: NDArray[np.float16], places: Places) -> torch.Tensor:
    """The latents `[C, T, 2 h, 2 w]` (fp32) of the 2 x 2 patches at the given places of `[C, F, 2 H, 2 W]`."""
    rows, columns = ((2 * p[:, None] + np.arange(2)).ravel() for p in places[1:])
    return torch.from_numpy(latent[:, places.frames][:, :, rows][..., columns].astype(np.float32))


def load_probe(probe: Probe, held: dict[str, Any], path: Path) -> None:
    """Load the probe of a checkpoint, if it holds one; ValueError for that of a version which asked other things."""
    if "probe" not in held:
        return
    if {k: v.shape for k, v in held["probe"].items()} != {k: v.shape for k, v in probe.state_dict().items()}:
        raise ValueError(
            f"expected a checkpoint of this version in {path}, found one whose probe asks other things; "
            "begin with exported weights in a new folder: `train start --out FOLDER`"
        )
    probe.load_state_dict(held["probe"])


def train_transformer(
    folder: Path,
    minutes: float,
    seed: int,
    device: str = "cpu",
    stages: tuple = STAGES,
    compile: bool = True,
    **sizes: int,
) -> Path:
    """Train until the time budget is used up, resuming from the folder's checkpoint; returns the checkpoint's path."""
    check_latents(folder, seed)
    torch.manual_seed(seed)
    model = Denoiser(**sizes).to(device)
    probe = Probe(model.transformer).to(device)
    optimizers = build_optimizers(model, probe)
    average, run = Average(model, 0.99), RunState(folder, "transformer", minutes, seed)
    if held := run.resume():
        model.load_state_dict(held["model"])
        average.load(held["average"])
        load_probe(probe, held, run.path)
        for optimizer, state in zip(optimizers, held.get("optimizers", ()), strict=False):  # none in a started folder
            optimizer.load_state_dict(state)
    kept = {"started_from": held["started_from"]} if held and "started_from" in held else {}
    prepare_for_training(model.transformer)
    forward = torch.compile(model.transformer, dynamic=False) if compile else model.transformer

    def save() -> None:
        run.save(
            model=model.state_dict(),
            probe=probe.state_dict(),
            optimizers=[o.state_dict() for o in optimizers],
            average=average.state(),
            **kept,
        )

    losses: list[tuple[float, float, float]] = []
    while run.progress < 1:
        parts = next(parts for end, parts in stages if run.progress < end)
        batch, frames, stride = parts[run.step % len(parts)]
        rng = np.random.default_rng([seed, 2, run.step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        latents = open_latents(folder / "latents.bin")
        clips = rng.integers(len(latents), size=batch)
        grid = (latents.shape[2], latents.shape[3] // 2, latents.shape[4] // 2)
        places = [sample_places(rng, grid, frames, stride) for _ in range(batch)]
        clean = torch.stack([take(latents[c], p) for c, p in zip(clips, places, strict=True)]).to(device)
        scenes = [clip_scene(seed, int(c)) for c in clips]
        captions = ["" if rng.random() < DROP_CAPTION else scene.caption for scene in scenes]
        objects = np.stack([describe_objects(s, p.frames) for s, p in zip(scenes, places, strict=True)])
        weights = np.stack([loss_weights(s, p, grid) for s, p in zip(scenes, places, strict=True)])

        noise = torch.randn(clean.shape, generator=generator).to(device)
        sigma = sample_sigmas(batch, generator).to(device)
        mix = sigma.view(-1, 1, 1, 1, 1)
        rate = scheduled_lr(PEAK_LR, run.progress, run.step, warmup=100, hold=0.7)
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["rate"] * rate
        asked = [training_scene(rng) for _ in range(CAPTIONS)]
        text_loss = probe.text_loss(
            model.encode([scene.caption for scene in asked])[0],
            torch.from_numpy(np.stack([describe_caption(scene) for scene in asked])).to(device),
        )
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            text, rows = model.encode(captions)
            set_inputs(
                model.transformer, rows, *(torch.from_numpy(np.stack(p)).to(device) for p in zip(*places, strict=True))
            )
            velocity = forward((1 - mix) * clean + mix * noise, 1000 * sigma, text.float(), return_dict=False)[0]
        error = (velocity.float() - (noise - clean)).square().mean(1)
        # Where the caption alone decides, weights would favour the places that an object may come to: there all are 1.
        shared = torch.where(mix[:, 0] < NOISIEST, torch.from_numpy(weights).to(device), 1)
        shared = shared.repeat_interleave(2, -2).repeat_interleave(2, -1)
        loss = ((error * shared).sum((1, 2, 3)) / shared.sum((1, 2, 3))).mean()
        captioned = torch.tensor([float(bool(c)) for c in captions], device=device)
        probe_loss = probe.loss(model.transformer.rope, grid, torch.from_numpy(objects).to(device), captioned)
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        (loss + PROBE_WEIGHT * (probe_loss + text_loss)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average.update(model)
        run.step += 1
        losses.append((loss.item(), probe_loss.item(), text_loss.item()))
        if run.step % 25 == 0 or run.progress == 1:
            flow, told, read = (float(v) for v in np.mean(losses, axis=0))
            run.log(loss=flow, probe=told, text=read, tokens=clean[0, 0].numel() // 4, clips=len(latents))
            losses.clear()
        if run.save_due:
            save()
    save()
    return run.path
