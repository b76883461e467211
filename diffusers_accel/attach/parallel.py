"""Context parallelism by Ulysses: each process has a piece of the sequence of all heads, and attends with all of the sequence for
its share of the heads. diffusers exchanges the one for the other; we attend between the two exchanges.

Which heads a process gets is ours to say: heads of unequal density are dealt so that all processes have about equally much to do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from diffusers_accel.families import Family
from diffusers_accel.layout import TokenLayout

Attend = Callable[[Tensor, Tensor, Tensor, tuple[int, ...]], Tensor]


def refusal(parallel_config: Any) -> str | None:
    """Why attention cannot be ours under this parallelism of diffusers, or None."""
    if getattr(parallel_config, "tensor_parallel_config", None) is not None:
        return "tensor parallelism shards heads out of sight of a patch: use ContextParallelConfig(ulysses_degree=N)"
    context = getattr(parallel_config, "context_parallel_config", None)
    if context is not None and context.ring_degree > 1:
        return (
            "ring attention merges pieces inside one backend of diffusers, which a patch cannot stand in for: use "
            "ContextParallelConfig(ulysses_degree=N)"
        )
    return None


def unfit(family: Family, module: Any, layout: TokenLayout | None = None) -> str | None:
    """Why this model's attention cannot be ours where processes share its sequence, or None.

    Args:
        layout: how its tokens lie, where that is known.
    """
    if family.no_parallel is not None and (reason := family.no_parallel(module.config)):
        return (
            f"{type(module).__name__} does not run under Ulysses, also without a patch: {reason}. Run it in one process"
        )
    if layout is not None and len(layout.segments) > 1 and (reason := _own_plan(module)):
        return (
            f"{reason} {type(module).__name__}, and under one of your own (cp_plan) text and "
            "video may come piece by piece, in an order that a patch does not know: run it in one process, or without a patch"
        )
    return None


_OWN: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()  # asked at each call, and settled once parallelism is on


def _own_plan(module: Any) -> str | None:
    """How a message begins about a sequence that is dealt otherwise than diffusers says for this class, or None."""
    if module not in _OWN:
        stock = getattr(type(module), "_cp_plan", None)
        if stock is None:
            _OWN[module] = "diffusers has no context-parallel plan for"
        elif _applied(module) == {part: _as_applied(rule) for part, rule in stock.items() if has_part(module, part)}:
            _OWN[module] = None
        else:
            _OWN[module] = "the sequence is not dealt by the context-parallel plan that diffusers has for"
    return _OWN[module]


def _as_applied(rule: Any) -> Any:
    """Of a plan, as a hook holds it: rules for outputs in a list."""
    return rule if isinstance(rule, (dict, list, tuple)) else [rule]


def has_part(module: Any, part: str) -> bool:
    """Whether a model has a part that a plan names, such as "blocks.0" or "blocks.*"."""
    try:
        return module.get_submodule(part.partition(".*")[0]) is not None
    except AttributeError:
        return False


def _applied(module: Any) -> dict[str, Any]:
    """The context-parallel plan that was applied to a model, whoever gave it: part -> rule, as the hooks there hold it."""
    found = {}
    for part in module.modules():
        for name, hook in getattr(getattr(part, "_diffusers_hook", None), "hooks", {}).items():
            if name.startswith(("cp_input---", "cp_output---")):
                found[name.partition("---")[2]] = hook.metadata
    return found


@functools.lru_cache(maxsize=1024)  # an order for each layer and span
def deal(costs: tuple[float, ...], processes: int) -> tuple[int, ...]:
    """The numbers of the heads in the order in which processes take them, equally many each: the costliest first, to whoever
    has least to do and room left. The model's own order where all cost the same.

    Raises:
        ValueError: the heads cannot be spread evenly.
    """
    each, rest = divmod(len(costs), processes)
    if rest:
        raise ValueError(
            f"expected a number of processes that divides the {len(costs)} heads, found {processes}: choose ulysses_degree so"
        )
    if len(set(costs)) == 1:
        return tuple(range(len(costs)))
    hands: list[list[int]] = [[] for _ in range(processes)]
    for head in sorted(range(len(costs)), key=lambda head: -costs[head]):
        free = (hand for hand in hands if len(hand) < each)
        min(free, key=lambda hand: sum(costs[other] for other in hand)).append(head)
    return tuple(head for hand in hands for head in sorted(hand))


def attend_in_parallel(
    q: Tensor, k: Tensor, v: Tensor, parallel_config: Any, costs: Sequence[float], attend: Attend
) -> Tensor:
    """Attention of a piece of the sequence, q, k, v and result [B, S / N, H, D].

    Args:
        parallel_config: diffusers' own, of the processor.
        costs: of each of the H heads, the same in all processes.
        attend: called with q, k, v [B, S, H / N, D] and the numbers of these heads in the model.

    Raises:
        ValueError: another parallelism than Ulysses, or heads that it does not divide.
    """
    if reason := refusal(parallel_config):
        raise ValueError(reason)
    from diffusers.models.attention_dispatch import dispatch_attention_fn

    if k.shape[2] != q.shape[2]:
        raise ValueError(
            f"expected as many heads of keys as of queries under context parallelism, found {k.shape[2]} and {q.shape[2]}: "
            "diffusers exchanges no grouped heads. Run this model in one process"
        )
    context = parallel_config.context_parallel_config
    order = deal(tuple(costs), context.ulysses_degree)
    moved = order != tuple(range(len(order)))
    if moved:
        q, k, v = (x.index_select(2, _index(order, x.device)) for x in (q, k, v))
    each = len(order) // context.ulysses_degree
    mine = order[context._ulysses_local_rank * each :][:each]
    with _InPlaceOfAttention(functools.partial(_transposed, attend, mine)):
        out: Tensor = dispatch_attention_fn(q, k, v, backend="native", parallel_config=parallel_config)
    return out.index_select(2, _index(_inverse(order), out.device)) if moved else out


def all_agree_to_compute(compute: bool, module: Any, device: torch.device) -> bool:
    """Whether any process of a parallel model wants its forward computed: those that predicted alone would wait for ever."""
    context = getattr(getattr(module, "_parallel_config", None), "context_parallel_config", None)
    if context is None:
        return compute
    wanted = torch.tensor([float(compute)], device=device)
    torch.distributed.all_reduce(wanted, torch.distributed.ReduceOp.MAX, group=context._flattened_mesh.get_group())
    return bool(wanted.item())


class _InPlaceOfAttention(TorchFunctionMode):
    """Runs `attend` wherever `F.scaled_dot_product_attention` is called, with heads before tokens."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._attend = attend

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | (kwargs or {})
            return self._attend(given["query"], given["key"], given["value"])
        return func(*args, **(kwargs or {}))


def _transposed(attend: Attend, heads: tuple[int, ...], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return attend(q, k, v, heads).transpose(1, 2)


@functools.lru_cache(maxsize=1024)
def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(range(len(order)), key=order.__getitem__))


@functools.lru_cache(maxsize=1024)
def _index(order: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(order, device=device)
