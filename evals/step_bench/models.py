"""Transformers of real shape with random weights, for the step benchmark: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Size: TypeAlias = tuple[int, int, int]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class BenchModel:
    """A transformer of real shape.

    Args:
        build: from the number of layers of each kind, with random weights.
        inputs: of one forward call at (frames, height, width) of latents, on a device.
        stacks: attribute with the layers -> how many the real model has, in the order in which they run.
        size: (frames, height, width) of the usual call's latents.
        passes: forward calls of a step: 2 where guidance is a second call.
        patch: latent frames, rows and columns of a token.
    """

    build: Callable[[int], nn.Module]
    inputs: Callable[[Size, torch.device, torch.dtype], dict[str, Any]]
    stacks: Mapping[str, int]
    size: Size
    passes: int
    patch: Size = (1, 2, 2)

    def check(self, size: Size) -> None:
        """Raises ValueError where latents of this size are not whole tokens."""
        if any(n < 1 or n % patch for n, patch in zip(size, self.patch, strict=True)):
            raise ValueError(f"latents must be multiples of {_shown(self.patch)}, found {_shown(size)}")


def _shown(size: Size) -> str:
    return "x".join(map(str, size))


def _noise(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device, dtype)


def _wan(heads: int, ffn: int, layers: int) -> nn.Module:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(num_attention_heads=heads, ffn_dim=ffn, num_layers=layers)


def _wan_inputs(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _noise(device, dtype, 1, 16, *size),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": _noise(device, dtype, 1, 512, 4096),
    }


def _hunyuan(layers: int) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    return HunyuanVideoTransformer3DModel(num_layers=layers, num_single_layers=layers)


def _hunyuan_inputs(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "hidden_states": _noise(device, dtype, 1, 16, *size),
        "timestep": torch.tensor([500], device=device),
        "encoder_hidden_states": _noise(device, dtype, 1, 256, 4096),
        "encoder_attention_mask": (torch.arange(256, device=device) < 60)[None].to(dtype),
        "pooled_projections": _noise(device, dtype, 1, 768),
        "guidance": torch.tensor([6000.0], device=device, dtype=dtype),
    }


def _cogvideox(layers: int) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=48,
        num_layers=layers,
        patch_size_t=2,
        patch_bias=False,
        use_rotary_positional_embeddings=True,
        ofs_embed_dim=None,
        sample_height=96,
        sample_width=170,
        sample_frames=81,
    )


def _cogvideox_inputs(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    frames, height, width = size
    rotary = get_3d_rotary_pos_embed(
        64,
        crops_coords=None,
        grid_size=(height // 2, width // 2),
        temporal_size=frames // 2,
        grid_type="slice",
        max_size=(height // 2, width // 2),
        device=device,
    )
    return {
        "hidden_states": _noise(device, dtype, 2, frames, 16, height, width),
        "timestep": torch.tensor([500, 500], device=device),
        "encoder_hidden_states": _noise(device, dtype, 2, 226, 4096),
        "image_rotary_emb": rotary,
    }


MODELS = {
    "wan2.1-1.3b 480p": BenchModel(partial(_wan, 12, 8960), _wan_inputs, {"blocks": 30}, (21, 60, 104), 2),
    "wan2.1-14b 720p": BenchModel(partial(_wan, 40, 13824), _wan_inputs, {"blocks": 40}, (21, 90, 160), 2),
    "hunyuanvideo 720p": BenchModel(
        _hunyuan, _hunyuan_inputs, {"transformer_blocks": 20, "single_transformer_blocks": 40}, (33, 90, 160), 1
    ),
    "cogvideox1.5-5b 768p": BenchModel(
        _cogvideox, _cogvideox_inputs, {"transformer_blocks": 42}, (22, 96, 170), 1, (2, 2, 2)
    ),
}
