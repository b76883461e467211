"""Cosmos 3, tiny: 4 heads that share 2 heads of keys; video, and video with sound."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer, UniPCMultistepScheduler

from diffusers_accel.layout import Segment, TokenLayout
from tests.families.family import TinyFamily
from tests.tiny import HEAD_DIM, HEADS, LAYERS, tiny_wan_vae

TEXT = 22  # tokens: 20 characters and two marks


class Characters:
    """Stands in for the tokenizer: the first 20 characters of what the user says."""

    eos_token_id = 1

    def convert_tokens_to_ids(self, token: str) -> int:
        return 2

    def apply_chat_template(self, conversation: list[dict[str, str]], **options: Any) -> Any:
        text = conversation[-1]["content"].ljust(TEXT - 2)[: TEXT - 2]
        return SimpleNamespace(input_ids=[ord(character) % 128 for character in text])


class Sound(torch.nn.Module):
    """Stands in for the tokenizer of sound."""

    config = SimpleNamespace(sampling_rate=240)
    _hop_size = 10

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def tiny_cosmos3(sound: bool = False) -> Cosmos3OmniPipeline:
    torch.manual_seed(0)
    transformer = Cosmos3OmniTransformer(
        head_dim=HEAD_DIM,
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=64,
        latent_channel=4,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        num_hidden_layers=LAYERS,
        patch_latent_dim=16,
        rope_axes_dim=[4, 2, 2],
        sound_gen=sound,
        sound_dim=4 if sound else None,
        vocab_size=128,
    )
    pipe = Cosmos3OmniPipeline(
        transformer=transformer.eval(),
        text_tokenizer=Characters(),
        vae=tiny_wan_vae(),
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        sound_tokenizer=Sound() if sound else None,
        enable_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_cosmos3_sound() -> Cosmos3OmniPipeline:
    return tiny_cosmos3(sound=True)


def tiny_cosmos3_call(seed: int = 0, **overrides: Any) -> dict[str, Any]:
    """Arguments for `pipe(**...)`: keys of 22 tokens of text, then 5 frames of 64 x 64 -> 3 x 16 x 16 = 768 tokens."""
    call: dict[str, Any] = {
        "prompt": "a robot pours tea into a cup",
        "negative_prompt": "blurred, and of bad colours",
        "height": 64,
        "width": 64,
        "num_frames": 5,
        "num_inference_steps": 5,
        "guidance_scale": 3.0,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
    }
    return {**call, **overrides}


def tiny_cosmos3_sound_call(seed: int = 0, **overrides: Any) -> dict[str, Any]:
    return tiny_cosmos3_call(seed, **{"enable_sound": True, **overrides})


def video_of(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    return np.asarray(pipe(**call).video)


KEYS = Segment("text", TEXT, queries=False)
COSMOS3 = TinyFamily(
    tiny_cosmos3,
    tiny_cosmos3_call,
    TokenLayout.of(KEYS, Segment.video((3, 16, 16))),
    ("cond", "uncond"),
    several={},  # the pipeline makes one video a call
    run=video_of,
)
COSMOS3_SOUND = TinyFamily(
    tiny_cosmos3_sound,
    tiny_cosmos3_sound_call,
    TokenLayout.of(KEYS, Segment.video((3, 16, 16)), Segment("audio", 5)),
    ("cond", "uncond"),
    several={},
    run=video_of,
)
