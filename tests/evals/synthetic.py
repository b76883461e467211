"""Reports made of numbers and frames that were never measured, for tests of what is done with them."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

from diffusers_accel.evals.intervals import estimate
from diffusers_accel.evals.measurement import Measurement, Spread
from diffusers_accel.evals.metrics import SetMetric
from diffusers_accel.evals.report import Clip, Media, Report, Subject
from diffusers_accel.evals.report.video import difference_pixels, encode, pixels
from diffusers_accel.methods import NAMED, AxisOrder, Band, Method, Recipe, Skip, Stripe
from diffusers_accel.plan import Plan
from diffusers_accel.shape import ModelShape

# What the films of a set weigh, so that a test sees whether all of them are there and whole.
FILMS = SetMetric(
    name="films",
    title="Films",
    unit="",
    range="0 upwards",
    better="closer",
    protocol="Bytes of all films.",
    load=lambda: lambda clips: float(sum(clip.path.stat().st_size for clip in clips.clips)),
)
METHODS = (Method(), Method(select=Skip()), Method(select=Band(0.25)), Method(select=Band(0.5)))
METHODS += (Method(order=AxisOrder("hwf"), select=Band(0.25)), Method(select=Stripe(0.25)))


def frames(seed: int, count: int = 4, side: int = 32) -> np.ndarray:
    """A square that moves over noise: [F, H, W, 3] float32 in 0..1."""
    clip = np.random.default_rng(seed).random((count, side, side, 3), dtype=np.float32) * 0.2
    for i in range(count):
        clip[i, 4:12, 4 + 2 * i : 12 + 2 * i] = (0.9, 0.2, 0.1)
    return clip


def plan(name: str = "", layers: int = 3, heads: int = 6) -> Plan:
    """Of a named method, or of all kinds of heads."""
    recipe = NAMED[name](precision="input") if name in NAMED else Recipe(heads=METHODS, dense_steps=0.25)
    return Plan.uniform(recipe, family="wan", models={"transformer": ModelShape(layers, heads, 64)})


def report(
    ratios: dict[str, list[float]],
    *,
    drift: float = 0.01,
    layers: int = 3,
    heads: int = 6,
    lpips: str | None = None,
    notes: dict[str, str] | None = None,
    prompt: str = "a red <square> | moves",
    prompts: int = 1,
    floor: float | None = None,
) -> Report:
    """A report of these speed-ups per subject and clip; LPIPS is missing, with that note, where one is given.

    `prompts`: so many, in turn, each with seeds of its own.
    `floor`: the PSNR of a floor. `notes`: what the patch of a subject noted. Subjects with the names of methods have their plans.
    """
    provenance: dict[str, Any] = {
        "machine": {"cpu": "a processor", "cores": 2},
        "versions": {"torch": "2.13.0"},
        "prompts": [prompt],
        "protocol": ["first sentence", "second sentence"],
        **({"floor": "torch's attention in float64"} if floor else {}),
    }
    count = len(next(iter(ratios.values())))
    clips = []
    for seed in range(count):
        films = {"dense": encode(pixels(frames(0)), 8)} | {name: encode(pixels(frames(seed + 1)), 8) for name in ratios}
        differences = {name: encode(difference_pixels(frames(0), frames(seed + 1)), 8) for name in ratios}
        text = prompt if prompts == 1 else f"{prompt} {seed % prompts}"
        clips.append(Clip(text, seed, Media(films, differences, 8, 4) if seed < 2 else None))

    def row(metric: str, value: float | None, subject: str, **more: Any) -> Measurement:
        unit = {"time": "ms", "attention_time": "ms", "peak_memory": "bytes", "speedup": "x", "psnr": "dB"}.get(
            metric, ""
        )
        baseline = None if subject == "dense" else "dense"
        return Measurement(metric, value, unit, more.pop("better", "higher"), subject, baseline, provenance, **more)

    rows = [
        row("time", 1000.0, "dense"),
        row("attention_time", 600.0, "dense"),
        row("attention_share", 0.6, "dense"),
        row("density", 1.0, "dense"),
    ]
    rows += [row("peak_memory", 2.0**30, "dense"), row("dense_drift", drift, "dense", note=f"-1.0% to {drift:+.1%}")]
    rows += [row("repeat_difference", 0.0, "dense", note="identical"), row("dense_patch_difference", 0.02, "dense")]
    if floor:
        rows += [row(metric, value, "floor") for metric, value in (("psnr", floor), ("ssim", 0.999), ("lpips", 0.001))]
        rows += [row(metric, value, "floor") for metric, value in (("time", 2000.0), ("speedup", 0.5))]
    for name, values in ratios.items():
        texts = [clip.prompt for clip in clips]
        mean, spread = estimate(values, texts, comparisons=len(ratios), ratio=True)
        rows += [
            row("speedup", mean, name, spread=spread),
            row("time", 1000 / mean, name, note=(notes or {}).get(name)),
        ]
        rows += [
            row("attention_time", 300.0, name),
            row("attention_share", 0.4, name),
            row("density", 0.4, name),
            row("peak_memory", 2.0**30, name),
        ]
        rows += [row("psnr", 27.5, name, spread=Spread(count, 1.25)), row("ssim", 0.93, name)]
        rows += [row("lpips", None if lpips else 0.05, name, note=lpips)]
        for clip, value in zip(clips, values, strict=True):
            rows += [row("speedup", value, name, clip=clip.key), row("time", 1000 / value, name, clip=clip.key)]
            rows += [row("psnr", 27.0 + clip.seed, name, clip=clip.key), row("ssim", 0.93, name, clip=clip.key)]
            rows += [row("lpips", None if lpips else 0.05, name, clip=clip.key, note=lpips)]
    for one, other in combinations(ratios, 2):
        between = [a / b for a, b in zip(ratios[one], ratios[other], strict=True)]
        ratio, spread = estimate(between, texts, ratio=True)
        more, wider = estimate([0.0] * count, texts)
        rows.append(Measurement("speed_ratio", ratio, "x", "higher", one, other, provenance, spread))
        rows.append(Measurement("psnr_difference", more, "dB", "higher", one, other, provenance, wider))
    subjects = tuple(
        Subject(name, plan(name, layers, heads), layer_rows(layers, heads, 0.3 + 0.1 * number))
        for number, name in enumerate(ratios)
    )
    return Report(tuple(rows), tuple(clips), subjects, provenance)


def layer_rows(layers: int, heads: int, density: float) -> list[dict[str, Any]]:
    """Rows of `Patch.report()` for 8 calls of each layer, 6 of them in the sparse kernel."""
    row = {
        "transformer": "transformer",
        "calls": 8,
        "methods": {"band 0.25": 8 * heads},
        "kernels": {"cpu": 6, "dense": 2},
    }
    kept = {"reused": 4 * heads, "cache_bytes": 2**20, "notes": {}}
    return [{**row, **kept, "layer": layer, "density": density + 0.01 * layer} for layer in range(layers)]
