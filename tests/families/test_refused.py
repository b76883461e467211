"""Models that gain nothing are refused with the reason and with what helps; a class of one's own can be made known."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models import ModelMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

import diffusers_accel
from diffusers_accel import Family, patch
from diffusers_accel.families import FAMILIES, find
from diffusers_accel.families.family import argument, text_at
from diffusers_accel.families.refused import REFUSED
from diffusers_accel.layout import TokenLayout


def class_of(name: str) -> type:
    module, _, kind = name.rpartition(".")
    found: type = getattr(importlib.import_module(module), kind)
    return found


@pytest.mark.parametrize("name", REFUSED, ids=lambda name: name.rpartition(".")[2])
def test_refusals_name_the_class_the_reason_and_what_helps(name: str) -> None:
    kind = class_of(name)
    model = kind.__new__(kind)  # without weights: the class alone says it
    nn.Module.__init__(model)
    with pytest.raises(TypeError, match=rf"transformer is a {kind.__name__}, which is not supported: .*What helps: "):
        find(model)
    assert name not in FAMILIES


@pytest.mark.parametrize(
    "kind", ["unet_motion_model.UNetMotionModel", "unet_spatio_temporal_condition.UNetSpatioTemporalConditionModel"]
)
def test_pipelines_with_a_unet_are_refused_with_its_reason(kind: str) -> None:
    """AnimateDiff and Stable Video Diffusion have no transformer."""
    unet_class = class_of(f"diffusers.models.unets.{kind}")
    unet = unet_class.__new__(unet_class)
    nn.Module.__init__(unet)
    with pytest.raises(TypeError, match=rf"unet is a {unet_class.__name__}, which is not supported: a U-Net attends"):
        patch(SimpleNamespace(unet=unet))


class Processor:
    def __call__(self, attn: Any, hidden_states: Tensor) -> Tensor:
        q, k, v = attn.to_qkv(hidden_states).unflatten(-1, (3, 2, 8)).unbind(2)
        return attn.to_out[0](dispatch_attention_fn(q, k, v).flatten(2))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(16, 48), nn.ModuleList([nn.Linear(16, 16)])
        self.processor: Any = Processor()

    def set_processor(self, processor: Any) -> None:
        self.processor = processor

    def forward(self, hidden_states: Tensor) -> Tensor:
        out: Tensor = self.processor(self, hidden_states)
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention()

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.attn1(hidden_states)


class OwnTransformer(ModelMixin, ConfigMixin):
    """Somebody's own: latents [B, 16, frames, height, width], a token each."""

    @register_to_config
    def __init__(self, num_layers: int = 2, num_attention_heads: int = 2, attention_head_dim: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer_blocks = nn.ModuleList([Block() for _ in range(num_layers)])

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, timestep: Tensor) -> Tensor:
        x = hidden_states.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            x = block(x)
        return x.transpose(1, 2).unflatten(2, hidden_states.shape[2:])


@pytest.fixture
def own_family() -> Iterator[Family]:
    name = f"{OwnTransformer.__module__}.{OwnTransformer.__qualname__}"
    family = Family(
        name="own",
        transformer=name,
        attention_call="dispatch_attention_fn",
        observe=lambda args, kwargs: tuple(argument(args, kwargs, "hidden_states", 0).shape[2:]),
        layout=lambda config, sizes: TokenLayout(*sizes),
        text=text_at(1),
    )
    diffusers_accel.register_family(family)
    yield family
    del FAMILIES[name]


def test_a_transformer_of_ones_own_is_refused_with_the_recipe() -> None:
    with pytest.raises(
        TypeError, match=r"OwnTransformer, supported: wan.*register_family\(\.\.\.\), see docs/families.md"
    ):
        patch(OwnTransformer())


def test_a_family_of_ones_own_is_patched_like_any_other(own_family: Family) -> None:
    model = OwnTransformer().eval()
    given = {
        "hidden_states": torch.randn(1, 16, 3, 16, 16, generator=torch.Generator().manual_seed(1)),
        "encoder_hidden_states": torch.zeros(1, 1, 1),
        "timestep": torch.tensor([500.0]),
    }
    with torch.no_grad():
        stock = model(**given)
        with patch(model, "dense"):
            assert torch.equal(model(**given), stock)
        with patch(model, "pattern", density=1.0, dense_steps=0.0):
            torch.testing.assert_close(model(**given), stock)
        with patch(model, "pattern", density=0.4, dense_steps=0.0) as done:
            assert not torch.allclose(model(**given), stock, atol=1e-4)
            assert {row["layer"] for row in done.report().rows} == {0, 1} and done.report().density < 1
        assert torch.equal(model(**given), stock)
