"""The smallest searches, plans and pipelines that still take every path."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.methods import DENSE, AxisOrder, Band, Draft, Kept, Method, Patches, Skip, Stored, Stripe
from diffusers_accel.methods.selects.stored import packed
from diffusers_accel.plan import Plan, Span
from diffusers_accel.shape import ModelShape
from tests.tiny import HEAD_DIM, HEADS, LAYERS, TEXT_DIM, tiny_wan

SIZE = {"height": 32, "width": 32, "num_frames": 5}  # 3 x 8 x 8 = 192 tokens, 2 blocks
CALL = {**SIZE, "num_inference_steps": 3, "guidance_scale": 3.0}
BLOCKS = 2
MODELS = {"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)}
CANDIDATES = (
    DENSE,
    Method(select=Skip()),
    Method(select=Band(0.4)),
    Method(select=Stripe(0.4, calibrated=True)),
    Method(AxisOrder("hwf"), Stored(0.5)),
    Method(Patches(), Draft(0.4), rest=Kept(2)),
)


def reading_wan(seed: int = 0) -> Any:
    """A tiny Wan pipeline that takes prompts as texts: an embedding is drawn from a text's hash."""
    pipe = tiny_wan(seed=seed)
    pipe._get_t5_prompt_embeds = _embeddings
    return pipe


def _embeddings(prompt: str | Sequence[str], *, num_videos_per_prompt: int = 1, **ignored: Any) -> Tensor:
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    return torch.cat([_embedding(text) for text in texts for _ in range(num_videos_per_prompt)])


def _embedding(text: str) -> Tensor:
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.randn(1, 8, TEXT_DIM, generator=generator)


def every_kind() -> Plan:
    """A plan that holds each kind of stage and each kind of tensor, for tiny Wan pipelines at `SIZE`."""
    methods = {
        ".": DENSE,
        "0": Method(select=Skip()),
        "a": Method(AxisOrder("hwf"), Band(0.4)),
        "b": Method(select=Stripe(0.4, calibrated=True)),
        "c": Method(AxisOrder("wfh"), Stored(0.5)),
        "d": Method(Patches(), Draft(0.4), rest=Kept(gated=True)),
        "e": Method(Patches(4, 4), Draft(None, 0.6), precision="int8"),
        "f": Method(select=Band(0.5, False), rest=Kept(2)),
    }
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(2, 3, BLOCKS, BLOCKS, generator=generator) < 0.5
    masks |= torch.eye(BLOCKS, dtype=torch.bool)
    bits, heads = Stored(0.5).names(AxisOrder("wfh"), "transformer")
    tensors = {
        bits: packed(masks),
        heads: torch.tensor([[-1, -1, -1, 0], [-1, 1, -1, -1], [-1, -1, -1, -1]], dtype=torch.int32),
        "stripe_mass/transformer": torch.rand(LAYERS, HEADS, 3, 8, generator=generator),
        "refresh/transformer": (torch.rand(3, LAYERS, HEADS, generator=generator) < 0.5).to(torch.uint8),
    }
    spans = (
        Span(0.0, 0.25, {"transformer": ("....", "....", ".0.0")}),
        Span(0.25, 1.0, {"transformer": ("abdc", "0cef", "a.bd")}),
    )
    provenance = {"prompts": ["a red circle", "Grüße, 世界"], "predicted": {"speedup": 1.25, "density": 0.5}, "seed": 0}
    return Plan("wan", dict(MODELS), methods, spans, {"kind": "density", "value": 0.5}, provenance, tensors)


def numbered_plans(count: int = 4) -> list[Plan]:
    """Plans that differ in their JSON, ever longer, and in their tensors; `provenance["number"]` tells which it is."""
    usual = every_kind()
    mass = usual.tensors["stripe_mass/transformer"]
    return [
        replace(
            usual,
            provenance={"number": number, "padding": "x" * 20_000 * number},
            tensors={**usual.tensors, "stripe_mass/transformer": mass + number},
        )
        for number in range(count)
    ]
