"""The plan: what it refuses and how it says so, what it means, and what of it comes back from a file."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import string
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from diffusers_accel.files import FlushError, strict_json
from diffusers_accel.methods import AUTO, NAMED, All, AxisOrder, Band, Draft, Kept, Method, Patches, Skip, Stripe
from diffusers_accel.plan import Plan, PlanError, Span
from diffusers_accel.shape import ModelShape

# A plan as version 1 was saved before plans had a checksum.
EARLIER = """{
 "format": "diffusers_accel.plan",
 "version": 1,
 "family": "wan",
 "models": {"transformer": {"layers": 2, "heads": 2, "head_dim": 64}},
 "methods": {".": {"select": {"kind": "all"}},
  "a": {"order": "8x16", "select": {"kind": "draft", "density": 0.3, "mass": null, "rule": "quantile", "floor": 1,
   "diagonal": true, "first_frame": true, "hold": 1}, "precision": "int8", "reuse": {"every": 3, "gated": false}}},
 "spans": [{"start": 0.0, "stop": 0.25, "heads": {"transformer": ["..", ".."]}},
  {"start": 0.25, "stop": 1, "heads": {"transformer": ["..", ".a"]}}],
 "budget": {"kind": "speedup", "value": 1.4},
 "provenance": {"prompts": ["a red circle"]},
 "tensors": null
}
"""
DENSE, SKIP = Method(), Method(select=Skip())
BAND, DIAGONAL = Method(select=Band(0.25)), Method(AxisOrder("hwf"), Band(0.5, first_frame=False))
CALIBRATED = Method(select=Stripe(0.25, calibrated=True))
METHODS = {".": DENSE, "a": BAND, "b": DIAGONAL, "c": CALIBRATED, "s": SKIP}


def stripes() -> dict[str, torch.Tensor]:
    return {"stripe_mass/transformer": torch.linspace(0, 1, 2 * 3 * 5 * 4).view(2, 3, 5, 4).half()}


def plan(**changes: Any) -> Plan:
    """2 layers of 3 heads, a dense span and a mixed one, with the tensor that its calibrated stripe reads."""
    base = Plan(
        family="wan",
        models={"transformer": ModelShape(layers=2, heads=3, head_dim=64)},
        methods=METHODS,
        spans=(Span(0.0, 0.25, {"transformer": ("...", "...")}), Span(0.25, 1.0, {"transformer": ("ab.", "csa")})),
        budget={"speedup": 1.5},
        provenance={"prompts": ["a red circle"], "seed": 0},
        tensors=stripes(),
    )
    return replace(base, **changes)


def dense() -> Plan:
    return Plan.uniform(DENSE, "wan", {"transformer": ModelShape(2, 3, 64)})


def spans(*edges: float) -> tuple[Span, ...]:
    return tuple(Span(a, b, {"transformer": ("...", "...")}) for a, b in zip(edges[::2], edges[1::2], strict=True))


# What is wrong in memory, and what the message must say: where, what was expected, what was found.
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no family": ({"family": ""}, r"family: expected the name .* found ''"),
    "no models": ({"models": {}}, r"models: expected at least one transformer, found none"),
    "zero layers": (
        {"models": {"transformer": ModelShape(0, 3, 64)}},
        r"models\.transformer\.layers: expected a whole number of 1 to 1,000,000, found 0",
    ),
    "bool as heads": ({"models": {"transformer": ModelShape(2, True, 64)}}, r"transformer\.heads: .* found True"),
    "no methods": ({"methods": {}}, r"methods: expected at least one, found none"),
    "long symbol": ({"methods": {".": DENSE, "a" * 17: BAND}}, r"methods: expected symbols of 1 to 16 .* found 'aaaaa"),
    "odd symbol": ({"methods": {".": DENSE, "-": BAND}}, r"methods: .* found '-'"),
    "no spans": ({"spans": ()}, r"spans: expected at least one"),
    "late start": ({"spans": spans(0.1, 1.0)}, r"spans\[0\]\.start: expected 0, .*begins, found 0\.1: there is a gap"),
    "early end": ({"spans": spans(0.0, 0.9)}, r"spans\[0\]\.stop: expected 1, the end of the schedule, found 0\.9"),
    "gap": (
        {"spans": spans(0.0, 0.2, 0.3, 1.0)},
        r"spans\[1\]\.start: expected 0\.2, where spans\[0\] stops, found 0\.3: there is a gap",
    ),
    "overlap": ({"spans": spans(0.0, 0.5, 0.4, 1.0)}, r"spans\[1\]\.start: expected 0\.5, .* found 0\.4: they overlap"),
    "empty span": ({"spans": spans(0.0, 0.0, 0.0, 1.0)}, r"spans\[0\]\.stop: expected more than its start 0, found 0"),
    "nan edge": ({"spans": spans(0.0, float("nan"))}, r"spans\[0\]\.stop: expected a share .* found nan"),
    "infinite edge": ({"spans": spans(0.0, float("inf"))}, r"spans\[0\]\.stop: expected a share .* found inf"),
    "bool edge": ({"spans": spans(False, 1.0)}, r"spans\[0\]\.start: expected a share .* found False"),
    "text edge": ({"spans": (Span("0", 1.0, {}),)}, r"spans\[0\]\.start: expected a share .* found '0'"),
    "41 heads": (
        {"spans": (Span(0.0, 1.0, {"transformer": ("...", "....")}),)},
        r"spans\[0\]\.heads\.transformer\[1\]: expected 3 symbols, one per head, found 4 in '\.\.\.\.'",
    ),
    "layer too few": (
        {"spans": (Span(0.0, 1.0, {"transformer": ("...",)}),)},
        r"spans\[0\]\.heads\.transformer: expected 2 rows, one per layer, found 1",
    ),
    "row of numbers": ({"spans": (Span(0.0, 1.0, {"transformer": ("...", 3)}),)}, r"transformer\[1\]: .* found 3"),
    "unknown symbol": (
        {"spans": (Span(0.0, 1.0, {"transformer": ("...", "..x")}),)},
        r"transformer\[1\]: expected symbols of methods \(\. a b c s\), found 'x' in '\.\.x'",
    ),
    "other transformer": (
        {"spans": (Span(0.0, 1.0, {"transformer_2": ("...", "...")}),)},
        r"spans\[0\]\.heads: expected 'transformer' as in models, found 'transformer_2'",
    ),
    "nan in budget": ({"budget": {"speedup": float("nan")}}, r"budget\.speedup: expected a finite number, found nan"),
    "infinity in provenance": ({"provenance": {"a": [1, float("-inf")]}}, r"provenance\.a\[1\]: .* found -inf"),
    "object in provenance": ({"provenance": {"dtype": torch.bfloat16}}, r"provenance\.dtype: expected plain JSON data"),
    "tuple in budget": ({"budget": {"size": (1, 2)}}, r"budget\.size: expected plain JSON data, found tuple"),
    "number as key": ({"budget": {1: 2}}, r"budget: expected text as keys, found 1"),
    "no calibration": (
        {"tensors": {}},
        r"tensors: expected 'stripe_mass/transformer', which the method 'c' reads, found none",
    ),
    "calibration of another size": (
        {"tensors": {"stripe_mass/transformer": torch.ones(2, 4, 5, 4)}},
        r"stripe_mass/transformer: expected a floating \[2 layers, 3 heads, frames, height\], found torch.float32 \[2, 4, 5, 4\]",
    ),
    "calibration in 8 bits": (
        {"tensors": {"stripe_mass/transformer": torch.ones(2, 3, 5, 4).to(torch.float8_e4m3fn)}},
        r"tensors\.stripe_mass/transformer: expected a tensor of one of the types bool, .* found torch\.float8_e4m3fn",
    ),
    "a type that nobody reads": (
        {"tensors": {**stripes(), "more": torch.ones(1, dtype=torch.complex64)}},
        r"tensors\.more: expected a tensor of one of the types .* found torch\.complex64",
    ),
    "precision of no device": (
        {"methods": {**METHODS, "a": replace(BAND, precision=AUTO)}},
        r'methods\.a: expected the precision of a device, found "auto"',
    ),
    "half a character": ({"family": "\ud800"}, r"family: expected Unicode text, found half a character"),
    "more than 64 bits": ({"budget": {"a": 2**63}}, r"budget\.a: expected a whole number of at most 64 bits"),
    "millions of heads": (
        {"models": {"transformer": ModelShape(2, 2**62, 64)}},
        r"transformer\.heads: expected .* found 46",
    ),
    "calibration with nan": (
        {"tensors": {"stripe_mass/transformer": torch.full((2, 3, 5, 4), torch.nan)}},
        r"stripe_mass/transformer: expected finite numbers",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plan_cannot_be_made(case: str) -> None:
    changes, message = WRONG[case]
    with pytest.raises(PlanError, match=message):
        plan(**changes)


def saved(folder: Path, edit: Callable[[dict[str, Any]], None] = lambda data: None) -> Path:
    """A plan file whose JSON was edited by hand, and its checksum removed."""
    path = folder / "plan.json"
    plan().save(path)
    data = json.loads(path.read_text())
    edit(data)
    del data["sha256"]
    path.write_text(json.dumps(data))
    return path


def rewrite(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda data: data.update(changes)


# What is wrong in a file's data.
EDITED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "unknown key": (
        rewrite(colour="red"),
        r"the plan: unknown key 'colour', expected only format, version, family",
    ),
    "missing key": (
        lambda data: data.pop("budget"),
        r"the plan: 'budget' is missing, expected format, version, family",
    ),
    "newer version": (rewrite(version=3), r"version: expected 2, found 3; upgrade diffusers-accel"),
    "older version": (rewrite(version=0), r"version: expected 2, found 0; search the plan again"),
    "bool version": (rewrite(version=True), r"version: expected 2, found True"),
    "other format": (rewrite(format="other.plan"), r'format: expected "diffusers_accel\.plan", found \'other\.plan\''),
    "models as list": (rewrite(models=[]), r"models: expected an object, found a list"),
    "model without heads": (
        lambda data: data["models"]["transformer"].pop("heads"),
        r"models\.transformer: 'heads' is missing, expected layers, heads, head_dim",
    ),
    "fractional heads": (
        lambda data: data["models"]["transformer"].update(heads=3.0),
        r"models\.transformer\.heads: expected a whole number of 1 to 1,000,000, found 3\.0",
    ),
    "bool layers": (
        lambda data: data["models"]["transformer"].update(layers=True),
        r"models\.transformer\.layers: .* found True",
    ),
    "unknown key of a method": (
        lambda data: data["heads"]["methods"]["a"].update(colour="red"),
        r"heads\.methods\.a: .*unknown key 'colour'",
    ),
    "unknown select": (
        lambda data: data["heads"]["methods"]["a"]["select"].update(kind="magic"),
        r"heads\.methods\.a: .*found 'magic'",
    ),
    "density of text": (
        lambda data: data["heads"]["methods"]["a"]["select"].update(density="0.5"),
        r"heads\.methods\.a: .*found '0\.5'",
    ),
    "density of bool": (
        lambda data: data["heads"]["methods"]["a"]["select"].update(density=True),
        r"heads\.methods\.a: .*found True",
    ),
    "density of 2": (
        lambda data: data["heads"]["methods"]["a"]["select"].update(density=2),
        r"heads\.methods\.a: .*\(0, 1\], found 2",
    ),
    "no such order": (
        lambda data: data["heads"]["methods"]["b"].update(order="xyz"),
        r"heads\.methods\.b: .*found 'xyz'",
    ),
    "order in other digits": (
        lambda data: data["heads"]["methods"]["b"].update(order="٣x٤"),
        r"heads\.methods\.b: order: .*found '٣x٤'",
    ),
    "order without end": (
        lambda data: data["heads"]["methods"]["b"].update(order=f"{2**63}x1"),
        r"heads\.methods\.b: order: .*found '9223372036854775808x1'",
    ),
    "order of millions": (
        lambda data: data["heads"]["methods"]["b"].update(order="8x9999999"),
        r"heads\.methods\.b: order: .*expected 1 to 65,536, found 9999999",
    ),
    "reselect_every of a fraction": (
        lambda data: data["heads"]["methods"].update(a={"select": {"kind": "draft", "reselect_every": 1.0}}),
        r"heads\.methods\.a: select\.reselect_every: expected int, found 1\.0",
    ),
    "min_blocks without end": (
        lambda data: data["heads"]["methods"].update(a={"select": {"kind": "draft", "min_blocks": 2**62}}),
        r"heads\.methods\.a: select\.min_blocks: expected a whole number of at most 2,147,483,647, found 46",
    ),
    "interval of bool": (
        lambda data: data["heads"]["methods"].update(
            a={"select": {"kind": "draft"}, "rest": {"kind": "kept", "refresh_every": True}}
        ),
        r"heads\.methods\.a: rest\.refresh_every: expected int \| None, found True",
    ),
    "rest of no kind": (
        lambda data: data["heads"]["methods"].update(a={"select": {"kind": "draft"}, "rest": {"refresh_every": 3}}),
        r"heads\.methods\.a: rest\.kind: expected one of \['drop', 'kept', 'pooled'\], found None",
    ),
    "rest of version 1": (
        lambda data: data["heads"]["methods"].update(a={"select": {"kind": "draft"}, "reuse": {"every": 3}}),
        r"heads\.methods\.a: a method: unknown key 'reuse'",
    ),
    "precision of a list": (
        lambda data: data["heads"]["methods"]["a"].update(precision=["int8"]),
        r"heads\.methods\.a: precision: ",
    ),
    "meaningless method": (
        lambda data: data["heads"]["methods"]["."].update(order="hwf"),
        r"heads\.methods\.\.: .*order",
    ),
    "spans as object": (lambda data: data["heads"].update(spans={}), r"heads\.spans: expected a list, found an object"),
    "span as text": (
        lambda data: data["heads"].update(spans=["all"]),
        r"heads\.spans\[0\]: expected an object, found the text 'all'",
    ),
    "span with a typo": (
        lambda data: data["heads"]["spans"][0].update(sotp=1),
        r"heads\.spans\[0\]: unknown key 'sotp'",
    ),
    "rows as one text": (
        lambda data: data["heads"]["spans"][0]["heads"].update(transformer="..."),
        r"heads\.spans\[0\]\.heads\.transformer: expected a list, found the text '\.\.\.'",
    ),
    "overlap": (
        lambda data: data["heads"]["spans"][1].update(start=0.2),
        r"heads\.spans\[1\]\.start: expected 0\.25, .*they overlap",
    ),
    "budget of null": (rewrite(budget=None), r"budget: expected an object, found null"),
    "tensors as text": (
        rewrite(tensors="plan.safetensors"),
        r'tensors: expected null or an object with the keys "file"',
    ),
    "side file above": (
        lambda data: data["tensors"].update(file="../plan.safetensors"),
        r"tensors\.file: expected the name of a \.safetensors file in the same folder, found '\.\./plan\.safetensors'",
    ),
    "absolute side file": (
        lambda data: data["tensors"].update(file="/etc/x.safetensors"),
        r"tensors\.file: .* found '/etc",
    ),
    "side file of windows": (
        lambda data: data["tensors"].update(file="..\\x.safetensors"),
        r"tensors\.file: expected the name",
    ),
    "side file of a drive": (
        lambda data: data["tensors"].update(file="c:x.safetensors"),
        r"tensors\.file: expected the name",
    ),
    "pickled side file": (lambda data: data["tensors"].update(file="plan.pt"), r"tensors\.file: .* found 'plan\.pt'"),
    "missing side file": (
        lambda data: data["tensors"].update(file="gone.safetensors"),
        r"tensors\.file: .* copy both files",
    ),
    "no hash": (lambda data: data["tensors"].update(sha256="1234"), r"tensors\.sha256: expected 64 .* found '1234'"),
    "hash of another file": (
        lambda data: data["tensors"].update(sha256="0" * 64),
        r"tensors: .*expected sha256 0+, found [0-9a-f]{64}",
    ),
    "tensors left out": (rewrite(tensors=None), r"tensors: expected 'stripe_mass/transformer'"),
}


@pytest.mark.parametrize("case", EDITED)
def test_a_wrong_file_is_refused_by_its_path(case: str, tmp_path: Path) -> None:
    edit, message = EDITED[case]
    path = saved(tmp_path, edit)
    with pytest.raises(PlanError, match=re.escape(str(path)) + ": " + message):
        Plan.load(path)


HUGE = "x" * 5_000_000
PLACES: dict[str, Callable[[dict[str, Any]], None]] = {
    "family": lambda data: data.update(family=[HUGE]),
    "format": lambda data: data.update(format=HUGE),
    "version": lambda data: data.update(version=HUGE),
    "models": lambda data: data.update(models=HUGE),
    "name of a model": lambda data: data["models"].update({HUGE: {"layers": 0}}),
    "heads": lambda data: data["models"]["transformer"].update(heads=HUGE),
    "symbol": lambda data: data["heads"]["methods"].update({HUGE: data["heads"]["methods"]["."]}),
    "kind": lambda data: data["heads"]["methods"]["a"]["select"].update(kind=HUGE),
    "key of a stage": lambda data: data["heads"]["methods"]["a"]["select"].update({HUGE: 1}),
    "density": lambda data: data["heads"]["methods"]["a"]["select"].update(density=HUGE),
    "order": lambda data: data["heads"]["methods"]["b"].update(order=HUGE),
    "precision": lambda data: data["heads"]["methods"]["a"].update(precision=HUGE),
    "span": lambda data: data["heads"]["spans"][0].update(start=HUGE),
    "spans": lambda data: data["heads"].update(spans=HUGE),
    "transformer of a span": lambda data: data["heads"]["spans"][0]["heads"].update({HUGE: []}),
    "row": lambda data: data["heads"]["spans"][0]["heads"]["transformer"].__setitem__(0, HUGE),
    "unknown key": lambda data: data.update({HUGE: 1}),
    "budget": lambda data: data.update(budget=HUGE),
    "deep in provenance": lambda data: data["provenance"].update({HUGE: {HUGE: 1e999}}),
    "reference": lambda data: data.update(tensors=HUGE),
    "side file": lambda data: data["tensors"].update(file=HUGE),
    "hash": lambda data: data["tensors"].update(sha256=HUGE),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_value_of_megabytes_makes_no_message_of_megabytes(place: str, tmp_path: Path) -> None:
    path = saved(tmp_path, PLACES[place])
    with pytest.raises(PlanError) as caught:
        Plan.load(path)
    assert len(str(caught.value)) < 600 + len(str(path))


def test_a_plan_that_was_changed_after_it_was_saved_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan().save(path)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << place % 7]) + whole[place + 1 :])
        try:
            assert Plan.load(path) == plan()
        except PlanError as error:
            assert str(error).startswith(f"{path}: ") and len(str(error)) < 500
    path.write_bytes(whole.replace(b'"seed": 0', b'"seed": 1'))
    with pytest.raises(PlanError, match=r'was changed after it was saved.*on purpose, remove its "sha256" line'):
        Plan.load(path)
    data = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed({**data, "provenance": plan().provenance}.items()))))
    assert Plan.load(path) == plan(), "indentation and order are not content"
    del data["sha256"]
    path.write_text(json.dumps(data))
    assert Plan.load(path) == plan(provenance={"prompts": ["a red circle"], "seed": 1})


def test_a_plan_saved_before_there_was_a_checksum_still_loads(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(EARLIER)
    found = Plan.load(path)
    assert found.method(1, "transformer", 1, 1) == Method(Patches(text_last=False), Draft(0.3), "int8", Kept(3))
    found.save(path)
    saved = json.loads(path.read_text())
    assert Plan.load(path) == found and "sha256" in saved
    assert saved["version"] == 2 and saved["heads"]["methods"]["a"]["rest"] == {
        "kind": "kept",
        "refresh_every": 3,
        "gated": False,
    }


@pytest.mark.parametrize(
    ("reuse", "message"),
    [
        ({"every": 1}, r"methods\.a: rest: .*expected 2 or more, found 1"),
        ({"every": True}, r"methods\.a: rest\.refresh_every: expected int \| None, found True"),
        ({"age": 3}, r"methods\.a: rest 'kept': unknown key 'age'"),
        ({"kind": "pooled"}, r"methods\.a: a method: unknown key 'reuse'"),
        (None, r"methods\.a: rest\.kind: expected one of .*, found None"),
        ("often", r"methods\.a: rest\.kind: expected one of .*, found None"),
    ],
)
def test_what_version_1_kept_is_checked_as_what_version_2_keeps(reuse: Any, message: str, tmp_path: Path) -> None:
    data = json.loads(EARLIER)
    data["methods"]["a"]["reuse"] = reuse
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=message):
        Plan.load(tmp_path / "plan.json")


def test_a_method_says_what_it_keeps_once(tmp_path: Path) -> None:
    data = json.loads(EARLIER)
    data["methods"]["a"]["rest"] = {"kind": "pooled"}
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r"methods\.a: unknown key 'rest' of version 1"):
        Plan.load(tmp_path / "plan.json")


class Trap:
    """Unpickling it would leave a trace."""

    def __reduce__(self) -> tuple[Any, ...]:
        return exec, ("import os; os.environ['DIFFUSERS_ACCEL_TRAP'] = 'sprung'",)


# What is wrong with a file's bytes.
BYTES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", r"expected a JSON file, found an empty file"),
    "cut off": (b'{"format": "diffusers_accel.plan", "version', r"expected JSON, found .*; is the file cut off"),
    "pickle": (pickle.dumps(Trap()), r"expected JSON, found a pickle"),
    "archive": (b"PK\x03\x04rest", r"expected JSON, found a pickle or a torch\.save archive"),
    "binary": (b"{\xff\x00\x01", r"expected JSON in UTF-8, found binary data"),
    "byte order mark": (b"\xef\xbb\xbf{}", r"expected JSON in UTF-8, found a byte order mark"),
    "UTF-16": (b"\xff\xfe{\x00}\x00", r"expected JSON in UTF-8, found a byte order mark"),
    "nan": (b'{"a": NaN}', r"expected a finite number, found NaN"),
    "infinity": (b'{"a": [-Infinity]}', r"expected a finite number, found -Infinity"),
    "key twice": (b'{"version": 1, "version": 2}', r"expected each key once in an object, found 'version' twice"),
    "list": (b"[]", r"the file: expected an object, found a list"),
    "too deep": (b"[" * 100_000, r"maximum recursion depth|nest"),
    "endless number": (b"[" + b"9" * 10_000 + b"]", r"[Ee]xceeds the limit"),
    "overflowing number": (b'{"format": 1e999}', r"format: expected a finite number, found inf"),
    "half a character": (b'{"family": "\\ud800"}', r"family: expected Unicode text, found half a character"),
    "more than 64 bits": (b'{"version": 9223372036854775808}', r"version: expected a whole number of at most 64 bits"),
}


@pytest.mark.parametrize("case", BYTES)
def test_bytes_that_are_no_plan_are_refused(case: str, tmp_path: Path) -> None:
    data, message = BYTES[case]
    path = tmp_path / "plan.json"
    path.write_bytes(data)
    with pytest.raises(PlanError, match=message) as caught:
        Plan.load(path)
    assert str(caught.value).startswith(str(path))
    assert "DIFFUSERS_ACCEL_TRAP" not in os.environ


def test_what_is_not_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PlanError, match="expected a JSON file, found a folder"):
        Plan.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="expected a JSON file, found nothing there"):
        Plan.load(tmp_path / "gone.json")
    path = saved(tmp_path)
    monkeypatch.setattr(strict_json, "MAX_JSON_BYTES", 100)
    with pytest.raises(PlanError, match=r"expected at most 100 bytes, found [\d,]+"):
        Plan.load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are a thing of POSIX")
def test_a_pipe_is_refused_rather_than_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="expected a JSON file, found a device, pipe or socket"):
        Plan.load(tmp_path / "plan.json")


def test_a_side_file_that_is_cut_off_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    (side,) = tmp_path.glob("*.safetensors")
    side.write_bytes(side.read_bytes()[:-10])
    with pytest.raises(
        PlanError,
        match=rf"{re.escape(side.name)}: expected \d+ bytes, .* found \d+; is it cut off.* copy it again together",
    ):
        Plan.load(path)


def test_a_side_file_of_another_kind_is_refused_even_with_its_own_hash(tmp_path: Path) -> None:
    data = pickle.dumps(Trap())
    (tmp_path / "x.safetensors").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    path = saved(tmp_path, rewrite(tensors={"file": "x.safetensors", "sha256": digest}))
    with pytest.raises(PlanError, match=r"x\.safetensors: expected a safetensors file"):
        Plan.load(path)
    assert "DIFFUSERS_ACCEL_TRAP" not in os.environ


def fail(*args: Any, **kwargs: Any) -> None:
    raise OSError("disk full")


@pytest.mark.parametrize(("broken", "at"), [("fsync", 1), ("fsync", 2), ("replace", 1), ("replace", 2)])
def test_a_failed_save_keeps_the_old_plan(
    broken: str, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails up to the JSON's new name, what was saved before still loads.

    Flushed are the side file, the JSON, and the folder with the side file's name.
    """
    path = tmp_path / "plan.json"
    old = plan()
    old.save(path)
    newer = plan(budget={"speedup": 2.0}, tensors={"stripe_mass/transformer": torch.zeros(2, 3, 1, 1)})
    calls = 0

    def sometimes(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return fail() if calls == at else original(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(os, broken, sometimes(getattr(os, broken)))
        with pytest.raises(OSError, match="disk full"):
            newer.save(path)
    assert calls == at
    assert Plan.load(path) == old
    assert not list(tmp_path.glob(".*")), "a temporary file was left behind"
    newer.save(path)
    assert Plan.load(path) == newer


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not flushed on Windows")
def test_a_folder_that_cannot_be_flushed_holds_the_new_plan_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last flush comes after the new name: the plan is there, and only a power cut may bring the old one back."""
    path = tmp_path / "plan.json"
    plan().save(path)
    newer = plan(budget={"speedup": 2.0}, tensors={"stripe_mass/transformer": torch.zeros(2, 3, 1, 1)})
    named: list[str] = []
    replace, fsync = os.replace, os.fsync

    def flush(descriptor: int) -> None:
        if path.name in named:
            fail()
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda a, b: (replace(a, b), named.append(Path(b).name)))
        patch.setattr(os, "fsync", flush)
        with pytest.raises(
            FlushError, match=r"plan\.json: was written, but the folder .* disk full; the new one is in its"
        ):
            newer.save(path)
    assert Plan.load(path) == newer
    assert not list(tmp_path.glob(".*")), "a temporary file was left behind"


def test_the_example_of_the_docs_is_a_plan(tmp_path: Path) -> None:
    text = (Path(__file__).parent.parent / "docs" / "plan-file.md").read_text()
    path = tmp_path / "plan.json"
    path.write_text(text.split("```json\n")[1].split("```")[0])
    assert Plan.load(path).models == {"transformer": ModelShape(6, 4, 64)}


def test_save_wants_a_json_name(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r'expected a file name that ends in "\.json", found \'plan\.safetensors\''):
        plan().save(tmp_path / "plan.safetensors")
    with pytest.raises(
        FileNotFoundError, match=r"such: expected a folder to write plan\.json into, found none; make it first"
    ):
        dense().save(tmp_path / "no" / "such" / "plan.json")


def test_a_plan_without_tensors_has_no_side_file(tmp_path: Path) -> None:
    dense().save(tmp_path / "plan.json")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    assert json.loads((tmp_path / "plan.json").read_text())["tensors"] is None


densities = st.floats(0, 1, exclude_min=True)
methods = st.one_of(
    st.just(DENSE),
    st.just(SKIP),
    st.builds(
        Method,
        st.sampled_from(["fhw", "fwh", "hfw", "hwf", "wfh", "whf"]).map(AxisOrder),
        st.builds(Band, densities, st.booleans()),
    ),
    st.builds(Method, select=st.builds(Stripe, densities, st.booleans(), st.booleans())),
)
json_data = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    names = draw(st.lists(st.sampled_from(["transformer", "transformer_2"]), min_size=1, unique=True))
    models = {
        name: ModelShape(draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 256))) for name in names
    }
    symbols = st.sampled_from(string.ascii_letters + string.digits + ".")
    table = draw(st.dictionaries(symbols, methods, min_size=1, max_size=6))
    edges = sorted(draw(st.sets(st.floats(0, 1, exclude_min=True, exclude_max=True), max_size=3)))
    row = st.sampled_from(sorted(table))

    def rows(shape: ModelShape) -> tuple[str, ...]:
        return tuple("".join(draw(row) for _ in range(shape.heads)) for _ in range(shape.layers))

    made = tuple(
        Span(a, b, {name: rows(shape) for name, shape in models.items()})
        for a, b in zip([0.0, *edges], [*edges, 1.0], strict=True)
    )
    dtype = draw(st.sampled_from([torch.float16, torch.float32]))
    tensors = {f"stripe_mass/{name}": torch.rand(s.layers, s.heads, 2, 3).to(dtype) for name, s in models.items()}
    data = st.dictionaries(st.text(), json_data, max_size=3)
    return Plan(draw(st.text(min_size=1)), models, table, made, draw(data), draw(data), tensors)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plans())
def test_what_is_saved_is_what_is_loaded(tmp_path: Path, made: Plan) -> None:
    made.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == made


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "ltx"},
        {"methods": {".": DENSE, "a": BAND, "b": BAND, "c": CALIBRATED, "s": SKIP}},
        {"budget": {}},
        {"spans": spans(0.0, 1.0)},
        {"tensors": {"stripe_mass/transformer": torch.zeros(2, 3, 5, 4).half()}},
        {"tensors": {"stripe_mass/transformer": plan().tensors["stripe_mass/transformer"].float()}},
    ],
)
def test_plans_that_differ_are_not_equal(changes: dict[str, Any]) -> None:
    assert plan() == plan()
    assert plan(**changes) != plan()


def test_check_names_what_does_not_fit() -> None:
    made = plan()
    made.check({"transformer": ModelShape(2, 3, 64)}, family="wan")
    wrong = {
        r"plan has 2 self-attention layers in 'transformer', this model has 40": ModelShape(40, 3, 64),
        r"plan has 3 heads in 'transformer', this model has 40; was it searched on another size": ModelShape(2, 40, 64),
        r"plan has 64 channels a head in 'transformer', this model has 128": ModelShape(2, 3, 128),
    }
    for message, shape in wrong.items():
        with pytest.raises(PlanError, match=message):
            made.check({"transformer": shape})
    with pytest.raises(PlanError, match=r"plan is for 'transformer', this pipeline has 'transformer', 'transformer_2'"):
        made.check({"transformer": ModelShape(2, 3, 64), "transformer_2": ModelShape(2, 3, 64)})
    with pytest.raises(PlanError, match=r"plan is for the family 'wan', this pipeline is of 'ltx'"):
        made.check(made.models, family="ltx")


def test_span_at_goes_by_the_middle_of_the_step() -> None:
    made = plan()
    assert [made.span_at(step, 10) for step in range(10)] == [0, 0, *[1] * 8], "0.25 lies in the middle of step 2 of 10"
    assert [made.span_at(step, 4) for step in range(4)] == [0, 1, 1, 1]
    assert made.span_at(0, 1) == 1
    for step in (-1, 10):
        with pytest.raises(PlanError, match=rf"step: expected 0 to 9 in a schedule of 10 steps, found {step}"):
            made.span_at(step, 10)


def test_method_is_that_of_the_symbol() -> None:
    made = plan()
    assert made.method(0, "transformer", 1, 2) == DENSE
    assert [made.method(1, "transformer", 1, head) for head in range(3)] == [CALIBRATED, SKIP, BAND]


def test_uniform_deals_a_recipe_out() -> None:
    def rows(*texts: str) -> dict[str, tuple[tuple[str, ...], ...]]:
        return {"transformer": tuple(map(tuple, texts))}

    models = {"transformer": ModelShape(3, 4, 64), "transformer_2": ModelShape(1, 2, 64)}
    made = Plan.uniform(NAMED["pattern"](density=0.25, dense_steps=0.2, dense_layers=1), "wan", models)
    assert [(span.start, span.stop) for span in made.spans] == [(0.0, 0.2), (0.2, 1.0)]
    assert made.spans[0].heads == rows("....", "....", "....") | {"transformer_2": (tuple(".."),)}
    assert made.spans[1].heads == rows("....", "abab", "abab") | {"transformer_2": (tuple(".."),)}
    assert made.methods["b"] == Method(AxisOrder("hwf"), Band(0.25))
    single = Plan.uniform(Method(select=All()), "wan", models)
    assert single.spans == (Span(0.0, 1.0, {"transformer": ("....",) * 3, "transformer_2": ("..",)}),)
    only_dense = Plan.uniform(NAMED["pattern"](dense_steps=1.0), "wan", models)
    assert len(only_dense.spans) == 1 and only_dense.spans[0].heads["transformer"] == (tuple("...."),) * 3


def test_shares_weigh_spans_by_their_length() -> None:
    assert plan().shares() == pytest.approx({".": 0.375, "a": 0.25, "b": 0.125, "c": 0.125, "s": 0.125})


def test_show_is_readable() -> None:
    text = plan().show()
    assert "plan for wan (transformer: 2 layers x 3 heads x 64)" in text
    assert "layer  0  ab." in text and "25% to 100% of the steps, transformer" in text
    shares = {line.split()[0]: line.split()[-1] for line in text.splitlines() if line.endswith("%")}
    assert shares == {".": "37.5%", "a": "25.0%", "b": "12.5%", "c": "12.5%", "s": "12.5%"}
    assert "speedup: 1.5" in text and "a red circle" in text
    hostile = plan(family="wan\x1b[31m", provenance={"a\nb": "\x1b]0;title\x07"}).show()
    assert hostile.count("\x1b") == hostile.count("\x07") == 0 and "a\\nb: \\x1b]0;title" in hostile
