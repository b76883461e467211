"""The interface of a predictor: the output of a step that does not run, from computed ones."""

from __future__ import annotations

from typing import ClassVar, Protocol

from torch import Tensor

from diffusers_accel.forwards.rule import Now


class Predictor(Protocol):
    """A frozen dataclass whose fields are plain data."""

    kind: ClassVar[str]

    @property
    def label(self) -> str:
        """A short name for tables."""
        ...

    @property
    def wants(self) -> frozenset[str]:
        """What it looks at beside latents: `GUIDE`, which leaves the first branch of a step to compute, or `VIDEO`."""
        ...

    @property
    def looks_back(self) -> int:
        """How many computed forwards it uses; it works with fewer, but one at least."""
        ...

    def predict(self, now: Now) -> Tensor:
        """The output that the model would give for `now.x`: its shape, in fp32 or wider."""
        ...
