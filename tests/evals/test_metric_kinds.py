"""A metric of any kind is one line away from every part of a report; what each kind gets, refuses and says."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import check_output
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch

from diffusers_accel.evals import compare as comparing
from diffusers_accel.evals.clip_record import ClipRecord
from diffusers_accel.evals.compare import compare
from diffusers_accel.evals.measurement import Measurement, read_rows
from diffusers_accel.evals.metrics import (
    DEFAULT,
    METRICS,
    AnyMetric,
    ClipMetric,
    ClipSet,
    FrameMetric,
    MetricUnavailable,
    SetMetric,
)
from diffusers_accel.evals.metrics.vbench import VBENCH
from diffusers_accel.evals.report import Report
from diffusers_accel.evals.report.video import encode_lossless
from diffusers_accel.evals.set_films import SetFilms
from diffusers_accel.files import FileError
from diffusers_accel.methods import Band, Method
from diffusers_accel.support.interrupted import Interrupted
from tests.evals.test_compare import CALL, PROMPT
from tests.tiny import tiny_wan

SHORT = {**CALL, "num_inference_steps": 2}
CLIPS = 2
SUBJECTS: dict[str, Any] = {"band": Method(select=Band(0.34)), "../all / dense": "dense"}

OF_FRAMES = FrameMetric(
    name="fake_frames",
    title="Fake of frames",
    unit="dB",
    range="0 to 1",
    better="lower",
    protocol="Mean distance per frame.",
    load=lambda: lambda dense, frames: np.abs(dense.astype(np.float64) - frames).mean((1, 2, 3)),
    packages=("scipy",),
)
OF_ONE_CLIP = ClipMetric(
    name="fake_clip",
    title="Fake of one clip",
    unit="",
    range="0 to 1",
    better="closer",
    protocol="Mean of all pixels.",
    load=lambda: lambda frames: float(frames.astype(np.float64).mean()),
)


def decoded(path: Path) -> np.ndarray:
    """[F, H, W, 3] uint8."""
    reader = imageio_ffmpeg.read_frames(str(path), pix_fmt="rgb24")
    width, height = next(reader)["size"]
    return np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def brightness(clips: ClipSet) -> float:
    """In another process, which is how a metric with dependencies of its own works."""
    program = "import pathlib, sys; print(len(list(pathlib.Path(sys.argv[1]).iterdir())))"
    assert int(check_output([sys.executable, "-c", program, str(clips.folder)])) == len(clips.clips)
    assert [(clip.prompt, clip.seed) for clip in clips.clips] == [
        ("embedded prompt 1", n) for n in range(len(clips.clips))
    ]
    return float(np.mean([decoded(clip.path).mean() for clip in clips.clips]))


OF_A_SET = SetMetric(
    name="fake_set",
    title="Fake of a set",
    unit="",
    range="0 to 255",
    better="higher",
    protocol="Mean of the pixels of all films.",
    load=lambda: brightness,
)
FAKES = (OF_FRAMES, OF_ONE_CLIP, OF_A_SET)
NAMES = tuple(fake.name for fake in FAKES)


def run(pipe: Any, **changes: Any) -> Report:
    arguments: dict[str, Any] = {"call": SHORT, "seeds": range(CLIPS), "metrics": NAMES, "show": 1, "progress": False}
    arguments["floor"] = False
    return compare(pipe, SUBJECTS, [PROMPT], **{**arguments, **changes})


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_wan()


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patched:
        for fake in FAKES:
            patched.setitem(METRICS, fake.name, fake)  # the one line
        yield


@pytest.fixture(scope="module")
def report(pipe: Any, registered: None) -> Report:
    return run(pipe)


def value(report: Report, metric: str, subject: str, seed: int | None = None) -> float:
    row = report.row(metric, subject, None if seed is None else report.clips[seed])
    assert row is not None and row.value is not None
    return row.value


def test_a_metric_of_each_kind_is_in_every_part_of_a_report(report: Report, tmp_path: Path) -> None:
    page = report.save(tmp_path / "report")
    html, markdown = page.read_text(), page.with_name("report.md").read_text()
    rows = {row.metric for row in read_rows(page.with_name("report.json"))}
    for fake in FAKES:
        assert fake.name in rows
        change = f"({value(report, fake.change, 'band'):+.4f} from dense)" if fake.scores_dense else ""
        shown = f"{value(report, fake.name, 'band'):.{fake.digits}f}"
        for text in (html, markdown, str(report), report.headline):
            assert fake.title in text and shown in text and (fake.scores_dense or "dB" in text), fake.name
        for text in (html, markdown, report.headline):
            assert change in text
        assert f"{fake.title}: {fake.protocol}" in html and f"{fake.title}: {fake.protocol}" in markdown
        assert f'aria-label="{fake.title} against speed-up.' in html
    assert "nearer dense: better" in html and html.count('class="headline') == 2
    (per_clip,) = [line for line in markdown.splitlines() if line.startswith("| prompt")]
    assert OF_FRAMES.title in per_clip and OF_ONE_CLIP.title in per_clip and OF_A_SET.title not in per_clip
    assert report.provenance["versions"]["scipy"]
    assert "PSNR" not in markdown and "LPIPS" not in html  # no columns of what was not measured


def test_a_metric_of_frames_has_rows_of_subjects_only(report: Report) -> None:
    assert report.row("fake_frames", "dense") is None and report.row("fake_frames_change", "band") is None
    assert value(report, "fake_frames", "band", 0) > 0 == value(report, "fake_frames", "../all / dense", 0)
    assert report.row("fake_frames", "band").better == "lower"  # type: ignore[union-attr]


def test_a_metric_of_one_clip_scores_dense_too_and_its_change_is_paired(report: Report, pipe: Any) -> None:
    for seed in range(CLIPS):
        frames = pipe(**PROMPT, **SHORT, output_type="np", generator=torch.Generator().manual_seed(seed)).frames[0]
        assert value(report, "fake_clip", "dense", seed) == pytest.approx(frames.astype(np.float64).mean(), rel=1e-6)
    changes = [value(report, "fake_clip", "band", n) - value(report, "fake_clip", "dense", n) for n in range(CLIPS)]
    row = report.row("fake_clip_change", "band")
    assert row is not None and row.spread is not None and row.value == pytest.approx(np.mean(changes))
    assert row.spread.std == pytest.approx(np.std(changes, ddof=1)) and row.better == "closer"
    assert value(report, "fake_clip_change", "../all / dense") == 0
    assert report.row("fake_clip_change", "dense") is None
    assert report.row("fake_clip", "dense").baseline is None  # type: ignore[union-attr]


def test_a_metric_of_a_set_has_one_number_per_subject_and_its_change(report: Report) -> None:
    # What it saw of the decoded films is, but for 8 bits, what the other fake saw of the frames.
    for subject in ("dense", *SUBJECTS):
        assert value(report, "fake_set", subject) == pytest.approx(255 * value(report, "fake_clip", subject), abs=0.2)
        assert not any(report.row("fake_set", subject, clip) for clip in report.clips)
    change = value(report, "fake_set", "band") - value(report, "fake_set", "dense")
    assert value(report, "fake_set_change", "band") == pytest.approx(change)


def lasting(report: Report) -> list[Measurement]:
    wanted = {*NAMES, OF_ONE_CLIP.change, OF_A_SET.change}
    return [dataclasses.replace(row, provenance={}) for row in report.rows if row.metric in wanted]


def failing(message: str, error: type[BaseException] = MetricUnavailable) -> Callable[[Any], float]:
    def score(_: Any) -> float:
        raise error(message)

    return score


def not_set_up() -> Any:
    raise MetricUnavailable("VBench is not set up:\na line")


@pytest.mark.parametrize(
    ("load", "why"),
    [
        (not_set_up, r"VBench is not set up:\na line"),
        (lambda: failing("it ended with code 1"), "it ended with code 1"),
        (lambda: lambda _: float("nan"), "Fake of {} is nan"),
    ],
)
def test_what_cannot_be_measured_says_why_and_the_rest_is_reported(
    pipe: Any, report: Report, load: Any, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for fake, what in ((OF_A_SET, "a set of these clips"), (OF_ONE_CLIP, "one clip of this clip")):
        monkeypatch.setitem(METRICS, fake.name, dataclasses.replace(fake, load=load))
        said = "not measured: " + why.format(what)
        found = run(pipe, seeds=[0], show=0)
        for name in (fake.name, fake.change):
            row = found.row(name, "band")
            assert row is not None and (row.value, row.note) == (None, said)
        assert f"{fake.title} not measured" in found.headline
        assert value(found, "fake_frames", "band", 0) == value(report, "fake_frames", "band", 0)
        monkeypatch.setitem(METRICS, fake.name, fake)


def test_clips_are_kept_for_metrics_of_sets_and_an_interruption_loses_none(
    pipe: Any, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = tmp_path / "kept"
    with monkeypatch.context() as patched:
        patched.setitem(METRICS, "fake_set", dataclasses.replace(OF_A_SET, load=lambda: failing("", KeyboardInterrupt)))
        with pytest.raises(Interrupted, match="2 of 2 clips are kept"):
            run(pipe, keep=keep)
    films = sorted(keep.glob("films/*/*.mp4"))
    assert len(films) == (1 + len(SUBJECTS)) * CLIPS
    monkeypatch.setattr(comparing, "generate", None)  # nothing is generated again
    again = run(pipe, keep=keep)
    assert lasting(again) == lasting(report)
    whole = films[0].read_bytes()
    for changed, found in ((whole[:-1] + bytes([whole[-1] ^ 1]), "another file"), (None, "no file")):
        films[0].unlink()
        if changed is not None:
            films[0].write_bytes(changed)
        with pytest.raises(
            FileError, match=rf"0000.mp4: expected the film of clip 0, found {found}; delete it, and this"
        ):
            run(pipe, keep=keep)
    films[0].write_bytes(whole)
    again.save(tmp_path / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_what_was_not_written_by_us_is_not_removed(tmp_path: Path) -> None:
    films = SetFilms(tmp_path / "films", 8)
    frames = np.full((2, 32, 32, 3), 0.5, np.float32)
    assert films.save("a", 0, frames) and films.save("b", 0, frames)
    (films.folder / "mine.txt").touch()
    films.remove()
    assert [path.name for path in films.folder.iterdir()] == ["mine.txt"]


def test_films_for_sets_are_lossless_at_any_size(tmp_path: Path) -> None:
    frames = np.random.default_rng(0).random((3, 33, 47, 3), dtype=np.float32)
    (tmp_path / "film.mp4").write_bytes(encode_lossless(frames, 8))
    np.testing.assert_array_equal(decoded(tmp_path / "film.mp4"), (frames * 255).round().astype(np.uint8))


def test_a_clip_that_is_not_finite_is_not_in_the_set_and_that_is_said(tmp_path: Path) -> None:
    films = SetFilms(tmp_path, 8)
    assert films.save("a", 0, np.full((2, 32, 32, 3), np.nan, np.float32)) is None and not list(tmp_path.iterdir())
    clips = ClipSet(tmp_path, (), 8, missing=1)
    assert OF_A_SET.of_set(brightness, clips) == (
        None,
        "not measured: the frames of 1 of 1 clips hold NaN or infinite values",
    )


@pytest.mark.parametrize("metric", FAKES[:2], ids=NAMES[:2])
def test_a_smallest_size_and_a_least_number_of_frames_are_obeyed(metric: AnyMetric) -> None:
    strict = dataclasses.replace(metric, smallest=9, fewest=3)  # type: ignore[call-arg]
    score, frames = strict.loaded(), np.zeros((2, 8, 16, 3), np.float32)
    for few, why in (
        (frames, "needs frames of at least 9 x 9 pixels, found 8 x 16"),
        (frames.repeat(2, 1), "needs at least 3 frames, found 2"),
    ):
        assert strict.of_clip(score, few, few) == (None, f"not measured: {metric.title} {why}")


def test_a_clip_without_films_has_no_key_of_them(pipe: Any, tmp_path: Path) -> None:
    """Metrics of sets alone need films."""
    run(pipe, metrics=("psnr",), keep=tmp_path / "kept", seeds=[0])
    path = tmp_path / "kept" / "clip-0000.safetensors"
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])["__metadata__"]
    fields = "prompt seed shape tokens seen repeat patch_difference fps warm_up dense_calls comparison"
    assert sorted(json.loads(header["content"])) == sorted(fields.split())
    assert header["version"] == "4"
    numbers = ClipRecord.load(path).numbers
    assert numbers.films == {}
    assert numbers.seen["dense"].scores == {} and set(numbers.seen["band"].scores) == {"psnr"}


def test_numbers_of_dense_count_for_the_largest_report(registered: None, pipe: Any) -> None:
    with pytest.raises(
        ValueError, match=r"found 63,000 \(9,000 clips x 1 subjects and the floor x 3, and 9,000 x 1 of dense"
    ):
        compare(pipe, {"a": "dense"}, [str(n) for n in range(9000)], call=SHORT, metrics=("fake_clip",))


def test_the_table_of_the_docs_is_that_of_the_registry() -> None:
    text = (Path(__file__).parents[2] / "docs" / "report.md").read_text()
    (table,) = [part for part in text.split("\n\n") if part.startswith("| metric | looks at |")]
    ours = [metric for metric in METRICS.values() if metric not in FAKES]
    assert table.splitlines()[2:] == [documented(metric) for metric in ours]
    (table,) = [part for part in text.split("\n\n") if part.startswith("| metric | may stand beside |")]
    assert table.splitlines()[2:] == [
        *(f"| `{metric.name}` | {metric.comparable} |" for metric in ours if metric not in VBENCH),
        f"| `vbench_...` | {VBENCH[0].comparable} |",
    ]


def documented(metric: AnyMetric) -> str:
    """A metric's line in the docs."""
    least = [f"{metric.smallest} x {metric.smallest} pixels"] if getattr(metric, "smallest", 1) > 1 else []
    least += [f"{metric.fewest} frames"] if getattr(metric, "fewest", 1) > 1 else []
    default = "yes" if metric.name in DEFAULT else ""
    cells = (metric.kind, metric.unit, metric.range, metric.better, ", ".join(least), metric.needs, default)
    return f"| `{metric.name}` ({metric.title}) | {' | '.join(cell or '-' for cell in cells)} |"
