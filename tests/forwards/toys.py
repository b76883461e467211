"""Transformers whose output is known, in the place of a Wan transformer, and pipelines of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from tests.tiny import TEXT_DIM

Function = Callable[[Tensor, Tensor], Tensor]  # of latents and timestep


class Toy(WanTransformer3DModel):
    """`f(latents, timestep)` of the first 4 channels; counts what runs, and on which timestep."""

    f: Function
    ran: list[float]

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        return_dict: bool = True,
        attention_kwargs: Any = None,
    ) -> Any:
        self.ran.append(float(timestep.max()))
        out = self.f(hidden_states[:, :4], timestep)
        return Transformer2DModelOutput(sample=out) if return_dict else (out,)


def toy(f: Function) -> Toy:
    model = Toy(
        num_attention_heads=1,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=8,
        ffn_dim=8,
        num_layers=1,
    ).eval()
    model.f, model.ran = f, []
    return model


def latents(seed: int, channels: int = 4, size: int = 8) -> Tensor:
    return torch.randn(1, channels, 2, size, size, generator=torch.Generator().manual_seed(seed))


TEXT = torch.zeros(1, 3, TEXT_DIM)


def walk(
    done: Any,
    model: Any,
    xs: list[Tensor],
    ts: list[float] | None = None,
    text: Tensor = TEXT,
    sigmas: list[float] | None = None,
) -> list[Tensor]:
    """A denoising loop by hand over given latents: what the model gives, computed or predicted."""
    out = []
    for step, x in enumerate(xs):
        done.step(step, len(xs), None if sigmas is None else sigmas[step])
        t = torch.tensor([float(len(xs) - step) if ts is None else ts[step]])
        with torch.no_grad():
            out.append(model(hidden_states=x, timestep=t, encoder_hidden_states=text).sample)
    return out
