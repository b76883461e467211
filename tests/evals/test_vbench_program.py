"""VBench's own program, in the environment that `vbench setup` makes, on real clips of the small model. Minutes: --slow."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from diffusers_accel import cli
from diffusers_accel.evals import toy
from diffusers_accel.evals.generate import SharedNoise, generate
from diffusers_accel.evals.metrics.flickering import flickering
from diffusers_accel.evals.report.video import encode_lossless
from diffusers_accel.evals.vbench import environment, process
from diffusers_accel.evals.vbench.clips import Clips, Film, read_folder
from diffusers_accel.evals.vbench.environment import Environment
from diffusers_accel.evals.vbench.process import VBenchFailed, measure
from diffusers_accel.evals.vbench.results import load_result
from diffusers_accel.evals.vbench.standard import asked_clips, read_prompts

pytestmark = pytest.mark.slow
STAND_INS = Path(__file__).with_name("vbench_stand_ins.py")
FPS = 16
CALL = {**toy.CALL, "num_inference_steps": 4}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The light environment, made from the pinned versions."""
    return environment.setup(tmp_path_factory.mktemp("vbench") / "env")


@pytest.fixture(scope="module")
def frames() -> dict[str, np.ndarray]:
    """Two clips of the small model by their prompts, [F, H, W, 3] in 0..1; of few steps, because a CPU takes a minute for ten."""
    pipe = toy.load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts = toy.held_out_prompts(2, seed=0)
    return {prompt: generate(pipe, prompt, SharedNoise(0), CALL).frames for prompt in prompts}


def films(frames: dict[str, np.ndarray], folder: Path, part: slice = slice(None)) -> Path:
    folder.mkdir()
    for prompt, clip in frames.items():
        (folder / f"{prompt}-0.mp4").write_bytes(encode_lossless(clip[part], FPS))
    return folder


def stand_ins(place: Environment, cache: Path, motion: float, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run([place.python, "-I", STAND_INS, process.CHILD, cache, str(motion)], check=True)
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(cache))


def test_flickering_from_the_command_line(
    place: Environment,
    frames: dict[str, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "empty"))
    line = ["vbench", "run", str(films(frames, tmp_path / "films")), "--env", str(place.folder), "--skip-missing"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*line, "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    print(said.out)
    (found,) = load_result(tmp_path / "out").dimensions.values()
    for prompt, clip in frames.items():
        assert found.clips[f"{prompt}-0.mp4"] == pytest.approx(flickering(clip), abs=1e-4), "but for 8 bits"
    assert found.score == pytest.approx(np.mean(list(found.clips.values())))
    assert found.versions["vbench"] == "0.1.5" and "no quality, semantic or total score" in said.out


def test_dimensions_with_stand_ins_for_their_weights(
    place: Environment, frames: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips = read_folder(films(frames, tmp_path / "films", slice(14, 19)))
    for motion, moves in ((0.0, 0.0), (1.0, 1.0)):
        stand_ins(place, tmp_path / f"cache{motion}", motion, monkeypatch)
        assert set(measure("dynamic_degree", clips, place, "cpu").clips.values()) == {moves}
    assert 0.9999 < measure("subject_consistency", clips, place, "cpu").score < 1, "colours hardly change"
    smooth = measure("motion_smoothness", clips, place, "cpu").clips
    for prompt, clip in frames.items():
        few = np.rint(clip[14:19].astype(np.float64) * 255)
        between = np.mean([np.abs((few[at - 1] + few[at + 1]) / 2 - few[at]).mean() for at in (1, 3)])
        assert smooth[f"{prompt}-0.mp4"] == pytest.approx(1 - between / 255, abs=1e-3)


def test_flickering_of_vbenchs_own_prompts_is_that_of_still_clips(
    place: Environment, frames: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = read_prompts(place)
    assert len(prompts) == 944 and len(asked_clips(prompts, ["temporal_flickering"])) == 75 * 25
    asked = asked_clips(prompts, ["temporal_flickering"])[:2]
    of = {}
    for each, clip in zip(asked, frames.values(), strict=True):
        (tmp_path / each.name).write_bytes(encode_lossless(clip[:2], FPS))
        of[each.name] = Film(tmp_path / each.name, each.prompt, prompts[0].dimensions)
    stand_ins(place, tmp_path / "still", 0.0, monkeypatch)
    found = measure("temporal_flickering", Clips(of, True, 5), place, "cpu")
    assert found.clips == {
        name: pytest.approx(flickering(clip[:2]), abs=1e-3) for name, clip in zip(of, frames.values(), strict=True)
    }
    stand_ins(place, tmp_path / "moving", 1.0, monkeypatch)
    with pytest.raises(VBenchFailed, match="takes none of the clips for a still one"):
        measure("temporal_flickering", Clips(of, True, 5), place, "cpu")
