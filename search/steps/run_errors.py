"""How far a run of predicted steps leads away, worked out without the model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from diffusers_accel.forwards import Computed
from diffusers_accel.search.steps.course import Course, Follower
from diffusers_accel.search.steps.samples import Part, Samples
from diffusers_accel.search.steps.state_graph import State, StateGraph

RunErrors = Mapping[State, Mapping[int, float]]


def run_errors(follower: Follower, graph: StateGraph) -> dict[State, dict[int, float]]:
    """For each state, and each step that may be computed next, how far the latents of that step are from the recorded ones: mean
    square, relative to the energy of the final latents. All ends of a state cost one pass, one step further for each."""
    return {state: dict(_of_ends(follower, state, graph.ends(state))) for state in graph.states()}


def _of_ends(follower: Follower, state: State, ends: range) -> Iterator[tuple[int, float]]:
    *earlier, last = state
    course = follower.compute(Course(last, _known(follower.samples, earlier)))
    for end in ends:
        if end > last + 1:
            course = follower.predict(course)
        yield end, follower.error(course)


def _known(samples: Samples, steps: Collection[int]) -> dict[Part, tuple[Computed, ...]]:
    """The recorded forwards at these steps."""
    found: dict[Part, tuple[Computed, ...]] = {}
    for step in steps:
        for part, v in samples.v[step].items():
            found[part] = (*found.get(part, ()), Computed(step, samples.timesteps[step], samples.x[step], v))
    return found


def path_error(follower: Follower, computed: Collection[int]) -> float:
    """How far the latents of the last step are from the recorded ones when exactly these steps are computed, as of `run_errors`.
    The whole run is followed, so that errors of several runs add up or cancel as they do."""
    course = Course(0)
    while course.step < follower.samples.steps - 1:
        course = follower.compute(course) if course.step in computed else follower.predict(course)
    return follower.error(course)
