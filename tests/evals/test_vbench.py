"""VBench: its scores against a published table, what is refused before the work, what is kept, and how its program is called."""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusers_accel import cli
from diffusers_accel.evals.compare import compare
from diffusers_accel.evals.metrics import METRICS, ClipSet, SetClip
from diffusers_accel.evals.report.video import encode_lossless
from diffusers_accel.evals.vbench import environment, standard
from diffusers_accel.evals.vbench.clips import Clips, Film, clips_of, read_folder
from diffusers_accel.evals.vbench.comparison import read_comparison
from diffusers_accel.evals.vbench.dimensions import CUSTOM, DIMENSIONS, check_dimensions
from diffusers_accel.evals.vbench.environment import Environment, EnvironmentMark
from diffusers_accel.evals.vbench.process import VBenchFailed
from diffusers_accel.evals.vbench.results import load_result
from diffusers_accel.evals.vbench.run import VBenchLacks, check_ready, check_size, run
from diffusers_accel.evals.vbench.scores import summarise
from diffusers_accel.evals.vbench.show import readiness, table
from diffusers_accel.evals.vbench.weights import WEIGHTS, faults_of
from diffusers_accel.files import FileError
from diffusers_accel.methods import Band, Method
from diffusers_accel.support.interrupted import Interrupted
from tests.evals.test_compare import CALL, PROMPT
from tests.tiny import tiny_wan, tiny_wan_call

FLICKERING = "temporal_flickering"
# In percent: total, quality and semantic score, then the dimensions in VBench's order. Rows of VBench's leaderboard as Zhang et
# al. 2025 (FlashVideo, arXiv 2502.05179) print them in table 1.
PUBLISHED = {
    "CogVideoX-5B": "81.61 82.75 77.04  96.23 96.52 98.66 96.92 70.97 61.98 62.90  "
    "85.23 62.11 99.40 82.81 66.35 53.20 24.91 25.38 27.59",
    "CogVideoX-2B": "81.57 82.51 77.79  96.42 96.53 98.45 97.76 58.33 61.47 65.60  "
    "87.81 69.35 97.00 86.87 54.64 57.51 24.93 25.56 28.01",
    "Mochi-1": "80.13 82.64 70.08  96.99 97.28 99.40 99.02 61.85 56.94 60.64  "
    "86.51 50.47 94.60 79.73 69.24 36.99 20.33 23.65 25.15",
}
HALF_A_DIGIT = 0.011  # of the printed scores, and of what their own rounding makes of a mean


def published(row: str) -> tuple[list[float], dict[str, float]]:
    numbers = [float(each) for each in row.split()]
    return numbers[:3], {name: value / 100 for name, value in zip(DIMENSIONS, numbers[3:], strict=True)}


@pytest.mark.parametrize("model", PUBLISHED)
def test_summary_scores_are_those_of_a_published_table(model: str) -> None:
    expected, scores = published(PUBLISHED[model])
    found = summarise(scores, standard=True)
    assert [100 * each for each in (found.total, found.quality, found.semantic)] == pytest.approx(
        expected, abs=HALF_A_DIGIT
    )


def test_a_summary_score_needs_all_its_dimensions_and_vbenchs_own_clips() -> None:
    _, scores = published(PUBLISHED["Mochi-1"])
    without_scene = summarise({name: value for name, value in scores.items() if name != "scene"}, standard=True)
    assert without_scene.quality is not None and without_scene.semantic is without_scene.total is None
    custom = summarise(scores, standard=False)
    assert custom.quality is custom.semantic is custom.total is None
    assert custom.normalised["motion_smoothness"] == pytest.approx((0.9902 - 0.706) / (0.9975 - 0.706))


def test_dimensions_are_told_apart_by_what_they_need() -> None:
    assert len(DIMENSIONS) == 16 and len(CUSTOM) == 10
    assert {name for each in DIMENSIONS.values() for name in each.weights} == set(WEIGHTS)
    assert check_dimensions(["scene", FLICKERING], standard=True) == (FLICKERING, "scene"), "in VBench's order"
    with pytest.raises(ValueError, match="scene compares with labels of VBench's own prompts"):
        check_dimensions(["scene"], standard=False)


# Requirements


