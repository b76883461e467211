"""The page of models and what was tried on each: made from results, and nothing is missing in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffusers_accel.families import FAMILIES
from diffusers_accel.starter.checkpoints import CHECKPOINTS
from tests import matrix
from tests.families import TINY
from tests.families.test_every_family import FIRST, PACKED

README = matrix.PAGE.parents[1] / "README.md"
# Made with a supported transformer and refused: docs/families.md says why.
REFUSED = {"LTXI2VLongMultiPromptPipeline", "LTX2DFRPipeline", "LTX2DFRTemporalRefinePipeline"}
WITH_HISTORY = {family.name for family in FAMILIES.values() if family.history}


def test_the_page_names_every_kind_of_pipeline_and_no_failure() -> None:
    text = matrix.PAGE.read_text(encoding="utf-8")
    for key in TINY:
        family, _, kind = key.partition(", ")
        assert f"| `{family}` | {kind} |" in text, f"write it anew: see {matrix.__name__}"
        row = next(line for line in text.splitlines() if line.startswith(f"| `{family}` | {kind} |"))
        blank = [cell for cell in row.split("|")[4:-1] if not cell.strip()]
        if key in FIRST:  # on which all is run, but that sequences of video alone have no other rows
            assert len(blank) == (key not in PACKED), row
    assert "**fails**" not in text


def test_the_page_says_of_every_family_what_goes_with_it() -> None:
    _, _, text = matrix.PAGE.read_text(encoding="utf-8").partition("## Features by family")
    lines = text.partition("## Pipelines")[0].splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    titles, rows = table[0], {row[0].strip("`"): row for row in table[2:]}
    assert titles == ["family", *matrix.FEATURES.values(), "starter plan", "diffusers' own tests"]
    assert set(rows) == {family.name for family in FAMILIES.values()}
    for name, row in rows.items():
        blank = {title for title, cell in zip(titles, row, strict=True) if not cell}
        assert blank <= {"starter plan", "diffusers' own tests", *({"history"} if name not in WITH_HISTORY else ())}, (
            name
        )
    starter, own = titles.index("starter plan"), titles.index("diffusers' own tests")
    assert {name for name, row in rows.items() if row[starter]} == {each.family for each in CHECKPOINTS}
    assert {name: row[own] for name, row in rows.items() if row[own]} == matrix.own_tests()


def test_the_column_of_diffusers_own_tests_is_renewed_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = matrix.PAGE.read_text(encoding="utf-8")
    assert matrix.with_own_tests(text) == text
    own = tmp_path / "own.md"
    own.write_text("| wan | lora | 9 | 5 | 2 | 2 | 1 |\n", encoding="utf-8")
    monkeypatch.setattr(matrix, "OWN_TESTS", own)
    before, after = text.splitlines(), matrix.with_own_tests(text).splitlines()
    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert all(
        old.rpartition("|")[0].rpartition("|")[0] == new.rpartition("|")[0].rpartition("|")[0] for old, new in changed
    )
    wan = next(new for _, new in changed if new.startswith("| `wan` |"))
    assert wan.endswith("| lora 5 of 7 |") and sum("lora" in new for _, new in changed) == 1


def test_the_readme_names_each_pipeline_that_works() -> None:
    _, _, models = README.read_text(encoding="utf-8").partition("## Models")
    named = set(re.findall(r"`(\w+Pipeline)`", models.partition("\n## ")[0]))
    _, _, table = matrix.PAGE.read_text(encoding="utf-8").partition("## Pipelines by transformer")
    assert named == set(re.findall(r"`(\w+Pipeline)`", table)) - REFUSED


def test_results_are_read_by_kind_and_column(tmp_path: Path) -> None:
    path = tmp_path / "results.xml"
    path.write_text(
        '<testsuites><testsuite><testcase name="test_a[wan]"/><testcase name="test_a[wan, edit]"><skipped/></testcase>'
        '<testcase name="test_b[wan_vace-fullgraph]"><failure/></testcase><testcase name="test_c"/>'
        '<testcase name="test_d[2-names0]"><properties><property name="shows" value="wan-ulysses"/>'
        '<property name="else" value="wan-x"/></properties></testcase></testsuite></testsuites>'
    )
    assert matrix.results(path) == {
        "wan": {"test_a": "passed", "ulysses": "passed"},
        "wan, edit": {"test_a": "skipped"},
        "wan_vace": {"test_b-fullgraph": "failed"},
    }
