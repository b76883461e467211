"""Indicators: what a transformer makes of a step before its blocks, by which TeaCache tells how far its output will change.

The model's own forward runs as far as the indicator and no further, so nothing of a family's embeddings is written a second time.
An embedding of the timestep is the same for every prompt; the tokens that go into the first self-attention are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_accel.families import Family

TOKENS = "tokens"  # what the first self-attention is given: modulated by the timestep, where the family does that


class _Reached(BaseException):
    """Ends a forward at its indicator; no exception, so that no model's code catches it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def check_indicator(name: str, family: Family) -> None:
    """Raises ValueError where a family has no indicator of this name."""
    known = [*family.indicators, TOKENS]
    if name not in known:
        raise ValueError(f"indicator: expected one that {family.name} has ({', '.join(known)}), found {name!r}")


def indicator(
    name: str,
    module: nn.Module,
    family: Family,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Tensor:
    """The indicator of a forward of `module`, of any shape and dtype.

    Args:
        name: one that `check_indicator` knows.
        module: the transformer.
        family: of it.
        forward: what runs it.
        args, kwargs: what it is given.
    """
    handle = _watch(name, module, family)
    try:
        forward(*args, **kwargs)
    except _Reached as reached:
        return reached.value.detach()
    finally:
        handle.remove()
    raise RuntimeError(f"expected the forward of {type(module).__name__} to come by its indicator {name!r}, it did not")


def _watch(name: str, module: nn.Module, family: Family) -> Any:
    if name == TOKENS:
        _, attention = family.self_attention(module)[0]
        return attention.register_forward_pre_hook(_before, with_kwargs=True)
    return module.get_submodule(family.indicators[name]).register_forward_hook(_behind)


def _before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = kwargs.get("hidden_states", args[0] if args else None)
    if not isinstance(given, torch.Tensor):
        raise RuntimeError(f"expected a self-attention that is given hidden_states, found {sorted(kwargs)}")
    raise _Reached(given)


def _behind(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
    raise _Reached(output)
