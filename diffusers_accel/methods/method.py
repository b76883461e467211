"""A method: the short pipeline of stages (order -> select -> attend -> restore order) by which a head attends."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.kernels.attention import choices
from diffusers_accel.methods.context import Context
from diffusers_accel.methods.orders import AxisOrder
from diffusers_accel.methods.selects import SELECTS, All, Band, Select, Skip, Stripe


@dataclass(frozen=True)
class Method:
    """One way to attend for some heads.

    Args:
        order: how tokens are sorted before blocks are cut.
        select: which key blocks a query block reads, in that order.

    Raises:
        ValueError: for a combination that means nothing, such as a stripe over tokens that are not in frames.
    """

    order: AxisOrder = AxisOrder()
    select: Select = All()

    def __post_init__(self) -> None:
        if isinstance(self.select, (All, Skip)) and not self.order.identity:
            raise ValueError(
                f'"{self.select.kind}" reads the same in every order: leave the order out, found {self.order}'
            )
        if isinstance(self.select, Stripe) and not self.order.identity:
            raise ValueError(f'a stripe is a set of frame rows: it goes with the order "fhw" only, found {self.order}')

    @property
    def dense(self) -> bool:
        return isinstance(self.select, All)

    @property
    def skips(self) -> bool:
        return isinstance(self.select, Skip)

    @property
    def calibrated(self) -> bool:
        """Whether the mask depends on the layer and head, through the plan's tensors."""
        return isinstance(self.select, Stripe) and self.select.calibrated

    def mask(self, ctx: Context) -> Tensor:
        """Which key blocks are read: bool [1 or heads, query blocks, key blocks], in this method's token order."""
        return self.select.mask(ctx, frame_major=self.order.axes[0] == "f")

    def refuses(self, head_dim: int, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this method cannot run there, or None if it can."""
        if self.dense or self.skips:
            return None
        options = [option for option in choices(device, dtype, head_dim) if option.name != "reference"]  # skips nothing
        if any(option.reason is None for option in options):
            return None
        return "; ".join(f"{option.name}: {option.reason}" for option in options)

    @property
    def label(self) -> str:
        """A short name for tables, such as "band hwf 0.25"."""
        if self.dense or self.skips:
            return "dense" if self.dense else "skip"
        calibrated = "calibrated" if self.calibrated else ""
        order = "" if self.order.identity else self.order.axes
        assert isinstance(self.select, (Band, Stripe))
        return " ".join(word for word in (self.select.kind, order, calibrated, f"{self.select.density:g}") if word)

    def to_json(self) -> dict[str, Any]:
        """Plain data: {"order": "hwf", "select": {"kind": "band", "density": 0.25, "first_frame": True}}."""
        order = {} if self.order.identity else {"order": self.order.axes}
        return {**order, "select": {"kind": self.select.kind, **dataclasses.asdict(self.select)}}

    @staticmethod
    def from_json(data: object) -> Method:
        """The inverse of `to_json`; anything unexpected is refused with a ValueError that names it."""
        fields = _object(data, "a method", {"order", "select"}, required={"select"})
        select = fields["select"]
        kind = select.get("kind") if isinstance(select, Mapping) else None
        if not isinstance(kind, str) or kind not in SELECTS:
            raise ValueError(f"select.kind: expected one of {sorted(SELECTS)}, found {kind!r}")
        cls = SELECTS[kind]
        known = {field.name: field for field in dataclasses.fields(cls)}
        required = {name for name, field in known.items() if field.default is dataclasses.MISSING}
        arguments = _object(select, f"select {kind!r}", {"kind", *known}, required)
        arguments.pop("kind")
        for name, value in arguments.items():
            _check_type(f"select.{name}", value, str(known[name].type))
        order = fields.get("order", "fhw")
        _check_type("order", order, "str")
        return Method(order=AxisOrder(order), select=cls(**arguments))


DENSE = Method()


def _object(data: object, what: str, known: set[str], required: set[str]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise ValueError(f"{what}: expected an object, found {type(data).__name__}")
    if unknown := sorted(set(data) - known):
        raise ValueError(f"{what}: unknown key {unknown[0]!r}, expected only {sorted(known)}")
    if missing := sorted(required - set(data)):
        raise ValueError(f"{what}: {missing[0]!r} is missing")
    return dict(data)


def _check_type(path: str, value: object, annotation: str) -> None:
    expected: tuple[type, ...] = {"float": (float, int), "bool": (bool,), "str": (str,), "int": (int,)}[annotation]
    if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
        raise ValueError(f"{path}: expected {annotation}, found {value!r}")
