"""Which implementation of an operator runs, and why the others do not."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

from diffusers_accel.extras import install
from diffusers_accel.kernels.ranking import UNRANKED


@dataclass(frozen=True)
class Choice:
    """An implementation of an operator on some inputs.

    Args:
        name: what to ask for it by.
        reason: why it cannot run; None means that it can.
        opt_in: why `auto` leaves it out although it can run; None means that it does not.
    """

    name: str
    reason: str | None
    opt_in: str | None = None

    @property
    def automatic(self) -> bool:
        """Whether `auto` may take it: it does if it is the first of which that is so."""
        return self.reason is None and self.opt_in is None

    @property
    def verdict(self) -> str:
        """For tables and messages."""
        if self.reason is not None:
            return self.reason
        return "usable" if self.opt_in is None else f"usable; {self.opt_in}"


@dataclass(frozen=True, eq=False)
class Operator:
    """An operator's implementations, each a module `<package>.<name>`.

    Every module has `refuses(*inputs) -> str | None`, the reason why it cannot run on such inputs; what `inputs` are is
    the operator's own affair. A module is imported when it is asked for, so that Triton is not needed where it is not used.

    Args:
        package: that of the modules.
        names: all of them; fastest first where there is no `order`.
        order: inputs -> the names that `auto` tries, fastest first. The others have to be asked for.
        notes: name -> why it has to be asked for where `order` leaves it out.
    """

    package: str
    names: tuple[str, ...]
    order: Callable[..., tuple[str, ...]] | None = None
    notes: Mapping[str, str | None] = field(default_factory=dict)

    def choices(self, *inputs: Any) -> list[Choice]:
        """Every implementation with its verdict: those that `auto` tries, fastest first, then the others."""
        tried = self.tried(*inputs)
        left_out = [name for name in self.names if name not in tried]
        return [
            *(Choice(name, _reason(self, name, inputs)) for name in tried),
            *(_opt_in(name, _reason(self, name, inputs), self.notes.get(name)) for name in left_out),
        ]

    def choose(self, impl: str, *inputs: Any) -> ModuleType:
        """The module that runs: the one asked for, or for `auto` the fastest that can of those that it tries.

        Raises:
            ValueError: `impl` is unknown or cannot run; the message lists every implementation with its reason.
        """
        return _chosen(self, impl, inputs)

    def tried(self, *inputs: Any) -> tuple[str, ...]:
        """The names that `auto` tries on such inputs, fastest first."""
        return self.names if self.order is None else self.order(*inputs)

    def _module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")


def _opt_in(name: str, reason: str | None, note: str | None) -> Choice:
    return Choice(name, reason, None if reason is not None else note or UNRANKED)


# What can run on given inputs does not change in the life of a process, and is asked for at every call.
@cache
def _reason(operator: Operator, name: str, inputs: tuple[Any, ...]) -> str | None:
    try:
        module = operator._module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        return f"needs Triton: {install('triton')}"
    return module.refuses(*inputs)


@cache
def _chosen(operator: Operator, impl: str, inputs: tuple[Any, ...]) -> ModuleType:
    if impl != "auto" and impl not in operator.names:
        raise ValueError(f"impl must be 'auto' or one of {', '.join(operator.names)}, found {impl!r}")
    for name in operator.tried(*inputs) if impl == "auto" else (impl,):
        if _reason(operator, name, inputs) is None:
            return operator._module(name)
    table = "\n".join(f"  {option.name}: {option.verdict}" for option in operator.choices(*inputs))
    found = ", ".join(str(x) for x in inputs)
    raise ValueError(f"{operator.package} cannot run impl={impl!r} on ({found}). Every implementation:\n{table}")
