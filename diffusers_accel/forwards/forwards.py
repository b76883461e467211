"""A rule and a predictor: the scope `forwards` of a patch, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Union

import msgspec

from diffusers_accel.files import Schema, built, printable, quoted, shaped, tagged
from diffusers_accel.forwards.predictor import Predictor
from diffusers_accel.forwards.predictors import PREDICTORS, Last
from diffusers_accel.forwards.rule import GUIDE, NOISE, SINCE_COMPUTED, VIDEO, Rule
from diffusers_accel.forwards.rules import RULES

# Forwards as they stand in a file.
ForwardsData: Any = msgspec.defstruct(
    "Forwards",
    [
        ("rule", tagged(RULES)),
        ("predictor", Union[tagged(PREDICTORS), msgspec.UnsetType], msgspec.UNSET),  # noqa: UP007
        ("branches", list[str] | None, None),
    ],
    bases=(Schema,),
    kw_only=True,
    namespace={"__doc__": "Which forwards of the transformers are computed (rule), and how the others are predicted."},
)

LONGEST_BRANCH = 60  # characters of a name that a label shows


@dataclass(frozen=True)
class Forwards:
    """Which forwards of the transformer are computed, and how the others are predicted.

    Args:
        rule: decides once a step; all branches of the step follow.
        predictor: gives the output of a step that is not computed.
        branches: those of guidance that may be predicted, by the pipeline's names for them ("cond", "uncond", and
            "cond_uncond" where both are one batch); the others always compute. None: all of them.

    Raises:
        ValueError: a part is of the wrong kind.
    """

    rule: Rule
    predictor: Predictor = Last()
    branches: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_kind("rule", self.rule, RULES)
        _check_kind("predictor", self.predictor, PREDICTORS)
        given: Any = self.branches
        if given is None:
            return
        if not isinstance(given, (list, tuple)) or not all(isinstance(each, str) and each for each in given):
            raise ValueError(f'branches: expected names such as ["uncond"], found {quoted(given)}')
        if not given:
            raise ValueError("branches: expected one name at least, or None for all, found none")
        object.__setattr__(self, "branches", tuple(given))

    @property
    def label(self) -> str:
        """A short name for tables, such as "easycache 0.025, last residual"."""
        shown = " and ".join(printable(branch[:LONGEST_BRANCH]) for branch in self.branches or ())
        only = f", {shown} only" if shown else ""
        return f"{self.rule.label}, {self.predictor.label}{only}"

    @property
    def looks_back(self) -> int:
        """How many computed forwards are kept for each branch."""
        return max(self.rule.looks_back, self.predictor.looks_back)

    @property
    def wants(self) -> frozenset[str]:
        """What of a forward is looked at beside its latents, see `Rule` and `Predictor`."""
        return self.rule.wants | self.predictor.wants

    @property
    def indicator(self) -> str | None:
        """The name of the indicator that is looked at."""
        return next(iter(self.wants - {NOISE, VIDEO, GUIDE, SINCE_COMPUTED}), None)

    def idle(self, steps: int) -> str | None:
        """What to say of a call of so many steps in which nothing can be predicted, though that was not asked for; else None."""
        reason = self.rule.idle(steps)
        return None if reason is None else f"{self.rule.label}: predicts none of the {steps} steps of a call; {reason}"

    def to_json(self) -> dict[str, Any]:
        """Plain data: {"rule": {"kind": "easycache", ...}, "predictor": {"kind": "last", ...}}."""
        data: dict[str, Any] = {"rule": _plain(self.rule), "predictor": _plain(self.predictor)}
        if self.branches:
            data["branches"] = list(self.branches)
        return data

    @staticmethod
    def from_json(data: object) -> Forwards:
        """The inverse of `to_json`; anything unexpected is refused with a FileError that names it."""
        found = shaped(data, ForwardsData, "forwards")
        predictor = Last() if found.predictor is msgspec.UNSET else built(found.predictor, PREDICTORS, "predictor")
        branches = None if found.branches is None else tuple(found.branches)
        return Forwards(built(found.rule, RULES, "rule"), predictor, branches)


def _plain(part: Any) -> dict[str, Any]:
    given = {field.name: _listed(getattr(part, field.name)) for field in fields(part)}
    return {"kind": part.kind, **{name: value for name, value in given.items() if value is not None}}


def _listed(value: Any) -> Any:
    """Lists for tuples, at any depth, as JSON has them."""
    if isinstance(value, tuple):
        return [_listed(each) for each in value]
    return {name: _listed(each) for name, each in value.items()} if isinstance(value, dict) else value


def _check_kind(what: str, part: Any, classes: Mapping[str, Any]) -> None:
    if type(part) not in classes.values():
        names = ", ".join(cls.__name__ for cls in classes.values())
        raise ValueError(f"{what}: expected one of {names}, found {quoted(part)}")
