"""A method: the short pipeline of stages by which a head attends.

order -> select -> attend in a precision -> merge with what is reused -> restore order
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.files import quoted
from diffusers_accel.kernels.attention import PRECISIONS, choices
from diffusers_accel.methods.context import Context
from diffusers_accel.methods.draft import Draft
from diffusers_accel.methods.orders import AxisOrder, Order, parse_order
from diffusers_accel.methods.reuse import Reuse
from diffusers_accel.methods.selects import All, Band, Skip, Stripe
from diffusers_accel.methods.stored import Stored

Select = All | Skip | Band | Stripe | Draft | Stored
SELECTS: dict[str, type[Select]] = {cls.kind: cls for cls in (All, Skip, Band, Stripe, Draft, Stored)}
AUTO = "auto"  # the precision of a recipe that leaves it to the device; `patch` replaces it


@dataclass(frozen=True)
class Method:
    """One way to attend for some heads.

    Args:
        order: how tokens are sorted before blocks are cut.
        select: which key blocks a query block reads, in that order.
        precision: in which type products are computed: "input", "int8" (QK), "int8_fp8" (QK and PV).
        reuse: what is kept of the blocks that are not read; None: nothing, their attention goes to the others.

    Raises:
        ValueError: for a combination that means nothing, such as a stripe over tokens that are not in frames.
    """

    order: Order = AxisOrder()
    select: Select = All()
    precision: str = "input"
    reuse: Reuse | None = None

    def __post_init__(self) -> None:
        kind = self.select.kind
        if isinstance(self.select, (All, Skip)):
            if not self.order.identity:
                raise ValueError(f'"{kind}" reads the same in every order: leave the order out, found {self.order}')
            if self.reuse:
                raise ValueError(f'"{kind}" leaves no blocks whose attention could be kept: leave the reuse out')
        if isinstance(self.select, Stripe) and not self.order.identity:
            raise ValueError(f'a stripe is a set of frame rows: it goes with the order "fhw" only, found {self.order}')
        if isinstance(self.select, Stored) and not isinstance(self.order, AxisOrder):
            raise ValueError(f"masks are stored for the six axis orders, found the order {self.order.label}")
        if isinstance(self.select, Draft) and self.select.hold > 1 and self.reuse:
            raise ValueError(
                f"a reuse keeps its selection until it refreshes: leave hold at 1, found {self.select.hold}"
            )
        if self.precision not in (*PRECISIONS, AUTO):
            raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, found {self.precision!r}")
        if self.skips and self.precision != "input":
            raise ValueError(
                f"a head that is skipped computes nothing: leave its precision out, found {self.precision!r}"
            )

    @property
    def dense(self) -> bool:
        """Whether the user's own attention computes it."""
        return isinstance(self.select, All) and self.precision == "input"

    @property
    def skips(self) -> bool:
        return isinstance(self.select, Skip)

    @property
    def dynamic(self) -> bool:
        """Whether the selection depends on q and k."""
        return isinstance(self.select, Draft)

    @property
    def calibrated(self) -> bool:
        """Whether the mask depends on the layer and head, through the plan's tensors."""
        return isinstance(self.select, Stored) or (isinstance(self.select, Stripe) and self.select.calibrated)

    @property
    def timed(self) -> bool:
        """Whether what it computes depends on the step."""
        held = isinstance(self.select, Draft) and self.select.hold > 1
        return self.reuse is not None or held

    def mask(self, ctx: Context) -> Tensor:
        """Which key blocks are read: bool [1 or heads, query blocks, key blocks], in this method's token order."""
        if isinstance(self.select, Draft):
            raise TypeError("a draft has no mask without q and k: use select.pattern(q, k, layout, order)")
        return self.select.mask(ctx, self.order)

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
        calibrated = "calibrated" if isinstance(self.select, Stripe) and self.select.calibrated else ""
        precision = "" if self.precision == "input" else self.precision
        kind = {"all": "dense"}.get(self.select.kind, self.select.kind)
        words = (kind, order, calibrated, self.select.label, precision)
        return ", ".join(part for part in (" ".join(w for w in words if w), self.reuse and self.reuse.label) if part)

    def to_json(self) -> dict[str, Any]:
        """Plain data: {"order": "hwf", "select": {"kind": "band", "density": 0.25, "first_frame": True}}."""
        data: dict[str, Any] = {} if self.order.identity else {"order": self.order.label}
        data["select"] = {"kind": self.select.kind, **dataclasses.asdict(self.select)}
        if self.precision != "input":
            data["precision"] = self.precision
        if self.reuse:
            data["reuse"] = dataclasses.asdict(self.reuse)
        return data

    @staticmethod
    def from_json(data: object) -> Method:
        """The inverse of `to_json`; anything unexpected is refused with a ValueError that names it."""
        fields = _object(data, "a method", {"order", "select", "precision", "reuse"}, required={"select"})
        select = fields["select"]
        kind = select.get("kind") if isinstance(select, Mapping) else None
        if not isinstance(kind, str) or kind not in SELECTS:
            raise ValueError(f"select.kind: expected one of {sorted(SELECTS)}, found {quoted(kind)}")
        chosen = _stage(SELECTS[kind], {k: v for k, v in select.items() if k != "kind"}, f"select {kind!r}")
        order, precision = fields.get("order", "fhw"), fields.get("precision", "input")
        _check_type("order", order, "str")
        if precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, found {quoted(precision)}")
        reuse = _stage(Reuse, fields["reuse"], "reuse") if "reuse" in fields else None
        return Method(order=_parsed_order(order), select=chosen, precision=precision, reuse=reuse)


DENSE = Method()


def _parsed_order(text: str) -> Order:
    try:
        return parse_order(text)
    except ValueError as error:
        raise ValueError(f"order: {error}") from error


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
