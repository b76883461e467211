"""Sparse attention by other packages, put on a transformer as their users do: what the step benchmark compares with.

`sparsevideo` (github.com/Mutual-Luo/SparseVideo, 0.1.0) replaces the processors of a pipeline's self-attention. It is measured as
`sparsevideo:<method>`, with its own defaults for the model. Where it is not installed, or a method of it does not run, the
row says why. Its methods need different things: svg1 FlexAttention alone, svg2 and radial FlashInfer, others nvcc.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from torch import nn

from diffusers_accel.evals.kernel_bench.peers import Missing

PACKAGE = "sparsevideo"
RIVALS = tuple(f"{PACKAGE}:{method}" for method in ("svg1", "svg2", "radial"))  # measured by default
SECONDS = 120.0  # that a first run may take at least: some compile their kernels then
LAYER_RATIO = "dense_warmup_layer_ratio"  # their option: which share of a model's layers stays dense


def is_rival(name: str) -> bool:
    return name.startswith(f"{PACKAGE}:")


class Rival:
    """A method of sparsevideo on a transformer.

    Args:
        pipe: what it takes as a pipeline: a transformer, a scheduler with as many timesteps as there are steps, and a name.
        method: of `sparsevideo.list_methods()`.

    Attributes:
        config: its options, as plain JSON.
        dense_layer_ratio: share of the model's layers that it would leave dense. Of the few that are built none is.
    """

    def __init__(self, package: Any, pipe: Any, method: str) -> None:
        self._package, self._pipe, self._method = package, pipe, method
        self._handle = package.apply(pipe, method=method)
        own: Mapping[str, Any] = self._handle.summary()["method_config"] or {}
        self.config: dict[str, Any] = json.loads(json.dumps(own, default=str))
        self.dense_layer_ratio = float(own.get(LAYER_RATIO) or 0.0)
        self._changed = {LAYER_RATIO: 0.0} if LAYER_RATIO in own else {}
        self.clear()

    def clear(self) -> None:
        """Puts it on anew: it counts the steps by their timesteps, from the first that it sees."""
        self.remove()
        self._handle = self._package.apply(self._pipe, method=self._method, config=self._changed)

    def step(self, index: int, steps: int) -> None:
        """Nothing to be told: it reads the timestep of each call."""

    def remove(self) -> None:
        self._handle.restore()


@contextmanager
def rival(name: str, transformer: nn.Module, model: str, steps: int) -> Iterator[Rival]:
    """Inside, the transformer attends by this method.

    Args:
        name: `sparsevideo:<method>`.
        model: a name by which the package knows its defaults, such as "wan2.1-1.3b 480p".
        steps: of the schedule.

    Raises:
        Missing: the package is not there, or refuses this method or model; the message is the reason.
    """
    try:
        import sparsevideo
    except Exception as error:  # whatever its own imports raise is the reason
        raise Missing(f"import {PACKAGE}: {type(error).__name__}: {error}") from error
    method = name.partition(":")[2]
    if method not in sparsevideo.list_methods():
        raise Missing(f"{PACKAGE} has {', '.join(sorted(sparsevideo.list_methods()))}, not {method!r}")
    scheduler = SimpleNamespace(timesteps=list(range(steps)))
    pipe = SimpleNamespace(transformer=transformer, scheduler=scheduler, name_or_path=model)
    try:
        found = Rival(sparsevideo, pipe, method)
    except (NotImplementedError, ImportError, ValueError) as error:
        raise Missing(f"{PACKAGE} {method}: {error}") from error
    try:
        yield found
    finally:
        found.remove()
