"""The drop-in attention processor: the model's own maths, with its attention call led to our op.

A redirected processor is a subclass of the module's own processor class whose `__call__` is the same code object with one
global name re-bound. So projections, norms and RoPE are the installed diffusers' own, whatever its release, and the
signature stays what the host inspects. The op itself is opaque to torch.compile, and every layer hands it a 0-d tensor
instead of a Python number, so that one graph serves all layers and steps.
"""

from __future__ import annotations

import functools
import itertools
import threading
import types
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from diffusers_accel.site import Site

SITES: WeakValueDictionary[int, Site] = WeakValueDictionary()
_HANDLES = itertools.count()
_RUNNING = threading.local()
_OURS = ("_accel_site", "_accel_handle", "_accel_stock")


@torch.library.custom_op("diffusers_accel::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attend(query: Tensor, key: Tensor, value: Tensor, site: Tensor) -> Tensor:
    """Self-attention at the site whose handle is `site`, a 0-d int64 CPU tensor; q, k, v and result [B, S, H, D]."""
    return SITES[int(site)].attend(query, key, value).contiguous()


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, site: Tensor) -> Tensor:
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


def _no_backward(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        "diffusers_accel::attend has no backward: it is for inference. Call diffusers_accel.unpatch(pipe) before training."
    )


attend.register_autograd(_no_backward)


def redirect(site: Site, stock: Any) -> Any:
    """A processor that does what `stock` does, but attends at `site`; it carries stock's backend and parallel settings.

    Raises:
        TypeError: when the processor's class does not call attention by the name that the family knows.
    """
    stock_class: Any = type(stock)
    cls: Any = _redirected(stock_class, site.model.family.attention_call)
    processor: Any = object.__new__(cls)
    vars(processor).update(vars(stock))
    handle = next(_HANDLES)
    SITES[handle] = site
    processor._accel_site = site
    processor._accel_stock = stock
    processor._accel_handle = torch.tensor(handle, device="cpu")
    return processor


def restore(processor: Any) -> Any:
    """The stock processor that `redirect` was given, with whatever settings its stand-in got since."""
    stock = processor._accel_stock
    vars(stock).update(_settings(processor))
    return stock


def site_of(processor: Any) -> Site | None:
    """The site of a redirected processor, None for any other."""
    return getattr(processor, "_accel_site", None)


@functools.cache
def _redirected(stock: Any, attention_call: str) -> type:
    """One class for each stock class, so that torch.compile sees the same code at every layer."""
    call: Any = stock.__call__
    if not isinstance(call, types.FunctionType) or attention_call not in call.__code__.co_names:
        raise TypeError(
            f"expected a processor whose __call__ calls {attention_call}, as diffusers' own does; found "
            f"{stock.__module__}.{stock.__qualname__}. Set the model's stock processor (set_attn_processor) before patching."
        )
    namespace = {**call.__globals__, attention_call: _attend_here}
    namespace.pop("__name__")  # else torch.compile resolves globals from the real module
    rebound = types.FunctionType(call.__code__, namespace, call.__name__, call.__defaults__, call.__closure__)
    rebound.__kwdefaults__ = call.__kwdefaults__

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        _RUNNING.handle = self._accel_handle
        return rebound(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (stock, _settings(self))  # a copy or a pickle holds the stock processor

    return type(f"Accelerated{stock.__name__}", (stock,), {"__call__": __call__, "__reduce_ex__": __reduce_ex__})


def _rebuild(stock: type, settings: dict[str, Any]) -> Any:
    processor: Any = object.__new__(stock)
    vars(processor).update(settings)
    return processor


def _settings(processor: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(processor).items() if name not in _OURS}


def _attend_here(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """Takes the place of `dispatch_attention_fn` in a redirected processor; `backend` is read by the site's dense call."""
    if attn_mask is not None or is_causal or dropout_p or scale is not None or enable_gqa or attention_kwargs:
        raise ValueError(
            "expected plain self-attention, found a mask, causality, dropout, a scale, grouped queries or backend arguments; "
            "call diffusers_accel.unpatch(pipe) for such calls"
        )
    if parallel_config is not None:
        raise ValueError(
            "context parallelism is not supported yet: call diffusers_accel.unpatch(pipe) before enabling it"
        )
    return attend(query, key, value, _RUNNING.handle)
