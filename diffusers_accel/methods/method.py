"""A method: the short pipeline of stages by which a head attends.

order -> select -> attend in a precision -> rest -> restore order
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from diffusers_accel.files import quoted
from diffusers_accel.kernels.attention import PRECISIONS, choices
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.orders import AxisOrder, parse_order
from diffusers_accel.methods.rest import Rest
from diffusers_accel.methods.rests import RESTS, Drop
from diffusers_accel.methods.select import Select
from diffusers_accel.methods.selects import SELECTS, All

AUTO = "auto"  # the precision of a recipe that leaves it to the device; `patch` replaces it


@dataclass(frozen=True)
class Method:
    """One way to attend for some heads.

    Args:
        order: how tokens are sorted before blocks are cut.
        select: which key blocks a query block reads, in that order.
        precision: in which type products are computed: "input", "int8" (QK), "int8_fp8" (QK and PV).
        rest: what happens to the blocks that are not read.

    Raises:
        ValueError: for a combination that means nothing, such as a stripe over tokens that are not in frames.
    """

    order: Order = AxisOrder()
    select: Select = All()
    precision: str = "input"
    rest: Rest = Drop()

    def __post_init__(self) -> None:
        if reason := self.select.refuses(self.order) or self.rest.refuses(self.select):
            raise ValueError(reason)
        if self.precision not in (*PRECISIONS, AUTO):
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, found {self.precision!r}")
        if self.skips and self.precision != "input":
            raise ValueError(
                f"a head that is skipped computes nothing: leave its precision out, found {self.precision!r}"
            )

    @property
    def dense(self) -> bool:
        """Whether the user's own attention computes it."""
        return self.select.reads_all and self.precision == "input"

    @property
    def skips(self) -> bool:
        return self.select.reads_nothing

    @property
    def timed(self) -> bool:
        """Whether what it computes depends on the step."""
        return self.rest.remembers or self.select.reselect_every > 1

    @property
    def period(self) -> int | None:
        """After how many steps it makes anew what it uses again until then; None where it uses nothing again."""
        held = self.select.reselect_every
        return self.rest.period or (held if held > 1 else None)

    @property
    def expected_density(self) -> float | None:
        """The share of the blocks that it computes, in the mean over the schedule; None where that is not known ahead."""
        return self.rest.expected_density(self.select.expected_density)

    def refuses(self, head_dim: int, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this method cannot run there, or None if it can."""
        if self.dense or self.skips:
            return None
        found = choices(device, dtype, head_dim, precision=self.precision)
        options = [option for option in found if option.name != "reference"]  # skips nothing
        if any(option.reason is None for option in options):
            return None
        return "; ".join(f"{option.name}: {option.reason}" for option in options)

    @cached_property  # read for every head at every call
    def label(self) -> str:
        """A short name for tables, such as "band hwf 0.25" or "draft 8x16 0.25 int8, cached 3"."""
        order = "" if self.order.identity else self.order.label
        precision = "" if self.precision == "input" else self.precision
        words = (self.select.name, order, self.select.label, precision)
        return ", ".join(part for part in (" ".join(word for word in words if word), self.rest.label) if part)

    def to_json(self) -> dict[str, Any]:
        """Plain data: {"order": "hwf", "select": {"kind": "band", "density": 0.25, "first_frame": True}}."""
        data: dict[str, Any] = {} if self.order.identity else {"order": self.order.label}
        data["select"] = {"kind": self.select.kind, **dataclasses.asdict(self.select)}
        if self.precision != "input":
            data["precision"] = self.precision
        if self.rest != Drop():
            data["rest"] = {"kind": self.rest.kind, **dataclasses.asdict(self.rest)}
        return data

    @staticmethod
    def from_json(data: object) -> Method:
        """The inverse of `to_json`; anything unexpected is refused with a ValueError that names it."""
        fields = _object(data, "a method", {"order", "select", "precision", "rest"}, required={"select"})
        select = _of_kind(SELECTS, fields["select"], "select")
        rest = _of_kind(RESTS, fields["rest"], "rest") if "rest" in fields else Drop()
        order, precision = fields.get("order", "fhw"), fields.get("precision", "input")
        _check_type("order", order, "str")
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, found {quoted(precision)}")
        return Method(order=_parsed_order(order), select=select, precision=precision, rest=rest)


DENSE = Method()


def _parsed_order(text: str) -> Order:
    try:
        return parse_order(text)
    except ValueError as error:
        raise ValueError(f"order: {error}") from error


def _of_kind(kinds: Mapping[str, type], data: object, path: str) -> Any:
    """A stage from its kind and its fields."""
    kind = data.get("kind") if isinstance(data, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{path}.kind: expected one of {sorted(kinds)}, found {quoted(kind)}")
    assert isinstance(data, Mapping)
    return _stage(kinds[kind], {key: value for key, value in data.items() if key != "kind"}, f"{path} {kind!r}")


def _stage(cls: type, data: object, what: str) -> Any:
    """A stage from its fields, every type checked."""
    known = {field.name: field for field in dataclasses.fields(cls)}
    required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
    arguments = _object(data, what, set(known), required)
    path = what.split()[0]
    for name, value in arguments.items():
        _check_type(f"{path}.{name}", value, str(known[name].type))
    try:
        return cls(**arguments)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _object(data: object, what: str, known: set[str], required: set[str]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{what}: expected an object, found {type(data).__name__}")
    if unknown := sorted(set(data) - known, key=str):
        raise ValueError(f"{what}: unknown key {quoted(unknown[0])}, expected only {sorted(known)}")
    if missing := sorted(required - set(data)):
        raise ValueError(f"{what}: {missing[0]!r} is missing")
    return dict(data)


MOST = 2**31 - 1  # of whole numbers in a file: what kernels count with
_TYPES: dict[str, tuple[type, ...]] = {
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "int": (int,),
    "None": (type(None),),
}


def _check_type(path: str, value: object, annotation: str) -> None:
    expected = tuple(each for name in annotation.split(" | ") for each in _TYPES[name])
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        raise ValueError(f"{path}: expected {annotation}, found {quoted(value)}")
    if isinstance(value, int) and not -MOST <= value <= MOST:
        raise ValueError(f"{path}: expected a whole number of at most {MOST:,}, found {quoted(value)}")
