"""Runs the real pipeline densely on calibration prompts and measures every candidate's error on the way.

The dense result is what goes on to the next layer, at every call. Sparse-vDiT's Algorithm 1 instead feeds each decision's
error forward, which ties the measurement to one budget; here the scores know nothing of a budget, so that one probe serves
all of them, and interactions between layers go unseen. One prompt is one pass, the unit in which a probe can be resumed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, Context, Method
from diffusers_accel.search.measure import BlockParts, column_mass, head_errors, projection, sample_rows
from diffusers_accel.search.running import SiteEngine, now
from diffusers_accel.search.scores import Array, Pass, Scores
from diffusers_accel.shape import ModelShape
from diffusers_accel.site import DenseAttention, Engine, Site, Timer

CHUNK_BYTES = (
    1 << 30
)  # heads are measured together as long as their intermediates stay below this; one head always fits


@dataclass(frozen=True)
class Settings:
    """What a pass measures.

    Args:
        candidates: the first is dense.
        spans: (start, stop) fractions of the schedule.
        rows: sampled query rows per call; half of them calibrate stripes where a candidate needs that.
        probe_steps: steps per span at which errors are measured.
        seed: of the sampled rows.
    """

    candidates: tuple[Method, ...]
    spans: tuple[tuple[float, float], ...]
    rows: int
    probe_steps: int
    seed: int

    def __post_init__(self) -> None:
        if self.rows < 2 or self.probe_steps < 1:
            raise ValueError(
                f"expected at least 2 rows and 1 probe step per span, found {self.rows} and {self.probe_steps}"
            )

    @property
    def calibrates(self) -> bool:
        return any(method.calibrated for method in self.candidates)


def span_index(spans: Sequence[tuple[float, float]], step: int, steps: int) -> int:
    """The span that a step belongs to: the one that holds its middle, as in `Plan.span_at`."""
    middle = (step + 0.5) / steps
    return next(index for index, (_, stop) in enumerate(spans) if middle < stop or index == len(spans) - 1)


def chosen_steps(spans: Sequence[tuple[float, float]], steps: int, per_span: int) -> frozenset[int]:
    """The steps at which a pass measures: up to `per_span` of each span, evenly spread."""
    chosen: set[int] = set()
    for span in range(len(spans)):
        inside = [step for step in range(steps) if span_index(spans, step, steps) == span]
        count = min(per_span, len(inside))
        chosen |= {inside[(2 * index + 1) * len(inside) // (2 * count)] for index in range(count)}
    return frozenset(chosen)


def head_bytes(tokens: int, head_dim: int, rows: int) -> int:
    """Bytes that measuring one head takes: rows of logits in a few copies, k and v in fp32, an output per block."""
    return 4 * tokens * (4 * rows + 4 * head_dim) + 4 * rows * head_dim * (tokens // BLOCK + 1)


def measuring_bytes(tokens: int, model: ModelShape, settings: Settings) -> int:
    """Bytes that measuring one call takes beside the pipeline's own memory, at most."""
    one = head_bytes(tokens, model.head_dim, settings.rows)
    outputs = 4 * model.heads * len(settings.candidates) * settings.rows * model.head_dim
    projections = 4 * (model.heads * model.head_dim) ** 2
    return max(one, min(CHUNK_BYTES, model.heads * one)) + 3 * outputs + 3 * projections


