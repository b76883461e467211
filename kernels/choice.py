"""Which implementation of an operator runs, and why the others do not."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Choice:
    """An implementation of an operator and why it cannot run; `reason` None means that it can."""

    name: str
    reason: str | None


@dataclass(frozen=True)
class Operator:
    """An operator's implementations, each a module `<package>.<name>`, fastest first.

    Every module has `refuses(*inputs) -> str | None`, the reason why it cannot run on such inputs; what `inputs` are is
    the operator's own affair. A module is imported when it is asked for, so that Triton is not needed where it is not used.
    """

    package: str
    names: tuple[str, ...]

    def choices(self, *inputs: Any) -> list[Choice]:
        """Every implementation with its verdict, fastest first."""
        return [Choice(name, _reason(self, name, inputs)) for name in self.names]

    def choose(self, impl: str, *inputs: Any) -> ModuleType:
        """The module that runs: the one asked for, or for `auto` the fastest that can.

        Raises:
            ValueError: `impl` is unknown or cannot run; the message lists every implementation with its reason.
        """
        return _chosen(self, impl, inputs)

    def _module(self, name: str) -> ModuleType:
        return importlib.import_module(f"{self.package}.{name}")


# What can run on given inputs does not change in the life of a process, and is asked for at every call.
@cache
def _reason(operator: Operator, name: str, inputs: tuple[Any, ...]) -> str | None:
    try:
        module = operator._module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "triton":
            raise
        return "needs Triton: pip install 'diffusers-accel[triton]'"
    return module.refuses(*inputs)


@cache
def _chosen(operator: Operator, impl: str, inputs: tuple[Any, ...]) -> ModuleType:
    if impl != "auto" and impl not in operator.names:
        raise ValueError(f"impl must be 'auto' or one of {', '.join(operator.names)}, found {impl!r}")
    for name in operator.names if impl == "auto" else (impl,):
        if _reason(operator, name, inputs) is None:
            return operator._module(name)
    table = "\n".join(f"  {option.name}: {option.reason or 'usable'}" for option in operator.choices(*inputs))
    found = ", ".join(str(x) for x in inputs)
    raise ValueError(f"{operator.package} cannot run impl={impl!r} on ({found}). Every implementation:\n{table}")
