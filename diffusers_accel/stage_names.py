"""Names of parts that are no method by themselves, as plans and tables spell them: what each is, and how it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import MISSING, fields
from typing import NamedTuple, get_type_hints

from diffusers_accel.forwards import NAMED_PREDICTORS, PREDICTORS, RULES
from diffusers_accel.kernels.attention import PRECISIONS
from diffusers_accel.methods import RESTS, SELECTS
from diffusers_accel.methods.orders import parse_order

SOME = 0.25  # for an amount that has no default


class StageName(NamedTuple):
    """What a name is, such as "a selection", and what `patch` takes instead, after these imports."""

    what: str
    instead: str
    imports: str = ""

    @property
    def line(self) -> str:
        """Python that patches `pipe` with it."""
        return f"{self.imports}; patch(pipe, {self.instead})" if self.imports else f"patch(pipe, {self.instead})"


def stage_named(name: str) -> StageName | None:
    """What is known of a name of a stage, a precision, or a rule or predictor of a step cache, whatever its case."""
    key = name.casefold()
    return next((found for find in _FINDERS if (found := find(key)) is not None), None)


def stage_names() -> list[str]:
    return [*SELECTS, *RESTS, *PRECISIONS, *RULES, *PREDICTORS, *NAMED_PREDICTORS]


def _selection(name: str) -> StageName | None:
    if name not in SELECTS:
        return None
    cls = SELECTS[name]
    if cls(*(SOME for _ in _required(cls))).records:
        return StageName(
            "a selection that reads what a search has found",
            "search_plan(pipe, prompts)",
            _imported("", ["search_plan"]),
        )
    made = _made(cls)
    return StageName("a selection", f"Method(select={made})", _imported("methods", ["Method", cls.__name__]))


def _rest(name: str) -> StageName | None:
    if name not in RESTS:
        return None
    cls = RESTS[name]
    made = f"Method(select=Draft({SOME}), rest={_made(cls)})"
    return StageName(
        "a rest, which goes with a selection", made, _imported("methods", ["Draft", "Method", cls.__name__])
    )


def _order(name: str) -> StageName | None:
    try:
        order = parse_order(name)
    except ValueError:
        return None
    made = f"Method({order!r}, Draft({SOME}))"
    return StageName(
        "an order, which goes with a selection", made, _imported("methods", ["Draft", "Method", type(order).__name__])
    )


def _precision(name: str) -> StageName | None:
    return StageName("a precision", f'"dense", precision="{name}"') if name in PRECISIONS else None


def _rule(name: str) -> StageName | None:
    if name not in RULES:
        return None
    cls, own = RULES[name], " and ".join(_required(RULES[name]))
    what = f"a rule of a step cache, with {own} of your model" if own else "a rule of a step cache"
    return StageName(what, f"Forwards({_made(cls)})", _imported("forwards", ["Forwards", cls.__name__]))


def _predictor(name: str) -> StageName | None:
    if name in NAMED_PREDICTORS:
        return StageName("a predictor of a step cache", f'"easycache", predictor="{name}"')
    if name not in PREDICTORS:
        return None
    cls = PREDICTORS[name]
    made = f"Forwards(EasyCache(), {_made(cls)})"
    return StageName(
        "a predictor of a step cache", made, _imported("forwards", ["EasyCache", "Forwards", cls.__name__])
    )


_FINDERS: tuple[Callable[[str], StageName | None], ...] = (_selection, _rest, _order, _precision, _rule, _predictor)


def _made(cls: type) -> str:
    """How one is written: with an amount for each field that has no default, and with the field's own name for another kind."""
    kinds = get_type_hints(cls)
    given = (f"{name}={SOME if kinds[name] is float else name}" for name in _required(cls))
    return f"{cls.__name__}({', '.join(given)})"


def _required(cls: type) -> list[str]:
    return [field.name for field in fields(cls) if field.default is MISSING]


def _imported(room: str, names: Iterable[str]) -> str:
    return f"from {'.'.join(filter(None, ('diffusers_accel', room)))} import {', '.join(dict.fromkeys(names))}"
