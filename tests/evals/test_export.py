"""A report as a folder that makes it again: the script is run, and finds the same quality."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffusers_accel import Plan, cli
from diffusers_accel.cli.plans import given_plans, read_subjects
from diffusers_accel.evals.export import AskedReport, PlanFile, check_export, export
from diffusers_accel.evals.measurement import read_rows
from diffusers_accel.files import WriteError
from diffusers_accel.methods import NAMED, Method, Stored
from diffusers_accel.plan import Span
from diffusers_accel.shape import ModelShape
from tests.tiny import save_small_wan

SMALL = ["--height", "64", "--width", "64", "--frames", "5", "--steps", "3", "--guidance", "2"]
MODELS = {"transformer": ModelShape(2, 2, 32)}
QUALITY = ("psnr", "latent_cosine", "density", "psnr_from_floor", "psnr_difference")
PROVENANCE: dict[str, Any] = {
    "pipeline": {"model": "a $(touch executed) 'model'"},
    "versions": {"python": "3.11.1", "torch": "2.13.0", "diffusers-accel": "0.1.0", "revision": "abc"},
}


def quality(page: Path) -> dict[Any, Any]:
    rows = read_rows(page / "report.json")
    return {(row.metric, row.subject, row.baseline, str(row.clip)): row.value for row in rows if row.metric in QUALITY}


def test_the_script_makes_the_report_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_small_wan(tmp_path / "my wan")
    Plan.uniform(NAMED["pattern"](density=0.5), "wan", MODELS).save(tmp_path / "searched.json")
    plans = [
        "searched.json",
        "both=schedule:steps=0/2+searched.json",
        "first_block_cache:threshold=0.3+draft:density=0.5",
    ]
    asked = [word for plan in plans for word in ("--plan", plan)]
    asked += ["--prompt", "a red circle", "--prompt", "a blue square", "--seed", "3"]
    asked += ["--metric", "psnr", "--metric", "latent_cosine", "--out", "pages", "--export", "again", *SMALL]
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", "my wan", *asked])
    assert ended.value.code == 0 and capsys.readouterr().out.endswith("again/run.sh\n")
    folder = tmp_path / "again"
    assert sorted(path.name for path in folder.iterdir()) == [
        "plans",
        "prompts.txt",
        "requirements.txt",
        "run.json",
        "run.sh",
    ]
    assert (folder / "prompts.txt").read_text() == "a red circle\na blue square\n"
    assert "torch==" in (folder / "requirements.txt").read_text()
    told = json.loads((folder / "run.json").read_text())
    content = json.dumps(told)
    assert str(tmp_path) not in content + (folder / "run.sh").read_text(), "whose folders are private"
    assert all(word in content for word in ("machine", "weights", "protocol", "num_inference_steps", "PIPELINE"))
    (tmp_path / "searched.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    without = subprocess.run(["sh", folder / "run.sh"], capture_output=True, text=True, env=environment)
    assert without.returncode and "give the folder of the pipeline, my wan" in without.stderr
    command = ["sh", folder / "run.sh", "../my wan", "new"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr
    first, second = quality(tmp_path / "pages"), quality(tmp_path / "elsewhere" / "new")
    assert {key[1] for key in first} == {"dense", "floor", "searched", "both", plans[2]}
    assert second == first and len(first) > 20


def test_plans_keep_their_names_and_their_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Plan.uniform(NAMED["pattern"](density=0.5), "wan", MODELS).save(tmp_path / name / "plan.json")
    given = ["one=a/plan.json", "b/plan.json", "draft:density=0.3", "x=easycache+a/plan.json", "backend:name=native"]
    before = read_subjects(given, of_diffusers=True)
    script = export(
        tmp_path / "out", AskedReport("toy", given_plans(given), ["two\nlines"], ["--rounds", "2"]), PROVENANCE
    )
    command = json.loads((tmp_path / "out" / "run.json").read_text())["command"]
    assert command[:3] == ["diffusers-accel", "report", "toy"] and command[-4:] == [
        "--prompt",
        "two\nlines",
        "--rounds",
        "2",
    ]
    spelled = [word for flag, word in zip(command, command[1:]) if flag == "--plan"]
    monkeypatch.chdir(script.parent)
    assert read_subjects(spelled, of_diffusers=True) == before
    assert spelled[2] == "draft:density=0.3" and "pipe=${1:-toy}" in script.read_text()


def test_a_plan_with_tensors_is_whole(tmp_path: Path) -> None:
    import torch

    stored = Method(select=Stored(0.5))
    names = stored.select.names(stored.order, "transformer")
    bits, heads = torch.full((1, 1, 6, 1), 63, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.int32)
    spans = (Span(0.0, 1.0, {"transformer": ("SS", "SS")}),)
    plan = Plan("wan", MODELS, {"S": stored}, spans, tensors=dict(zip(names, (bits, heads), strict=True)))
    export(tmp_path / "out", AskedReport("hub/id", [("", [PlanFile("stored.json", plan)])], ["a"], []), PROVENANCE)
    again = Plan.load(tmp_path / "out" / "plans" / "00" / "stored.json")
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in plan.tensors.items())


def test_what_a_script_is_given_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    hostile = "$(touch executed) `touch executed` '; touch executed; \" \\ $HOME"
    for pipe in ("folder", "hub/$(touch executed)"):
        asked = AskedReport(pipe, [(hostile, ["draft"])], [hostile], [])
        script = export(tmp_path / "out" / pipe.replace("/", "-"), asked, PROVENANCE)
        words = tmp_path / "words"
        python = tmp_path / "python"
        python.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{words}"\n')
        python.chmod(0o755)
        command = ["sh", script, *(["folder"] if pipe == "folder" else [])]
        subprocess.run(command, env={"PYTHON": str(python), "PATH": os.environ["PATH"]}, check=True)
        assert f"{hostile}=draft" in words.read_text().splitlines()
    assert not list(tmp_path.rglob("executed"))


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(WriteError, match="holds other files"):
        check_export(tmp_path)
    with pytest.raises(WriteError, match="holds other files"):
        export(tmp_path, AskedReport("toy", [("", ["draft"])], ["a"], []), PROVENANCE)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
