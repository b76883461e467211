"""What tells one pipeline from another, so that measurements of two are never mixed."""

from __future__ import annotations

import torch
from diffusers import UniPCMultistepScheduler

from diffusers_accel.families import find
from diffusers_accel.support.identity import components, fingerprint
from tests.tiny import tiny_wan


def test_other_weights_types_and_fused_adapters_have_another_fingerprint() -> None:
    pipe = tiny_wan()
    before = fingerprint(find(pipe))
    assert fingerprint(find(tiny_wan())) == before
    linear = pipe.transformer.blocks[0].attn1.to_q
    with torch.no_grad():
        linear.weight.add_(1e-3)  # as a fused LoRA changes a matrix and no vector
    fused = fingerprint(find(pipe))
    assert fused != before
    assert fingerprint(find(tiny_wan().to(torch.bfloat16))) != before
    with torch.no_grad():
        linear.weight.sub_(1e-3)
    pipe.transformer.to(torch.bfloat16).to(torch.float32)
    assert fingerprint(find(pipe)) != before, "rounded weights are other weights"


def test_another_scheduler_or_decoder_is_another_pipeline() -> None:
    pipe = tiny_wan()
    before = components(pipe, find(pipe))
    assert components(tiny_wan(), find(tiny_wan())) == before
    scheduler = pipe.scheduler
    pipe.scheduler = UniPCMultistepScheduler.from_config(scheduler.config)
    assert components(pipe, find(pipe)) != before
    pipe.scheduler = type(scheduler).from_config({**scheduler.config, "shift": 5.0})
    assert components(pipe, find(pipe)) != before
    pipe.scheduler = scheduler
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(1e-2)
    assert components(pipe, find(pipe)) != before
