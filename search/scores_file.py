"""The file of scores: a safetensors file whose header says in JSON what was measured, and whose checksum tells any change."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import torch
from torch import Tensor

from diffusers_accel.files import (
    FileError,
    Kind,
    Schema,
    load_tensor_document,
    prepare_file,
    printable,
    quoted,
    save_tensor_document,
)
from diffusers_accel.layout import Segment, TokenLayout
from diffusers_accel.methods import Method
from diffusers_accel.shape import ModelShape

KIND = Kind("diffusers_accel.scores", 6, "delete the file, or name another one, and probe again")

Array = np.ndarray[Any, np.dtype[Any]]


class CalibrationRun(Schema, frozen=True):
    """One finished generation of a calibration prompt.

    Args:
        prompt: a label of the prompt (its text, or a hash of its embeddings).
        seconds: wall time of the pipeline call, without the time spent on measuring.
        attention_seconds: time of all dense self-attention calls in it.
        calls: self-attention calls of each layer, per transformer and span.
        steps: steps at which the transformer ran, per transformer and span.
        chunk: of a video that is made chunk by chunk, the one (from 0) whose attention is nearest the mean size; else 0.
    """

    prompt: str
    seconds: float
    attention_seconds: float
    calls: dict[str, tuple[int, ...]]
    steps: dict[str, tuple[int, ...]]
    chunk: int = 0


class _Shape(Schema, frozen=True):
    layers: int
    heads: int
    head_dim: int


class _Segment(Schema, frozen=True):
    kind: Literal["video", "text", "history", "audio", "reference", "condition", "image"]
    tokens: int
    grid: tuple[int, int, int] | None
    valid: int | None
    exact: bool
    queries: bool


class _Layout(Schema, frozen=True):
    frames: int
    height: int
    width: int
    text_tokens: int
    text_at: Literal["none", "start", "end"]
    text_valid: int | None
    segments: tuple[_Segment, ...] | None = None  # of a layout that the sizes alone do not tell

    @classmethod
    def told(cls, layout: TokenLayout) -> _Layout:
        sizes = {name: getattr(layout, name) for name in cls.__struct_fields__ if name != "segments"}
        segments = None if layout.short else tuple(_Segment(**vars(each)) for each in layout.segments)
        return cls(**sizes, segments=segments)

    def layout(self) -> TokenLayout:
        """Raises ValueError where it is none."""
        if self.segments is None:
            sizes = {name: getattr(self, name) for name in self.__struct_fields__ if name != "segments"}
            return TokenLayout(**sizes)
        fields = _Segment.__struct_fields__
        found = TokenLayout.of(*(Segment(**{name: getattr(each, name) for name in fields}) for each in self.segments))
        if _Layout.told(found) != self:
            raise ValueError(f"layout: expected sizes that the segments have, found {self}")
        return found


class Header(Schema, frozen=True):
    """What a file of scores holds beside its arrays; the fields are those of `search.scores.Scores`, two of which have
    their former names in the file."""

    family: str
    models: dict[str, _Shape]
    layout: _Layout
    candidates: tuple[dict[str, Any], ...]
    spans: tuple[tuple[float, float], ...]
    segments: int = msgspec.field(name="parts")
    config: dict[str, Any]
    provenance: dict[str, Any]
    runs: tuple[CalibrationRun, ...] = msgspec.field(name="passes")
    impacts: tuple[dict[str, tuple[float, ...]], ...]


def write(path: Path, fields: dict[str, Any]) -> None:
    """Writes the fields of scores, whole or not at all; makes the folder."""
    header = Header(
        **{
            **{name: fields[name] for name in ("family", "segments", "config", "provenance", "runs")},
            "models": {name: _Shape(**vars(shape)) for name, shape in fields["models"].items()},
            "layout": _Layout.told(fields["layout"]),
            "candidates": tuple(method.to_json() for method in fields["candidates"]),
            "spans": tuple((float(start), float(stop)) for start, stop in fields["spans"]),
            "impacts": tuple(
                {name: tuple(float(each) for each in row) for name, row in span.items()} for span in fields["impacts"]
            ),
        }
    )
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in fields["sums"].items()}
    prepare_file(path)
    save_tensor_document(path, KIND, header, tensors)


def read(path: Path) -> dict[str, Any]:
    """The fields of scores that `write` wrote, of the right types; `Scores` checks their values.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        FileError: it is something else, of another version, or damaged.
    """
    header, tensors = load_tensor_document(path, KIND, Header)
    try:
        return {
            **{name: getattr(header, name) for name in Header.__struct_fields__},
            "models": {
                name: ModelShape(shape.layers, shape.heads, shape.head_dim) for name, shape in header.models.items()
            },
            "layout": header.layout.layout(),
            "candidates": tuple(_method(index, data) for index, data in enumerate(header.candidates)),
            "sums": {name: _array(name, tensor) for name, tensor in tensors.items()},
        }
    except ValueError as error:
        raise refused(path, error) from error


def _array(name: str, tensor: Tensor) -> Array:
    if tensor.dtype == torch.bfloat16:  # which numpy has not
        raise ValueError(f"{quoted(name)}: expected numbers of another type, found bfloat16")
    array: Array = tensor.numpy()
    return array


def refused(path: Path, error: ValueError) -> FileError:
    """The error for a file whose values are wrong."""
    return FileError(f"{printable(path)}: {error}; {KIND.remedy}")


def _method(index: int, data: dict[str, Any]) -> Method:
    try:
        return Method.from_json(data)
    except ValueError as error:
        raise ValueError(f"candidates[{index}]: {error}") from error
