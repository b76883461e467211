"""What makes two searches the same, so that one may go on with the other's scores, and what is recorded beside that."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch

import diffusers_accel
from diffusers_accel.identity import Found, fingerprint, model_name, plain
from diffusers_accel.layout import TokenLayout
from diffusers_accel.search.cost import describe_device
from diffusers_accel.search.schedule import Settings
from diffusers_accel.search.scores import Scores
from diffusers_accel.shape import ModelShape


def configuration(pipe: Any, found: Found, call: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """JSON data that is equal exactly where two searches measure the same."""
    return {
        "pipeline": type(pipe).__name__,
        "model": model_name(pipe),
        "weights": fingerprint(found),
        "call": plain(call),
        "seed": settings.seed,
        "rows": settings.rows,
        "probe_steps": settings.probe_steps,
    }


def check_same_search(
    scores: Scores,
    where: str,
    config: Mapping[str, Any],
    models: Mapping[str, ModelShape],
    settings: Settings,
    prompts: Sequence[str],
) -> None:
    """Refuses scores that another search measured, naming what differs; more prompts at the end are fine."""
    mine = {**config, "models": models, "candidates": settings.candidates, "spans": settings.spans}
    theirs = {**scores.config, "models": scores.models, "candidates": scores.candidates, "spans": scores.spans}
    for key in sorted({*mine, *theirs}):
        if mine.get(key) != theirs.get(key):
            raise ValueError(
                f"{where} was measured with {key} = {theirs.get(key)}, this search has {mine.get(key)}: their scores cannot "
                f"be mixed. Give the search another scores_path, or the same {key}"
            )
    for number, (done, prompt) in enumerate(zip(scores.passes, prompts)):
        if done.prompt != prompt:
            raise ValueError(
                f"{where}: prompt {number} was {done.prompt!r}, this search has {prompt!r}; prompts can be added at the end "
                "only. Give the search another scores_path"
            )
    if len(scores.passes) > len(prompts):
        found = f"{where} holds {len(scores.passes)} prompts, this search has {len(prompts)}"
        raise ValueError(f"{found}: give it all of them")


def versions(pipe: Any, layout: TokenLayout) -> dict[str, Any]:
    """What a plan's provenance says beside the configuration."""
    return {
        "diffusers_accel": diffusers_accel.__version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": describe_device(torch.device(pipe._execution_device)),
        "layout": {
            "frames": layout.frames,
            "height": layout.height,
            "width": layout.width,
            "text_tokens": layout.text_tokens,
        },
    }
