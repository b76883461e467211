"""What a run of predicted steps does to the final latents, worked out without the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from diffusers_accel.forwards import Computed
from diffusers_accel.search.steps.course import Course, Follower
from diffusers_accel.search.steps.lift import Lift
from diffusers_accel.search.steps.samples import Part, Samples
from diffusers_accel.search.steps.state_graph import State, StateGraph

SKETCH = 1024  # numbers
RunErrors = Mapping[State, Mapping[int, Tensor]]


def run_errors(
    follower: Follower, lift: Lift, graph: StateGraph, number: int = 0, count: int = 1
) -> dict[State, dict[int, Tensor]]:
    """For each state, and each step that may be computed next: how the final latents deviate because of the steps between, as of
    `Lift`, in a `sketch`. The run begins at the recorded latents of the state's last step, and what the model makes of it begins
    at its end. All ends of a state cost one pass, one step further for each.

    Args:
        number, count: of this recorded run, and of all, as of `sketch`.
    """
    return {
        state: {end: sketch(error, number, count) for end, error in _of_ends(follower, lift, state, graph.ends(state))}
        for state in graph.states()
    }


def sketch(x: Tensor, number: int = 0, count: int = 1) -> Tensor:
    """A short vector for a long one: sums of its numbers with random signs, which keep lengths and angles to a few percent. Those
    of `count` vectors, of which this is one, add up to the sketch of all of them side by side."""
    flat = x.reshape(-1)
    if count * len(flat) <= SKETCH:  # as it is, in its place
        return torch.cat([flat.new_zeros(number * len(flat)), flat, flat.new_zeros((count - number - 1) * len(flat))])
    signs, place = _drawn(len(flat), number)
    return torch.zeros(SKETCH).index_add_(0, place, flat * signs)


@lru_cache(maxsize=1)
def _drawn(length: int, number: int) -> tuple[Tensor, Tensor]:
    """Signs and places, the same for one length and number."""
    generator = torch.Generator().manual_seed(number)
    signs = torch.randint(0, 2, (length,), generator=generator) * 2.0 - 1
    return signs, torch.randint(0, SKETCH, (length,), generator=generator)


def _of_ends(follower: Follower, lift: Lift, state: State, ends: range) -> Iterator[tuple[int, Tensor]]:
    *earlier, last = state
    course = follower.compute(Course(last, _known(follower.samples, earlier)))
    for end in ends:
        if end > last + 1:
            course = follower.predict(course)
        yield end, lift(end, follower.deviation(course))


def _known(samples: Samples, steps: Collection[int]) -> dict[Part, tuple[Computed, ...]]:
    """The recorded forwards at these steps."""
    found: dict[Part, tuple[Computed, ...]] = {}
    for step in steps:
        for part, v in samples.v[step].items():
            found[part] = (*found.get(part, ()), Computed(step, samples.timesteps[step], samples.x[step], v))
    return found


def path_error(follower: Follower, lift: Lift, computed: Sequence[int]) -> float:
    """Relative squared error of the final latents when exactly these steps are computed, of which the first and the last are two:
    the square of what all runs add up to, which point the same way or against each other."""
    total = torch.zeros_like(follower.samples.x[0])
    state: State = ()
    for start, end in pairwise(computed):
        state = (start,) if start in follower.fresh else (*state, start)[-follower.looks_back :]
        if end > start + 1:
            *_, (_, deviation) = _of_ends(follower, lift, state, range(start + 1, end + 1))
            total += deviation
    return float(total.double().square().sum())
