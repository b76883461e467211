"""Runs the real pipeline densely on calibration prompts and measures every candidate's error on the way.

The dense result is what goes on to the next layer, at every call. Sparse-vDiT's Algorithm 1 instead feeds each decision's
error forward, which ties the measurement to one budget; here the scores know nothing of a budget, so that one probe serves
all of them, and interactions between layers go unseen. One prompt is one pass, the unit in which a probe can be resumed.

What a candidate that reuses would have kept is recorded some steps before a measured one, for the rows that are sampled
there: its blocks as they were selected, and the attention over all others. Stored masks are chosen in the first pass and
measured in the others, so that no mask is judged by the sample that chose it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from diffusers_accel.kernels.dense import dense as attend_densely
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, AxisOrder, Context, Method
from diffusers_accel.search.masks import Masks, StoredChoice
from diffusers_accel.search.measure import (
    SampledHeads,
    column_mass,
    head_grams,
    layer_energy,
    projection,
    sample_rows,
)
from diffusers_accel.search.row import Chunk, Kept, RowProbe, grouped
from diffusers_accel.search.running import SiteEngine, now
from diffusers_accel.search.schedule import Schedule, Settings, kept_age, span_index
from diffusers_accel.search.scores import Array, Pass, Scores
from diffusers_accel.search.stored_masks import QUERY_STEP, best_orders, block_shares, kept_levels, order_scores
from diffusers_accel.shape import ModelShape
from diffusers_accel.site import DenseAttention, Engine, Site, Timer

CHUNK_BYTES = (
    1 << 30
)  # heads are measured together as long as their intermediates stay below this; one head always fits


def head_bytes(tokens: int, head_dim: int, rows: int, candidates: int) -> int:
    """Bytes that measuring one head takes: rows of logits in a few copies, q, k and v in a few more, an output per block;
    a few masks; an output and the weights of blocks per candidate."""
    blocks = tokens // BLOCK + 1
    one = 4 * tokens * (4 * rows + 6 * head_dim) + 4 * rows * head_dim * blocks + 40 * blocks**2
    return one + 4 * candidates * rows * (3 * blocks + 3 * head_dim)


def measuring_bytes(tokens: int, model: ModelShape, settings: Settings) -> int:
    """Bytes that measuring one call takes beside the pipeline's own memory, at most."""
    one = head_bytes(tokens, model.head_dim, settings.rows, len(settings.candidates))
    projections = 4 * (model.heads * model.head_dim) ** 2
    return max(one, min(CHUNK_BYTES, model.heads * one)) + 3 * projections


