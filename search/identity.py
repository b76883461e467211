"""What makes two searches the same, so that one may go on with the other's scores, and what is recorded beside that."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import diffusers
import torch

import diffusers_accel
from diffusers_accel.files import quoted
from diffusers_accel.layout import TokenLayout
from diffusers_accel.plan.uses import GRID
from diffusers_accel.search.cost import describe_device
from diffusers_accel.search.schedule import ProbeSettings
from diffusers_accel.search.scores import Scores
from diffusers_accel.search.stored_masks import USUAL_MASKS, MaskSettings
from diffusers_accel.shape import ModelShape
from diffusers_accel.support.identity import Found, components, fingerprint, model_name, plain


def configuration(pipe: Any, found: Found, call: Mapping[str, Any], settings: ProbeSettings) -> dict[str, Any]:
    """JSON data that is equal exactly where two searches measure the same; what tells most of a difference stands first."""
    return {
        "pipeline": type(pipe).__name__,
        "model": model_name(pipe),
        "weights": fingerprint(found),
        "components": components(pipe, found),
        "device": describe_device(torch.device(pipe._execution_device)),
        "call": plain(call),
        "seed": settings.seed,
        "rows": settings.rows,
        "probe_steps": settings.probe_steps,
        **({"masks": _masks(settings.masks)} if settings.masks != USUAL_MASKS else {}),
    }


def _masks(masks: MaskSettings) -> dict[str, Any]:
    """As files of scores have it, where the segments are still called parts."""
    return {"parts" if name == "segments" else name: value for name, value in asdict(masks).items()}


def check_same_search(
    scores: Scores,
    where: str,
    config: Mapping[str, Any],
    models: Mapping[str, ModelShape],
    settings: ProbeSettings,
    prompts: Sequence[str],
) -> None:
    """Refuses scores that another search measured, naming what differs; more prompts at the end are fine."""
    mine = {**config, "models": models, "candidates": settings.candidates, "spans": settings.spans}
    theirs = {**scores.config, "models": scores.models, "candidates": scores.candidates, "spans": scores.spans}
    for key in {**mine, **theirs}:
        if mine.get(key) != theirs.get(key):
            what, other, own = _difference(key, theirs.get(key), mine.get(key))
            raise ValueError(
                f"{where} was measured with {what} = {quoted(other)}, this search has {quoted(own)}: their scores cannot "
                f"be mixed. Give the search another scores_path, or the same {what}"
            )
    for number, (done, prompt) in enumerate(zip(scores.runs, prompts)):
        if done.prompt != prompt:
            raise ValueError(
                f"{where}: prompt {number} was {quoted(done.prompt)}, this search has {quoted(prompt)}; prompts can be added "
                "at the end only. Give the search another scores_path"
            )
    if len(scores.runs) > len(prompts):
        found = f"{where} holds {len(scores.runs)} prompts, this search has {len(prompts)}"
        raise ValueError(f"{found}: give it all of them")


def check_layout(scores: Scores, found: TokenLayout, where: str) -> None:
    """Refuses to go on at another size, which prompts that bring their own arguments may have."""
    if scores.layout != found:
        raise ValueError(
            f"{where} was measured at {scores.layout}, this call has {found}: their scores cannot be mixed. Give the search "
            "another scores_path, or the same size"
        )


def _difference(key: str, other: Any, own: Any) -> tuple[str, Any, Any]:
    """The path of what differs, and both values: of mappings the first entry, of methods their labels."""
    if isinstance(other, Mapping) and isinstance(own, Mapping):
        inner = next(name for name in sorted({*other, *own}) if other.get(name, key) != own.get(name, key))
        return f"{key}.{inner}", other.get(inner), own.get(inner)
    if key == "candidates":
        return key, [method.label for method in other], [method.label for method in own]
    return key, other, own


def environment(pipe: Any) -> dict[str, str]:
    """The versions and the device with which a search measures."""
    return {
        "diffusers_accel": diffusers_accel.__version__,
        "diffusers": diffusers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": describe_device(torch.device(pipe._execution_device)),
    }


def versions(pipe: Any, layout: TokenLayout) -> dict[str, Any]:
    """What a plan's provenance says beside the configuration."""
    parts = [{**vars(each), "grid": None if each.grid is None else list(each.grid)} for each in layout.segments]
    segments = {} if layout.short else {"segments": parts}
    return {
        **environment(pipe),
        "layout": {**{name: getattr(layout, name) for name in (*GRID, "text_tokens")}, **segments},
    }
