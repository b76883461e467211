"""diffusers' own caches (`enable_cache`) beside a patch: which are on, and what that means for it."""

from __future__ import annotations

from torch import nn

# How the hooks of a cache are named, and what it leaves out.
_BLOCKS = "leaves out the blocks of whole steps"
_ATTENTION = "repeats the attention of earlier steps"
CACHES = {
    "fbc_": ("FirstBlockCache", "leaves out all blocks but the first at some steps"),
    "mag_cache": ("MagCache", _BLOCKS),
    "sea_cache": ("SeaCache", _BLOCKS),
    "taylorseer_cache": ("TaylorSeer", "predicts the output of modules instead of computing it"),
    "pyramid_attention_broadcast": ("PyramidAttentionBroadcast", _ATTENTION),
    "faster_cache": ("FasterCache", f"{_ATTENTION} and leaves out branches"),
}


def caches_on(transformer: nn.Module) -> list[str]:
    """What to say of each cache whose hooks are on the transformer; nothing where there is none."""
    hooks = {
        name
        for module in transformer.modules()
        for name in getattr(getattr(module, "_diffusers_hook", None), "hooks", {})
    }
    return [_said(*CACHES[prefix]) for prefix in CACHES if any(name.startswith(prefix) for name in hooks)]


def _said(cache: str, does: str) -> str:
    return (
        f"diffusers' {cache} is on: it {does}, and what it leaves out never reaches this patch. Layers that then run in dense "
        'steps only are reported as dense, and methods that keep something from step to step ("cached", reselect_every above 1) '
        "start anew after each gap: take one of the two, see docs/choosing.md"
    )
