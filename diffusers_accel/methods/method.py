"""A method: the short pipeline of stages by which a head attends.

order -> select -> attend in a precision -> rest -> restore order
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Union

import msgspec
import torch

from diffusers_accel.files import FileError, Schema, built, quoted, shaped, tagged
from diffusers_accel.kernels.attention import PRECISIONS, none_skips
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods.former import by_present_names
from diffusers_accel.methods.order import Order
from diffusers_accel.methods.orders import AxisOrder, parse_order
from diffusers_accel.methods.rest import Rest
from diffusers_accel.methods.rests import RESTS, Drop
from diffusers_accel.methods.select import Select
from diffusers_accel.methods.selects import SELECTS, All

_EXAMPLES = {
    "order": 'an order such as AxisOrder("hwf") or Patches(8, 16)',
    "select": "a selection such as Band(0.25) or Draft(0.25)",
    "rest": "a rest such as Drop(), Kept(3) or Pooled()",
}
_STAGES: dict[str, Mapping[str, type]] = {"select": SELECTS, "rest": RESTS}
AUTO = "auto"  # the precision of a recipe that leaves it to the device; `patch` replaces it


# A method as it stands in a file.
MethodData: Any = msgspec.defstruct(
    "Method",
    [
        ("order", str, AxisOrder().label),
        ("select", tagged(SELECTS)),
        ("precision", Literal[PRECISIONS], "input"),
        ("rest", Union[tagged(RESTS), msgspec.UnsetType], msgspec.UNSET),  # noqa: UP007
    ],
    bases=(Schema,),
    kw_only=True,
    namespace={
        "__doc__": "How some heads attend. order: a permutation of fhw (frames, height, width), or a patch such as 8x16 (token "
        "rows x columns); select: which keys are read; rest: what happens to the others."
    },
)


@dataclass(frozen=True)
class Method:
    """One way to attend for some heads.

    Args:
        order: how tokens are sorted before blocks are cut.
        select: which key blocks a query block reads, in that order.
        precision: in which type products are computed: "input", "int8" (QK), "int8_fp8" (QK and PV).
        rest: what happens to the blocks that are not read.

    Raises:
        ValueError: for a combination that has no meaning, such as a stripe over tokens that are not in frames.
    """

    order: Order = AxisOrder()
    select: Select = All()
    precision: str = "input"
    rest: Rest = Drop()

    def __post_init__(self) -> None:
        for name, stage, kind in (
            ("order", self.order, Order),
            ("select", self.select, Select),
            ("rest", self.rest, Rest),
        ):
            if not isinstance(stage, kind):
                raise TypeError(
                    f"{name}: expected {_EXAMPLES[name]}, found {quoted(stage)}: a Method is Method(order=..., select=..., "
                    "precision=..., rest=...)"
                )
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

    def expected_density(self, layout: TokenLayout | None = None) -> float | None:
        """The share of the blocks that it computes, in the mean over the schedule; None where that is not known ahead, for this
        layout or, without one, for all."""
        return self.rest.expected_density(self.select.expected_density(self.order, layout))

    def refuses(self, head_dim: int, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this method cannot run there, or None if it can."""
        if self.dense or self.skips:
            return None
        return none_skips(device, dtype, head_dim, self.precision)

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
        """The inverse of `to_json`; anything unexpected is refused with a FileError that names it."""
        found = shaped(stages_by_present_names(data), MethodData, "a method")
        try:
            order = parse_order(found.order)
        except ValueError as error:
            raise FileError(f"order: {error}") from error
        select = built(found.select, SELECTS, "select")
        rest = Drop() if found.rest is msgspec.UNSET else built(found.rest, RESTS, "rest")
        return Method(order=order, select=select, precision=found.precision, rest=rest)


DENSE = Method()


def stages_by_present_names(method: object, warn: bool = True) -> object:
    """A method's JSON data with the parameters of its stages under the names that they have now.

    Raises:
        FileError: one was given under both names.
    """
    if not isinstance(method, Mapping):
        return method
    found = dict(method)
    for stage, kinds in _STAGES.items():
        part = found.get(stage)
        kind = part.get("kind") if isinstance(part, Mapping) else None
        if isinstance(part, Mapping) and isinstance(kind, str) and kind in kinds:
            known = [field.name for field in dataclasses.fields(kinds[kind])]
            try:
                found[stage] = by_present_names(part, known, stage, warn)
            except ValueError as error:
                raise FileError(str(error)) from error
    return found
