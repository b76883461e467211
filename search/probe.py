"""Runs the real pipeline densely on calibration prompts and measures every candidate's error on the way.

The dense result is what goes on to the next layer, at every call. Sparse-vDiT's Algorithm 1 instead feeds each decision's
error forward, which ties the measurement to one budget; here the scores know nothing of a budget, so that one probe serves
all of them, and interactions between layers go unseen. One prompt is one calibration run, the unit in which a probe can be
resumed.

What a candidate that keeps something would have kept is recorded some steps before a measured one, for the rows that are
sampled there. Both are done by the stages that are at work in a patched pipeline, on rows instead of whole calls.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.attach.site import Engine, Site, Timer
from diffusers_accel.call import AttentionCall
from diffusers_accel.kernels.grouped import of_heads
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, Method
from diffusers_accel.search.measure import SampledHeads, head_grams, layer_energy, projection, sample_rows
from diffusers_accel.search.recorders import recorders
from diffusers_accel.search.row import Chunk, RowProbe, grouped, keep
from diffusers_accel.search.running import Schedules, SiteEngine, now
from diffusers_accel.search.schedule import ProbeSchedule, ProbeSettings, kept_age, span_index
from diffusers_accel.search.scores import Array, CalibrationRun, Scores
from diffusers_accel.search.selections import KeptRows, RowReader, Selections
from diffusers_accel.shape import ModelShape

LEAST_BYTES = 1 << 30
SHARE = 1 / 16  # of a GPU's memory


def together_bytes(device: torch.device) -> int:
    """Heads are measured together as long as their intermediates stay below this; one head always fits. By the whole memory, not
    by what is free, so that equal devices measure alike to the last bit."""
    if device.type != "cuda":
        return LEAST_BYTES
    return max(LEAST_BYTES, int(SHARE * torch.cuda.get_device_properties(device).total_memory))


def head_bytes(tokens: int, head_dim: int, rows: int, candidates: int) -> int:
    """Bytes that measuring one head takes: rows of logits in a few copies, q, k and v in a few more, an output per block;
    a few masks; an output and the weights of blocks per candidate."""
    blocks = tokens // BLOCK + 1
    one = 4 * tokens * (4 * rows + 6 * head_dim) + 4 * rows * head_dim * blocks + 40 * blocks**2
    return one + 4 * candidates * rows * (3 * blocks + 3 * head_dim)


def measuring_bytes(tokens: int, model: ModelShape, settings: ProbeSettings, device: torch.device) -> int:
    """Bytes that measuring one call takes beside the pipeline's own memory, at most."""
    one = head_bytes(tokens, model.head_dim, settings.rows, len(settings.candidates))
    projections = 4 * (model.heads * model.head_dim) ** 2
    return max(one, min(together_bytes(device), model.heads * one)) + 3 * projections