class PassProbe:
    """What one pass has seen. `attend` is the engine of all its sites."""

    def __init__(
        self,
        settings: Settings,
        models: dict[str, ModelShape],
        layout: TokenLayout,
        steps: int,
        before: dict[str, Array],
        number: int,
        on_call: Callable[[Site], None] = lambda site: None,
    ) -> None:
        """`before`: the sums of earlier passes (stripes' running mean, stored masks); `number`: of this pass, from 0."""
        self.settings = settings
        self.models = models
        self.layout = layout
        self.schedule = Schedule.of(settings, steps)
        parts = len(self.schedule.parts)
        self.sums = Scores.zeros(models, len(settings.spans), settings.candidates, layout, parts)
        self.calls = {name: np.zeros(len(settings.spans), "i8") for name in models}
        self.dense_timer = Timer()
        self.measuring_seconds = 0.0
        self._steps: dict[str, set[int]] = {name: set() for name in models}
        self._before = before
        self._number = number
        self._on_call = on_call
        self._stored = StoredChoice.of(settings.candidates, before, models)
        self._mass = {
            f"stripe_mass/{name}": torch.zeros(
                shape.layers, shape.heads, layout.frames, layout.height, dtype=torch.float64
            )
            for name, shape in models.items()
        }
        self._masks = Masks(self._mass, self._stored)
        # (measured step, transformer, layer, branch, batch row) -> candidate -> what it keeps
        self._kept: dict[tuple[int, str, int, str, int], dict[int, Kept]] = defaultdict(dict)
        self._calibrated: set[tuple[str, int, int]] = set()  # (transformer, layer, part)

    def engine(self, site: Site) -> Engine:
        return SiteEngine(self, site)

    def attend(self, site: Site, q: Tensor, k: Tensor, v: Tensor, dense: DenseAttention) -> Tensor:
        """The dense result; measures when this is one of the chosen steps."""
        step, steps = now(site)
        if steps != self.schedule.steps:
            raise RuntimeError(
                f"expected {self.schedule.steps} steps as in the first call of the pipeline, found {steps}"
            )
        span = span_index(self.settings.spans, step, steps)
        if site.layer == 0 and site.rows[0] == 0:  # once for all rows, whose texts may be padded to different lengths
            self.calls[site.transformer][span] += 1
            self._steps[site.transformer].add(step)
            self._on_call(site)
        out = self.dense_timer.run(lambda: dense(q, k, v), q.device)
        if step in self.schedule.measured:
            self.measure(site, span, step, q, k, v)
        if step in self.schedule.kept:
            self.keep(site, step, q, k, v)
        if self._number == 0 and step in self.schedule.parts:
            self.calibrate(site, self.schedule.parts[step], q, k, v)
        return out

    def measure(self, site: Site, span: int, step: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Adds the errors of one call's candidates to the sums."""
        with self._measuring(site, q.device):
            linear = site.model.family.output_projection(site.model.module, site.name)
            weight = projection(linear, q.shape[2] * q.shape[3], q)  # under the user's own autocast
            with torch.autocast(q.device.type, enabled=False):
                for row in range(q.shape[0]):
                    kept = self._kept.pop(self._key(site, step, row), {})
                    self._measure_row(site, span, step, weight, q[row], k[row], v[row], kept)

    def keep(self, site: Site, step: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Records what reusing candidates keep of one call for later, measured ones."""
        with self._measuring(site, q.device), torch.autocast(q.device.type, enabled=False):
            for later in dict.fromkeys(later for later, _ in self.schedule.kept[step]):
                members = [index for each, index in self.schedule.kept[step] if each == later]
                for row in range(q.shape[0]):
                    found = self._keep_row(site, step, later, members, q[row], k[row], v[row])
                    self._kept[self._key(site, later, row)] |= found

    def calibrate(self, site: Site, part: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Chooses the orders of a layer's heads, at its first call, and the blocks of one part of the schedule.

        By the last batch row of the first pass of a step: where guidance comes in one batch that is the prompt's own row,
        and where it comes in two passes the prompt's pass is the first. Both share the masks, as in the paper's code.
        """
        name, layer = site.transformer, site.layer
        if (name, layer, part) in self._calibrated:
            return
        self._calibrated.add((name, layer, part))
        layout = site.layout()
        sparse, quant, levels = (self.sums[f"{kind}/{name}"] for kind in ("order_sparse", "order_quant", "levels"))
        decided = quant[layer].any()
        with self._measuring(site, q.device), torch.autocast(q.device.type, enabled=False):
            for some in self._chunks(*q.shape[1:]):
                q_some, k_some, v_some = (x[-1:, :, some] for x in (q, k, v))
                if not decided:
                    lse = attend_densely(q_some, k_some, v_some)[1]
                    sparse[layer, some], quant[layer, some] = order_scores(
                        q_some, k_some, lse, layout, self._stored.axes
                    )
                orders = best_orders(sparse[layer, some], quant[layer, some])
                for order in np.unique(orders):
                    sequence = AxisOrder(self._stored.axes[order]).index(layout).to(q.device)
                    own = torch.from_numpy(np.flatnonzero(orders == order)).to(q.device)
                    keys = k_some[:, sequence[: k.shape[1]]][:, :, own]
                    queries = q_some[:, sequence[::QUERY_STEP]][:, :, own]
                    lse = attend_densely(queries, keys, keys)[1]  # which does not depend on the values
                    chosen = kept_levels(block_shares(queries, keys, lse), layout, self._stored.densities)
                    levels[part, layer, some.start + own.cpu().numpy()] = chosen.cpu().numpy()

    def finished(self, prompt: str, seconds: float) -> Pass:
        """The record of this pass, which took `seconds` of wall time, measuring included."""
        spans = range(len(self.settings.spans))
        calls = {name: tuple(int(count) for count in counts) for name, counts in self.calls.items()}
        steps = {
            name: tuple(sum(self._span(step) == span for step in seen) for span in spans)
            for name, seen in self._steps.items()
        }
        attention = self.dense_timer.attention_ms / 1e3
        return Pass(prompt, seconds - self.measuring_seconds, attention, calls, steps)

    def _span(self, step: int) -> int:
        return span_index(self.settings.spans, step, self.schedule.steps)

    @contextmanager
    def _measuring(self, site: Site, device: torch.device) -> Iterator[None]:
        """Counts the time inside as ours, and checks that the tokens lie as everywhere else; texts may differ in length."""
        if replace(site.layout(), text_valid=None) != self.layout:
            raise RuntimeError(f"expected one layout per search, {self.layout}, found {site.layout()} at {site.name}")
        _wait(device)
        begin = time.perf_counter()
        with torch.no_grad():
            yield
        _wait(device)
        self.measuring_seconds += time.perf_counter() - begin

    def _chunks(self, tokens: int, heads: int, dim: int) -> Iterator[slice]:
        """The heads that are measured together."""
        one = head_bytes(tokens, dim, self.settings.rows, len(self.settings.candidates))
        together = max(1, CHUNK_BYTES // one)
        for start in range(0, heads, together):
            yield slice(start, min(start + together, heads))

    @staticmethod
    def _key(site: Site, step: int, row: int) -> tuple[int, str, int, str, int]:
        return step, site.transformer, site.layer, site.branch, site.rows[0] + row

    def _rows(self, site: Site, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rows of a measured step at which errors are taken, and those that calibrate stripes (none where none need it).

        Of the tokens that exist: nobody sees what padding attends to.
        """
        seed = (self.settings.seed, self._number, step, site.layer)
        rows = sample_rows(site.layout().keys, self.settings.rows, seed).to(device)
        return (rows[::2], rows[1::2]) if self.settings.stripes else (rows, rows[:0])

    def _context(self, site: Site, heads: slice, step: int) -> Context:
        some = tuple(range(heads.start, heads.stop))
        return Context(site.layout(), site.transformer, site.layer, some, {}, (step, self.schedule.steps))

    def _measure_row(
        self, site: Site, span: int, step: int, weight: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: dict[int, Kept]
    ) -> None:
        """One batch row: q [S, H, D], k and v [keys, H, D]."""
        tokens, heads, dim = q.shape
        rows, others = self._rows(site, step, q.device)
        candidates = self.settings.candidates
        ages = [self._age(method, step) for method in candidates]
        found = RowProbe(candidates, self._masks, self._stored, kept, ages, heads)
        grams = head_grams(weight, heads)
        dense = q.new_empty((heads, len(rows), dim), dtype=torch.float32)
        for some in self._chunks(tokens, heads, dim):
            ctx = self._context(site, some, step)
            qkv = q[:, some], k[:, some], v[:, some]
            if len(others):
                self._add_mass(site, some, column_mass(SampledHeads(*qkv, others, ctx.layout).logits, ctx.layout))
            found.add(Chunk(ctx, SampledHeads(*qkv, rows, ctx.layout), dense[some], grams[some]))
        self._add(site, span, found, layer_energy(dense, weight), dense.square().mean((1, 2)).double().cpu().numpy())

    def _age(self, method: Method, step: int) -> int:
        """Of what a candidate reuses at a measured step, in steps; 1 for one that reuses nothing."""
        if not method.reuse:
            return 1
        return max(1, kept_age(self.settings.spans, step, self.schedule.steps, method.reuse.every))

    def _keep_row(
        self, site: Site, step: int, later: int, members: list[int], q: Tensor, k: Tensor, v: Tensor
    ) -> dict[int, Kept]:
        """One batch row: q [S, H, D], k and v [keys, H, D]; what each candidate keeps for the rows of the `later` step."""
        rows, _ = self._rows(site, later, q.device)
        candidates = self.settings.candidates
        chunks: dict[int, list[Kept]] = {index: [] for index in members}
        for some in self._chunks(*q.shape):
            ctx = self._context(site, some, step)
            sampled = SampledHeads(q[:, some], k[:, some], v[:, some], rows, ctx.layout)
            for (order, precision), group in grouped(candidates, members).items():
                parts = sampled.parts(order, precision)
                for index in group:
                    mask = self._masks.of(candidates[index], ctx, sampled).expand(len(ctx.heads), -1, -1)
                    chunks[index].append(Kept.of(parts, mask, q.dtype))
        return {index: Kept.cat(some) for index, some in chunks.items()}

    def _add_mass(self, site: Site, heads: slice, mass: Tensor) -> None:
        """Adds to the mean by which stripes are chosen, over all samples so far, this one's other rows included."""
        name, layer = site.transformer, site.layer
        self.sums[f"mass/{name}"][layer, heads] += mass.double().cpu().numpy()
        if heads.start == 0:
            self.sums[f"mass_samples/{name}"][layer] += 1
        total = self.sums[f"mass/{name}"][layer, heads] + self._before[f"mass/{name}"][layer, heads]
        count = self.sums[f"mass_samples/{name}"][layer] + self._before[f"mass_samples/{name}"][layer]
        self._mass[f"stripe_mass/{name}"][layer, heads] = torch.from_numpy(total / count)

    def _add(self, site: Site, span: int, found: RowProbe, layer: float, energy: Array) -> None:
        name, at = site.transformer, (span, site.layer)
        error = found.felt / layer if layer > 0 else np.zeros_like(found.felt)
        self.sums[f"samples/{name}"][at] += found.samples
        self.sums[f"error/{name}"][at] += error
        self.sums[f"error_square/{name}"][at] += error**2
        self.sums[f"mse/{name}"][at] += found.mse
        self.sums[f"density/{name}"][at] += found.density
        self.sums[f"energy/{name}"][at] += energy


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
