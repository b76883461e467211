"""What is particular to LTX-2: passes in which some layers do not attend, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffusers_accel import patch
from diffusers_accel.api import attach
from diffusers_accel.call import AttentionCall
from tests.families.ltx2 import LTX2, tiny_ltx2
from tests.families.test_every_family import WHOLE, Watch, latents
from tests.tiny import LAYERS, TEXT_DIM

# Spatio-temporal guidance: one more pass, in which layer 1 takes its values instead of attending.
PERTURBED = {"stg_scale": 1.0, "audio_stg_scale": 1.0, "spatio_temporal_guidance_blocks": [1]}


def test_perturbed_layers_do_not_attend_and_the_others_know_their_pass() -> None:
    pipe, seen = tiny_ltx2(), []
    with attach(pipe, lambda site: Watch(seen)):
        latents(LTX2, pipe, num_inference_steps=2, **PERTURBED)
    layers = [("cond_uncond", each) for each in range(LAYERS)]
    layers += [("uncond_stg", each) for each in range(LAYERS) if each != 1]
    layers += [("uncond_modality", each) for each in range(LAYERS)]
    assert [(call.branch, call.layer) for call in seen] == layers * 2
    assert {call.rows for call in seen if call.branch == "uncond_stg"} == {(0, 1)}


@pytest.mark.parametrize("name", ["cached", "draft"])
def test_methods_with_density_1_are_dense_under_perturbed_passes(name: str) -> None:
    pipe = tiny_ltx2()
    stock = latents(LTX2, pipe, **PERTURBED)
    assert np.abs(latents(LTX2, pipe) - stock).max() > 1e-3
    with patch(pipe, name, **WHOLE):
        assert np.abs(latents(LTX2, pipe, **PERTURBED) - stock).max() <= 1e-4 * np.abs(stock).max()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"num_frames, height and width its 18 tokens fold, found None x None x None"),
        ({"num_frames": 2, "height": 4, "width": 4}, r"at least the 32 tokens of 2 x 4 x 4 latents, found 18"),
        (
            {"num_frames": 2, "height": 3, "width": 3, "video_self_attention_mask": torch.ones(1, 18, 18)},
            "expected plain self-attention, found a mask",
        ),
    ],
)
def test_unknown_sizes_and_masks_are_refused(given: dict, message: str) -> None:
    transformer = tiny_ltx2().transformer
    seen: list[AttentionCall] = []
    with attach(transformer, lambda site: Watch(seen)), pytest.raises((ValueError, RuntimeError), match=message):
        transformer(
            hidden_states=torch.zeros(1, 18, 4),
            audio_hidden_states=torch.zeros(1, 5, 4),
            encoder_hidden_states=torch.zeros(1, 6, TEXT_DIM),
            audio_encoder_hidden_states=torch.zeros(1, 6, TEXT_DIM),
            timestep=torch.tensor([500.0]),
            sigma=torch.tensor([500.0]),
            audio_num_frames=5,
            **{"video_coords": torch.zeros(1, 3, 18, 2), **given},
        )
    assert not seen