def rows(name: str) -> dict[str, str]:
    lines = (environment.REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split(" --hash=sha256:")[0].split("==") for line in lines)


@pytest.mark.parametrize("build", ["cpu", "cuda"])
def test_every_package_is_pinned_once_with_a_hash(build: environment.Build) -> None:
    for path in environment.REQUIREMENTS.iterdir():
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, sha256 = line.partition(" --hash=sha256:")
            assert len(name.split("==")) == 2 and len(sha256) == 64 and int(sha256, 16), line
    for packages in ("light", "full"):
        names, _ = environment.steps(packages, build)[-1]  # type: ignore[arg-type]
        counted = Counter(package for name in names for package in rows(name))
        assert max(counted.values()) == 1 and {"vbench", "torch", "numpy"} <= set(counted)
    assert environment.digest("light", build) != environment.digest("full", build)


# An environment whose Python answers as VBench's program does

PROGRAM = """#!{python}
import json, os, sys
job = json.load(open(sys.argv[3]))
assert sys.argv[1:2] == ["-I"] and sys.argv[2].endswith("child.py"), sys.argv
with open({log!r}, "a") as log:
    log.write(json.dumps({{**job, "films": sorted(os.listdir(job["videos"]))}}) + "\\n")
print(json.dumps({{"versions": {{"vbench": "0"}}}}), flush=True)
answer = {answer}
print(json.dumps({{"result": answer}}), flush=True)
"""
ALL = '[0.5, dict.fromkeys(os.listdir(job["videos"]), 0.5)]'


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """A light environment, and an empty cache of weights."""
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "weights"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    made = EnvironmentMark(packages="light", build="cpu", requirements=environment.digest("light", "cpu"))
    folder = tmp_path / "env"
    (folder / "bin").mkdir(parents=True)
    environment.save_document(folder / environment.MARK, environment.KIND, made)
    answer(Environment(folder, made), ALL)
    return environment.find(folder)


def answer(place: Environment, code: str) -> None:
    place.python.write_text(PROGRAM.format(python=sys.executable, log=str(place.folder / "log"), answer=code))
    place.python.chmod(0o755)


def jobs(place: Environment) -> list[dict[str, Any]]:
    log = place.folder / "log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.fixture
def films(tmp_path: Path) -> Path:
    folder = tmp_path / "films"
    folder.mkdir()
    for name in ("a cat-0.mp4", "a cat-1.mp4", "a \x1b[31mdog.mp4"):
        (folder / name).write_bytes(name.encode())
    (folder / "notes.txt").write_text("not a film")
    return folder


def test_clips_of_a_folder_have_prompts_by_name_or_by_a_file(films: Path, tmp_path: Path) -> None:
    assert [each.prompt for each in read_folder(films).clips.values()] == ["a \x1b[31mdog", "a cat", "a cat"]
    told = tmp_path / "prompts.json"
    told.write_text(json.dumps({name: f"of {name}" for name in read_folder(films).clips}))
    assert read_folder(films, told).clips["a cat-1.mp4"].prompt == "of a cat-1.mp4"
    told.write_text(json.dumps({"a cat-0.mp4": "a cat"}))
    with pytest.raises(FileError, match=r"expected a prompt of each film, found none of 'a \\x1b"):
        read_folder(films, told)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{}")
    with pytest.raises(FileError, match="found a report, whose page has small compressed ones only"):
        read_folder(tmp_path / "report")
    with pytest.raises(FileError, match="at most 8,388,608 bytes"):
        check_size(Clips({f"{number:06}.mp4": Film(films, "") for number in range(12_000)}))


