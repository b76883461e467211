"""What somebody may have meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusers_accel.support.suggest import did_you_mean, did_you_mean_file

METHODS = ("dense", "pattern", "draft", "cached", "reordered")


@pytest.mark.parametrize(
    ("word", "meant"), [("drat", "draft"), ("DRAFT", "draft"), ("cache", "cached"), ("patern", "pattern")]
)
def test_a_name_that_is_nearly_right(word: str, meant: str) -> None:
    assert did_you_mean(word, METHODS) == f'; did you mean "{meant}"?'


@pytest.mark.parametrize("word", ["", "magic", "x" * 1_000_000])
def test_a_name_that_resembles_none(word: str) -> None:
    assert did_you_mean(word, METHODS) == ""


def test_what_is_suggested_steers_no_terminal() -> None:
    assert did_you_mean("plan", ["pl\x1ban"]) == '; did you mean "pl\\x1ban"?'


def test_a_file_beside_it(tmp_path: Path) -> None:
    (tmp_path / "searched.json").touch()
    assert did_you_mean_file(tmp_path / "serched.json") == f'; did you mean "{tmp_path / "searched.json"}"?'
    assert did_you_mean_file(tmp_path / "other.txt") == ""
    assert did_you_mean_file(tmp_path / "none" / "searched.json") == ""
    assert did_you_mean_file(tmp_path / ("n" * 5000)) == ""
