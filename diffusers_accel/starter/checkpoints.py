"""The checkpoints whose heads have been measured, how each is recognised, and what its heads need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffusers_accel.families import Family
from diffusers_accel.files import read_tensor_file

NEEDS = Path(__file__).with_name("head_needs.safetensors")
UNIT = 1e-4  # of the numbers in that file
Found = Mapping[str, tuple[nn.Module, Family]]


@dataclass(frozen=True)
class Checkpoint:
    """One that has been measured.

    Args:
        key: of its tensors in the file of needs.
        title: as its makers call it.
        family: of the plugin.
        size: self-attention layers and heads of each transformer.
        transformers: how many it has: two where experts share the schedule.
        image: whether it continues an image.
    """

    key: str
    title: str
    family: str
    size: tuple[int, int]
    transformers: int = 1
    image: bool = False

    def is_that_of(self, found: Found) -> bool:
        """Whether a pipeline's transformers look like it."""
        return len(found) == self.transformers and all(
            family.name == self.family
            and (family.shape(module).layers, family.shape(module).heads) == self.size
            and _continues_an_image(module.config) == self.image
            for module, family in found.values()
        )

    def needs(self) -> dict[str, Tensor]:
        """Transformer -> [layers, heads] fp32: the share of keys that holds 95 % of a head's attention mass, mean over queries
        and over the steps that this transformer runs."""
        tensors = read_tensor_file(NEEDS).tensors
        names = ("transformer", "transformer_2")[: self.transformers]
        return {name: tensors[f"{self.key}/{name}"].float() * UNIT for name in names}


CHECKPOINTS = (
    Checkpoint("wan_1_3B_t2v", "Wan 2.1 1.3B text-to-video", "wan", (30, 12)),
    Checkpoint("wan_14B_t2v", "Wan 2.1 14B text-to-video", "wan", (40, 40)),
    Checkpoint("wan_14B_i2v", "Wan 2.1 14B image-to-video", "wan", (40, 40), image=True),
    Checkpoint("wan22_A14B_t2v", "Wan 2.2 A14B text-to-video", "wan", (40, 40), 2),
    Checkpoint("wan22_A14B_i2v", "Wan 2.2 A14B image-to-video", "wan", (40, 40), 2, image=True),
    Checkpoint("hunyuan10_13B_t2v", "HunyuanVideo text-to-video", "hunyuan_video", (60, 24)),
    Checkpoint("hunyuan10_13B_i2v", "HunyuanVideo image-to-video", "hunyuan_video", (60, 24), image=True),
)


def _continues_an_image(config: Any) -> bool:
    """By its inputs: more channels than it denoises, image embeddings, or HunyuanVideo's two kinds."""
    if getattr(config, "image_dim", None) or getattr(config, "image_condition_type", None):
        return True
    return bool(config.in_channels > (config.out_channels or config.in_channels))
