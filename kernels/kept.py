"""Small tensors that are made once and kept for the process, until nothing that asked for them is at work any more."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeVar

T = TypeVar("T")

_FORGETTERS: list[Callable[[], None]] = []


def kept(most: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Keeps the `most` results of a function that were used last, by its arguments, until `forget_kept`."""

    def decorate(build: Callable[..., T]) -> Callable[..., T]:
        cached = lru_cache(maxsize=most)(build)
        _FORGETTERS.append(cached.cache_clear)
        return cached

    return decorate


def forget_kept() -> None:
    """Drops all that is kept; what is asked for again is made again."""
    for forget in _FORGETTERS:
        forget()