class RunProbe:
    """What one calibration run has seen. `attend` is the engine of all its sites."""

    def __init__(
        self,
        settings: ProbeSettings,
        models: dict[str, ModelShape],
        layout: TokenLayout,
        steps: int,
        before: dict[str, Array],
        number: int,
        on_call: Callable[[AttentionCall], None] = lambda call: None,
    ) -> None:
        """`before`: the sums of earlier runs, of which what the first one has recorded is used (stripes' columns, stored masks).
        `number`: of this run, from 0."""
        self.settings = settings
        self.models = models
        self.layout = layout
        self.schedule = ProbeSchedule.of(settings, steps)
        segments = len(self.schedule.segments)
        self.sums = Scores.zeros(models, len(settings.spans), settings.candidates, layout, segments)
        self.calls = {name: np.zeros(len(settings.spans), "i8") for name in models}
        self.dense_timer = Timer()
        self.measuring_seconds = 0.0
        self._steps: dict[str, set[int]] = {name: set() for name in models}
        self._schedules, self._schedule = Schedules(), 0  # the running one
        self._sizes: dict[int, list[int]] = defaultdict(list)  # schedule -> queries x keys of its calls
        self._number = number
        self._on_call = on_call
        self._recorders = [
            each(settings.candidates, self.sums, before, models, settings.masks)
            for each in recorders(settings.candidates)
        ]
        tensors = {name: tensor for each in self._recorders for name, tensor in each.found().items()}
        self._selections = Selections(tensors)
        # (measured step, transformer, layer, branch, batch row) -> candidate -> what it keeps
        self._kept: dict[tuple[int, str, int, str, int], dict[int, KeptRows]] = defaultdict(dict)

    def engine(self, site: Site) -> Engine:
        return SiteEngine(self, site)

    def attend(self, site: Site, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The dense result; measures when this is one of the chosen steps."""
        step, steps = now(call)
        if steps != self.schedule.steps:
            raise RuntimeError(
                f"expected {self.schedule.steps} steps as in the first call of the pipeline, found {steps}"
            )
        span = span_index(self.settings.spans, step, steps)
        self._schedule = self._schedules.of(call)
        if call.layer == 0 and call.rows[0] == 0:  # once for all rows, whose texts may be padded to different lengths
            self._sizes[self._schedule].append(call.layout.queries * call.layout.keys)
            self.calls[call.transformer][span] += 1
            self._steps[call.transformer].add(step)
            self._on_call(call)
        assert call.dense is not None
        with self.dense_timer.running(q.device):
            out = call.dense(q, k, v)
        if step in self.schedule.measured:
            self.measure(site, call, span, q, k, v)
        if step in self.schedule.kept:
            self.keep(call, q, k, v)
        if self._number == 0 and step in self.schedule.segments:
            self.calibrate(call, self.schedule.segments[step], q, k, v)
        return out

    def measure(self, site: Site, call: AttentionCall, span: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Adds the errors of one call's candidates to the sums."""
        with self._measuring(call, q.device):
            linear = site.model.family.output_projection(site.model.module, site.name)
            weight = projection(linear, q.shape[2] * q.shape[3], q)  # under the user's own autocast
            with torch.autocast(q.device.type, enabled=False):
                for row in range(q.shape[0]):
                    kept = self._kept.pop(self._key(call, now(call)[0], row), {})
                    self._measure_row(call, span, weight, q[row], k[row], v[row], kept)

    def keep(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Records what candidates keep of one call for later, measured ones."""
        step, _ = now(call)
        with self._measuring(call, q.device), torch.autocast(q.device.type, enabled=False):
            for later in dict.fromkeys(later for later, _ in self.schedule.kept[step]):
                members = [index for each, index in self.schedule.kept[step] if each == later]
                for row in range(q.shape[0]):
                    found = self._keep_row(call, later, members, q[row], k[row], v[row])
                    self._kept[self._key(call, later, row)] |= found

    def calibrate(self, call: AttentionCall, segment: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Shows a whole call of one segment of the schedule to the recorders."""
        with self._measuring(call, q.device), torch.autocast(q.device.type, enabled=False):
            for recorder in self._recorders:
                recorder.add_call(call, segment, q, k, v, self._chunks(q.device, call.layout.tokens, *q.shape[2:]))

    def finished(self, prompt: str, seconds: float) -> CalibrationRun:
        """The record of this run, which took `seconds` of wall time, measuring included."""
        spans = range(len(self.settings.spans))
        calls = {name: tuple(int(count) for count in counts) for name, counts in self.calls.items()}
        steps = {
            name: tuple(sum(self._span(step) == span for step in seen) for span in spans)
            for name, seen in self._steps.items()
        }
        attention = self.dense_timer.attention_ms / 1e3
        return CalibrationRun(prompt, seconds - self.measuring_seconds, attention, calls, steps, self._usual_schedule())

    def _usual_schedule(self) -> int:
        """The schedule whose calls are nearest the mean size, with which attention's time grows."""
        mean = np.mean([size for sizes in self._sizes.values() for size in sizes])
        return min(self._sizes, key=lambda schedule: float(abs(np.mean(self._sizes[schedule]) - mean)))

    def _span(self, step: int) -> int:
        return span_index(self.settings.spans, step, self.schedule.steps)

    @contextmanager
    def _measuring(self, call: AttentionCall, device: torch.device) -> Iterator[None]:
        """Counts the time inside as ours, and checks that the tokens lie as everywhere else; texts may differ in length."""
        if not self._lies_alike(call.layout.whole):
            raise RuntimeError(
                f"expected one layout per search, {self.layout}, found {call.layout} at layer {call.layer} of {call.transformer}"
            )
        _wait(device)
        begin = time.perf_counter()
        with torch.no_grad():
            yield
        _wait(device)
        self.measuring_seconds += time.perf_counter() - begin

    def _lies_alike(self, layout: TokenLayout) -> bool:
        """Whether errors at this layout add up with the others. Where candidates read what is recorded of places, all but the
        text must be the same, and for stored masks that too; else the video must: what stands beside it may differ from layer to
        layer and from chunk to chunk, and later chunks may have other frames."""
        if layout == self.layout or self.settings.in_segments:
            return layout == self.layout
        if not self.settings.records:
            later = slice(1 if self._schedule else 0, None)
            return layout.grid[later] == self.layout.grid[later]
        mine, other = ([each for each in some.segments if each.kind != "text"] for some in (self.layout, layout))
        return mine == other

    def _chunks(self, device: torch.device, tokens: int, heads: int, dim: int) -> Iterator[slice]:
        """The heads that are measured together."""
        one = head_bytes(tokens, dim, self.settings.rows, len(self.settings.candidates))
        together = max(1, together_bytes(device) // one)
        for start in range(0, heads, together):
            yield slice(start, min(start + together, heads))

    @staticmethod
    def _key(call: AttentionCall, step: int, row: int) -> tuple[int, str, int, str, int]:
        return step, call.transformer, call.layer, call.branch, call.rows[0] + row

    def _rows(self, call: AttentionCall, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows of a measured step at which errors are taken, and those that recorders look at (none where none need it).

        Of the tokens that exist: nobody sees what padding attends to.
        """
        seed = (self.settings.seed, self._number, step, call.layer)
        rows = sample_rows(call.layout.existing_queries, self.settings.rows, seed).to(device)
        return (rows[::2], rows[1::2]) if self.settings.splits_rows else (rows, rows[:0])

    def _measure_row(
        self, call: AttentionCall, span: int, weight: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: dict[int, KeptRows]
    ) -> None:
        """One batch row: q [queries, H, D], k and v [keys, H_k, D]."""
        tokens, (_, heads, dim) = call.layout.tokens, q.shape
        step, _ = now(call)
        rows, others = self._rows(call, step, q.device)
        candidates = self.settings.candidates
        ages = [self._age(method, step) for method in candidates]
        found = RowProbe(candidates, self._selections, kept, ages, heads, dim)
        grams = head_grams(weight, heads)
        dense = q.new_empty((heads, len(rows), dim), dtype=torch.float32)
        for some in self._chunks(q.device, tokens, heads, dim):
            here = call.of(call.heads[some])
            own_k, own_v = (of_heads(x, here.heads, heads) for x in (k, v))
            qkv = q[:, some], own_k, own_v
            if len(others):
                sampled = SampledHeads(*qkv, others, call.layout)
                for recorder in self._recorders:
                    recorder.add_rows(here, some, sampled)
            found.add(Chunk(here, SampledHeads(*qkv, rows, call.layout), dense[some], grams[some]))
        energy = dense.square().mean((1, 2)).double().cpu().numpy()
        self._add(call, span, found, layer_energy(dense, weight), energy)

    def _age(self, method: Method, step: int) -> int:
        """Of the output that a candidate has kept at a measured step, in steps; 1 for one that keeps none."""
        if method.rest.period is None:
            return 1
        return max(1, kept_age(self.settings.spans, step, self.schedule.steps, method.rest.period))

    def _keep_row(
        self, call: AttentionCall, later: int, members: list[int], q: Tensor, k: Tensor, v: Tensor
    ) -> dict[int, KeptRows]:
        """One batch row: q [queries, H, D], k and v [keys, H_k, D]; what candidates keep for the rows of the `later` step."""
        rows, _ = self._rows(call, later, q.device)
        candidates = self.settings.candidates
        chunks: dict[int, list[KeptRows]] = {index: [] for index in members}
        for some in self._chunks(q.device, call.layout.tokens, *q.shape[1:]):
            here = call.of(call.heads[some])
            keys, values = (of_heads(x, here.heads, q.shape[1]) for x in (k, v))
            sampled = SampledHeads(q[:, some], keys, values, rows, call.layout)
            for (order, precision), group in grouped(candidates, members).items():
                reader = RowReader(sampled, order, precision)
                for index in group:
                    chunks[index].append(keep(candidates[index], here, sampled, reader, self._selections))
        return {index: KeptRows.cat(some) for index, some in chunks.items()}

    def _add(self, call: AttentionCall, span: int, found: RowProbe, layer: float, energy: Array) -> None:
        name, at = call.transformer, (span, call.layer)
        error = found.felt / layer if layer > 0 else np.zeros_like(found.felt)
        self.sums[f"samples/{name}"][at] += found.samples
        self.sums[f"error/{name}"][at] += error
        self.sums[f"error_square/{name}"][at] += error**2
        self.sums[f"mse/{name}"][at] += found.mse
        self.sums[f"density/{name}"][at] += found.density
        self.sums[f"energy/{name}"][at] += energy
        self.sums[f"mean_error/{name}"][at] += found.mean_error


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
