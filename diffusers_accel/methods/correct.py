"""The correct stage: what is done to the output of a layer after its heads have attended?

It belongs to a plan and not to a method: what it needs was calibrated for the heads, methods and spans of that very plan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from diffusers_accel.methods.stage import Stage
from diffusers_accel.methods.uses import Tensors
from diffusers_accel.shape import ModelShape


@dataclass(frozen=True)
class Correct(Stage, ABC):
    """Members are frozen dataclasses, each in a file of `corrects/`; their fields are what a plan file says of them.

    Class attributes:
        kind: the name in plan files.
    """

    given_as: ClassVar[str] = "Plan(correct=...)"
    kind: ClassVar[str]

    @property
    @abstractmethod
    def label(self) -> str:
        """For tables, such as "mean error"."""

    @abstractmethod
    def check(self, transformer: str, shape: ModelShape, spans: int, tensors: Tensors) -> None:
        """Checks that a plan has the tensors that it reads of a transformer, and that they fit.

        Args:
            spans: how many the plan has.

        Raises:
            FileError: begins with the path of what is wrong.
        """

    @abstractmethod
    def offset(self, span: int, place: tuple[str, int], tensors: Tensors) -> Tensor:
        """fp32 [heads of the model, D]: what is added to the output of each head at every query of the video. Heads that run
        densely are left out by who adds it.

        Args:
            span: index of the running span.
            place: transformer and layer.
        """
