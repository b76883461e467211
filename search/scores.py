"""Scores: what a probe measured, in one file that is worth keeping, because it holds the GPU hours of a search.

The file is safetensors with JSON in its header, written whole and renamed, so that a kill leaves the passes finished before.
It holds sums, not means, so that a search can go on where it stopped with the very same result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, Method
from diffusers_accel.search.schedule import mean_age, refresh_share, stored_axes
from diffusers_accel.shape import ModelShape

FORMAT, VERSION = "diffusers_accel.scores", 2
HEADER = {"family", "models", "layout", "candidates", "spans", "parts", "config", "provenance", "passes", "impacts"}
DENSE = 0  # index of the dense candidate

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Pass:
    """One finished generation of a calibration prompt.

    Args:
        prompt: a label of the prompt (its text, or a hash of its embeddings).
        seconds: wall time of the pipeline call, without the time spent on measuring.
        attention_seconds: time of all dense self-attention calls in it.
        calls: self-attention calls of each layer, per transformer and span.
        steps: steps at which the transformer ran, per transformer and span.
    """

    prompt: str
    seconds: float
    attention_seconds: float
    calls: dict[str, tuple[int, ...]]
    steps: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Scores:
    """Errors of every candidate for every (span, layer, head) of each transformer, as sums over samples.

    A sample is one attention call (one prompt, step, branch and batch row) in which a candidate could be measured. What a
    candidate that reuses does at its refresh steps is not sampled but known: no error, density 1. Its error is divided by
    the age of what it reused; the means below are those of its cycle, exact where errors grow evenly with age.

    Args:
        family: name of the model family.
        models: layers, heads and head dim per transformer.
        layout: how the tokens lie at the calibration size, whole text.
        candidates: the methods; the first is dense.
        spans: (start, stop) fractions of the schedule, ascending, covering [0, 1].
        parts: equal parts of the schedule that have stored masks of their own; 0 without such candidates.
        config: what a resumed search must agree with (model, call, seed, rows ...).
        provenance: what is worth knowing but may change between passes (versions, device).
        passes: the finished generations.
        sums: arrays per transformer `t`, fp64 unless said otherwise, with S spans, L layers, H heads, C candidates:
            `samples/t` (int64), `error/t`, `error_square/t`, `mse/t`, `density/t` [S, L, H, C]; `energy/t` [S, L, H];
            `mass/t` [L, H, frames, rows]; `mass_samples/t` (int64) [L]. With stored candidates of O orders also the
            calibration of the first pass: `order_sparse/t`, `order_quant/t` [L, H, O] and `levels/t` (uint8)
            [parts, L, H, blocks, blocks], see `search.stored_masks`.
        impacts: per span, as far as measured, the relative squared error of the final latents per unit of summed error
            (`search.sensitivity`); 1 for a span without a call.
    """

    family: str
    models: dict[str, ModelShape]
    layout: TokenLayout
    candidates: tuple[Method, ...]
    spans: tuple[tuple[float, float], ...]
    parts: int
    config: dict[str, Any]
    provenance: dict[str, Any]
    passes: tuple[Pass, ...]
    sums: dict[str, Array]
    impacts: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.impacts) > len(self.spans) or not all(np.isfinite(each) and each >= 0 for each in self.impacts):
            raise ValueError(f"scores: expected at most {len(self.spans)} impacts of 0 or more, found {self.impacts}")
        expected = _arrays(self.models, len(self.spans), self.candidates, self.layout, self.parts)
        if set(self.sums) != set(expected):
            raise ValueError(f"scores: expected the arrays {sorted(expected)}, found {sorted(self.sums)}")
        for name, (shape, kind) in expected.items():
            array = self.sums[name]
            if array.shape != shape or array.dtype != np.dtype(kind):
                raise ValueError(f"scores: {name} must be {kind} {shape}, found {array.dtype} {array.shape}")
            if kind == "f8" and not np.isfinite(array).all():
                raise ValueError(f"scores: {name} must be finite, found NaN or infinity; probe again")

    @staticmethod
    def zeros(
        models: Mapping[str, ModelShape], spans: int, candidates: tuple[Method, ...], layout: TokenLayout, parts: int
    ) -> dict[str, Array]:
        """`sums` of no sample at all."""
        arrays = _arrays(models, spans, candidates, layout, parts)
        return {name: np.zeros(shape, kind) for name, (shape, kind) in arrays.items()}

    def plus(self, done: Pass, sums: Mapping[str, Array]) -> Scores:
        """These scores and one more pass."""
        total = {name: old + sums[name] for name, old in self.sums.items()}
        return replace(self, passes=(*self.passes, done), sums=total)

    def samples(self, transformer: str) -> Array:
        """[spans, layers, heads, candidates]: attention calls in which that candidate was measured."""
        return self.sums[f"samples/{transformer}"]

    def error(self, transformer: str) -> Array:
        """[spans, layers, heads, candidates]: mean relative squared error, 0 or more; NaN where there is no sample.

        The unit is the energy of the layer's whole attention output, so that the errors of a layer's heads add up.
        """
        return self._mean("error", transformer) * self._ages(transformer)

    def error_std(self, transformer: str) -> Array:
        """[spans, layers, heads, candidates]: standard deviation of that error over samples."""
        mean = self._mean("error", transformer)
        spread = np.sqrt(np.maximum(self._mean("error_square", transformer) - mean**2, 0))
        return spread * self._ages(transformer)

    def mse(self, transformer: str) -> Array:
        """[spans, layers, heads, candidates]: the paper's MSE(O_i, O_0), in squared units of the activations."""
        return self._mean("mse", transformer) * self._ages(transformer)

    def density(self, transformer: str) -> Array:
        """[spans, layers, heads, candidates]: mean realised share of computed block pairs, 0..1, refresh steps included;
        NaN where there is no sample."""
        selected, refreshed = self._mean("density", transformer), self.refreshed(transformer)[:, None, None]
        return selected + refreshed * (1 - selected)

    def energy(self, transformer: str) -> Array:
        """[spans, layers, heads]: mean square of the dense output, by which an MSE becomes relative."""
        count = self.samples(transformer)[..., DENSE]
        return self.sums[f"energy/{transformer}"] / np.where(count, count, np.nan)

    def steps(self, transformer: str) -> Array:
        """int [spans]: steps of a generation at which the transformer runs."""
        return np.max([done.steps[transformer] for done in self.passes], axis=0)

    def refreshed(self, transformer: str) -> Array:
        """[spans, candidates]: share of the steps at which a candidate refreshes what it reuses; 0 for one that does not."""
        return self._of_cycles(transformer, refresh_share, 0.0)

    def _ages(self, transformer: str) -> Array:
        """[spans, 1, 1, candidates]: mean age of what is reused; 1 for a candidate that reuses nothing."""
        return self._of_cycles(transformer, mean_age, 1.0)[:, None, None]

    def _of_cycles(self, transformer: str, figure: Callable[[int, int], float], without: float) -> Array:
        rows = [
            [figure(int(steps), method.reuse.every) if method.reuse else without for method in self.candidates]
            for steps in self.steps(transformer)
        ]
        return np.array(rows)

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
            "layout": asdict(self.layout),
            "candidates": [method.to_json() for method in self.candidates],
            "spans": self.spans,
            "parts": self.parts,
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
            what = f"expected {FORMAT} version {VERSION}, found {found[0]} version {found[1]}"
            raise ValueError(f"{path}: {what}; delete the file, or name another one, and probe again")
        try:
            header = json.loads(metadata["header"])
            if not isinstance(header, dict) or set(header) != HEADER:
                raise ValueError(f"expected the keys {sorted(HEADER)}, found {sorted(header)}")
            return cls(
                family=header["family"],
                models={name: ModelShape(**shape) for name, shape in header["models"].items()},
                layout=TokenLayout(**header["layout"]),
                candidates=tuple(Method.from_json(method) for method in header["candidates"]),
                spans=tuple((float(start), float(stop)) for start, stop in header["spans"]),
                parts=header["parts"],
                config=header["config"],
                provenance=header["provenance"],
                passes=tuple(_read_pass(done) for done in header["passes"]),
                sums=sums,
                impacts=tuple(float(impact) for impact in header["impacts"]),
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: damaged scores: {error}; delete the file and probe again") from error

    def _mean(self, name: str, transformer: str) -> Array:
        count = self.samples(transformer)
        return self.sums[f"{name}/{transformer}"] / np.where(count, count, np.nan)


def _read_pass(data: Mapping[str, Any]) -> Pass:
    counts = {key: {name: tuple(each) for name, each in data[key].items()} for key in ("calls", "steps") if key in data}
    return Pass(**{**data, **counts})


def _arrays(
    models: Mapping[str, ModelShape], spans: int, candidates: tuple[Method, ...], layout: TokenLayout, parts: int
) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array of `sums`."""
    arrays: dict[str, tuple[tuple[int, ...], str]] = {}
    orders, blocks = len(stored_axes(candidates)), layout.blocks(BLOCK)
    for name, model in models.items():
        layers, heads = model.layers, model.heads
        full = (spans, layers, heads, len(candidates))
        arrays[f"samples/{name}"] = full, "i8"
        arrays |= {f"{kind}/{name}": (full, "f8") for kind in ("error", "error_square", "mse", "density")}
        arrays[f"energy/{name}"] = full[:3], "f8"
        arrays[f"mass/{name}"] = (layers, heads, layout.frames, layout.height), "f8"
        arrays[f"mass_samples/{name}"] = (layers,), "i8"
        if orders:
            arrays |= {f"{kind}/{name}": ((layers, heads, orders), "f8") for kind in ("order_sparse", "order_quant")}
            arrays[f"levels/{name}"] = (parts, layers, heads, blocks, blocks), "u1"
    return arrays
