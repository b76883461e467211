"""What is particular to FramePack: sections with schedules of their own, and text that only a batch has padding of."""

from __future__ import annotations

import torch

from diffusers_accel.api import attach
from diffusers_accel.call import AttentionCall
from tests.families.framepack import FRAMEPACK, IMAGE_DIM, tiny_framepack, tiny_framepack_transformer
from tests.families.test_every_family import Watch
from tests.tiny import LAYERS, POOLED_DIM, TEXT_DIM, TEXT_TOKENS, text_mask


def test_each_section_has_its_own_steps() -> None:
    pipe = tiny_framepack()
    for sampling in ("inverted_anti_drifting", "vanilla"):
        seen: list[AttentionCall] = []
        with attach(pipe, lambda site, seen=seen: Watch(seen)):
            pipe(**FRAMEPACK.call(num_frames=18, num_inference_steps=2, sampling_type=sampling, output_type="latent"))
        assert [call.now for call in seen] == [(step, 2) for step in (0, 1, 0, 1) for _ in range(2 * LAYERS)]
        assert {call.layout for call in seen if call.branch == "branch 0"} == {FRAMEPACK.layout}


def test_a_batch_keeps_the_padding_of_its_text() -> None:
    """The pipeline makes no batches, the model does: with a mask of the padding, of which a single prompt has none."""
    model, generator = tiny_framepack_transformer(), torch.Generator().manual_seed(0)

    def forward(*lengths: int) -> torch.Tensor:
        batch = len(lengths)
        with torch.no_grad():
            return model(
                hidden_states=torch.ones(batch, 4, 2, 32, 32),
                timestep=torch.full((batch,), 500),
                encoder_hidden_states=torch.ones(batch, TEXT_TOKENS, TEXT_DIM),
                encoder_attention_mask=text_mask(*lengths),
                pooled_projections=torch.ones(batch, POOLED_DIM),
                image_embeds=torch.ones(batch, 3, IMAGE_DIM),
                indices_latents=torch.arange(2),
                guidance=torch.ones(batch),
                latents_clean=torch.randn(batch, 4, 1, 32, 32, generator=generator.manual_seed(1)),
                indices_latents_clean=torch.arange(1),
                latents_history_2x=torch.zeros(batch, 4, 2, 32, 32),
                indices_latents_history_2x=torch.arange(2),
                latents_history_4x=torch.zeros(batch, 4, 16, 32, 32),
                indices_latents_history_4x=torch.arange(16),
            ).sample

    for lengths in ((5, 9), (20, 20), (6,)):
        stock, seen = forward(*lengths), []
        with attach(model, lambda site, seen=seen: Watch(seen)):
            torch.testing.assert_close(forward(*lengths), stock, rtol=1e-4, atol=1e-5)
        texts = [
            each.tokens if each.valid is None else each.valid for each in (call.layout.segments[-1] for call in seen)
        ]
        assert set(texts) == set(lengths)
        assert {call.layout.segments[0].tokens for call in seen} == {64 + 64 + 256}
