"""What heads remember from step to step, and how much memory that may take."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass, field

import psutil
import torch
from torch import Tensor

from diffusers_accel.files import quoted
from diffusers_accel.methods.rest import CacheEntry

LSE_BYTES = 4
CACHE_MEMORY_FRACTION = 0.2  # of the free memory

Layer = tuple[str, int]  # name of the transformer, number of the layer
Stream = tuple[str, tuple[int, int]]  # branch of guidance, and which batch rows


@dataclass
class LayerCache:
    """What one layer remembers on one branch. It lasts while step follows step of one generation, computed or
    predicted (`carry`): a gap, a step back, another number of steps, shape, dtype or device empty it."""

    held: dict[Hashable, CacheEntry] = field(default_factory=dict)
    before: int | None = None  # the step at which the layer attended before this one; None at the first
    _last: int | None = None  # the last step that was computed or predicted
    _attended: int | None = None
    _like: tuple[object, ...] | None = None

    def begin(self, now: tuple[int, int], q: Tensor, k: Tensor, groups: Collection[Hashable]) -> None:
        """Called at each step (step, steps), before anything is read; `groups` are the keys of all that remember there."""
        step, steps = now
        like = (steps, q.shape, k.shape, q.dtype, q.device)
        if self._last is None or step != self._last + 1 or like != self._like:
            self.clear()
        for key in self.held.keys() - groups:  # of an earlier span
            del self.held[key]
        self.before, self._attended = self._attended, step
        self._last, self._like = step, like

    def clear(self) -> None:
        self.held.clear()
        self._last = self._attended = None

    def carry(self, now: tuple[int, int]) -> None:
        """The forward of this step is predicted: nothing attends, and what is kept stays. How old it is, the methods ask."""
        step, steps = now
        if self._last == step - 1 and self._like is not None and self._like[0] == steps:
            self._last = step

    def outlived(self, step: int) -> bool:
        """Whether nothing that is kept can be used at this step or later."""
        return self._last is None or self._last < step - 1

    @property
    def bytes(self) -> int:
        """Of the kept outputs and LSEs. The block lists beside them grow with the square of the tokens: for a draft, 3 % of
        this at 32k tokens, 11 % at 120k."""
        tensors = [tensor for held in self.held.values() for tensor in (held.out, held.lse) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class CacheBudget:
    """Says which layers may keep what they reuse: those that save most time per byte, until the memory is used up.

    Args:
        share: of the memory that is free at the first call, in [0, 1].
        free: how many bytes are free on a device; for tests.
    """

    def __init__(self, share: float, free: Callable[[torch.device], int] | None = None) -> None:
        if isinstance(share, bool) or not (isinstance(share, (int, float)) and 0 <= share <= 1):
            raise ValueError(
                f"cache_memory_fraction is a share of the free memory, expected in [0, 1], found {quoted(share)}"
            )
        self.share = share
        self._free = free or free_bytes
        self._rank: list[tuple[float, Layer, int]] = []  # (saving, layer, heads), best first
        self._admitted: dict[Hashable, set[Layer]] = {}
        self._like: tuple[object, ...] | None = None
        self._total = 0
        self._left: int | None = None

    def enter(self, layer: Layer, heads: int, saving: float) -> None:
        """Names a layer: how many of its heads reuse, and what share of its attention time that saves per head."""
        self._rank.append((saving, layer, heads))
        self._rank.sort(key=lambda entry: -entry[0])

    def restart(self) -> None:
        """Nothing is kept any more: the next call decides anew, from the same memory while calls are of the same size."""
        self._admitted.clear()
        self._left = None

    def admits(self, layer: Layer, stream: Stream, q: Tensor, of: int) -> bool:
        """Whether a layer may keep its outputs on this stream, for calls of the size of q [B, S, H, D]: decided for all layers
        of its transformer when the stream is first seen, and not changed before `restart`.

        Args:
            of: how many heads the model has. Where q holds some of them, as in processes that share them, so many of those that
                reuse are taken to be among these as if they were spread evenly, which dealing them by their cost comes near.
        """
        like = (q.shape, q.dtype, q.device)
        if self._left is None:
            if like != self._like:
                self._like, self._total = like, int(self.share * self._free(q.device))
            self._left = self._total
        if (stream, like) not in self._admitted:
            one_head = q.shape[0] * q.shape[1] * (q.shape[3] * q.element_size() + LSE_BYTES)
            self._admitted[stream, like], self._left = self._fill(layer[0], one_head, (q.shape[2], of), self._left)
        return layer in self._admitted[stream, like]

    def _fill(self, transformer: str, one_head: int, here: tuple[int, int], left: int) -> tuple[set[Layer], int]:
        """The layers that fit, and the bytes that they leave; `here` are some of so many heads."""
        admitted: set[Layer] = set()
        for _, layer, heads in self._rank:
            needed = -(-heads * here[0] // here[1]) * one_head
            if layer[0] == transformer and needed <= left:
                left -= needed
                admitted.add(layer)
        return admitted, left


class CacheManager:
    """The caches of all layers under one patch, and the budget that says which layers may have one.

    What is kept belongs to one generation and to the transformer that runs: when one expert takes over from another, that
    one's caches are emptied. Nothing is left of a generation that was interrupted once the next one begins.

    Args:
        cache_memory_fraction: the budget's share of the memory that is free at the first call, in [0, 1].
    """

    def __init__(self, cache_memory_fraction: float = CACHE_MEMORY_FRACTION) -> None:
        self.budget = CacheBudget(cache_memory_fraction)
        self._kept: dict[tuple[Layer, Stream], LayerCache] = {}
        self._at: tuple[str, int, int] | None = None

    def at(self, transformer: str, now: tuple[int, int]) -> None:
        """Called at every call of attention, before `of`: drops what no later step can use."""
        before, self._at = self._at, (transformer, *now)
        if self._at == before:
            return
        if before is None or (transformer, now[1]) != (before[0], before[2]) or now[0] < before[1]:
            self.clear()
        for key in [key for key, cache in self._kept.items() if cache.outlived(now[0])]:
            del self._kept[key]

    def carry(self, transformer: str, branch: str, now: tuple[int, int]) -> None:
        """The forward of a branch at this step is predicted: what its layers keep outlives the step."""
        if self._kept:
            self.at(transformer, now)
        for (layer, (running, _)), cache in self._kept.items():
            if layer[0] == transformer and running == branch:
                cache.carry(now)

    def of(self, layer: Layer, stream: Stream) -> LayerCache:
        return self._kept.setdefault((layer, stream), LayerCache())

    def bytes(self, layer: Layer) -> int:
        """What a layer keeps now, on all branches."""
        return sum(cache.bytes for (of, _), cache in self._kept.items() if of == layer)

    def clear(self) -> None:
        self._kept.clear()
        self.budget.restart()


def free_bytes(device: torch.device) -> int:
    """Bytes that are free on a device: for a CPU, the memory that the system calls available."""
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    return int(psutil.virtual_memory().available)
