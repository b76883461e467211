"""How a transformer's `forward` is intercepted: one attribute of the instance, which leaves nothing behind.

`torch.compile` sees one frame, the model's own, whichever way and whenever it is called: only the wrapper's own frame is
skipped (`recursive=False`), and what decides is never traced. A predicted forward would have no compiled frame at all, which
torch refuses under `fullgraph=True`: it has a graph of one operator that does nothing. accelerate's hooks keep the model's
forward in `_old_forward` and write it back after every call of the pipeline: where that exists, it is what is wrapped.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

HOLDERS = ("_old_forward", "forward")  # accelerate's place for the model's own forward, and PyTorch's


@torch.library.custom_op("diffusers_accel::nothing", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def nothing(x: Tensor) -> Tensor:
    """An operator for torch.compile to see; opaque, so that nothing is generated for it."""
    return x.clone()


@nothing.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


_NOTHING = torch.zeros((), device="cpu")


def _graph_of_nothing(x: Tensor) -> Tensor:
    return nothing(x)


class Interceptor(Protocol):
    """Runs around every forward. Neither method is traced by torch.compile."""

    def before(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """(what `after` is to know, the output if the model need not run, else None)."""
        ...

    def after(self, call: Any, output: Any) -> None:
        """The model has run, without an exception."""
        ...


def wrap(module: nn.Module, name: str, interceptor: Interceptor) -> Callable[[], None]:
    """Puts `interceptor` around the forward of a module; returns the function that takes it off again.

    Args:
        module: the transformer.
        name: how messages call it.
        interceptor: what decides.
    """
    wrapper = _Wrapper(wrapped_forward(module), interceptor)
    setattr(module, _holder(module), wrapper)
    guard = module.register_forward_hook(_Guard(wrapper, name))

    def undo() -> None:
        guard.remove()
        wrapper.remove(module)

    return undo


def wrapped_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that `wrap` would stand around."""
    inner = getattr(module, _holder(module))
    while isinstance(inner, _Wrapper) and inner.interceptor is None:  # of an earlier patch, put back by another hook
        inner = inner.inner
    found: Callable[..., Any] = inner
    return found


def _holder(module: nn.Module) -> str:
    return HOLDERS[0] if hasattr(module, HOLDERS[0]) else HOLDERS[1]


class _Wrapper:
    """Stands in for a `forward`; in a copy or pickle of the model, the forward that it wraps is in its place."""

    def __init__(self, inner: Callable[..., Any], interceptor: Interceptor) -> None:
        self.inner = inner
        self.interceptor: Interceptor | None = interceptor
        self.passed = False  # since the guard has looked last
        functools.update_wrapper(self, inner)

    # Not recursive: the model's own frame is compiled as if this one were not there.
    @torch.compiler.disable(recursive=False, reason="decides whether the model runs")
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.interceptor is None:
            return self.inner(*args, **kwargs)
        self.passed = True
        interceptor = self.interceptor
        call, known = interceptor.before(args, kwargs)
        if known is not None:
            _graph_of_nothing(_NOTHING)
            return known
        output = self.inner(*args, **kwargs)
        interceptor.after(call, output)
        return output

    def remove(self, module: nn.Module) -> None:
        """Takes it out where it is on top; where another hook holds it, it passes straight through from now on."""
        self.interceptor = None
        for holder in HOLDERS:
            if vars(module).get(holder) is not self:
                continue
            if holder == "forward" and _is_own(self.inner, module):
                del module.forward
            else:
                setattr(module, holder, self.inner)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.inner,)


class _Guard:
    """A forward hook that sees whether a forward came through the wrapper; in a copy of the model it does nothing."""

    def __init__(self, wrapper: _Wrapper | None = None, name: str = "") -> None:
        self.wrapper = wrapper
        self.name = name

    @torch.compiler.disable(reason="looks after the wrapper, not the model")
    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.wrapper is None:
            return
        if not self.wrapper.passed:
            raise RuntimeError(
                f"expected the forward of {self.name} to run under its patch, found that something has replaced it since (such "
                "as disable_cache of a cache that was enabled before patching): call diffusers_accel.unpatch(pipe) and patch "
                "it again"
            )
        self.wrapper.passed = False

    def __reduce__(self) -> tuple[Any, ...]:
        return _Guard, ()


def _is_own(forward: Callable[..., Any], module: nn.Module) -> bool:
    """Whether this is the forward that the module's class gives it."""
    return (
        isinstance(forward, types.MethodType)
        and forward.__self__ is module
        and forward.__func__ is getattr(type(module), "forward", None)
    )


def _same(forward: Callable[..., Any]) -> Callable[..., Any]:
    return forward
