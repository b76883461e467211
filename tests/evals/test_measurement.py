"""Measurements: honest about what is missing, and the same again after a file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffusers_accel.evals.machine import machine, versions
from diffusers_accel.evals.measurement import Measurement, Spread, read_rows, summarise, write_rows
from diffusers_accel.files import FileError


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


def test_summary_is_the_statistic_and_its_spread() -> None:
    values = [1.0, 2.0, 4.0, 9.0]
    for statistic, function in (("mean", np.mean), ("median", np.median)):
        centre, spread = summarise(values, statistic)  # type: ignore[arg-type]
        assert centre == function(values)
        assert spread.n == 4
        assert spread.std == pytest.approx(np.std(values, ddof=1))
        # A bootstrap of the same statistic by hand: its 2.5 and 97.5 percentiles, whose own sampling error is below 0.3 here.
        draws = function(np.random.default_rng(1).choice(values, (9999, 4)), axis=1)
        assert spread.low == pytest.approx(np.percentile(draws, 2.5), abs=0.3)
        assert spread.high == pytest.approx(np.percentile(draws, 97.5), abs=0.3)
        assert summarise(values, statistic) == (centre, spread)  # type: ignore[arg-type]


def test_summary_of_few_values_claims_no_interval() -> None:
    assert summarise([3.0], "mean") == (3.0, Spread(1))
    centre, spread = summarise([3.0, 5.0], "mean")
    assert (centre, spread.n, spread.low, spread.high) == (4.0, 2, None, None)
    assert spread.std == pytest.approx(2**0.5)
    assert summarise([2.0, 2.0, 2.0], "median") == (2.0, Spread(3, 0.0, 2.0, 2.0))


@pytest.mark.parametrize("values", [[], [1.0, float("inf")], [float("nan")]])
def test_summary_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        summarise(values, "mean")


def test_rows_come_back_from_a_file(tmp_path: Path) -> None:
    other = {"machine": "two", "protocol": ["a", "b"]}
    rows = (
        row(spread=Spread(4, 0.5, 1.0, 2.0)),
        row(None, note="identical", clip={"prompt": "a | b", "seed": 3}),
        Measurement("time", 12.0, "ms", "lower", "dense", None, other),
    )
    path = tmp_path / "report.json"
    write_rows(path, rows, headline="faster")
    assert read_rows(path) == rows
    document = json.loads(path.read_text())
    assert document["headline"] == "faster"
    assert document["provenance"] == [{"machine": "one"}, other]  # each once


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text('{"format": "diffusers_accel.report", "version": 2}')
    with pytest.raises(FileError, match="version 1, found"):
        read_rows(path)
    path.write_text(
        '{"format": "diffusers_accel.report", "version": 1, "provenance": [], "measurements": [{"provenance": 0}]}'
    )
    with pytest.raises(FileError, match="expected rows"):
        read_rows(path)


def test_provenance_names_no_host() -> None:
    import platform

    found = machine()
    assert found["cores"] >= 1 and found["cpu"]
    assert not platform.node() or platform.node() not in repr(found)
    assert set(versions()) >= {"python", "torch", "diffusers"}
