"""Scores: what a probe measured, in one file that is worth keeping, because it holds the GPU hours of a search.

The file is safetensors with JSON in its header, written whole and renamed, so that a kill leaves the passes finished before.
It holds sums, not means, so that a search can go on where it stopped with the very same result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffusers_accel.methods import Method
from diffusers_accel.shape import ModelShape

FORMAT, VERSION = "diffusers_accel.scores", 1
HEADER = {"family", "models", "grid", "candidates", "densities", "spans", "config", "provenance", "passes", "impacts"}

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Pass:
    """One finished generation of a calibration prompt.

    Args:
        prompt: a label of the prompt (its text, or a hash of its embeddings).
        seconds: wall time of the pipeline call, without the time spent on measuring.
        attention_seconds: time of all dense self-attention calls in it.
        calls: self-attention calls of each layer, per transformer and span.
    """

    prompt: str
    seconds: float
    attention_seconds: float
    calls: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Scores:
    """Errors of every candidate for every (span, layer, head) of each transformer, as sums over samples.

    A sample is one attention call (one prompt, step, branch and batch row).

    Args:
        family: name of the model family.
        models: layers, heads and head dim per transformer.
        grid: (latent frames, token rows) of the calibration size.
        candidates: the methods; the first is dense.
        densities: of each candidate the realised share of computed block pairs at the calibration size, 0..1.
        spans: (start, stop) fractions of the schedule, ascending, covering [0, 1].
        config: what a resumed search must agree with (model, call, seed, rows ...).
        provenance: what is worth knowing but may change between passes (versions, device).
        passes: the finished generations.
        sums: arrays per transformer `t`, fp64 but for the counts (int64), with S spans, L layers, H heads, C candidates:
            `samples/t` [S, L]; `error/t`, `error_square/t`, `mse/t` [S, L, H, C]; `energy/t` [S, L, H];
            `mass/t` [L, H, frames, rows]; `mass_samples/t` [L].
        impacts: per span, as far as measured, the relative squared error of the final latents per unit of summed error
            (`search.sensitivity`); 1 for a span without a call.
    """

    family: str
    models: dict[str, ModelShape]
    grid: tuple[int, int]
    candidates: tuple[Method, ...]
    densities: tuple[float, ...]
    spans: tuple[tuple[float, float], ...]
    config: dict[str, Any]
    provenance: dict[str, Any]
    passes: tuple[Pass, ...]
    sums: dict[str, Array]
    impacts: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.impacts) > len(self.spans) or not all(np.isfinite(each) and each >= 0 for each in self.impacts):
            raise ValueError(f"scores: expected at most {len(self.spans)} impacts of 0 or more, found {self.impacts}")
        if len(self.densities) != len(self.candidates):
            raise ValueError(f"scores: {len(self.candidates)} candidates, but {len(self.densities)} densities")
        expected = _shapes(self.models, len(self.spans), len(self.candidates), self.grid)
        if set(self.sums) != set(expected):
            raise ValueError(f"scores: expected the arrays {sorted(expected)}, found {sorted(self.sums)}")
        for name, shape in expected.items():
            array, kind = self.sums[name], "i8" if "samples/" in name else "f8"
            if array.shape != shape or array.dtype != np.dtype(kind):
                raise ValueError(f"scores: {name} must be {kind} {shape}, found {array.dtype} {array.shape}")
            if not np.isfinite(array).all():
                raise ValueError(f"scores: {name} must be finite, found NaN or infinity; probe again")

    @staticmethod
    def zeros(models: Mapping[str, ModelShape], spans: int, candidates: int, grid: tuple[int, int]) -> dict[str, Array]:
        """`sums` of no sample at all."""
        shapes = _shapes(models, spans, candidates, grid)
        return {name: np.zeros(shape, "i8" if "samples/" in name else "f8") for name, shape in shapes.items()}

    def plus(self, done: Pass, sums: Mapping[str, Array]) -> Scores:
        """These scores and one more pass."""
        total = {name: old + sums[name] for name, old in self.sums.items()}
        return replace(self, passes=(*self.passes, done), sums=total)

    def samples(self, transformer: str) -> Array:
        """[spans, layers]: attention calls that were measured."""
        return self.sums[f"samples/{transformer}"]

    def error(self, transformer: str) -> Array:
        """[spans, layers, heads, candidates]: mean relative squared error, 0 or more; NaN where there is no sample.

        The unit is the energy of the layer's whole attention output, so that the errors of a layer's heads add up.
        """
        return self._mean("error", transformer)

    def error_std(self, transformer: str) -> Array:
        """[spans, layers, heads, candidates]: standard deviation of that error over samples."""
        mean = self.error(transformer)
        return np.sqrt(np.maximum(self._mean("error_square", transformer) - mean**2, 0))

    def mse(self, transformer: str) -> Array:
        """[spans, layers, heads, candidates]: the paper's MSE(O_i, O_0), in squared units of the activations."""
        return self._mean("mse", transformer)

    def energy(self, transformer: str) -> Array:
        """[spans, layers, heads]: mean square of the dense output, by which an MSE becomes relative."""
        return self._mean("energy", transformer)

    def stripe_mass(self, transformer: str) -> Array:
        """[layers, heads, frames, rows], fp32: mean attention probability that a key in that (frame, token row) receives."""
        count = np.maximum(self.sums[f"mass_samples/{transformer}"], 1)
        return (self.sums[f"mass/{transformer}"] / count[:, None, None, None]).astype(np.float32)

    def calls(self, transformer: str) -> Array:
        """[spans]: self-attention calls of each layer in one generation, mean over passes."""
        return np.mean([done.calls[transformer] for done in self.passes], axis=0)

    def span_weights(self) -> Array:
        """[spans]: how much an error in each span matters: the measured impacts; all 1 until every span has one.

        They come from one prompt, so a span counts at least a twentieth of the one that matters most.
        """
        if len(self.impacts) < len(self.spans) or max(self.impacts) == 0:
            return np.ones(len(self.spans))
        return np.maximum(self.impacts, max(self.impacts) / 20)

    @property
    def attention_share(self) -> float:
        """Share of a dense generation's wall time that goes to self-attention: median over passes, 0..1."""
        return float(np.median([done.attention_seconds / done.seconds for done in self.passes]))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file beside itself and renames it, so that a failed save leaves the old file."""
        path = Path(path)
        header = {
            "family": self.family,
            "models": {name: asdict(shape) for name, shape in self.models.items()},
            "grid": self.grid,
            "candidates": [method.to_json() for method in self.candidates],
            "densities": self.densities,
            "spans": self.spans,
            "config": self.config,
            "provenance": self.provenance,
            "passes": [asdict(done) for done in self.passes],
            "impacts": self.impacts,
        }
        metadata = {"format": FORMAT, "version": str(VERSION), "header": json.dumps(header, allow_nan=False)}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file({name: np.ascontiguousarray(array) for name, array in self.sums.items()}, temporary, metadata)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Reads a file that `save` wrote.

        Raises:
            ValueError: the file is not scores, of another version, or damaged; the message says which and what to do.
        """
        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file ({error}); delete it and probe again") from error
        found = (metadata.get("format"), metadata.get("version"))
        if found != (FORMAT, str(VERSION)):
            raise ValueError(f"{path}: expected {FORMAT} version {VERSION}, found {found[0]} version {found[1]}")
        try:
            header = json.loads(metadata["header"])
            if not isinstance(header, dict) or set(header) != HEADER:
                raise ValueError(f"expected the keys {sorted(HEADER)}, found {sorted(header)}")
            return cls(
                family=header["family"],
                models={name: ModelShape(**shape) for name, shape in header["models"].items()},
                grid=tuple(header["grid"]),
                candidates=tuple(Method.from_json(method) for method in header["candidates"]),
                densities=tuple(float(density) for density in header["densities"]),
                spans=tuple((float(start), float(stop)) for start, stop in header["spans"]),
                config=header["config"],
                provenance=header["provenance"],
                passes=tuple(_read_pass(done) for done in header["passes"]),
                sums=sums,
                impacts=tuple(float(impact) for impact in header["impacts"]),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: damaged scores: {error}; delete the file and probe again") from error

    def _mean(self, name: str, transformer: str) -> Array:
        total = self.sums[f"{name}/{transformer}"]
        count = self.samples(transformer).astype("f8")
        count[count == 0] = np.nan
        return total / count.reshape(count.shape + (1,) * (total.ndim - 2))


def _read_pass(data: Mapping[str, Any]) -> Pass:
    return Pass(**{**data, "calls": {name: tuple(counts) for name, counts in data["calls"].items()}})


def _shapes(
    models: Mapping[str, ModelShape], spans: int, candidates: int, grid: tuple[int, int]
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, model in models.items():
        full = (spans, model.layers, model.heads, candidates)
        shapes[f"samples/{name}"] = full[:2]
        shapes |= {f"{kind}/{name}": full for kind in ("error", "error_square", "mse")}
        shapes[f"energy/{name}"] = full[:3]
        shapes[f"mass/{name}"] = (model.layers, model.heads, *grid)
        shapes[f"mass_samples/{name}"] = (model.layers,)
    return shapes
