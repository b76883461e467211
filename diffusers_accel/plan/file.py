"""The plan file: versioned, strict JSON, in which a layer of a span is one text of symbols; docs/plan-file.md describes it.

What is said twice in a file (a key), left out or not known is refused: a plan that is half understood would give other
frames than the ones that its search measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Annotated, Any

import msgspec

from diffusers_accel.files import FileError, Schema, built, checksum, printable, quoted, shaped, tagged
from diffusers_accel.forwards import Forwards
from diffusers_accel.methods import CORRECTS, Correct, Method
from diffusers_accel.methods.method import stages_by_present_names
from diffusers_accel.methods.orders.patches import of_version_1
from diffusers_accel.plan.data import PlanData
from diffusers_accel.plan.span import EDGES, Row, Span, row_of, row_text
from diffusers_accel.shape import ModelShape

FORMAT = "diffusers_accel.plan"
VERSION = 2
READABLE = (1, VERSION)
MOST = 1_000_000  # layers, heads or channels: what is above it is a mistake
TO_COME = ("schedule",)  # sections that have their place, and no meaning yet
_SUM = "sha256"  # of all the others; a plan that was written by hand, or before plans had it, has none

CorrectData: Any = tagged(CORRECTS)  # a correction as it stands in a file
Count = Annotated[int, msgspec.Meta(ge=1, le=MOST)]
Edge = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]


class Transformer(Schema, frozen=True):
    """Sizes of a transformer, which must match those of the pipeline."""

    layers: Count
    heads: Count
    head_dim: Count


class ShareSpan(Schema, frozen=True):
    """A stretch of the schedule by share of its steps. A step belongs to the span that holds its middle. heads: per transformer a
    text for each layer, a symbol for each head, with a space between symbols where some have several characters."""

    start: Edge
    stop: Edge
    heads: dict[str, list[str]]


class SigmaSpan(Schema, frozen=True):
    """A stretch of the schedule by noise level: from_sigma >= sigma > to_sigma, and 0 belongs to the last. heads: as in spans by
    share."""

    from_sigma: Edge
    to_sigma: Edge
    heads: dict[str, list[str]]


class Heads(Schema, frozen=True):
    """Which method each head takes. methods: symbol -> method; spans: one after another, over the whole schedule."""

    methods: dict[str, Any]
    spans: list[Any]


class File(Schema, frozen=True):
    """A plan of diffusers_accel. Sections that are null may be left out. sha256: checksum of all the rest, written with the file;
    whoever changes it by hand removes that line."""

    format: str
    version: int
    family: str
    models: dict[str, Transformer]
    heads: Heads
    budget: dict[str, Any]
    provenance: dict[str, Any]
    schedule: None = None
    forwards: Any = None
    correct: Any = None
    tensors: Any = None


class _File1(Schema, frozen=True):
    """Version 1, as far as it is not read as version 2: heads had no section of their own."""

    format: Any
    version: Any
    family: Any
    models: Any
    methods: dict[str, Any]
    spans: list[ShareSpan]
    budget: Any
    provenance: Any
    tensors: Any


def plain(plan: PlanData) -> dict[str, Any]:
    """The plan as JSON data, without its tensors."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "family": plan.family,
        "models": {
            name: {"layers": shape.layers, "heads": shape.heads, "head_dim": shape.head_dim}
            for name, shape in plan.models.items()
        },
        "schedule": None,
        "forwards": plan.forwards.to_json() if plan.forwards else None,
        "heads": {
            "methods": {symbol: method.to_json() for symbol, method in plan.methods.items()},
            "spans": [_span_data(span, plan.methods) for span in plan.spans],
        },
        "correct": {"kind": plan.correct.kind, **dataclasses.asdict(plan.correct)} if plan.correct else None,
        "budget": plan.budget,
        "provenance": plan.provenance,
    }


def _span_data(span: Span, symbols: Collection[str]) -> dict[str, Any]:
    start, stop = EDGES[span.by]
    heads = {name: [row_text(row, symbols) for row in rows] for name, rows in span.heads.items()}
    return {start: span.start, stop: span.stop, "heads": heads}


def signed(data: dict[str, Any]) -> dict[str, Any]:
    """A plan file's data with the checksum by which `parse` knows it again."""
    return {**data, _SUM: checksum(data)}


def parse(data: object) -> dict[str, Any]:
    """Checks the shape of a plan file's data, whose values `Plan` checks.

    Returns:
        What `Plan` takes; but "tensors" is the reference to the side file, as found.

    Raises:
        FileError: a key is unknown or missing or holds another type, or the file was changed after it was saved; the message
            gives the path.
    """
    plan = _check_format(data)
    _check_sum(plan)
    if plan["version"] == 1:
        plan = _upgraded(plan)
    for key in TO_COME:
        if plan.get(key) is not None:
            raise FileError(
                f"{key}: expected null, found {quoted(plan[key])}: this version knows no {key}; upgrade diffusers-accel"
            )
    file = shaped(plan, File, "the plan")
    methods = file.heads.methods
    return {
        "family": file.family,
        "models": {name: ModelShape(each.layers, each.heads, each.head_dim) for name, each in file.models.items()},
        "methods": {symbol: _method(each, f"heads.methods.{_key(symbol)}") for symbol, each in methods.items()},
        "spans": tuple(_span(each, f"heads.spans[{i}]", methods) for i, each in enumerate(file.heads.spans)),
        "budget": file.budget,
        "provenance": file.provenance,
        "tensors": file.tensors,
        "forwards": None if file.forwards is None else _forwards(file.forwards),
        "correct": None if file.correct is None else _correct(file.correct),
    }


