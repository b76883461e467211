"""The drop-in attention processor: the model's own maths, with its attention call led to our op.

A redirected processor is a subclass of the module's own processor class whose `__call__` is the same code object with one
global name re-bound: `dispatch_attention_fn`, or `F` where attention is called as `F.scaled_dot_product_attention`. So
projections, norms and RoPE are the installed diffusers' own, whatever its release, and the signature stays what the host
inspects. The op itself is opaque to torch.compile, and every layer hands it a 0-d tensor instead of a Python number, so that
one graph serves all layers and steps.
"""

from __future__ import annotations

import functools
import itertools
import os
import threading
import types
from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_accel.attach.parallel import attend_in_parallel, unfit
from diffusers_accel.attach.site import Site
from diffusers_accel.families.family import AttentionName, Family

SITES: WeakValueDictionary[int, Site] = WeakValueDictionary()
_HANDLES = itertools.count()
_RUNNING = threading.local()
_OURS = ("_accel_site", "_accel_handle", "_accel_stock")


@torch.library.custom_op("diffusers_accel::attend", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def attend(query: Tensor, key: Tensor, value: Tensor, site: Tensor) -> Tensor:
    """Self-attention at the site whose handle is `site`, a 0-d int64 CPU tensor; q and result [B, queries, H, D], k and v
    [B, tokens, H_k, D].

    With `DIFFUSERS_ACCEL_CHECKS=1` in the environment, NaN in q, k or v is refused (which waits for the device).
    """
    where = SITES[int(site)]
    _check_numbers(where, query=query, key=key, value=value)
    return where.attend(query, key, value).contiguous()


def _check_numbers(site: Site, **tensors: Tensor) -> None:
    if os.environ.get("DIFFUSERS_ACCEL_CHECKS") != "1":
        return
    for name, tensor in tensors.items():
        if count := int(tensor.isnan().sum()):
            raise ValueError(
                f"{site.name} of {site.transformer}: expected numbers, found {count:,} NaN among the {tensor.numel():,} values "
                f"of {name}. They come from before this layer: compare with the unpatched pipeline, or with a wider dtype"
            )


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
    family = site.model.family
    cls: Any = _redirected(stock_class, family)
    processor: Any = object.__new__(cls)
    vars(processor).update(vars(stock))
    handle = next(_HANDLES)
    SITES[handle] = site
    processor._accel_site = site
    processor._accel_stock = stock
    processor._accel_handle = torch.tensor(handle, device="cpu")
    return processor


def restore(processor: Any) -> Any:
    """The stock processor that `redirect` was given, with whatever settings its stand-in got since.

    The stand-in becomes a plain processor of the stock class: the host may have kept it (`fuse_qkv_projections` does) and may
    set it again, and it then runs exactly stock, with nothing to decide at run time.
    """
    stock = processor._accel_stock
    vars(stock).update(_settings(processor))
    for name in _OURS:
        delattr(processor, name)
    processor.__class__ = type(stock)
    return stock


def attend_densely(processor: Any, attention_call: AttentionName, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the stock processor would have called, for q [B, S, H, D] and k, v [B, keys, H_k, D], with the user's own backend.

    The processor is a redirected one, or was one (`restore`).
    """
    grouped = k.shape[2] != q.shape[2]
    if attention_call == "dispatch_attention_fn":
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        # The user's, which some processors do not pass on; a class's own is for masks, which there are none of here.
        backend = vars(processor).get("_attention_backend")
        out: Tensor = dispatch_attention_fn(q, k, v, backend=backend, enable_gqa=grouped)
        return out
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped).transpose(1, 2)


def site_of(processor: Any) -> Site | None:
    """The site of a redirected processor, None for any other."""
    return getattr(processor, "_accel_site", None)


@functools.cache
def _redirected(stock: Any, family: Family) -> type:
    """One class for each stock class, so that torch.compile sees the same code at every layer."""
    call: Any = stock.__call__
    here = functools.partial(_attend_here, masks_text=family.text_valid is not None)
    own = family.call.get(stock.__name__)
    inner = functools.partial(own, here) if own else _rebound(stock, family, here)

    @functools.wraps(call)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        _RUNNING.handle = self._accel_handle
        return inner(self, *args, **kwargs)

    def __reduce_ex__(self: Any, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (stock, _settings(self))  # a copy or a pickle holds the stock processor

    return type(f"Accelerated{stock.__name__}", (stock,), {"__call__": __call__, "__reduce_ex__": __reduce_ex__})


def _rebound(stock: Any, family: Family, here: Callable[..., Tensor]) -> Callable[..., Any]:
    """The `__call__` of a stock processor with another attention function."""
    call: Any = stock.__call__
    names = family.attention_call.split(".")
    if not isinstance(call, types.FunctionType) or not {*names} <= {*call.__code__.co_names}:
        raise TypeError(
            f"expected a processor whose __call__ calls {family.attention_call}, as diffusers' own does; found "
            f"{stock.__module__}.{stock.__qualname__}. Set the model's stock processor (set_attn_processor) before patching."
        )
    if family.beside is not None:
        here = _unless(family.beside, call.__globals__[names[0]], here)
    namespace = {**call.__globals__, names[0]: here if len(names) == 1 else _Functional(here)}
    namespace.pop("__name__")  # else torch.compile resolves globals from the real module
    rebound = types.FunctionType(call.__code__, namespace, call.__name__, call.__defaults__, call.__closure__)
    rebound.__kwdefaults__ = call.__kwdefaults__
    return rebound


def _unless(beside: Callable[[Any], bool], stock: Callable[..., Tensor], here: Callable[..., Tensor]) -> Any:
    def attend(*args: Any, **kwargs: Any) -> Tensor:
        return stock(*args, **kwargs) if beside(kwargs) else here(*args, **kwargs)

    return attend


def _rebuild(stock: type, settings: dict[str, Any]) -> Any:
    processor: Any = object.__new__(stock)
    vars(processor).update(settings)
    return processor


def _settings(processor: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(processor).items() if name not in _OURS}


class _Functional:
    """Stands in for `torch.nn.functional` in a redirected processor: all of it, but for attention, in [B, H, S, D]."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        self._attend = attend

    def __getattr__(self, name: str) -> Any:
        return getattr(F, name)

    def scaled_dot_product_attention(
        self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return self._attend(query, key, value, *args, **kwargs).transpose(1, 2)


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
    masks_text: bool,
) -> Tensor:
    """Takes the place of `dispatch_attention_fn` in a redirected processor; `backend` is read by the site's dense call.

    With `masks_text` the model's mask [B or 1, 1, 1, S] is left out: it says what the site knows from the model's own arguments.
    """
    if masks_text and attn_mask is not None and attn_mask.dim() == 4 and attn_mask.shape[1:3] == (1, 1):
        attn_mask = None if attn_mask.shape[0] in (1, query.shape[0]) else attn_mask
    if attn_mask is not None or is_causal or dropout_p or scale is not None or attention_kwargs:
        raise ValueError(
            "expected plain self-attention, found a mask, causality, dropout, a scale or backend arguments; "
            "call diffusers_accel.unpatch(pipe) for such calls"
        )
    if not _fit(query, key, value, enable_gqa):
        raise ValueError(
            "expected self-attention with q, k and v of one shape [B, S, H, D], save that q may have another number of tokens "
            "and, with enable_gqa, a multiple of the heads, found "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}; call diffusers_accel.unpatch(pipe) for such calls"
        )
    if parallel_config is not None:
        return _attend_in_parallel(query, key, value, parallel_config, _RUNNING.handle)
    return attend(query, key, value, _RUNNING.handle)


@torch.compiler.disable(reason="exchanges heads for tokens between processes")
def _attend_in_parallel(q: Tensor, k: Tensor, v: Tensor, parallel_config: Any, handle: Tensor) -> Tensor:
    site = SITES[int(handle)]
    _check_numbers(site, query=q, key=k, value=v)
    if reason := unfit(site.model.family, site.model.module, site.model.rows(len(q), site.layer)[0].layout):
        raise ValueError(f"{site.transformer}: {reason}")
    return attend_in_parallel(q, k, v, parallel_config, site.costs_of_heads(len(q)), site.attend)


def _fit(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> bool:
    """Whether these are q, k and v of one self-attention. How many tokens there are of each, the site checks when they run: in a
    compiled graph the number may depend on data."""
    alike = q.shape[0] == k.shape[0] == v.shape[0] and q.shape[3] == k.shape[3] == v.shape[3]
    alike = alike and k.shape[2] == v.shape[2]
    return alike and (q.shape[2] == k.shape[2] or (grouped and q.shape[2] % k.shape[2] == 0))
