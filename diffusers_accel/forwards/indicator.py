"""Indicators: what a transformer makes of a step before its blocks, by which TeaCache tells how far its output will change.

The model's own forward runs as far as the indicator and no further, so nothing of a family's embeddings is written a second time.
An embedding of the timestep is the same for every prompt; the tokens that go into the first self-attention, and what the first
block adds to them, are not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from diffusers_accel.families import Family

TOKENS = "tokens"  # what the first self-attention is given: modulated by the timestep, where the family does that
FIRST_BLOCK = "first_block"  # what the first block adds to its tokens; attention in it is dense


class _Reached(BaseException):
    """Ends a forward at its indicator; no exception, so that no model's code catches it."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def check_indicator(name: str, family: Family) -> None:
    """Raises ValueError where a family has no indicator of this name."""
    known = [*family.indicators, TOKENS, FIRST_BLOCK]
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
    handles = _watch(name, module, family)
    try:
        with torch.compiler.set_stance("force_eager"):  # a compiled block would have the hook in its graph
            forward(*args, **kwargs)
    except _Reached as reached:
        return reached.value.detach()
    finally:
        for handle in handles:
            handle.remove()
    raise RuntimeError(f"expected the forward of {type(module).__name__} to come by its indicator {name!r}, it did not")


def _watch(name: str, module: nn.Module, family: Family) -> list[Any]:
    """Hooks that end the forward at the indicator."""
    path, attention = family.self_attention(module)[0]
    if name == TOKENS:
        return [attention.register_forward_pre_hook(_before, with_kwargs=True)]
    if name == FIRST_BLOCK:
        return _around(module.get_submodule(_block_of(path)))
    return [module.get_submodule(family.indicators[name]).register_forward_hook(_behind)]


def _block_of(path: str) -> str:
    """The block of a self-attention, such as "blocks.0" of "blocks.0.attn1": the first member of a list on its path."""
    parts = path.split(".")
    return ".".join(parts[: next(place for place, part in enumerate(parts) if part.isdigit()) + 1])


def _around(block: nn.Module) -> list[Any]:
    given: list[Tensor] = []

    def begins(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given.append(_tokens(args, kwargs))

    def ends(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        found = next(
            (each for each in pytree.tree_leaves(output) if getattr(each, "shape", None) == given[-1].shape), None
        )
        if found is None:
            raise RuntimeError(
                f"expected a block that gives tokens of the shape {list(given[-1].shape)} that it was given"
            )
        raise _Reached(found - given[-1])

    return [block.register_forward_pre_hook(begins, with_kwargs=True), block.register_forward_hook(ends)]


def _before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Reached(_tokens(args, kwargs))


def _behind(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
    raise _Reached(output)


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What an attention module or a block attends with."""
    given = kwargs.get("hidden_states", args[0] if args else None)
    if not isinstance(given, torch.Tensor):
        raise RuntimeError(f"expected a module that is given hidden_states, found {sorted(kwargs)}")
    return given
