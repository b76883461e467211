"""Which clips the page shows: the worst, decided when their numbers are known; and no more of them than a page can hold."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusers_accel.evals import compare as comparing
from diffusers_accel.evals.clip_record import ClipNumbers, ClipRecord, Seen
from diffusers_accel.evals.report import render
from diffusers_accel.evals.report.page_films import fitting
from diffusers_accel.evals.report.worst import rank, worst_first
from diffusers_accel.evals.shown import drop_films, worst_of_records
from diffusers_accel.support.interrupted import Interrupted
from tests.evals import synthetic
from tests.evals.test_kept import run
from tests.tiny import tiny_wan

SIX: dict[str, Any] = {"seeds": range(6), "show": 2, "metrics": ("psnr", "temporal_flickering")}


def record(psnr: float | None, note: str | None = None, ssim: float = 0.9) -> ClipRecord:
    seen = Seen(times=[1.0], middles=[0.0], peaks=[1], scores={"ssim": (ssim, None), "psnr": (psnr, note)})
    numbers = ClipNumbers("a", 0, (1, 8, 8), {}, {"dense": Seen(), "a": seen}, [0.0], None, 8)
    return ClipRecord(numbers, {"dense": b"film", "a": b"film"}, {"a": b"film"})


def test_the_worst_of_all_subjects_counts_and_what_cannot_be_scored_is_worst() -> None:
    ranks = [
        rank({"psnr": [each]})
        for each in ((None, "not measured: NaN"), (20.0, None), (30.0, None), (None, "identical"))
    ]
    assert ranks == sorted(ranks) and len(set(ranks)) == 4
    assert rank({"psnr": [(40.0, None), (20.0, None)]}) == rank({"psnr": [(20.0, None)]}) == (20.0,)
    assert rank({"lpips": [(0.3, None)], "psnr": [(20.0, None)], "temporal_flickering": [(0.5, None)]}) == (20.0, -0.3)


def test_films_of_other_clips_are_dropped() -> None:
    records = {
        0: record(30.0),
        1: record(20.0),
        2: record(None, "identical"),
        3: record(25.0),
        4: record(20.0, ssim=0.5),
    }
    assert worst_of_records(records, ["a"], 3).numbers == {1, 3, 4} and worst_of_records(records, ["a"], 1).numbers == {
        4
    }
    worst = worst_of_records({number: records[number] for number in (0, 2)}, ["a"], 2)
    assert [worst.add(number, records[number].numbers.seen) for number in (3, 1)] == [True, True] and worst.numbers == {
        1,
        3,
    }
    assert not worst.add(0, records[0].numbers.seen) and not worst_of_records(records, ["a"], 0).numbers
    assert drop_films(records, {1, 4}) == {0, 2, 3}
    assert [bool(each.films) for each in records.values()] == [False, True, False, False, True]
    assert records[0].numbers == record(30.0).numbers and not records[0].differences
    assert drop_films(records, {1, 4}) == set()


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_wan()


def test_the_page_shows_the_worst_clips_also_after_an_interruption(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(pipe, None, **SIX)
    values = [whole.row("psnr", "a sign says [/b]", clip).value for clip in whole.clips]  # type: ignore[union-attr]
    worst = sorted(range(6), key=lambda number: values[number])[:2]  # type: ignore[arg-type,return-value]
    assert [number for number, clip in enumerate(whole.clips) if clip.media] == sorted(worst) != [0, 1]
    stock = comparing._Session.clip

    def clip(self: Any, index: int, *arguments: Any) -> Any:
        if index == 4:
            raise KeyboardInterrupt
        return stock(self, index, *arguments)

    keep = tmp_path / "kept"
    with monkeypatch.context() as patched:
        patched.setattr(comparing._Session, "clip", clip)
        with pytest.raises(Interrupted):
            run(pipe, keep, **SIX)
    kept = [bool(ClipRecord.load(keep / f"clip-{number:04}.safetensors").films) for number in range(4)]
    so_far = sorted(range(4), key=lambda number: values[number])[:2]  # type: ignore[arg-type,return-value]
    assert [number for number in range(4) if kept[number]] == sorted(so_far), "of the worst so far, on the disk too"
    resumed = run(pipe, keep, **SIX)
    assert [each.media for each in resumed.clips] == [each.media for each in whole.clips]
    page = render.html(whole)
    figures = page.split('<figure class="clip">')[1:]
    assert [f"seed {number}" in figure for number, figure in zip(worst, figures, strict=True)] == [True, True]
    assert "The 2 worst clips of 6, by the lowest quality of any subject (Frame-mean PSNR first)." in page
    assert [each.seed for each in worst_first(whole)][:2] == worst


def test_films_left_over_by_a_kill_are_not_shown(pipe: Any, tmp_path: Path) -> None:
    """It may come between a clip and the films that it replaces."""
    keep, few = tmp_path / "kept", {"seeds": range(3), "show": 1}
    whole = run(pipe, keep, **few)
    (shown,) = [number for number, clip in enumerate(whole.clips) if clip.media]
    path = keep / f"clip-{(shown + 1) % 3:04}.safetensors"
    films = ClipRecord.load(keep / f"clip-{shown:04}.safetensors").films
    dataclasses.replace(ClipRecord.load(path), films=films).save(path)
    again = run(pipe, keep, **few)
    assert [bool(clip.media) for clip in again.clips] == [bool(clip.media) for clip in whole.clips]


def test_a_page_holds_no_more_films_than_can_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    report = synthetic.report({"one": [1.4, 1.5], "two": [1.1, 1.2]}, prompt="a ball")
    first, second = report.clips
    assert first.media and second.media
    sizes = {name: len(film) + len(first.media.differences.get(name, b"")) for name, film in first.media.videos.items()}
    assert fitting(report.clips) == ([first, second], "")
    kept, said = fitting(report.clips, sizes["dense"] + sizes["one"])
    assert [list(clip.media.videos) for clip in kept] == [["dense", "one"]]  # type: ignore[union-attr]
    assert list(kept[0].media.differences) == ["one"]  # type: ignore[union-attr]
    assert said.endswith("open: two of “a ball” seed 0; all films of “a ball” seed 1.")
    twice, _ = fitting([first, first], sizes["dense"] + sizes["one"])
    assert len(twice) == 1, "what the first takes the second has not"
    nothing, said = fitting(report.clips, sizes["dense"] + 10)
    assert nothing == [] and "all films of “a ball” seed 0" in said
    many, said = fitting([first] * 8, 10)
    assert many == [] and said.count("seed 0") == 5 and said.endswith("; and of 3 more clips.")
    monkeypatch.setattr(render, "fitting", lambda clips: fitting(clips, sizes["dense"] + sizes["one"]))
    page = render.html(report)
    assert page.count("data-mp4=") == 3 and "two of “a ball” seed 0" in page
    monkeypatch.setattr(render, "fitting", lambda clips: fitting(clips, 0))
    assert "all films of “a ball” seed 0" in render.html(report)


def test_a_long_table_of_clips_ends_with_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    report = synthetic.report({"one": [1.4] * 6, "two": [1.1] * 6}, prompt="a ball")
    monkeypatch.setattr(render, "MOST_LINES", 5)
    for text in (render.markdown(report), render.html(replace(report, clips=report.clips[::-1]))):
        told = text.split("The worst clip comes first.")[1].split("## Protocol")[0].split('<h2 id="h-protocol">')[0]
        assert told.strip().startswith("These are the worst 2; the other 4 are in report.json.")
        assert told.count("a ball") == 2 * 2
    monkeypatch.undo()
    assert "These are the worst" not in render.markdown(report)
