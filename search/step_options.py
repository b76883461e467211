"""The step caches that a search may choose from, and what they save."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusers_accel.attach.forward_timer import ForwardTimer
from diffusers_accel.families import find
from diffusers_accel.files import FileError, Kind, Schema, load_document, printable, save_document
from diffusers_accel.forwards import Forwards
from diffusers_accel.search.running import Prompt
from diffusers_accel.search.steps.choice import StepChoice
from diffusers_accel.search.steps.curve import step_choices
from diffusers_accel.search.steps.recorder import record

PROMPTS = 2  # that are generated to record what each step gives
WAYS = 4  # to leave out so many steps, among which clips decide
KIND = Kind("diffusers_accel.steps", 2, "delete the file and search again")


class _Choice(Schema, frozen=True):
    forwards: dict[str, Any]
    computed: tuple[int, ...]
    error: float
    measured: bool


class _File(Schema, frozen=True):
    choices: tuple[_Choice, ...]
    transformers: tuple[str, ...]
    share: float
    config: dict[str, Any]


@dataclass(frozen=True)
class StepOptions:
    """Step caches to choose from.

    Args:
        choices: they compute different steps, or predict the others differently; several may compute as many.
        transformers: which one runs, for each step of the schedule.
        share: of a dense generation's wall time, what the forwards of the transformers take, attention included: 0..1.
        config: of the search that recorded the runs which they follow from: JSON data.
    """

    choices: tuple[StepChoice, ...]
    transformers: tuple[str, ...]
    share: float
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        steps = len(self.transformers)
        if not 0 < self.share <= 1:
            raise ValueError(f"share: expected a share of the time in (0, 1], found {self.share}")
        for number, each in enumerate(self.choices):
            inside = all(0 <= step < steps for step in each.computed)
            if not inside or list(each.computed) != sorted(set(each.computed)) or each.computed[:1] != (0,):
                raise ValueError(
                    f"choices[{number}].computed: expected steps of 0 to {steps - 1}, ascending from 0, found {each.computed}"
                )
            if not (math.isfinite(each.error) and each.error >= 0):
                raise ValueError(f"choices[{number}].error: expected a number of 0 or more, found {each.error}")

    def computes_first(self, chosen: StepChoice, dense_steps: float) -> bool:
        """Whether all of the first `dense_steps` of the schedule, a share of it, are computed."""
        first = round(dense_steps * len(self.transformers))
        return chosen.computed[:first] == tuple(range(first))

    def time(self, attention: float, ratio: float, chosen: StepChoice | None) -> float:
        """Time of a generation / that of the dense one.

        Args:
            attention: share of the dense generation's time that self-attention takes.
            ratio: attention's time / that of dense attention in all steps.
            chosen: None: every step is computed.
        """
        return 1 - self.share + (self.share - attention) * self._computed(chosen) + attention * ratio

    def speedup(self, attention: float, ratio: float, chosen: StepChoice | None) -> float:
        """How many times as fast a generation is; arguments as of `time`."""
        return 1 / max(self.time(attention, ratio, chosen), 1e-9)

    def attention_left(self, time: float, attention: float, chosen: StepChoice | None) -> float:
        """The `ratio` with which a generation takes this `time`; below 0 where it takes more in any case."""
        return (time - self.time(attention, 0.0, chosen)) / attention

    def _computed(self, chosen: StepChoice | None) -> float:
        """Share of the steps that are computed."""
        return len(chosen.computed) / len(self.transformers) if chosen else 1.0

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes JSON, whole or not at all."""
        choices = tuple(
            _Choice(forwards=each.forwards.to_json(), computed=each.computed, error=each.error, measured=each.measured)
            for each in self.choices
        )
        content = _File(choices=choices, transformers=self.transformers, share=self.share, config=self.config)
        save_document(Path(path), KIND, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StepOptions:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            FileError: it is something else, of another version, or damaged; the message says which and what to do.
        """
        found = load_document(Path(path), KIND, _File)
        try:
            choices = tuple(
                StepChoice(Forwards.from_json(each.forwards), each.computed, each.error, each.measured)
                for each in found.choices
            )
            return cls(choices, found.transformers, found.share, found.config)
        except ValueError as error:
            raise FileError(f"{printable(path)}: {error}; {KIND.remedy}") from error


def measure_steps(
    pipe: Any,
    prompts: Sequence[Prompt],
    call: Mapping[str, Any],
    seed: int,
    seconds: float,
    on_prompt: Callable[[int], None],
) -> StepOptions:
    """The step caches that dense generations of these prompts recommend, the noise of prompt i by seed + i.

    Args:
        seconds: that a whole generation takes; the recorded ones end before the decoder.
        on_prompt: told how many are done.
    """
    found = find(pipe)
    modules = [module for module, _ in found.values()]
    trajectories, shares = [], []
    for number, prompt in enumerate(prompts):
        with ForwardTimer(torch.device(pipe._execution_device)).on(modules) as timer:
            trajectories.append(record(pipe, prompt, call, seed + number))
        shares.append(min(1.0, timer.milliseconds / 1e3 / seconds))
        on_prompt(number + 1)
    transformers = trajectories[0].transformers
    choices = tuple(each for each in step_choices(trajectories, ways=WAYS) if len(each.computed) < len(transformers))
    return StepOptions(choices, transformers, float(np.median(shares)))
