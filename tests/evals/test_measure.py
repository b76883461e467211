"""The measurement of the toy model: it goes on with its own file and replaces nobody else's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffusers_accel.evals.toy.training import measure
from diffusers_accel.files import FileError, write_json

WHAT: dict[str, Any] = {"weights": "abc", "prompts": 4, "seed": 0, "part": "0/1", "call": {"height": 128}}


def test_only_the_same_measurement_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "measured.json"
    assert measure.held_rows(path, WHAT) == []
    rows = [{"source": "generated"}]
    write_json(path, {"what": WHAT, "summary": {}, "rows": rows})
    before = path.read_bytes()
    assert measure.held_rows(path, WHAT) == rows
    with pytest.raises(FileError, match="holds a measurement with other seed, weights; name another --out"):
        measure.held_rows(path, {**WHAT, "weights": "other", "seed": 1})
    assert path.read_bytes() == before
    for other in ([], {"what": WHAT}, {"rows": [], "what": 3}):
        write_json(path, other)
        with pytest.raises(FileError, match="expected an unfinished measurement, found another file"):
            measure.held_rows(path, WHAT)


@pytest.mark.parametrize("text", ["", "1", "1/1", "2/1", "-1/2", "a/b", "0/2/3", "x" * 1000])
def test_parts_that_are_none_are_refused(text: str) -> None:
    assert measure.part_of("1/2") == (1, 2)
    with pytest.raises(ValueError, match="--part: expected i/n") as refused:
        measure.part_of(text)
    assert len(str(refused.value)) < 400