def place(message: str, data: object) -> str:
    """A message about a plan in the words of the file that it was read from: version 1 has no section "heads"."""
    return message.removeprefix("heads.") if isinstance(data, dict) and data.get("version") == 1 else message


def _check_format(data: object) -> dict[str, Any]:
    """Before anything else, so that a file of another kind or version is not called a plan with unknown keys."""
    plan = dict(shaped(data, dict[str, Any], "the file"))
    if plan.get("format") != FORMAT:
        raise FileError(f'format: expected "{FORMAT}", found {quoted(plan.get("format"))}; this is not a plan file')
    version = plan.get("version")
    if type(version) is not int or version not in READABLE:
        newer = isinstance(version, int) and version > VERSION
        advice = "upgrade diffusers-accel" if newer else "search the plan again"
        raise FileError(f"version: expected {VERSION}, found {quoted(version)}; {advice}")
    return plan


def _check_sum(plan: dict[str, Any]) -> None:
    """Takes the checksum out of a plan's data, if there is one, and compares it with the rest."""
    if _SUM not in plan:
        return
    given = plan.pop(_SUM)
    if given != (found := checksum(plan)):
        raise FileError(
            f"{_SUM}: expected {found}, found {quoted(given)}: the file was changed after it was saved. Copy it again; or, "
            f'if it was changed on purpose, remove its "{_SUM}" line'
        )


def _method(data: object, path: str) -> Method:
    try:
        return Method.from_json(data)
    except ValueError as error:
        raise FileError(f"{path}: {error}") from error


def _forwards(data: object) -> Forwards:
    try:
        return Forwards.from_json(data)
    except ValueError as error:
        raise FileError(str(error) if str(error).startswith("forwards") else f"forwards.{error}") from error


def _correct(data: object) -> Correct:
    return built(shaped(data, CorrectData, "correct", "correct"), CORRECTS, "correct")


def _span(data: object, path: str, symbols: Collection[str]) -> Span:
    def rows(heads: dict[str, list[str]]) -> dict[str, tuple[Row, ...]]:
        return {name: tuple(row_of(text, symbols) for text in texts) for name, texts in heads.items()}

    if isinstance(data, Mapping) and set(EDGES["sigma"]) & set(data):
        window = shaped(data, SigmaSpan, path, path)
        return Span(window.from_sigma, window.to_sigma, rows(window.heads), "sigma")
    share = shaped(data, ShareSpan, path, path)
    return Span(share.start, share.stop, rows(share.heads))


def _upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """What a file of version 1 says, as version 2 says it: heads had no section of their own, and symbols one character."""
    shaped(data, _File1, "the plan")
    plan, methods = dict(data), data["methods"]
    if long := next((symbol for symbol in methods if len(symbol) != 1), None):
        raise FileError(f"methods: expected symbols of one character in version 1, found {quoted(long)}")
    heads = {
        "methods": {symbol: _upgraded_method(method, f"methods.{_key(symbol)}") for symbol, method in methods.items()},
        "spans": data["spans"],
    }
    del plan["methods"], plan["spans"]
    return {**plan, "version": VERSION, "heads": heads}


# What version 1 meant by selections that have changed since.
_MEANT = {"band": {"text_counts": True}, "stripe": {"text_counts": True}}


def _upgraded_method(method: object, path: str) -> object:
    """Version 1 called the rest "kept" a reuse and had no other; some stages meant something else, or had other names for what
    they take."""
    if isinstance(method, Mapping) and "rest" in method:
        raise FileError(f"{path}: unknown key 'rest' of version 1, which has \"reuse\"")
    if not isinstance(method, Mapping):
        return method
    select = method.get("select")
    if isinstance(select, Mapping) and isinstance(select.get("kind"), str):
        method = {**method, "select": {**select, **_MEANT.get(select["kind"], {})}}
    if "order" in method:
        method = {**method, "order": of_version_1(method["order"])}
    if "reuse" not in method:
        return stages_by_present_names(method, warn=False)
    reuse = method["reuse"]
    if isinstance(reuse, Mapping) and "kind" in reuse:
        # Version 1 did not know a kind either: "reuse" is refused.
        return stages_by_present_names(method, warn=False)
    kept = {"kind": "kept", **reuse} if isinstance(reuse, Mapping) else reuse
    upgraded = {**{key: value for key, value in method.items() if key != "reuse"}, "rest": kept}
    return stages_by_present_names(upgraded, warn=False)


def _key(name: str) -> str:
    """A key as a path shows it."""
    return printable(name[:60])
