"""The plan file: versioned, strict JSON, in which a layer of a span is one text of symbols; docs/plan-file.md describes it.

What is said twice in a file (a key), left out or not known is refused: a plan that is half understood would give other
frames than the ones that its search measured.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from diffusers_accel.files import FileError, checksum, printable, quoted
from diffusers_accel.forwards import Forwards
from diffusers_accel.methods import Method
from diffusers_accel.plan_span import EDGES, By, Span, row_of, row_text
from diffusers_accel.shape import ModelShape

if TYPE_CHECKING:
    from diffusers_accel.plan import Plan

FORMAT = "diffusers_accel.plan"
VERSION = 2
READABLE = (1, VERSION)
_KEYS_1 = ("format", "version", "family", "models", "methods", "spans", "budget", "provenance", "tensors")
_KEYS = (
    "format",
    "version",
    "family",
    "models",
    "schedule",
    "forwards",
    "heads",
    "correct",
    "budget",
    "provenance",
    "tensors",
)
_NULLABLE = ("schedule", "forwards", "correct", "tensors")  # may be left out
_TO_COME = ("schedule", "correct")  # sections that have their place, and no meaning yet
_SUM = "sha256"  # of all the others; a plan that was written by hand, or before plans had it, has none


def plain(plan: Plan) -> dict[str, Any]:
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
        "correct": None,
        "budget": plan.budget,
        "provenance": plan.provenance,
    }


def _span_data(span: Span, symbols: Collection[str]) -> dict[str, Any]:
    start, stop = EDGES[span.by]
    heads = {name: [row_text(row, symbols) for row in rows] for name, rows in span.heads.items()}
    return {start: span.start, stop: span.stop, "heads": heads}


def place(message: str, data: object) -> str:
    """A message about a plan in the words of the file that it was read from: version 1 has no section "heads"."""
    return message.removeprefix("heads.") if isinstance(data, dict) and data.get("version") == 1 else message


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
    return _parts(_upgraded(plan) if plan["version"] == 1 else plan)


def _parts(plan: dict[str, Any]) -> dict[str, Any]:
    plan = _object({**dict.fromkeys(_NULLABLE), **plan}, "the plan", _KEYS)
    for key in _TO_COME:
        if plan[key] is not None:
            raise FileError(
                f"{key}: expected null, found {quoted(plan[key])}: this version knows no {key}; upgrade diffusers-accel"
            )
    heads = _object(plan["heads"], "heads", ("methods", "spans"))
    methods, spans = _mapping(heads["methods"], "heads.methods"), _list(heads["spans"], "heads.spans")
    return {
        "family": plan["family"],
        "models": {
            name: _shape(item, f"models.{_key(name)}") for name, item in _mapping(plan["models"], "models").items()
        },
        "methods": {symbol: _method(item, f"heads.methods.{_key(symbol)}") for symbol, item in methods.items()},
        "spans": tuple(_span(item, f"heads.spans[{index}]", methods) for index, item in enumerate(spans)),
        "budget": _mapping(plan["budget"], "budget"),
        "provenance": _mapping(plan["provenance"], "provenance"),
        "tensors": plan["tensors"],
        "forwards": None if plan["forwards"] is None else _forwards(plan["forwards"]),
    }


def _check_format(data: object) -> dict[str, Any]:
    """Before anything else, so that a file of another kind or version is not called a plan with unknown keys."""
    plan = _mapping(data, "the file")
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


def _shape(data: object, path: str) -> ModelShape:
    return ModelShape(**_object(data, path, ("layers", "heads", "head_dim")))


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


def _upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """What a file of version 1 says, as version 2 says it: heads had no section of their own, and symbols one character."""
    plan = _object(data, "the plan", _KEYS_1)
    methods, spans = _mapping(plan.pop("methods"), "methods"), plan.pop("spans")
    for index, span in enumerate(spans if isinstance(spans, list) else ()):
        _object(span, f"spans[{index}]", ("start", "stop", "heads"))
    if long := next((symbol for symbol in methods if len(symbol) != 1), None):
        raise FileError(f"methods: expected symbols of one character in version 1, found {quoted(long)}")
    methods = {symbol: _upgraded_method(method, f"methods.{symbol}") for symbol, method in methods.items()}
    return {**plan, "version": VERSION, "heads": {"methods": methods, "spans": spans}}


def _upgraded_method(method: object, path: str) -> object:
    """Version 1 called the rest "kept" a reuse and had no other."""
    if isinstance(method, Mapping) and "rest" in method:
        raise FileError(f"{path}: unknown key 'rest' of version 1, which has \"reuse\"")
    if not isinstance(method, Mapping) or "reuse" not in method:
        return method
    reuse = method["reuse"]
    kept = {"kind": "kept", **reuse} if isinstance(reuse, Mapping) else reuse
    return {**{key: value for key, value in method.items() if key != "reuse"}, "rest": kept}


def _span(data: object, path: str, symbols: Collection[str]) -> Span:
    by: By = "sigma" if isinstance(data, Mapping) and set(EDGES["sigma"]) & set(data) else "share"
    start, stop = EDGES[by]
    span = _object(data, path, (start, stop, "heads"))
    heads = _mapping(span["heads"], f"{path}.heads")
    rows = {name: tuple(_list(item, f"{path}.heads.{_key(name)}")) for name, item in heads.items()}
    for name, texts in rows.items():
        for layer, text in enumerate(texts):
            if not isinstance(text, str):
                where = f"{path}.heads.{_key(name)}[{layer}]"
                raise FileError(f"{where}: expected a text of symbols, one per head, found {_kind(text)}")
    return Span(
        span[start],
        span[stop],
        {name: tuple(row_of(text, symbols) for text in texts) for name, texts in rows.items()},
        by,
    )


def _object(data: object, path: str, keys: tuple[str, ...]) -> dict[str, Any]:
    found = _mapping(data, path)
    if unknown := sorted(set(found) - set(keys)):
        raise FileError(f"{path}: expected only the keys {', '.join(keys)}, found the unknown key {quoted(unknown[0])}")
    if missing := [key for key in keys if key not in found]:
        raise FileError(f"{path}: expected the keys {', '.join(keys)}, found none called {missing[0]!r}")
    return found


def _mapping(data: object, path: str) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        raise FileError(f"{path}: expected an object, found {_kind(data)}")
    return dict(data)


def _list(data: object, path: str) -> list[Any]:
    if not isinstance(data, list):
        raise FileError(f"{path}: expected a list, found {_kind(data)}")
    return data


def _kind(data: object) -> str:
    if isinstance(data, str):
        return f"the text {quoted(data)}"
    return {dict: "an object", list: "a list", type(None): "null"}.get(type(data), quoted(data))


def _key(name: str) -> str:
    """A key as a path shows it."""
    return printable(name[:60])
