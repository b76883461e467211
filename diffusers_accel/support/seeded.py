"""The same noise in every run of a pipeline, also where it draws without its generator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[torch.Generator]:
    """A fresh CPU generator of a seed for a pipeline's call. torch's own generators, from which some pipelines draw as well, have
    that seed meanwhile, and afterwards the state that they had."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):  # all that manual_seed reaches
        torch.manual_seed(seed)
        yield torch.Generator("cpu").manual_seed(seed)


def drawn(generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """The states of all generators that a pipeline draws from, which tell how much it has drawn."""
    states = [generator.get_state(), torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(_index(device)))
    return states


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
