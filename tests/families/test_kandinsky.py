"""Kandinsky's own parts: the order of NABLA's tokens, and its mask, which a patch leaves out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_kandinsky, transformer_kandinsky6_sr

from diffusers_accel import patch
from diffusers_accel.families.kandinsky import in_patches
from tests.families.kandinsky5 import tiny_kandinsky5_image_call, tiny_kandinsky5_nabla
from tests.families.kandinsky6_sr import tiny_kandinsky6_sr, tiny_kandinsky6_sr_call


def test_tokens_stand_where_diffusers_puts_them() -> None:
    tokens = torch.arange(3 * 16 * 24).view(1, 3, 16, 24, 1)
    theirs, _ = transformer_kandinsky.fractal_flatten(tokens, tokens, (1, 3, 16, 24), block_mask=True)
    assert torch.equal(theirs.flatten()[in_patches(3, 16, 24)], tokens.flatten())


@pytest.mark.parametrize(
    ("module", "name", "pipeline", "call"),
    [
        (transformer_kandinsky, "nablaT_v2", tiny_kandinsky5_nabla, tiny_kandinsky5_image_call),
        (transformer_kandinsky6_sr, "nabla_block_mask", tiny_kandinsky6_sr, tiny_kandinsky6_sr_call),
    ],
    ids=["kandinsky5", "kandinsky6_sr"],
)
def test_no_mask_is_built_under_a_patch(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, pipeline: Any, call: Any
) -> None:
    built = []
    stock = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: built.append(name) or stock(*args, **kwargs))
    pipe, steps = pipeline(), {"num_inference_steps": 1, "guidance_scale": 1.0}
    steps = {key: value for key, value in steps.items() if key == "num_inference_steps" or key in call()}
    with patch(pipe, "dense"):
        pipe(**call(**steps))
    assert not built
    pipe(**call(**steps))
    assert built == [name] * len(pipe.transformer.visual_transformer_blocks)
