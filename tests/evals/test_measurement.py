"""Measurements: honest about what is missing, and the same again after a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffusers_accel.evals.machine import machine, versions
from diffusers_accel.evals.measurement import Measurement, Spread, read_rows, write_rows
from diffusers_accel.files import FileError, checksum


def row(value: float | None = 1.5, **more: object) -> Measurement:
    return Measurement("psnr", value, "dB", "higher", "plan", "dense", {"machine": "one"}, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_value_must_be_finite(value: float) -> None:
    with pytest.raises(ValueError, match="expected a finite value"):
        row(value)


def test_missing_value_needs_a_reason() -> None:
    with pytest.raises(ValueError, match="needs a note"):
        row(None)
    assert row(None, note="identical").value is None


def test_rows_come_back_from_a_file(tmp_path: Path) -> None:
    other = {"machine": "two", "protocol": ["a", "b"]}
    rows = (
        row(spread=Spread(4, 0.5, 1.0, 2.0, median=1.5, prompts=3, comparisons=2)),
        row(None, note="identical", clip={"prompt": "a | b", "seed": 3}),
        Measurement("time", 12.0, "ms", "lower", "dense", None, other),
    )
    path = tmp_path / "report.json"
    write_rows(path, rows, headline="faster")
    assert read_rows(path) == rows
    document = json.loads(path.read_text())
    assert document["headline"] == "faster"
    assert document["provenance"] == [{"machine": "one"}, other]  # each once


def saved(path: Path, **changes: Any) -> Path:
    """A file of one row with parts of it replaced, its checksum right."""
    write_rows(path, [row(spread=Spread(4, 0.5, 1.0, 2.0), clip={"prompt": "a", "seed": 3})])
    data = json.loads(path.read_text())
    del data["sha256"]
    for place, value in changes.items():
        *parents, last = place.split("__")
        parent = data
        for each in parents:
            parent = parent[int(each) if each.isdigit() else each]
        parent[last] = value
    path.write_text(json.dumps({**data, "sha256": checksum(data)}))
    return path


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"version": 2}, "expected version 3 of diffusers_accel.report, found 2"),
        ({"format": "diffusers_accel.cost"}, "expected the format diffusers_accel.report"),
        ({"measurements": 3}, "measurements: expected array, found int"),
        ({"measurements__0__value": "1.5"}, r"measurements\[0\].value: expected float"),
        ({"measurements__0__value": None}, "a missing value needs a note"),
        ({"measurements__0__better": "more"}, r"measurements\[0\].better"),
        ({"measurements__0__provenance": 1}, "list index out of range"),
        ({"measurements__0__provenance": -1}, r"measurements\[0\].provenance: expected int >= 0"),
        ({"measurements__0__clip": 7}, "list index out of range"),
        ({"measurements__0__spread": [1]}, r"measurements\[0\].spread"),
        ({"measurements__0__more": 1}, "found the unknown key more"),
        ({"provenance": {}}, "provenance: expected array"),
        ({"clips": [{"prompt": "a", "seed": "3"}]}, r"clips\[0\].seed: expected int"),
        ({"headline": "x" * 5_000_000, "measurements": "x" * 5_000_000}, "measurements: expected array"),
    ],
)
def test_other_files_are_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "report.json", **changes)
    with pytest.raises(FileError, match=f"report.json: .*{says}.*; make the report again") as refused:
        read_rows(path)
    assert len(str(refused.value)) < 500


def test_a_changed_number_is_noticed(tmp_path: Path) -> None:
    path = saved(tmp_path / "report.json")
    assert read_rows(path)[0].value == 1.5
    path.write_text(path.read_text().replace("1.5", "2.5"))
    with pytest.raises(FileError, match="damaged; make the report again"):
        read_rows(path)


def test_the_largest_report_that_compare_makes_is_read_again(tmp_path: Path) -> None:
    """As many rows as its arguments allow, with prompts as long as a metric's note."""
    from diffusers_accel.evals.arguments import MOST_ROWS

    one: dict[str, Any] = {"machine": "one"}
    note = "not measured: " + "y" * 300
    rows = [
        Measurement(
            "lpips", None, "", "lower", "p" * 30, "dense", one, clip={"prompt": "x" * 300, "seed": n // 25}, note=note
        )
        for n in range(MOST_ROWS)
    ]
    write_rows(tmp_path / "report.json", rows)
    assert read_rows(tmp_path / "report.json") == tuple(rows)


def test_more_than_can_be_read_again_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="expected at most 16,777,216 bytes of JSON"):
        write_rows(tmp_path / "report.json", [row(None, note="x" * 2**24)])
    assert not list(tmp_path.iterdir())


def test_provenance_names_no_host() -> None:
    import platform

    found = machine()
    assert found["cores"] >= 1 and found["cpu"]
    assert not platform.node() or platform.node() not in repr(found)
    assert set(versions()) >= {"python", "torch", "diffusers"}
