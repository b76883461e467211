"""The interface of a recorder."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from diffusers_accel.call import AttentionCall
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import Method
from diffusers_accel.search.measure import SampledHeads
from diffusers_accel.search.scores_file import Array
from diffusers_accel.search.stored_masks import USUAL_MASKS, MaskSettings
from diffusers_accel.shape import ModelShape

Kinds = dict[str, tuple[tuple[int, ...], str]]  # name of an array without its transformer -> shape and dtype


class Recorder(ABC):
    """What one kind of selection needs to know, seen in one calibration run and kept in the sums of its scores.

    Args:
        candidates: of the search, all of them.
        sums: the arrays of this run, to which it adds.
        before: those of the earlier runs, or of the first one alone.
        models: the transformers.
        masks: how stored masks are chosen.

    Class attributes:
        splits_rows: it looks at half of the sampled rows, at which no errors are measured.
        in_segments: it looks at whole calls of the first run, in each segment of the schedule.
        first_run_first: later runs measure with what the first one has recorded, and with nothing of each other.
    """

    splits_rows: ClassVar[bool] = False
    in_segments: ClassVar[bool] = False
    first_run_first: ClassVar[bool] = False

    def __init__(
        self,
        candidates: Sequence[Method],
        sums: dict[str, Array],
        before: Mapping[str, Array],
        models: Mapping[str, ModelShape],
        masks: MaskSettings = USUAL_MASKS,
    ) -> None:
        self.candidates = tuple(candidates)
        self.sums = sums
        self.before = before
        self.models = models
        self.masks = masks

    @classmethod
    @abstractmethod
    def arrays(cls, candidates: Sequence[Method], shape: ModelShape, layout: TokenLayout, segments: int) -> Kinds:
        """Its arrays for one transformer. `segments`: of the schedule that are told apart."""

    @classmethod
    @abstractmethod
    def tensors(
        cls, candidates: Sequence[Method], sums: Mapping[str, Array], transformer: str, method: Method, heads: Array
    ) -> dict[str, Tensor]:
        """What a method reads of a plan, for the heads (bool [layers, heads]) that take it."""

    @classmethod
    def provenance(
        cls, candidates: Sequence[Method], sums: Mapping[str, Array], models: Sequence[str]
    ) -> dict[str, Any]:
        """What a plan tells of how its tensors came about; JSON data."""
        return {}

    @abstractmethod
    def found(self) -> dict[str, Tensor]:
        """What the candidates read now, as of a plan; what is recorded later in the run shows in these very tensors."""

    def add_rows(self, call: AttentionCall, heads: slice, sampled: SampledHeads) -> None:
        """Looks at its half of the rows of one batch row of a measured call."""
        return None

    def add_call(
        self, call: AttentionCall, segment: int, q: Tensor, k: Tensor, v: Tensor, chunks: Iterator[slice]
    ) -> None:
        """Looks at a whole call of a segment of the schedule.

        Args:
            q: [B, queries, H, D]; k, v: [B, keys, H_k, D].
            chunks: the heads that fit into memory together.
        """
        return None
