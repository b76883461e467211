"""What VBench said of a set of clips, as files: one for each dimension as soon as it is measured, and one of them all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from diffusers_accel.evals.vbench.dimensions import DIMENSIONS
from diffusers_accel.evals.vbench.scores import Summary, summarise
from diffusers_accel.files import FileError, Kind, Schema, load_document, printable, quoted

RESULT = "vbench.json"
KIND = Kind("diffusers_accel.vbench", version=1, remedy="delete it, and run `diffusers-accel vbench run` again")
DIMENSION = Kind(
    "diffusers_accel.vbench_dimension", version=1, remedy="delete it, and this dimension is measured again"
)
SAMPLES = 5  # clips of each prompt that VBench asks for

Seconds = Annotated[float, msgspec.Meta(ge=0)]


class DimensionResult(Schema, frozen=True):
    """One dimension of one set of clips.

    score: VBench's own. clips: its score of each clip, whose scale may be another (imaging_quality has 0 to 100 there).
    weights: what it was measured by, title -> sha256. versions: of the packages in VBench's environment. clips_digest,
    requirements: of the clips and of the environment's files.
    """

    dimension: str
    score: float
    clips: dict[str, float]
    weights: dict[str, str]
    versions: dict[str, str]
    device: str
    seconds: Seconds
    clips_digest: str
    requirements: str


class Result(Schema, frozen=True):
    """All dimensions of one set of clips.

    clips: name -> prompt. samples: of each prompt, of VBench's own set, else 0. left_out: dimension -> why it was not measured.
    """

    standard: bool
    samples: Annotated[int, msgspec.Meta(ge=0, le=SAMPLES)]
    clips: dict[str, str]
    dimensions: dict[str, DimensionResult]
    left_out: dict[str, str] = {}

    @property
    def complete(self) -> bool:
        """Whether its clips are those that VBench's summary scores are of."""
        return self.standard and self.samples == SAMPLES

    def summary(self) -> Summary:
        scores = {name: each.score for name, each in self.dimensions.items()}
        return summarise(scores, standard=self.complete)


def load_result(path: Path) -> Result:
    """The result in a file, or in the folder of a run.

    Raises:
        FileNotFoundError: there is none.
        FileError: it is no result, or damaged.
    """
    path = path / RESULT if path.is_dir() else path
    result = load_document(path, KIND, Result)
    _check(path, result.dimensions)
    return result


def _check(path: Path, dimensions: Mapping[str, DimensionResult]) -> None:
    for name, each in dimensions.items():
        if name not in DIMENSIONS or each.dimension != name:
            raise FileError(
                f"{printable(path)}: expected dimensions of VBench, found {quoted(name)} of {quoted(each.dimension)}; "
                f"{KIND.remedy}"
            )
