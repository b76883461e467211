"""LoRA adapters and a patch live beside each other: an adapter changes the projections, a patch what is between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig

from diffusers_accel import patch, unpatch
from diffusers_accel.methods import Band, Method
from tests.tiny import TEXT_DIM, tiny_wan_transformer

SPARSE = Method(select=Band(0.34))
ADAPTER = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False)


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "hidden_states": torch.randn(1, 4, 3, 32, 32, generator=generator),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 8, TEXT_DIM, generator=generator),
    }


def output(transformer: Any) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**inputs(), return_dict=False)[0]


def add_adapter(transformer: Any) -> None:
    torch.manual_seed(1)
    transformer.add_adapter(ADAPTER)


@pytest.mark.parametrize("method", ["dense", SPARSE])
def test_an_adapter_added_before_or_after_patching_is_the_same(method: Any) -> None:
    before, after = tiny_wan_transformer(), tiny_wan_transformer()
    plain = output(before)
    add_adapter(before)
    adapted = output(before)
    assert not torch.allclose(adapted, plain, atol=1e-3), "the adapter must do something"
    patch(before, method)
    patch(after, method)
    add_adapter(after)
    assert torch.equal(output(before), output(after))
    if method == "dense":
        assert torch.equal(output(after), adapted)


def test_adapters_can_be_switched_while_patched() -> None:
    transformer = tiny_wan_transformer()
    with patch(transformer, SPARSE):
        sparse = output(transformer)
        add_adapter(transformer)
        adapted = output(transformer)
        transformer.disable_adapters()
        assert torch.allclose(output(transformer), sparse, atol=1e-6)
        transformer.enable_adapters()
        assert torch.equal(output(transformer), adapted)
    stock = output(transformer)
    patch(transformer, "dense")
    assert torch.equal(output(transformer), stock)
    unpatch(transformer)
    transformer.delete_adapters("default")
    assert torch.allclose(output(transformer), output(tiny_wan_transformer()), atol=1e-6)
