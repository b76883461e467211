"""Whether the unpatched model attends with a mask, for which PyTorch has no flash kernel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffusers_accel.layout import TokenLayout
from diffusers_accel.step_timing import SLOW_LAYER_MS, SeenEnough, full_call, until_seen

ROUNDS = 3


class MaskedAttention(NamedTuple):
    """Attention over the video under a mask, in the stock forward.

    Args:
        calls: how many calls of the forward had one, of `of` calls over the video.
        mask: its shape.
        with_ms, without_ms: of one such call, and of the same q, k and v without a mask; None where that is too slow to repeat.
    """

    calls: int
    of: int
    mask: tuple[int, ...]
    with_ms: float | None
    without_ms: float | None


class _Watch(TorchFunctionMode):
    """Looks at the calls of PyTorch's attention that are self-attention over the video, in the backend that the user has chosen.

    Args:
        layouts: how the tokens of these may lie; by their numbers they are told from cross-attention.
    """

    def __init__(self, layouts: Collection[TokenLayout]) -> None:
        super().__init__()
        self._sizes = {(layout.queries, layout.tokens) for layout in layouts}
        self.inside = False  # a transformer, and not a text encoder
        self.calls = self.masked = 0
        self.mask: tuple[int, ...] = ()
        self.times: tuple[float | None, float | None] = (None, None)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside and func is F.scaled_dot_product_attention:
            self._look(func, args, kwargs)
        return func(*args, **kwargs)

    def _look(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | dict(kwargs)
        query, mask = named["query"], named.get("attn_mask")
        if (query.shape[-2], named["key"].shape[-2]) not in self._sizes:
            return
        self.calls += 1
        if mask is None:
            return
        self.masked += 1
        if not self.mask:
            self.mask = tuple(mask.shape)
            self.times = _both(func, named)


def masked_attention(
    pipe: Any, modules: Collection[nn.Module], call: Mapping[str, Any], layouts: Collection[TokenLayout]
) -> MaskedAttention | None:
    """Runs one forward of the unpatched pipeline; None where the video is attended to without a mask.

    It runs without its compiled graphs, if it has any. What attends by another function than PyTorch's own shows nothing.
    """
    watch = _Watch(layouts)

    def start(*_: Any) -> None:
        watch.inside = True

    def stop(*_: Any) -> None:
        raise SeenEnough  # one forward is enough

    hooks = [module.register_forward_pre_hook(start) for module in modules]
    hooks += [module.register_forward_hook(stop) for module in modules]
    try:
        with torch.compiler.set_stance("force_eager"), watch:  # a graph shows no calls
            until_seen(pipe, full_call(pipe, call))
    finally:
        for hook in hooks:
            hook.remove()
    return MaskedAttention(watch.masked, watch.calls, watch.mask, *watch.times) if watch.masked else None


def _both(func: Any, named: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """Milliseconds with the mask and without, medians of runs in turn after one to warm up; None where one run is too slow."""
    plain = {**named, "attn_mask": None}
    if _milliseconds(func, named) > SLOW_LAYER_MS:
        return None, None
    _milliseconds(func, plain)
    times = [(_milliseconds(func, named), _milliseconds(func, plain)) for _ in range(ROUNDS)]
    masked, unmasked = (statistics.median(column) for column in zip(*times, strict=True))
    return masked, unmasked


def _milliseconds(func: Any, named: Mapping[str, Any]) -> float:
    query: Tensor = named["query"]
    if query.device.type == "cuda":
        torch.cuda.synchronize(query.device)
    start = time.perf_counter()
    func(**named)
    if query.device.type == "cuda":
        torch.cuda.synchronize(query.device)
    return (time.perf_counter() - start) * 1e3
