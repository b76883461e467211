"""The plan: which forwards run, and which method each head takes in each span of the schedule; patch replays it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.files import (
    FileError,
    encode_json,
    printable,
    quoted,
    read_json,
    read_tensors,
    side_file,
    write_together,
)
from diffusers_accel.methods import DENSE, Method, Recipe
from diffusers_accel.plan import file as plan_file
from diffusers_accel.plan.check import check_plan, names
from diffusers_accel.plan.data import PlanData
from diffusers_accel.plan.span import By, Row, Span, new_symbols
from diffusers_accel.shape import ModelShape

SHOWN = 1000  # characters of an entry of budget or provenance that `show` prints


class PlanError(FileError):
    """A plan or its file is wrong or does not fit: the message says what was expected, what was found and what to do."""


@dataclass(frozen=True, eq=False)
class Plan(PlanData):
    """What the transformers of one pipeline compute. Checked whole when it is made.

    Args:
        family: model family, such as "wan".
        models: transformer name -> its self-attention layers, heads and head dim.
        methods: symbol -> method; 1 to 16 of A-Z, a-z, 0-9, ".", "_" and "-", of which the last two do not come first.
        spans: stretches of the schedule in order, without gap or overlap: by share of the steps from 0 to 1, or all by sigma from
            1 to 0.
        budget: what the search was asked for; plain JSON data.
        provenance: how the plan was made: model, prompts, seeds, versions, device; plain JSON data.
        tensors: what its methods read, by name, see docs/plan-file.md.
        forwards: which forwards of the transformers are computed and how the others are predicted; None: all are computed.
        correct: what is done to the output of heads that do not run densely; None: nothing.

    Raises:
        PlanError: a part is wrong; the message gives its path.
    """

    def __post_init__(self) -> None:
        try:
            check_plan(self)
        except FileError as error:
            raise PlanError(str(error)) from error

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Reads a plan file and its side file of tensors. Nothing in them is executed.

        Raises:
            FileNotFoundError: there is nothing at `path`.
            PlanError: the file is not a plan of this version, whole and consistent.
        """
        path = Path(path)
        try:
            data = read_json(path)
        except FileError as error:
            raise PlanError(str(error)) from error
        try:
            parts = plan_file.parse(data)
            parts["tensors"] = read_tensors(path, parts["tensors"])
            return Plan(**parts)
        except FileError as error:
            raise PlanError(f"{printable(path)}: {plan_file.place(str(error), data)}") from error

    def save(self, path: str | Path) -> None:
        """Writes `path`, which must end in ".json", and beside it `<stem>.<hash>.safetensors` if there are tensors.

        Both are written under temporary names and then renamed, the side file first: a save that fails leaves the plan
        that was there before, and its side file, as they were, and no other.

        Raises:
            PlanError: the name does not end in ".json".
            FileError: the plan is longer than `load` would read again.
            OSError: the folder cannot be written; or (`FlushError`) the new plan is in its place, but the folder that holds it
                could not be flushed to the disk.
        """
        path = Path(path)
        if path.suffix != ".json":
            raise PlanError(f'{path}: expected a file name that ends in ".json", found {quoted(path.name)}')
        reference, side = side_file(path, self.tensors)
        text = encode_json(path, plan_file.signed({**plan_file.plain(self), "tensors": reference}))
        beside = {path.with_name(reference["file"]): side} if reference else {}
        write_together({**beside, path: text})

    @staticmethod
    def uniform(method: Method | Recipe, family: str, models: Mapping[str, ModelShape]) -> Plan:
        """The plan in which every layer is assigned by the same rule; a recipe's dense steps and layers stay dense."""
        recipe = Recipe(heads=(method,)) if isinstance(method, Method) else method
        symbols = {DENSE: "."} if recipe.dense_steps or recipe.dense_layers or DENSE in recipe.heads else {}
        unused = new_symbols()
        for each in recipe.heads:
            if each not in symbols:
                symbols[each] = next(unused)

        def span(start: float, stop: float, of: Recipe) -> Span:
            def row(layer: int, heads: int) -> Row:
                return tuple(symbols[of.method(layer, head)] for head in range(heads))

            rows = {
                name: tuple(row(layer, each.heads) for layer in range(each.layers)) for name, each in models.items()
            }
            return Span(start, stop, rows)

        edge = float(recipe.dense_steps)
        spans = [span(0.0, edge, Recipe(heads=(DENSE,)))] if edge > 0 else []
        spans += [span(edge, 1.0, recipe)] if edge < 1 else []
        methods = {symbol: each for each, symbol in symbols.items()}
        return Plan(family=family, models=dict(models), methods=methods, spans=tuple(spans))

    @property
    def by(self) -> By:
        """What the spans are stretches of: "share" of the steps, or "sigma"."""
        return self.spans[0].by

    @property
    def dense(self) -> bool:
        """Whether all heads take the model's own attention in all spans."""
        return all(self.methods[symbol].dense for symbol, share in self.shares().items() if share)

    def check(self, models: Mapping[str, ModelShape], *, family: str | None = None) -> None:
        """Compares with a loaded pipeline's transformers.

        Raises:
            PlanError: the plan was made for another family, other transformers or other sizes.
        """
        if family is not None and family != self.family:
            raise PlanError(
                f"the plan is for the family {quoted(self.family)}, this pipeline is of {family!r}: search a plan for it"
            )
        if set(models) != set(self.models):
            raise PlanError(
                f"the plan is for {names(self.models)}, this pipeline has {names(models)}; was it searched on another model?"
            )
        for name, found in models.items():
            for what, word in (
                ("layers", "self-attention layers"),
                ("heads", "heads"),
                ("head_dim", "channels a head"),
            ):
                planned, real = getattr(self.models[name], what), getattr(found, what)
                if planned != real:
                    raise PlanError(
                        f"the plan has {planned} {word} in {quoted(name)}, this model has {real}; was it searched on another "
                        f"size of the model? Search one for this: diffusers-accel search"
                    )

    def span_at(self, step: int, steps: int) -> int:
        """Index of the span that holds the middle of step `step` (0-based) of `steps`; for spans by share."""
        if self.by != "share":
            raise PlanError(
                "the spans of this plan are windows of sigma, which a step alone does not tell: ask span_at_sigma"
            )
        if not 0 <= step < steps:
            raise PlanError(f"step: expected 0 to {steps - 1} in a schedule of {steps} steps, found {quoted(step)}")
        middle = (step + 0.5) / steps
        return next(index for index, span in enumerate(self.spans) if middle < span.stop)

    def span_at_sigma(self, sigma: float) -> int:
        """Index of the span with start >= sigma > stop, which for 0 is the last; for spans by sigma."""
        if self.by != "sigma":
            raise PlanError("the spans of this plan are shares of the steps, which sigma does not tell: ask span_at")
        if not 0 <= sigma <= 1:
            raise PlanError(f"sigma: expected a noise level in 0..1, found {quoted(sigma)}")
        return next((index for index, span in enumerate(self.spans) if sigma > span.stop), len(self.spans) - 1)

    def method(self, span: int, transformer: str, layer: int, head: int) -> Method:
        """The method of one head in the span of that index."""
        return self.methods[self.spans[span].heads[transformer][layer][head]]

    def shares(self) -> dict[str, float]:
        """Symbol -> the share of heads that take it, over the whole schedule (of spans by sigma: over all of sigma) and all
        transformers; they add up to 1."""
        total = sum(shape.layers * shape.heads for shape in self.models.values())
        counts = dict.fromkeys(self.methods, 0.0)
        for span in self.spans:
            for symbol in (symbol for rows in span.heads.values() for row in rows for symbol in row):
                counts[symbol] += span.length / total
        return counts

    def show(self) -> str:
        """The plan as text for a terminal: its methods with their share of heads, then a row of symbols per layer and span."""
        return "\n".join(printable(line) for line in _lines(self))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        mine, theirs = plan_file.plain(self), plan_file.plain(other)
        return mine == theirs and _same_tensors(self.tensors, other.tensors)


