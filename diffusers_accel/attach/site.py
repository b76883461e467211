"""One self-attention module at run time: where it is, how its tokens lie now, and what attends for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import count, groupby
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from diffusers_accel.attach.clock import Clock
from diffusers_accel.attach.host_guidance import scores_skipped
from diffusers_accel.call import AttentionCall, DenseAttention
from diffusers_accel.families import Family
from diffusers_accel.layout import TokenLayout
from diffusers_accel.shape import ModelShape


class Engine(Protocol):
    """What attends at a site: a plan at work, or a search that watches."""

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [B, queries, H, D], k and v [B, keys, H_k, D] after norm and RoPE -> the attention output, q's shape and dtype.

        These are the batch rows `call.rows`, whose tokens lie as `call.layout` says: k and v are the first `layout.keys`
        tokens, without the padding. H_k divides H: with grouped queries several heads read one head of the keys.
        """
        ...


@dataclass(frozen=True)
class Rows:
    """Neighbouring batch rows `start <= row < stop` whose tokens lie alike."""

    start: int
    stop: int
    layout: TokenLayout


class _Forward(threading.local):
    """What the forward that runs in this thread has shown: sizes, which branch, its noise level, existing text of each row."""

    sizes: tuple[int, ...] | None = None
    branch: str = ""
    sigma: float | None = None
    text: tuple[int, ...] | None = None
    ahead: bool = False  # it is not the forward of the step, but looks at the beginning of it


