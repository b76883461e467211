"""Model families: one file each, found by the transformer's class."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from diffusers_accel.families.allegro import ALLEGRO
from diffusers_accel.families.anyflow import ANYFLOW
from diffusers_accel.families.anyflow_far import ANYFLOW_FAR
from diffusers_accel.families.chronoedit import CHRONOEDIT
from diffusers_accel.families.cogvideox import COGVIDEOX
from diffusers_accel.families.consisid import CONSISID
from diffusers_accel.families.cosmos import COSMOS
from diffusers_accel.families.cosmos3 import COSMOS3
from diffusers_accel.families.easyanimate import EASYANIMATE
from diffusers_accel.families.family import Family
from diffusers_accel.families.framepack import FRAMEPACK
from diffusers_accel.families.helios import HELIOS
from diffusers_accel.families.hunyuan_video import HUNYUAN_VIDEO
from diffusers_accel.families.hunyuan_video15 import HUNYUAN_VIDEO15
from diffusers_accel.families.kandinsky5 import KANDINSKY5
from diffusers_accel.families.kandinsky6 import KANDINSKY6
from diffusers_accel.families.kandinsky6_sr import KANDINSKY6_SR
from diffusers_accel.families.latte import LATTE
from diffusers_accel.families.ltx import LTX
from diffusers_accel.families.ltx2 import LTX2
from diffusers_accel.families.minimax_h3 import MINIMAX_H3
from diffusers_accel.families.mochi import MOCHI
from diffusers_accel.families.motif_video import MOTIF_VIDEO
from diffusers_accel.families.refused import refusal, unet_of
from diffusers_accel.families.skyreels_v2 import SKYREELS_V2
from diffusers_accel.families.wan import WAN
from diffusers_accel.families.wan_animate import WAN_ANIMATE
from diffusers_accel.families.wan_vace import WAN_VACE
from diffusers_accel.files import quoted

COMPONENTS = ("transformer", "transformer_2", "transformer_ref")
FAMILIES: dict[str, Family] = {}  # by the module-qualified name of the transformer class


def register_family(family: Family) -> None:
    """Makes `patch`, the search and all else know a transformer class, such as one of your own: docs/families.md has the recipe.

    Again with the same name and class it replaces the earlier one.

    Raises:
        ValueError: another family has that name, or is for that class.
    """
    for known in FAMILIES.values():
        if (known.name == family.name) != (known.transformer == family.transformer):
            raise ValueError(
                f"expected a family of another name and transformer class than {quoted(known.name)} ({known.transformer}), found "
                f"{quoted(family.name)} ({family.transformer}): name it otherwise"
            )
    FAMILIES[family.transformer] = family


for _family in (
    WAN,
    WAN_VACE,
    WAN_ANIMATE,
    SKYREELS_V2,
    CHRONOEDIT,
    ANYFLOW,
    ANYFLOW_FAR,
    HELIOS,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO15,
    FRAMEPACK,
    COGVIDEOX,
    LTX,
    LTX2,
    MINIMAX_H3,
    MOCHI,
    MOTIF_VIDEO,
    CONSISID,
    ALLEGRO,
    EASYANIMATE,
    LATTE,
    COSMOS,
    KANDINSKY5,
    KANDINSKY6,
    KANDINSKY6_SR,
    COSMOS3,
):
    register_family(_family)


def find(pipe_or_transformer: Any) -> dict[str, tuple[nn.Module, Family]]:
    """The transformers of a pipeline (or the one that is given) with their families, by the pipeline's names for them.

    Raises:
        TypeError: when there is no transformer of a supported class; the message lists those that are.
    """
    if isinstance(pipe_or_transformer, (str, os.PathLike)):
        raise TypeError(
            f"expected a loaded pipeline or its transformer, found the text {quoted(str(pipe_or_transformer))}: load it first, "
            f"pipe = DiffusionPipeline.from_pretrained({quoted(str(pipe_or_transformer))}). {supported()}"
        )
    if isinstance(pipe_or_transformer, nn.Module):
        candidates = {"transformer": pipe_or_transformer}
    else:
        parts = {name: getattr(pipe_or_transformer, name, None) for name in COMPONENTS}
        candidates = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
        unet = None if candidates else unet_of(pipe_or_transformer)
        candidates |= {} if unet is None or refusal(unet) is None else {"unet": unet}
    found: dict[str, tuple[nn.Module, Family]] = {}
    for name, module in candidates.items():
        module = _uncompiled(module)
        family = family_of(type(module))
        if family is None:
            raise TypeError(f"{name} is a {type(module).__name__}, {_why_not(module)}")
        found[name] = (module, family)
    if not found:
        missing = any(hasattr(pipe_or_transformer, name) for name in COMPONENTS)
        raise TypeError(
            f"expected a loaded pipeline or its transformer, found a {type(pipe_or_transformer).__name__} "
            + (f"whose {COMPONENTS[0]} is not loaded" if missing else f"with no {' or '.join(COMPONENTS)}")
            + f"; {supported()}"
        )
    return found


def family_of(transformer: type) -> Family | None:
    """The family of a transformer class, which it shares with the classes that are made from it; None for others."""
    names = (f"{cls.__module__}.{cls.__qualname__}" for cls in transformer.__mro__)
    return next((FAMILIES[name] for name in names if name in FAMILIES), None)


def list_families() -> list[str]:
    """Names of the supported families with their transformer classes."""
    return [f"{family.name} ({family.transformer.rpartition('.')[2]})" for family in FAMILIES.values()]


def supported() -> str:
    """The end of a message that refuses a model."""
    names = ", ".join(family.name for family in FAMILIES.values())
    return (
        f"supported: {names} (list_families() names their classes). Pass a diffusers pipeline or transformer of these."
    )


def _why_not(module: nn.Module) -> str:
    reason = refusal(module)
    if reason is not None:
        return f"which is not supported: {reason}"
    return (
        f"{supported()} For a transformer of your own call diffusers_accel.register_family(...), see docs/families.md."
    )


def _uncompiled(module: nn.Module) -> nn.Module:
    """The module inside torch.compile's wrapper: hooks and processors belong to that one."""
    original = getattr(module, "_orig_mod", module)
    return original if isinstance(original, nn.Module) else module


__all__ = ["COMPONENTS", "FAMILIES", "Family", "family_of", "find", "list_families", "register_family", "supported"]