def test_a_run_measures_each_dimension_once_and_shows_it(
    place: Environment, films: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips, out, said = read_folder(films), tmp_path / "out", []
    found = run(clips, (FLICKERING,), out, place, "cpu", left_out={"scene": "\x1b[1m"}, say=said.append)
    assert run(clips, (FLICKERING,), out, place, "cpu", say=said.append).dimensions == found.dimensions
    (job,) = jobs(place)
    assert job["films"] == ["000000.mp4", "000001.mp4", "000002.mp4"], "names that mean nothing to VBench"
    assert job["prompts"] == {"000000.mp4": "a \x1b[31mdog", "000001.mp4": "a cat", "000002.mp4": "a cat"}
    assert (job["mode"], job["filter"]) == ("custom_input", False) and len(said) == 1
    assert load_result(out) == load_result(out / "vbench.json")
    assert found.dimensions[FLICKERING].clips == dict.fromkeys(clips.clips, 0.5)
    shown = table(found)
    assert "50.00%" in shown and f"{(0.5 - 0.6293) / (1 - 0.6293):.2%}" in shown and "3 clips of 2 prompts" in shown
    assert "\x1b" not in shown and "no quality, semantic or total score" in shown and "\ntotal" not in shown
    with pytest.raises(SystemExit) as ended:
        cli.main(["vbench", "show", str(out)])
    assert ended.value.code == 0 and FLICKERING in capsys.readouterr().out


def test_scores_of_other_clips_are_not_mixed_in(place: Environment, films: Path, tmp_path: Path) -> None:
    run(read_folder(films), (FLICKERING,), tmp_path / "out", place, "cpu", say=lambda _: None)
    (films / "a cat-0.mp4").write_bytes(b"another")
    with pytest.raises(FileError, match="holds the score of other clips than those of this run"):
        run(read_folder(films), (FLICKERING,), tmp_path / "out", place, "cpu")
    assert len(jobs(place)) == 1


@pytest.mark.parametrize(
    ("code", "says"),
    [
        (f"[0.5, dict(list({ALL}[1].items())[1:])]", "expected a score of each of 3 clips, found none of "),
        (f"[float('nan'), {ALL}[1]]", "expected finite scores of VBench, found nan"),
        ("[0.5, {'other.mp4': 0.5}]", "expected scores of the clips that were given, found one of 'other.mp4'"),
        ("None", "expected VBench's score and those of its clips, found None"),
        ('sys.exit("ValueError: no such codec")', "ended before its answer: exit code 1: ValueError: no such codec"),
    ],
    ids=["a film is passed over", "nan", "another film", "nothing", "crash"],
)
def test_an_answer_that_cannot_be_is_refused(
    place: Environment, films: Path, tmp_path: Path, code: str, says: str
) -> None:
    answer(place, code)
    with pytest.raises(VBenchFailed, match=says):
        run(read_folder(films), (FLICKERING,), tmp_path / "out", place, "cpu", say=lambda _: None)
    assert not list((tmp_path / "out").glob("*.json"))


def test_what_is_missing_is_told_before_the_work(place: Environment, tmp_path: Path) -> None:
    with pytest.raises(
        VBenchLacks, match="2 of 3 dimensions lack something, such as motion_smoothness: AMT-S must lie at"
    ) as told:
        check_ready([FLICKERING, "motion_smoothness", "dynamic_degree"], place, standard=False)
    assert str(tmp_path / "weights" / "amt_model" / "amt-s.pth") in str(told.value) and "ready: " + FLICKERING in str(
        told.value
    )
    ready, left_out = check_ready(None, place, standard=False, skip=True)
    assert ready == (FLICKERING,) and len(left_out) == 9 and left_out["dynamic_degree"] == "RAFT"
    assert "setup --full" in left_out["imaging_quality"]
    with pytest.raises(VBenchLacks, match="RAFT"):  # its filter of still clips
        check_ready([FLICKERING], place, standard=True, skip=True)
    shown = readiness(place)
    assert f"{FLICKERING}     ready for clips of a folder; of VBench's own prompts it lacks RAFT" in shown
    assert WEIGHTS["clip_b32"].sha256 in shown and "detectron2" not in shown, "what comes first is told first"


def test_weights_are_held_to_what_is_published_of_them(place: Environment, tmp_path: Path) -> None:
    for name in ("raft", "musiq", "bpe"):
        path = tmp_path / "weights" / WEIGHTS[name].place
        path.parent.mkdir(parents=True)
        path.write_bytes(gzip.compress(b"other"))
    found = faults_of(["dynamic_degree", "imaging_quality", "temporal_style"], standard=False)
    assert set(found) == {"musiq", "bpe", "viclip"}, "nothing is published of RAFT's file"
    assert "expected sha256 358bb6af, found " in found["musiq"]


def test_an_environment_is_whole_or_refused(place: Environment, tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.write_text("#!/bin/sh\necho 3.12.1\necho Linux x86_64\necho CPython\n")
    other.chmod(0o755)
    with pytest.raises(
        ValueError, match=r"expected CPython 3\.11 on Linux x86_64.*which is CPython 3\.12 on Linux x86_64"
    ):
        environment.setup(tmp_path / "new", python=str(other))
    assert not (tmp_path / "new").exists()
    made = EnvironmentMark(packages="light", build="cpu", requirements="of an earlier release")
    environment.save_document(place.folder / environment.MARK, environment.KIND, made)
    with pytest.raises(FileError, match="was made of other versions than this release pins; make it with: .* --env"):
        environment.find(place.folder)


def test_a_report_measures_a_dimension_as_a_metric_of_sets(
    place: Environment, films: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = METRICS["vbench_temporal_flickering"]
    monkeypatch.setattr(environment, "default_folder", lambda: place.folder / "none")
    assert "expected VBench's environment, found none that is whole" in str(metric.loaded())
    monkeypatch.setattr(environment, "default_folder", lambda: place.folder)
    assert "AMT-S must lie at" in str(METRICS["vbench_motion_smoothness"].loaded())
    score = metric.loaded()
    clips = ClipSet(
        films, (SetClip(films / "a cat-0.mp4", "a cat", 0), SetClip(films / "a cat-1.mp4", "a cat", 1)), 16, 0
    )
    assert metric.of_set(score, clips) == (0.5, None)
    answer(place, 'sys.exit("ValueError: no such codec")')
    value, why = metric.of_set(score, clips) or (0.0, None)
    assert value is None and "ValueError: no such codec" in str(why)


def test_the_films_of_a_comparison_are_measured_by_subject(
    place: Environment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "default_folder", lambda: place.folder)
    metric, kept, name = "vbench_temporal_flickering", tmp_path / "kept", "../\x1b[1mband"
    asked: dict[str, Any] = {
        "call": {**CALL, "num_inference_steps": 2},
        "metrics": [metric],
        "show": 0,
        "floor": False,
        "progress": False,
    }
    report = compare(tiny_wan(), {name: Method(select=Band(0.34))}, [PROMPT], **asked, keep=kept)
    assert [row.value for row in report.rows if row.metric == metric] == [0.5, 0.5]
    with pytest.raises(SystemExit) as ended:
        cli.main(["vbench", "run", str(kept), "--skip-missing", "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert ended.value.code == 0, said.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["00-dense", "01--1mband"]
    assert said.out.count("1 clip of 1 prompt (custom input)") == 2 and "\x1b" not in said.out
    assert load_result(tmp_path / "out" / "01--1mband").clips == {"0000.mp4": "embedded prompt 1"}
    for film in kept.glob("films/*/*.mp4"):
        film.unlink()
    with pytest.raises(FileError, match="expected the film of clip 0, found no file"):
        read_comparison(kept)


# VBench's own clips

INFO = [
    {"prompt_en": "a still cup", "dimension": [FLICKERING]},
    {"prompt_en": "a dog", "dimension": ["temporal_style"]},
    {"prompt_en": "a cat", "dimension": ["object_class"], "auxiliary_info": {}},
    {"prompt_en": "a dog", "dimension": ["appearance_style"]},
]


def test_vbench_asks_for_five_clips_a_prompt_and_25_still_ones() -> None:
    prompts = standard.parse_prompts(json.dumps(INFO).encode())
    assert [prompt.text for prompt in prompts] == ["a still cup", "a dog", "a cat"]
    every = standard.asked_clips(prompts, list(DIMENSIONS))
    assert Counter(each.prompt for each in every) == {"a still cup": 25, "a dog": 5, "a cat": 5}
    assert len({each.seed for each in every}) == len({each.name for each in every}) == 35
    some = standard.asked_clips(prompts, ["appearance_style"], samples=2)
    assert [each.name for each in some] == ["a dog-0.mp4", "a dog-1.mp4"] and set(some) <= set(every), "the same seeds"


def test_prompts_that_are_not_the_published_ones_are_refused(place: Environment) -> None:
    path = place.folder / "lib" / "python3.11" / "site-packages" / "vbench" / "VBench_full_info.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(INFO))
    with pytest.raises(FileError, match="expected the published prompts, sha256 5dd2de80"):
        standard.read_prompts(place)


def test_clips_are_generated_once_and_those_of_a_plan_stay_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [standard.AskedClip(f"a dog-{index}.mp4", "a dog", index) for index in range(3)]
    pipe, made, folder = tiny_wan(), [], tmp_path / "clips"
    call = {key: value for key, value in tiny_wan_call().items() if key not in ("latents", "generator", "output_type")}

    def generate(pipe: Any, prompt: str, noise: Any, call: Any) -> Any:
        made.append((prompt, noise.seed))
        if len(made) == 2:
            raise KeyboardInterrupt
        return type("Run", (), {"frames": np.full((2, 16, 16, 3), noise.seed / 4, np.float32)})

    monkeypatch.setattr(standard, "generate", generate)
    with pytest.raises(Interrupted, match="1 of 3 clips are kept"):
        standard.make_clips(pipe, asked, folder, call=call, say=lambda _: None)
    standard.make_clips(pipe, asked, folder, call=call, say=lambda _: None)
    assert made == [("a dog", 0), ("a dog", 1), ("a dog", 1), ("a dog", 2)]
    assert (folder / "a dog-2.mp4").read_bytes() == encode_lossless(np.full((2, 16, 16, 3), 0.5), 16)
    for changed in ({"fps": 8}, {"seed": 1}, {"subject": Method(select=Band(0.34))}):
        with pytest.raises(FileError, match="keeps clips with .* they cannot be mixed"):
            standard.make_clips(pipe, asked, folder, call=call, say=lambda _: None, **changed)  # type: ignore[arg-type]
    prompts = [standard.StandardPrompt("a dog", frozenset({"scene"}))]
    clips = standard.read_clips(folder, prompts, asked, 5)
    assert clips.standard and not clips_of("color", clips).clips and len(clips_of("scene", clips).clips) == 3
    (folder / "a dog-1.mp4").unlink()
    with pytest.raises(FileError, match="expected 3 clips, found 2; 'a dog-1.mp4' is missing"):
        standard.read_clips(folder, prompts, asked, 5)


def test_vbenchs_own_clips_keep_their_names(place: Environment, films: Path, tmp_path: Path) -> None:
    of = {name: Film(films / name, "a cat", frozenset({FLICKERING})) for name in ("a cat-0.mp4", "a cat-1.mp4")}
    answer(place, f"[0.25, dict(list({ALL}[1].items())[:1])]")  # its filter takes away what moves
    found = run(Clips(of, True, 5), (FLICKERING,), tmp_path / "out", place, "cpu", say=lambda _: None)
    (job,) = jobs(place)
    assert job["films"] == ["a cat-0.mp4", "a cat-1.mp4"] and job["prompts"] == []
    assert (job["mode"], job["filter"]) == ("vbench_standard", True)
    assert "(needs 6 more: subject_consistency, background_consistency, motion_smoothness, ...)" in table(found)
    few = run(Clips(of, True, 4), (FLICKERING,), tmp_path / "few", place, "cpu", say=lambda _: None)
    assert "no quality, semantic or total score" in table(few), "of fewer clips than VBench asks for"


def test_without_an_environment_show_says_what_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "weights"))
    with pytest.raises(SystemExit) as ended:
        cli.main(["vbench", "show"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "found none that is whole; make it with: diffusers-accel vbench setup\n" in said
    lines = {line.split()[0]: line for line in said.splitlines() if line}
    assert lines[FLICKERING].endswith("diffusers-accel vbench setup"), "it needs no weights"
    assert "vbench setup --full, MUSIQ" in lines["imaging_quality"]
    assert lines["scene"].endswith("(own prompts only)") and WEIGHTS["clip_b32"].sha256 in said


def test_a_comparison_without_a_clip_says_so(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"metrics": (), "show": 0, "floor": False, "progress": False}
    asked |= {"call": {**CALL, "num_inference_steps": 1}, "keep": tmp_path / "kept"}
    compare(tiny_wan(), {"band": "dense"}, [PROMPT], **asked)
    (tmp_path / "kept" / "clip-0000.safetensors").unlink()
    with pytest.raises(FileError, match="no clip of this comparison is finished yet"):
        read_comparison(tmp_path / "kept")