class AttachedModel:
    """A transformer of a pipeline, as its sites see it; told by a forward pre-hook how the tokens of each call lie."""

    def __init__(self, name: str, module: nn.Module, family: Family, clock: Clock) -> None:
        self.name = name
        self.module = module
        self.family = family
        self.clock = clock
        self.shape: ModelShape = family.shape(module)
        self.expects: Callable[[TokenLayout], None] | None = None  # refuses calls of another size, where a size matters
        self._expected: set[tuple[int, ...]] = set()
        self._forward = _Forward()
        self._layouts: dict[tuple[tuple[int, ...], int | None, int], TokenLayout] = {}
        self._places: dict[tuple[tuple[int, ...], torch.device], Tensor | None] = {}
        self._branches = WeakTensorKeyDictionary()  # text embeddings -> a name for the branch that they belong to
        self._numbers = count()

    def observe(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Takes note of a forward that begins, unless it takes no step."""
        if self.family.prepares is not None and self.family.prepares(args, kwargs):
            return
        self.clock.follow(self.module)
        self._forward.sizes = self.family.observe(args, kwargs)
        if self.expects is not None and self._forward.sizes not in self._expected:
            self.expects(self.family.layout(self.module.config, self._forward.sizes))
            self._expected.add(self._forward.sizes)
        self._forward.branch = self.clock.branch or self._unnamed(self.family.text(args, kwargs))
        self._forward.sigma = self.clock.sigma()
        self._forward.text = None
        if self.family.text_valid is not None:
            self._forward.text = self.family.text_valid(args, kwargs)

    @property
    def label(self) -> str:
        """What tells models of other sizes apart, such as "wan, 30 layers of 12 heads"."""
        return f"{self.family.name}, {self.shape.layers} layers of {self.shape.heads} heads"

    @property
    def layout(self) -> TokenLayout:
        """How the tokens of the running call lie, as if all text existed; of the first layer, where layers differ."""
        return self._layout(None, 0)

    @property
    def branch(self) -> str:
        """The running branch: the pipeline's name for it, such as "cond", else one by its text embeddings; "" before any."""
        return self._forward.branch

    @property
    def sigma(self) -> float | None:
        """The noise level of the running forward, see `AttentionCall.sigma`."""
        return self._forward.sigma

    @contextmanager
    def looking_ahead(self) -> Iterator[None]:
        """Inside, a forward only looks at its beginning: sites attend densely, and no engine counts or keeps anything of it."""
        self._forward.ahead = True
        try:
            yield
        finally:
            self._forward.ahead = False

    @property
    def looks_ahead(self) -> bool:
        return self._forward.ahead

    def rows(self, batch: int, layer: int) -> list[Rows]:
        """The `batch` rows of the running call in a layer, in as few parts as have equal layouts."""
        counts = self._forward.text
        if counts is None:
            return [Rows(0, batch, self._layout(None, layer))]
        if len(counts) == 1:  # of one prompt, of which several videos are made
            counts *= batch
        if len(counts) != batch:
            raise RuntimeError(f"{self.name}: expected text lengths of {batch} rows, as q has, found {len(counts)}")
        parts = [list(part) for _, part in groupby(range(batch), key=counts.__getitem__)]
        return [Rows(part[0], part[-1] + 1, self._layout(counts[part[0]], layer)) for part in parts]

    def places(self, device: torch.device) -> Tensor | None:
        """Where the tokens of the layout stand in the sequence of the running call; None where in their order."""
        sizes = self._forward.sizes
        if self.family.places is None or sizes is None:
            return None
        if (sizes, device) not in self._places:
            places = self.family.places(self.module.config, sizes)
            self._places[sizes, device] = None if places is None else places.to(device)
        return self._places[sizes, device]

    def _layout(self, text_valid: int | None, layer: int) -> TokenLayout:
        sizes = self._forward.sizes
        if sizes is None:
            raise RuntimeError(
                f"self-attention of {self.name} was called outside the model's own forward: its layout is unknown"
            )
        differs = self.family.layout_in
        key = (sizes, text_valid, layer if differs else 0)
        if key not in self._layouts:
            layout = self.family.layout(self.module.config, sizes)
            all_exist = text_valid is None or text_valid == layout.text_tokens
            layout = layout if all_exist else layout.with_text(text_valid)
            self._layouts[key] = differs(self.module.config, layout, layer) if differs else layout
        return self._layouts[key]

    def _unnamed(self, text: Tensor) -> str:
        """A name by the identity of the embeddings; none is used twice, so that one branch is never taken for another."""
        if text not in self._branches:
            self._branches[text] = f"branch {next(self._numbers)}"
        name: str = self._branches[text]
        return name


def set_processor(module: Any, processor: Any) -> None:
    """Gives an attention module its processor; some, as Mochi's, have no method for that."""
    if hasattr(module, "set_processor"):
        module.set_processor(processor)
    else:
        module.processor = processor


def _counted(queries: int, keys: int) -> str:
    return f"{keys:,} tokens" if queries == keys else f"{queries:,} queries and {keys:,} keys"


@dataclass
class Timer:
    """Adds up the time spent in attention while it is attached to sites."""

    _cpu_seconds: float = 0.0
    _events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Counts the time inside."""
        if device.type == "cuda":
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            stop.record()
            self._events.append((start, stop))
            return
        begin = time.perf_counter()
        yield
        self._cpu_seconds += time.perf_counter() - begin

    @property
    def attention_ms(self) -> float:
        """Milliseconds so far; waits for the GPU."""
        if self._events:
            torch.cuda.synchronize()
        return self._cpu_seconds * 1e3 + sum(start.elapsed_time(stop) for start, stop in self._events)


class Site:
    """One self-attention module: what attends there (`engine`) and what a search may want to know about it."""

    def __init__(self, model: AttachedModel, layer: int, name: str, module: nn.Module, dense: DenseAttention) -> None:
        self.model = model
        self.layer = layer
        self.name = name
        self.module = module
        self.dense = dense
        self.engine: Engine
        self.attachment: Any = None
        self.processor: Any = None  # ours, while it is attached
        self._stranger: str | None = None
        self._heads = tuple(range(model.shape.heads))
        self.costs: Callable[[AttentionCall], Sequence[float]] | None = None  # of the heads, where an engine knows them
        self.timer: Timer | None = None

    @property
    def transformer(self) -> str:
        """The pipeline's name of the model that this site belongs to."""
        return self.model.name

    @property
    def stranger(self) -> str | None:
        """The class of the processor that the user has set instead of ours, with which the module attends without us."""
        if self.processor is None:  # taken off
            return self._stranger
        return None if self.module.processor is self.processor else type(self.module.processor).__name__

    def take_off(self, restore: Callable[[Any], Any]) -> None:
        """Gives the module its stock processor back, which `restore` gets out of ours; one that the user has set stays."""
        self._stranger = self.stranger
        stock = restore(self.processor)
        self.processor = None
        if self._stranger is None:
            set_processor(self.module, stock)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: tuple[int, ...] | None = None) -> Tensor:
        """q [B, queries, H, D], k and v [B, tokens, H_k, D] -> out like q.

        What the engine is given is cut to tokens that exist as keys, in the order of the layout. Where a guider of diffusers
        perturbs a pass by leaving the scores out, the result is v, and the engine is not asked.

        Args:
            heads: numbers in the model of the heads that these are; None: all.
        """
        if q.shape == v.shape and scores_skipped(self.module):
            return v.clone()
        with self.timer.running(q.device) if self.timer else nullcontext():
            places, parts = self.model.places(q.device), []
            if places is not None:
                q, k, v = (x.index_select(1, places) for x in (q, k, v))
            for rows in self.model.rows(len(q), self.layer):
                self._check_sizes(rows.layout, q, k, v)
                own = q, k, v  # as they are, where nothing is cut off: three views cost more than to ask
                if rows.stop - rows.start != len(q) or rows.layout.keys != k.shape[1]:
                    some, keys = slice(rows.start, rows.stop), rows.layout.keys
                    own = q[some], k[some, :keys], v[some, :keys]
                ahead = self.model.looks_ahead
                parts.append(self.dense(*own) if ahead else self.engine.attend(self._call(rows, heads), *own))
            out = parts[0] if len(parts) == 1 else torch.cat(parts)
            return out if places is None else torch.empty_like(out).index_copy_(1, places, out)

    def _check_sizes(self, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor) -> None:
        if v.shape[1] != k.shape[1]:
            raise RuntimeError(
                f"{self.name} of {self.transformer}: expected a value for each of {k.shape[1]:,} keys, found {v.shape[1]:,}"
            )
        if (q.shape[1], k.shape[1]) != (layout.queries, layout.tokens):
            raise RuntimeError(
                f"{self.name} of {self.transformer}: expected the {_counted(layout.queries, layout.tokens)} of {layout}, found "
                f"{_counted(q.shape[1], k.shape[1])}: something else changes the sequence of this model. Take that off, or call "
                "diffusers_accel.unpatch(pipe)"
            )

    def costs_of_heads(self, batch: int) -> Sequence[float]:
        """Of a call that begins, relative to each other; equal where nobody knows."""
        if self.costs is None:
            return [1.0] * len(self._heads)
        return self.costs(self._call(self.model.rows(batch, self.layer)[0], None))

    def _call(self, rows: Rows, heads: tuple[int, ...] | None) -> AttentionCall:
        return AttentionCall(
            layout=rows.layout,
            transformer=self.transformer,
            layer=self.layer,
            heads=heads or self._heads,
            branch=self.model.branch,
            rows=(rows.start, rows.stop),
            now=self.model.clock.now(),
            sigma=self.model.sigma,
            dense=self.dense,
        )
