"""A training run that can be killed at any moment: its clock, its log and its checkpoint, which is written whole or not at all.

A checkpoint is a safetensors file whose header holds the rest. It is no pickle, and one in its place is never loaded.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta

from diffusers_accel.evals.toy.training.nested import flatten, unflatten
from diffusers_accel.files import (
    FileError,
    Kind,
    Schema,
    append_line,
    convert,
    load_tensor_document,
    printable,
    read_lines,
    save_tensor_document,
)

SAVE_EVERY_S = 90.0
KIND = Kind("diffusers_accel.training", 1, "begin with exported weights in a new folder: `train start --out FOLDER`")


class _Header(Schema, frozen=True):
    step: Annotated[int, Meta(ge=0)]
    seconds: Annotated[float, Meta(ge=0)]
    seed: int
    values: dict[str, Any]


def load_run(folder: Path, name: str) -> dict[str, Any] | None:
    """The checkpoint of a named run: "step", "seconds", "seed" and what `RunState.save` was given; None where there is none.

    Raises:
        FileError: it is something else, of another version or damaged, or a pickle of an earlier version; or one of its tensors
            is not fp32, in which all of a training run is kept: loading it into a model or an optimizer would convert it.
    """
    path, pickled = folder / f"{name}.safetensors", folder / f"{name}.pt"
    if not path.exists():
        if pickled.exists():
            raise FileError(
                f"{printable(pickled)}: expected a checkpoint in {path.name}, found a pickle, which could run code and is "
                f"never read; {KIND.remedy}"
            )
        return None
    header, tensors = load_tensor_document(path, KIND, _Header)
    try:
        _check_types(tensors)
        values = unflatten(header.values, tensors)
    except FileError as error:
        raise FileError(f"{printable(path)}: {error}; {KIND.remedy}") from error
    return {**values, "step": header.step, "seconds": header.seconds, "seed": header.seed}


def _check_types(tensors: Mapping[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32:
            found = str(tensor.dtype).removeprefix("torch.")
            raise FileError(f"{printable(name)[:100]}: expected float32, as all of a training run, found {found}")


def read_log(path: Path) -> list[dict[str, int | float]]:
    """The rows of a run's log, without one that was cut off."""
    rows = read_lines(path, "a row of a training log", KIND.remedy)
    return convert(rows, list[dict[str, int | float]])


class RunState:
    """Step counter, training seconds and checkpoint of one named run in a folder.

    Seconds count training only and survive restarts, so `progress` (0..1 of the minutes asked for) drives the learning
    rate and the stages wherever the run was interrupted. Steps that were not saved are trained again.
    """

    def __init__(self, folder: Path, name: str, minutes: float, seed: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.log_path = folder / f"{name}.safetensors", folder / f"{name}.jsonl"
        self.minutes, self.seed = minutes, seed
        self.step, self.seconds = 0, 0.0
        self._saved = self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Training seconds up to now."""
        return self.seconds + time.monotonic() - self._started

    @property
    def progress(self) -> float:
        """Share of the time budget that is used, 0..1."""
        return min(1.0, self.elapsed / (60 * self.minutes))

    def resume(self) -> dict[str, Any] | None:
        """Tensors of the last checkpoint, or None for a new run."""
        if (held := load_run(self.path.parent, self.path.stem)) is None:
            return None
        self.step, self.seconds = held.pop("step"), held.pop("seconds")
        if (seed := held.pop("seed")) != self.seed:
            raise ValueError(
                f"expected the seed {seed} of {self.path}, found {self.seed}; give that seed or another folder"
            )
        self._saved = self._started = time.monotonic()
        return held

    def save(self, **values: Any) -> None:
        """Write the checkpoint, whole or not at all: tensors (fp32), numbers and texts, nested as they are."""
        data, tensors = flatten(values)
        _check_types(tensors)
        header = _Header(step=self.step, seconds=self.elapsed, seed=self.seed, values=data)
        save_tensor_document(self.path, KIND, header, tensors)
        self._saved = time.monotonic()

    @property
    def save_due(self) -> bool:
        return time.monotonic() - self._saved > SAVE_EVERY_S

    def log(self, **row: float) -> None:
        """Append a row to the log and print it."""
        row = {"step": self.step, "minutes": round(self.elapsed / 60, 2), **{k: round(v, 6) for k, v in row.items()}}
        append_line(self.log_path, row)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


class Average:
    """Exponential moving average of a module's parameters in fp32, warmed up so that early steps count fully."""

    def __init__(self, module: torch.nn.Module, decay: float) -> None:
        self.decay, self.count = decay, 0
        self.values = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module) -> None:
        self.count += 1
        decay = min(self.decay, (1 + self.count) / (10 + self.count))
        for name, value in module.state_dict().items():
            self.values[name].lerp_(value, 1 - decay)

    def state(self) -> dict[str, Any]:
        return {"count": self.count, "values": self.values}

    def load(self, state: dict[str, Any]) -> None:
        self.count, self.values = state["count"], state["values"]


def scheduled_lr(peak: float, progress: float, step: int, warmup: int = 100, hold: float = 0.5) -> float:
    """Linear warm-up in steps, constant up to `hold` of the budget, then linear to 1 % of the peak at its end."""
    decay = 1.0 if progress <= hold else 1.0 - 0.99 * (progress - hold) / (1 - hold)
    return peak * decay * min(1.0, (step + 1) / warmup)
