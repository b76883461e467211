"""Processes that share one work, each with a whole pipeline on a device of its own: those of an initialised process group of
torch.distributed, as `accelerate launch` and `torchrun` start them. One process otherwise.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from diffusers_accel.files import quoted
from diffusers_accel.support.log import LOG

T = TypeVar("T")

# That one process may work while others wait for it. NCCL's usual ten minutes are less than a long clip takes.
LONGEST_WAIT = timedelta(days=30)


class OtherProcessFailed(RuntimeError):
    """Another process that shares the work has failed, and says itself why."""

    said_elsewhere = True


@dataclass(frozen=True)
class Processes:
    """The processes of one work. Each makes the same calls of `each` and `first`, in the same order.

    Args:
        rank: of this one, from 0.
        count: how many there are.
        group: of torch.distributed, by which they tell each other; None where there is one process.
    """

    rank: int = 0
    count: int = 1
    group: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this is the one that writes files and talks to the user."""
        return self.rank == 0

    def each(self, work: Callable[[], T]) -> list[T]:
        """Everybody does their own work, at the same time; everybody gets what all have found, in the order of ranks.

        Raises:
            OtherProcessFailed: another one has failed. Whatever `work` itself raises is raised as it is, when all are done.
        """
        if self.count == 1:
            return [work()]
        mine, failure = None, None
        try:
            mine = work()
        except Exception as error:
            failure = error
        told = self._gathered((mine, None if failure is None else f"{type(failure).__name__}: {failure}"))
        if failure is not None:
            raise failure
        for rank, (_, why) in enumerate(told):
            self._check_done(rank, why)
        return [found for found, _ in told]

    def first(self, work: Callable[[], T]) -> T:
        """The first process does it, while the others wait; everybody gets what it has found. Raises as `each` does."""
        if self.count == 1:
            return work()
        told: list[Any] = [None, None]
        failure = None
        if self.is_first:
            try:
                told[0] = work()
            except Exception as error:
                failure, told[1] = error, f"{type(error).__name__}: {error}"
        with _connected(self.count):
            dist.broadcast_object_list(told, src=0, group=self.group)
        if failure is not None:
            raise failure
        self._check_done(0, told[1])
        found: T = told[0]
        return found

    def _check_done(self, rank: int, why: str | None) -> None:
        if why is not None:
            raise OtherProcessFailed(f"process {rank} of {self.count} failed: {why}")

    def agree(self, what: str, mine: Any) -> None:
        """Makes sure that all processes have been given the same.

        Raises:
            ValueError: in all of them, where that of one differs from the first one's.
        """
        told = self.each(lambda: mine)
        for rank, other in enumerate(told):
            if other != told[0]:
                here, there = _difference(told[0], other)
                raise ValueError(
                    f"expected the same {what} in all {self.count} processes, found {quoted(here)} in process 0 and "
                    f"{quoted(there)} in process {rank}"
                )

    def _gathered(self, mine: Any) -> list[Any]:
        told: list[Any] = [None] * self.count
        with _connected(self.count):
            dist.all_gather_object(told, mine, group=self.group)
        return told


ALONE = Processes()


@contextmanager
def processes() -> Iterator[Processes]:
    """All that torch.distributed has been initialised with, for one work; all of them enter, and leave when it is done.

    They talk by a group of their own, on the host: what they tell each other is no business of a GPU's, and one may wait for
    another for hours. A process that ends, however it does, wakes those that wait for it.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield ALONE
        return
    group = dist.new_group(backend="gloo", timeout=LONGEST_WAIT)
    here, level = Processes(dist.get_rank(), dist.get_world_size(), group), LOG.level
    if not here.is_first:
        LOG.setLevel(logging.ERROR)  # the first one warns for all
    try:
        yield here
    finally:
        LOG.setLevel(level)
        dist.destroy_process_group(group)


@contextmanager
def _connected(count: int) -> Iterator[None]:
    """Says what it means when the connections to other processes are closed."""
    try:
        yield
    except RuntimeError as error:
        raise OtherProcessFailed(
            f"another of the {count} processes has ended; what it says itself tells why ({error})"
        ) from error


def _difference(one: Any, other: Any) -> tuple[Any, Any]:
    """Of two mappings the first entries that differ, else both."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in (*one, *other):
            if one.get(key) != other.get(key):
                return {key: one.get(key)}, {key: other.get(key)}
    return one, other
