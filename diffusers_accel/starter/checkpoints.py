"""The checkpoints whose heads have been measured, how each is recognised, and what its heads need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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
        channels: of the latents that go into it, conditions included.
        transformers: how many it has: two where experts share the schedule.
        image: whether an image's embeddings, or HunyuanVideo's image conditions, go in as well.
    """

    key: str
    title: str
    family: str
    size: tuple[int, int]
    channels: tuple[int, ...] = (16,)
    transformers: int = 1
    image: bool = False

    def is_that_of(self, found: Found) -> bool:
        """Whether a pipeline's transformers look like it: they are told apart by their configuration alone."""
        return {*found} == {*self._names} and all(self._fits(*each) for each in found.values())

    def _fits(self, module: nn.Module, family: Family) -> bool:
        shape, config = family.shape(module), cast(Any, module).config
        return (
            (family.name, shape.layers, shape.heads) == (self.family, *self.size)
            and config.in_channels in self.channels
            and _takes_images(config) == self.image
            and not getattr(config, "pos_embed_seq_len", None)  # first and last frame
        )

    @property
    def _names(self) -> tuple[str, ...]:
        return ("transformer", "transformer_2")[: self.transformers]

    def needs(self) -> dict[str, Tensor]:
        """Transformer -> [layers, heads] fp32: the share of keys that holds 95 % of a head's attention mass, mean over queries
        and over the steps that this transformer runs."""
        tensors = read_tensor_file(NEEDS).tensors
        return {name: tensors[f"{self.key}/{name}"].float() * UNIT for name in self._names}


CHECKPOINTS = (
    Checkpoint("wan_1_3B_t2v", "Wan 2.1 1.3B text-to-video", "wan", (30, 12)),
    Checkpoint("wan_14B_t2v", "Wan 2.1 14B text-to-video", "wan", (40, 40)),
    Checkpoint("wan_14B_i2v", "Wan 2.1 14B image-to-video", "wan", (40, 40), (36,), image=True),
    Checkpoint("wan22_A14B_t2v", "Wan 2.2 A14B text-to-video", "wan", (40, 40), transformers=2),
    Checkpoint("wan22_A14B_i2v", "Wan 2.2 A14B image-to-video", "wan", (40, 40), (36,), transformers=2),
    Checkpoint("hunyuan10_13B_t2v", "HunyuanVideo text-to-video", "hunyuan_video", (60, 24)),
    Checkpoint("hunyuan10_13B_i2v", "HunyuanVideo image-to-video", "hunyuan_video", (60, 24), (16, 33), image=True),
)


def _takes_images(config: Any) -> bool:
    return bool(getattr(config, "image_dim", None) or getattr(config, "image_condition_type", None))
