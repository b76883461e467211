"""What is said of a long work where no bar can be drawn."""

from __future__ import annotations

import pytest

from diffusers_accel.search.screen import Screen
from diffusers_accel.support import progress
from diffusers_accel.support.progress import EVERY, ProgressLines, clock


def test_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = ProgressLines(200, said.append)
    lines.tell(0, "warm-up")
    for done in range(1, 200):
        now += EVERY / 10
        lines.tell(done, "draft")
    now += EVERY / 10
    lines.tell(200, "draft")
    assert said[0] == "0 %: warm-up" and said[-1] == "100 % in 10 min 00 s: draft"
    assert said[1] == "5 % in 30 s, about 9 min 30 s left: draft" and len(said) == 21


def test_times_are_as_people_say_them() -> None:
    assert [clock(seconds) for seconds in (7, 123, 3900)] == ["7 s", "2 min 03 s", "1 h 05 min"]


def test_a_search_says_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for shown in (True, False):
        with Screen(shown).bar("probe", 50) as advance:
            advance(10)
            advance(50)
        assert capsys.readouterr().err.splitlines() == (["probe: 0 %", "probe: 100 % in 0 s"] if shown else [])