def _same_tensors(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(
        tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]) for name, tensor in mine.items()
    )


def _short(value: Any) -> str:
    text = str(value)
    shown = printable(text[:SHOWN])  # a plan may come from anybody: its texts steer no terminal
    return shown if len(text) <= SHOWN else f"{shown} ... ({len(text):,} characters, all of them in the file)"


def _aligned(row: Row, width: int) -> str:
    """A row of symbols in columns."""
    return "".join(row) if width == 1 else " ".join(f"{symbol:<{width}}" for symbol in row).rstrip()


def _lines(plan: Plan) -> list[str]:
    shapes = [f"{_short(name)}: {s.layers} layers x {s.heads} heads x {s.head_dim}" for name, s in plan.models.items()]
    forwards = ["", f"forwards: {_short(plan.forwards.label)}"] if plan.forwards else []
    correct = ["", f"correct: {_short(plan.correct.label)}"] if plan.correct else []
    lines = [
        f"plan for {_short(plan.family)} ({'; '.join(shapes)})",
        *forwards,
        *correct,
        "",
        f"methods, with the share of heads over {'all of sigma' if plan.by == 'sigma' else 'the whole schedule'}",
    ]
    width = max(map(len, plan.methods))
    for symbol, share in plan.shares().items():
        lines.append(f"  {symbol:<{width}}  {plan.methods[symbol].label:<24} {share:>6.1%}")
    for span in plan.spans:
        for name, rows in span.heads.items():
            lines += ["", f"{span.label}, {_short(name)}"]
            lines += [f"  layer {layer:>2}  {_aligned(row, width)}" for layer, row in enumerate(rows)]
    for title, data in (("budget", plan.budget), ("provenance", plan.provenance)):
        if data:
            lines += ["", title, *(f"  {_short(key)}: {_short(value)}" for key, value in data.items())]
    return lines
