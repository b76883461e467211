"""What is particular to HunyuanVideo 1.5: its processor makes no mask of tokens x tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ClassifierFreeGuidance
from diffusers.modular_pipelines.hunyuan_video1_5.modular_blocks_hunyuan_video1_5 import HunyuanVideo15CoreDenoiseStep
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusers_accel.api import attach
from diffusers_accel.call import AttentionCall
from tests.families.hunyuan_video15 import (
    GLYPH_DIM,
    GLYPH_TOKENS,
    IMAGE_DIM,
    IMAGE_TOKENS,
    tiny_hunyuan15,
    tiny_hunyuan15_call,
    tiny_hunyuan15_transformer,
)
from tests.families.test_every_family import Watch
from tests.tiny import LAYERS, TEXT_DIM, TEXT_TOKENS, text_mask


class Largest(TorchDispatchMode):
    """Of all tensors that are made inside, the bytes of the largest."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = (leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        self.bytes = max([self.bytes, *(leaf.numel() * leaf.element_size() for leaf in made)])
        return out


class Echo:
    """Attends to nothing: at 50k tokens attention itself takes minutes here."""

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return q.clone()


def forward(model: Any, frames: int, height: int, width: int) -> None:
    with torch.no_grad():
        model(
            hidden_states=torch.zeros(1, 9, frames, height, width),
            timestep=torch.tensor([500.0]),
            encoder_hidden_states=torch.ones(1, TEXT_TOKENS, TEXT_DIM),
            encoder_attention_mask=text_mask(7),
            encoder_hidden_states_2=torch.ones(1, GLYPH_TOKENS, GLYPH_DIM),
            encoder_attention_mask_2=text_mask(3)[:, :GLYPH_TOKENS],
            image_embeds=torch.zeros(1, IMAGE_TOKENS, IMAGE_DIM),
        )


def test_no_mask_of_tokens_by_tokens_is_made() -> None:
    model = tiny_hunyuan15_transformer(layers=1, heads=1)
    tokens = 2 * 16 * 16 + TEXT_TOKENS + GLYPH_TOKENS + IMAGE_TOKENS
    with Largest() as stock:
        forward(model, 2, 16, 16)
    assert stock.bytes >= tokens**2, "what the stock processor makes in each layer"
    with attach(model, lambda site: Echo()), Largest() as ours:
        forward(model, 14, 60, 60)
    tokens = 14 * 60 * 60
    assert tokens > 50_000 and ours.bytes < tokens**2 / 100  # a projection has 16 MB


def test_the_modular_pipeline_is_followed() -> None:
    stock = tiny_hunyuan15()
    pipe = HunyuanVideo15CoreDenoiseStep().init_pipeline()
    guider = ClassifierFreeGuidance(guidance_scale=3.0)
    pipe.update_components(transformer=stock.transformer, scheduler=stock.scheduler, guider=guider)
    call = tiny_hunyuan15_call(num_inference_steps=2, latents=torch.ones(1, 4, 3, 16, 16))
    del call["output_type"]
    # Without its VAE, which this part of the pipeline does not run, it assumes the compression of the real one.
    seen: list[AttentionCall] = []
    with attach(pipe, lambda site: Watch(seen)):
        pipe(**{**call, "height": 256, "width": 256})
    expected = [((step, 2), name) for step in range(2) for name in ("pred_cond", "pred_uncond") for _ in range(LAYERS)]
    assert [(call.now, call.branch) for call in seen] == expected
    assert {call.layout.grid for call in seen} == {(3, 16, 16)}
    assert {call.layout.text_valid for call in seen} == {10, 4}
