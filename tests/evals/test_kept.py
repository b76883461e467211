"""Clips that a comparison keeps: it goes on with them after whatever stopped it, and mixes them with no other's."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from diffusers_accel.evals import compare as comparing
from diffusers_accel.evals.clip_record import ClipRecord, Seen
from diffusers_accel.evals.compare import compare
from diffusers_accel.evals.measurement import Measurement
from diffusers_accel.evals.report import Report
from diffusers_accel.files import FileError, WriteError, only_writer
from diffusers_accel.methods import Band, Method
from diffusers_accel.support.interrupted import Interrupted
from tests.evals.test_compare import CALL, PROMPT
from tests.tiny import tiny_wan

SHORT = {**CALL, "num_inference_steps": 2}
SUBJECTS = {"a sign says [/b]": Method(select=Band(0.34)), "dense too": "dense"}
TIMES = ("time", "attention_time", "attention_share", "speedup", "speed_ratio", "dense_drift", "warm_up", "peak_memory")
CLIPS = 3
FEW: dict[str, Any] = {"show": 0, "seeds": range(2), "subjects": {"band": Method(select=Band(0.34))}}

ONE: dict[str, Any] = {**FEW, "seeds": [0]}


def run(pipe: Any, keep: Path | None, **changes: Any) -> Report:
    arguments: dict[str, Any] = {"call": SHORT, "seeds": range(CLIPS), "metrics": ("psnr",), "show": 1, "fps": 8}
    arguments |= {"floor": False, "progress": False, "subjects": SUBJECTS, "prompts": [PROMPT], **changes}
    return compare(pipe, arguments.pop("subjects"), arguments.pop("prompts"), keep=keep, **arguments)


def lasting(report: Report) -> list[Measurement]:
    """The rows whose values no clock decides."""
    return [dataclasses.replace(row, provenance={}) for row in report.rows if row.metric not in TIMES]


def stop_at(number: int, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Callable[[], int]:
    """Raises at the number-th generation, counted from 1; returns how many there were."""
    stock, calls = comparing.generate, 0

    def generate(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            raise error
        return stock(*arguments)

    monkeypatch.setattr(comparing, "generate", generate)
    return lambda: calls


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_wan()


@pytest.fixture(scope="module")
def whole(pipe: Any) -> Report:
    """The comparison without an interruption."""
    return run(pipe, None)


def test_it_goes_on_after_the_clips_that_are_finished(
    pipe: Any, whole: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = tmp_path / "report.partial"
    # 3 runs of warm-up; a clip is dense, two subjects, dense; the first has one more under a patch. So in the second clip.
    with monkeypatch.context() as patched:
        stop_at(3 + 5 + 2, patched, KeyboardInterrupt())
        with pytest.raises(Interrupted) as stopped:
            run(pipe, keep)
    assert stopped.value.kept.startswith(f"1 of {CLIPS} clips are kept in {keep}") and "goes on" in stopped.value.kept
    assert isinstance(stopped.value, KeyboardInterrupt)
    assert pipe._progress_bar_config == {"disable": True}

    count = stop_at(0, monkeypatch, KeyboardInterrupt())
    resumed = run(pipe, keep)
    assert count() == 3 + 4 * (CLIPS - 1)
    assert lasting(resumed) == lasting(whole)
    assert [subject.layers for subject in resumed.subjects] == [subject.layers for subject in whole.subjects]
    assert resumed.provenance == whole.provenance
    assert [clip.media for clip in resumed.clips] == [clip.media for clip in whole.clips]
    assert sum(clip.media is not None for clip in whole.clips) == 1

    again = run(pipe, keep)  # all is there
    assert count() == 3 + 4 * (CLIPS - 1) and again.rows == resumed.rows and again.clips == resumed.clips
    again.save(tmp_path / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["report"]


def test_ctrl_c_without_a_folder_says_that_nothing_is_kept(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(4, monkeypatch, KeyboardInterrupt())
    with pytest.raises(Interrupted, match="nothing is kept .*keep="):
        run(pipe, None)


def test_a_full_disk_keeps_the_clips_before(
    pipe: Any, whole: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep, stock, calls = tmp_path / "kept", os.replace, 0

    def replace(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # after the identity and the first clip
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        stock(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(WriteError, match=r"clip-0001.safetensors: cannot be written: No space left on device"):
            run(pipe, keep)
    names = {path.name for path in keep.iterdir() if path.suffix != ".lock"}
    assert names == {"comparison.json", "clip-0000.safetensors"}
    assert lasting(run(pipe, keep)) == lasting(whole)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from tests.evals.test_kept import FEW, lasting, run
from tests.tiny import tiny_wan

pipe, folder = tiny_wan(), Path(sys.argv[1])

def child(work):
    if (process := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

def killed(point):
    calls = 0
    def counted(stock):
        def call(*arguments):
            nonlocal calls
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return stock(*arguments)
        return call
    os.fsync, os.replace = counted(os.fsync), counted(os.replace)
    run(pipe, folder / str(point), **FEW)

def resumed(point):
    rows = [repr(row) for row in lasting(run(pipe, folder / str(point), **FEW))]
    (folder / f"{point}.rows").write_text(json.dumps(rows))

for point in map(int, sys.argv[2:]):
    assert child(lambda: killed(point)) == -signal.SIGKILL
    child(lambda: resumed(point))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_kill_the_report_is_the_same(pipe: Any, tmp_path: Path) -> None:
    """Before the first clip has its name, and before the second has it; tests/campaign kills everywhere."""
    points = (6, 9)
    command = [sys.executable, "-c", KILLED, str(tmp_path), *map(str, points)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    expected = [repr(row) for row in lasting(run(pipe, None, **FEW))]
    for point in points:
        assert json.loads((tmp_path / f"{point}.rows").read_text()) == expected


def test_another_comparison_is_refused(pipe: Any, tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    run(pipe, keep, show=0, metrics=(), seeds=[0])
    changes: dict[str, dict[str, Any]] = {
        "seeds": {"seeds": [1]},
        "call": {"call": {**SHORT, "guidance_scale": 4.0}},
        "subjects": {"subjects": {**SUBJECTS, "dense too": "pattern"}},
        "rounds": {"rounds": 2},
        "metrics": {"metrics": ("psnr",)},
        "prompts": {"prompts": [{**PROMPT, "negative_prompt_embeds": PROMPT["prompt_embeds"]}]},
    }
    for key, change in changes.items():
        with pytest.raises(
            FileError, match=rf"kept: keeps clips of a comparison with {key} .*delete this one"
        ) as refused:
            run(pipe, keep, **{"show": 0, "metrics": (), "seeds": [0], **change})
        assert len(str(refused.value)) < 700
    with pytest.raises(FileError, match=r"comparison with weights"):
        run(tiny_wan(seed=1), keep, show=0, metrics=(), seeds=[0])


def test_two_comparisons_do_not_share_a_folder(pipe: Any, tmp_path: Path) -> None:
    tmp_path.joinpath("kept").mkdir()
    with (
        only_writer(tmp_path / "kept" / "comparison.json", "somebody"),
        pytest.raises(FileError, match="another comparison writes into this folder; wait"),
    ):
        run(pipe, tmp_path / "kept")


def test_folders_that_hold_something_else_are_refused(pipe: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(WriteError, match=r"holds other files \(mine.txt\) .*name a folder of its own"):
        run(pipe, tmp_path)
    with pytest.raises(WriteError, match="there is a file of that name"):
        run(pipe, tmp_path / "mine.txt")
    with pytest.raises(TypeError, match="keep: expected the path of a folder"):
        run(pipe, 3)  # type: ignore[arg-type]
    assert (tmp_path / "mine.txt").exists()


def test_broken_clips_are_refused(pipe: Any, tmp_path: Path) -> None:
    keep = tmp_path / "kept"
    small: dict[str, Any] = {"show": 0, "metrics": (), "seeds": [0, 1]}
    run(pipe, keep, **small)
    first, second = keep / "clip-0000.safetensors", keep / "clip-0001.safetensors"
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    with pytest.raises(FileError, match="expected the clip of 'embedded prompt 1' with seed 0, found .* seed 1"):
        run(pipe, keep, **small)
    run(pipe, tmp_path / "other", **{**small, "rounds": 2})
    first.write_bytes((tmp_path / "other" / first.name).read_bytes())
    with pytest.raises(FileError, match="expected a clip of this comparison, found one of another; delete it"):
        run(pipe, keep, **small)
    changed = data.replace(b"repeat", b"repeal")
    assert changed != data
    first.write_bytes(changed)
    with pytest.raises(
        FileError, match=r"clip-0000.safetensors: .*damaged; delete it, and this clip is measured again"
    ):
        run(pipe, keep, **small)
    first.unlink()
    run(pipe, keep, **small)
    assert first.exists()


def altered(seen: dict[str, Seen], name: str, **fields: Any) -> dict[str, Seen]:
    return {**seen, name: msgspec.structs.replace(seen[name], **fields)}


def of_layers(seen: dict[str, Seen], **fields: Any) -> dict[str, Seen]:
    (row, *others) = seen["band"].layers
    return altered(seen, "band", layers=[msgspec.structs.replace(row, **fields), *others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda seen: altered(seen, "band", peaks=[]),
            "seen.band: expected a time, its middle and a peak of each run, found 1, 1 and 0",
        ),
        (
            lambda seen: altered(seen, "dense", times=[], peaks=[]),
            "seen.dense: expected a time, its middle and a peak of each run",
        ),
        (
            lambda seen: altered(seen, "band", densities=[]),
            "seen.band: expected attention, shares and densities of 1 runs",
        ),
        (lambda seen: altered(seen, "dense", shares=[0.5] * 3), "seen.dense: expected no densities and at most one"),
        (lambda seen: altered(seen, "band", times=[0.0]), "times.*: expected float > 0"),
        (
            lambda seen: of_layers(seen, reused=10**9),
            "layers: expected at most .* heads x calls that reused, found 1,0",
        ),
        (lambda seen: of_layers(seen, kernels={"portable": 0}), "kernels"),
        (lambda seen: of_layers(seen, layer=2**40), "layer: expected int <= 1000000"),
        (lambda seen: altered(seen, "band", layers=[]), "expected no densities and at most one"),
        (lambda seen: altered(seen, "band", scores={}), "found other subjects or metrics; delete it, and this clip is"),
        (lambda seen: {"dense": seen["dense"]}, r"expected what was seen of \['dense', 'band'\] by \['psnr'\]"),
    ],
)
def test_clips_whose_parts_do_not_fit_are_refused(
    pipe: Any, one_clip: Path, change: Any, message: str, tmp_path: Path
) -> None:
    """Also where the checksum is of what the file says."""
    keep = Path(shutil.copytree(one_clip, tmp_path / "kept"))
    path = keep / "clip-0000.safetensors"
    numbers = ClipRecord.load(path).numbers
    ClipRecord(msgspec.structs.replace(numbers, seen=change(numbers.seen))).save(path)
    with pytest.raises(FileError, match=f"clip-0000.safetensors: .*{message}"):
        run(pipe, keep, **ONE)


@pytest.fixture(scope="module")
def one_clip(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    keep = tmp_path_factory.mktemp("clips") / "kept"
    run(pipe, keep, **ONE)
    return keep


def test_stopped_before_its_first_clip_another_comparison_may_begin(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = tmp_path / "kept"
    with monkeypatch.context() as patched:
        stop_at(4, patched, KeyboardInterrupt())  # the first run after the warm-up
        with pytest.raises(Interrupted) as stopped:
            run(pipe, keep)
    assert stopped.value.kept == "no clip was finished yet: the next start begins with the first"
    assert not list(keep.glob("clip-*")) and (keep / "comparison.json").is_file()
    other = run(pipe, keep, **ONE)
    assert len(other.clips) == 1 and [path.name for path in keep.glob("clip-*")] == ["clip-0000.safetensors"]
    with pytest.raises(FileError, match="keeps clips of a comparison with seeds"):
        run(pipe, keep, **{**ONE, "seeds": [1]})
