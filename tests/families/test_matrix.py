"""The page of models and what was tried on each: made from results, and nothing is missing in it."""

from __future__ import annotations

from pathlib import Path

from diffusers_accel.families import FAMILIES
from tests import matrix
from tests.families import TINY
from tests.families.test_every_family import FIRST, PACKED

WITH_HISTORY = {family.name for family in FAMILIES.values() if family.history}


def test_the_page_names_every_kind_of_pipeline_and_no_failure() -> None:
    text = matrix.PAGE.read_text(encoding="utf-8")
    for key in TINY:
        family, _, kind = key.partition(", ")
        assert f"| `{family}` | {kind} |" in text, f"write it anew: see {matrix.__name__}"
        row = next(line for line in text.splitlines() if line.startswith(f"| `{family}` | {kind} |"))
        blank = [cell for cell in row.split("|")[4:-1] if not cell.strip()]
        if key in FIRST:  # on which all is run, but that sequences of video alone have no other rows, and few a history
            assert len(blank) == (key not in PACKED) + (family not in WITH_HISTORY), row
    assert "**fails**" not in text


def test_results_are_read_by_kind_and_column(tmp_path: Path) -> None:
    path = tmp_path / "results.xml"
    path.write_text(
        '<testsuites><testsuite><testcase name="test_a[wan]"/><testcase name="test_a[wan, edit]"><skipped/></testcase>'
        '<testcase name="test_b[wan_vace-fullgraph]"><failure/></testcase><testcase name="test_c"/></testsuite></testsuites>'
    )
    assert matrix.results(path) == {
        "wan": {"test_a": "passed"},
        "wan, edit": {"test_a": "skipped"},
        "wan_vace": {"test_b-fullgraph": "failed"},
    }