class PassProbe:
    """What one pass has seen. `attend` is the engine of all its sites."""

    def __init__(
        self,
        settings: Settings,
        models: dict[str, ModelShape],
        layout: TokenLayout,
        before: dict[str, Array],
        number: int,
        on_call: Callable[[Site], None] = lambda site: None,
    ) -> None:
        """`before`: the sums of earlier passes (for the stripes' running mean); `number`: of this pass, from 0."""
        self.settings = settings
        self.models = models
        self.layout = layout
        self.sums = Scores.zeros(models, len(settings.spans), len(settings.candidates), (layout.frames, layout.height))
        self.calls = {name: np.zeros(len(settings.spans), "i8") for name in models}
        self.dense_timer = Timer()
        self.measuring_seconds = 0.0
        self._before = before
        self._number = number
        self._on_call = on_call
        self._masks: dict[tuple[int, torch.device], Tensor] = {}
        self._mass = {
            f"stripe_mass/{name}": torch.zeros(
                shape.layers, shape.heads, layout.frames, layout.height, dtype=torch.float64
            )
            for name, shape in models.items()
        }

    def engine(self, site: Site) -> Engine:
        return SiteEngine(self, site)

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
        """The dense result; measures when this is one of the chosen steps."""
        step, steps = now(site)
        span = span_index(self.settings.spans, step, steps)
        if site.layer == 0:
            self.calls[site.transformer][span] += 1
            self._on_call(site)
        out = self.dense_timer.run(lambda: dense(q, k, v), q.device)
        if step in chosen_steps(self.settings.spans, steps, self.settings.probe_steps):
            self.measure(site, span, step, q, k, v)
        return out

    def measure(self, site: Site, span: int, step: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Adds the errors of one call's candidates to the sums."""
        if site.layout() != self.layout:
            raise RuntimeError(f"expected one layout per search, {self.layout}, found {site.layout()} at {site.name}")
        _wait(q.device)
        begin = time.perf_counter()
        with torch.no_grad():
            linear = site.model.family.output_projection(site.module)
            weight = projection(linear, q.shape[2] * q.shape[3], q)  # under the user's own autocast
            with torch.autocast(q.device.type, enabled=False):
                for row in range(q.shape[0]):
                    self._measure_row(site, span, step, weight, q[row], k[row], v[row])
        _wait(q.device)
        self.measuring_seconds += time.perf_counter() - begin

    def _measure_row(self, site: Site, span: int, step: int, weight: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
        """One batch row: q, k, v [S, H, D]."""
        tokens, heads, dim = q.shape
        rows = sample_rows(tokens, self.settings.rows, (self.settings.seed, self._number, step, site.layer)).to(
            q.device
        )
        error_rows = rows[::2] if self.settings.calibrates else rows
        outputs = q.new_empty((heads, len(self.settings.candidates), len(error_rows), dim), dtype=torch.float32)
        together = max(1, CHUNK_BYTES // head_bytes(tokens, dim, len(rows)))
        for start in range(0, heads, together):
            some = slice(start, min(start + together, heads))
            q_rows, keys, values = (x[:, some].transpose(0, 1).float() for x in (q[rows], k, v))
            logits = q_rows @ keys.transpose(1, 2) * dim**-0.5
            if self.settings.calibrates:
                self._add_mass(site, some, column_mass(logits[:, 1::2], self.layout))
                logits = logits[:, ::2]
            self._candidate_outputs(site, some, logits, values, error_rows, outputs[some])
        self._add(site, span, outputs, weight)

    def _candidate_outputs(
        self, site: Site, heads: slice, logits: Tensor, values: Tensor, rows: Tensor, out: Tensor
    ) -> None:
        candidates = self.settings.candidates
        for order in dict.fromkeys(method.order for method in candidates):
            members = [index for index, method in enumerate(candidates) if method.order == order]
            parts = BlockParts(logits, values, rows, order, self.layout)
            masks = [self._mask(site, heads, index, logits.device) for index in members]
            wide = max(mask.shape[0] for mask in masks)
            out[:, members] = parts.merge(torch.stack([mask.expand(wide, -1, -1) for mask in masks]))

    def _mask(self, site: Site, heads: slice, index: int, device: torch.device) -> Tensor:
        """Block mask of a candidate, [1 or heads, query blocks, key blocks]."""
        method = self.settings.candidates[index]
        some = tuple(range(heads.start, heads.stop))
        if method.calibrated:
            return method.mask(Context(self.layout, site.transformer, site.layer, some, self._mass)).to(device)
        if (index, device) not in self._masks:
            mask = method.mask(Context(self.layout, site.transformer, site.layer, some[:1], {}))
            self._masks[index, device] = mask.to(device)
        return self._masks[index, device]

    def _add_mass(self, site: Site, heads: slice, mass: Tensor) -> None:
        """Adds to the mean by which stripes are chosen, over all samples so far, this one's other rows included."""
        name, layer = site.transformer, site.layer
        self.sums[f"mass/{name}"][layer, heads] += mass.double().cpu().numpy()
        if heads.start == 0:
            self.sums[f"mass_samples/{name}"][layer] += 1
        total = self.sums[f"mass/{name}"][layer, heads] + self._before[f"mass/{name}"][layer, heads]
        count = self.sums[f"mass_samples/{name}"][layer] + self._before[f"mass_samples/{name}"][layer]
        self._mass[f"stripe_mass/{name}"][layer, heads] = torch.from_numpy(total / count)

    def _add(self, site: Site, span: int, outputs: Tensor, weight: Tensor) -> None:
        found = head_errors(outputs, weight)
        name, at = site.transformer, (span, site.layer)
        self.sums[f"samples/{name}"][at] += 1
        self.sums[f"error/{name}"][at] += found.error
        self.sums[f"error_square/{name}"][at] += found.error**2
        self.sums[f"mse/{name}"][at] += found.mse
        self.sums[f"energy/{name}"][at] += found.energy

    def finished(self, prompt: str, seconds: float) -> Pass:
        """The record of this pass, which took `seconds` of wall time, measuring included."""
        calls = {name: tuple(int(count) for count in counts) for name, counts in self.calls.items()}
        return Pass(prompt, seconds - self.measuring_seconds, self.dense_timer.attention_ms / 1e3, calls)


def realised_density(method: Method, layout: TokenLayout, models: dict[str, ModelShape]) -> float:
    """Share of block pairs that `method` computes at this layout; a calibrated stripe's does not depend on its masses."""
    name, shape = next(iter(models.items()))
    masses = {f"stripe_mass/{name}": torch.zeros(shape.layers, shape.heads, layout.frames, layout.height)}
    return float(method.mask(Context(layout, name, 0, (0,), masses)).double().mean())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
