"""The sixteen dimensions of VBench as data: what each needs, and how its score enters the total.

Ranges and weights are those of VBench's own scripts (`scripts/constant.py` of its repository), which its leaderboard uses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from diffusers_accel.files import quoted
from diffusers_accel.support.suggest import did_you_mean

Group = Literal["quality", "semantic"]
Set = Literal["light", "full"]


@dataclass(frozen=True)
class Dimension:
    """One dimension.

    Attributes:
        name: as VBench's program calls it.
        group: of the total that it counts in.
        low, high: the scores that become 0 and 1. Neither is a bound: a score may lie outside.
        weight: within its group.
        packages: the set of packages with which its code can be imported.
        weights: names in `weights.WEIGHTS`.
        labelled: whether it compares with labels of VBench's own prompts, so that it takes no others.
        detectron2: whether it needs that too, which is in no registry of packages.
    """

    name: str
    group: Group
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0
    packages: Set = "full"
    weights: tuple[str, ...] = ()
    labelled: bool = False
    detectron2: bool = False

    @property
    def title(self) -> str:
        return self.name.replace("_", " ").capitalize()


def _of_objects(name: str) -> Dimension:
    """One that looks for objects, by GRiT."""
    return Dimension(name, "semantic", weights=("grit", "bert"), labelled=True, detectron2=True)


# In VBench's order.
DIMENSIONS: dict[str, Dimension] = {
    each.name: each
    for each in (
        Dimension("subject_consistency", "quality", 0.1462, packages="light", weights=("dino", "dino_code")),
        Dimension("background_consistency", "quality", 0.2615, weights=("clip_b32",)),
        Dimension("temporal_flickering", "quality", 0.6293, packages="light"),
        Dimension("motion_smoothness", "quality", 0.706, 0.9975, packages="light", weights=("amt",)),
        Dimension("dynamic_degree", "quality", weight=0.5, packages="light", weights=("raft",)),
        Dimension("aesthetic_quality", "quality", weights=("clip_l14", "laion")),
        Dimension("imaging_quality", "quality", weights=("musiq",)),
        _of_objects("object_class"),
        _of_objects("multiple_objects"),
        Dimension("human_action", "semantic", weights=("umt",)),
        _of_objects("color"),
        _of_objects("spatial_relationship"),
        Dimension("scene", "semantic", high=0.8222, weights=("tag2text", "bert"), labelled=True),
        Dimension("appearance_style", "semantic", 0.0009, 0.2855, weights=("clip_b32",), labelled=True),
        Dimension("temporal_style", "semantic", high=0.364, weights=("viclip", "bpe")),
        Dimension("overall_consistency", "semantic", high=0.364, weights=("viclip", "bpe")),
    )
}
CUSTOM = tuple(name for name, each in DIMENSIONS.items() if not each.labelled)
FLICKERING = "temporal_flickering"
FILTER = ("raft",)  # weights of VBench's filter for still clips, on which alone it measures flickering


def check_dimensions(names: Iterable[str], *, standard: bool) -> tuple[str, ...]:
    """The names in VBench's order.

    Raises:
        ValueError: one is none, or takes VBench's own prompts only and `standard` is false.
    """
    names = list(names)
    for name in names:
        if name not in DIMENSIONS:
            raise ValueError(
                f"dimensions: expected some of {', '.join(DIMENSIONS)}, found {quoted(name)}{did_you_mean(name, DIMENSIONS)}"
            )
        if DIMENSIONS[name].labelled and not standard:
            raise ValueError(
                f"dimensions: {name} compares with labels of VBench's own prompts, found other clips: leave it out, or "
                "generate VBench's clips with --standard"
            )
    return tuple(name for name in DIMENSIONS if name in names)


def weights_of(name: str, *, standard: bool) -> tuple[str, ...]:
    """The names of the weights that a dimension needs on such clips."""
    filtering = FILTER if standard and name == FLICKERING else ()
    return (*DIMENSIONS[name].weights, *filtering)
