"""The command line: what it says, what it refuses, and a search and a report of a tiny pipeline from end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import typer

from diffusers_accel import Plan, __version__, cli
from diffusers_accel.cli.arguments import find_prompts, find_validation
from diffusers_accel.cli.options import Setup
from diffusers_accel.cli.search import find_asked
from diffusers_accel.evals import kernel_bench
from diffusers_accel.evals.toy import CALL
from diffusers_accel.forwards import easycache
from diffusers_accel.methods import NAMED
from diffusers_accel.plan.card import card
from diffusers_accel.plan.difference import difference
from diffusers_accel.plan.merge import merge_plans
from diffusers_accel.search import plan_search
from diffusers_accel.search.budget import Budget
from diffusers_accel.shape import ModelShape
from diffusers_accel.tune import Goal
from tests.tiny import save_small_wan

SMALL = ["--height", "128", "--width", "128", "--frames", "5", "--steps", "4", "--guidance", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_wan(tmp_path_factory.mktemp("pipeline"))


def run(*arguments: object) -> None:
    """A command that succeeds."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert ended.value.code == 0


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a refused command says, in one line without a traceback."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    found = capsys.readouterr()
    assert found.out == "" and found.err.startswith("error: ") and found.err.count("\n") == 1, found.err
    return found.err


def test_help_needs_nothing_heavy() -> None:
    code = """
import sys
from diffusers_accel import cli
for command in ([], ["doctor"], ["search"], ["calibrate"], ["report"], ["plan"], ["plan", "show"], ["plan", "schema"]):
    try:
        cli.main([*command, "--help"])
    except SystemExit as ended:
        assert ended.code == 0, command
print("imported:", sorted({"torch", "diffusers", "numpy", "transformers"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("imported: []\n")
    for word in ("doctor", "search", "calibrate", "report", "bench", "plan", "--speedup", "--offload"):
        assert word in done.stdout


# Files of cli/ that are no command.
SHARED = {"__init__", "arguments", "invoke", "launched", "loading", "options", "output", "plans", "toy"}


def commands(group: Any, *names: str) -> dict[str, Any]:
    """The file that a command should be in, such as plan_show, -> what the command runs."""
    found = {}
    for name, command in group.commands.items():
        inside = hasattr(command, "commands")
        found.update(commands(command, *names, name) if inside else {"_".join((*names, name)): command.callback})
    return found


def test_every_file_of_a_command_is_registered_under_its_name() -> None:
    found = commands(typer.main.get_command(cli.app))
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")}
    assert files > SHARED
    assert set(found) == files - SHARED
    for name, callback in found.items():
        assert (callback.__module__, callback.__name__) == (f"diffusers_accel.cli.{name}", name)


def as_module(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "diffusers_accel", *arguments], capture_output=True, text=True)


def test_the_package_runs_as_a_module() -> None:
    done = as_module("plan", "nope")
    assert done.returncode == 2 and done.stderr.startswith("error: No such command 'nope'"), done.stderr
    done = as_module("--version")
    assert (done.returncode, done.stdout) == (0, f"diffusers-accel {__version__}\n"), done.stderr


def test_an_unknown_option_before_a_command_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--versoin"])
    said = 'error: diffusers-accel: there is no option --versoin; did you mean "--version"?'
    assert ended.value.code == 2 and capsys.readouterr().err == f"{said}\n"


def test_the_version_stands_before_everything_else(capsys: pytest.CaptureFixture[str]) -> None:
    run("--version")
    assert capsys.readouterr().out == f"diffusers-accel {__version__}\n"
    run("--version", "search")  # which lacks its arguments
    assert capsys.readouterr().out == f"diffusers-accel {__version__}\n"


@pytest.mark.parametrize("command", ["", "doctor", "search", "calibrate", "report", "bench", "plan", "plan show"])
def test_help_has_a_short_name_in_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("-h", "--help"):
        run(*command.split(), flag)
        said = capsys.readouterr().out
        assert " ".join(["usage: diffusers-accel", *command.split()]) in said.lower()
        assert {"-h", "--help"} <= {word.strip("[],") for word in said.split()}


def test_what_a_command_runs_on_is_told_alike_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every field of a Setup is an option of each command that loads a pipeline, and reaches it."""
    words = ["--dtype", "float32", "--device", "cpu", "--offload", "model", *SMALL]
    asked = Setup("some/pipeline", "float32", "cpu", "model", 128, 128, 5, 4, 2.0)
    found: list[Setup] = []

    def stop(setup: Setup) -> Setup:
        found.append(setup)
        raise ValueError("seen")

    monkeypatch.setattr(Setup, "check", stop)
    needed = {"doctor": [], "report": ["--plan", "draft"], "search": ["--out", "p.json"]}
    needed["calibrate"] = ["--out", "p.json", "--plan", "q.json"]
    for command, more in needed.items():
        with pytest.raises(ValueError, match="seen"):
            cli.main([command, "some/pipeline", *words, *more, "--debug"])
        with pytest.raises(ValueError, match="seen"):
            cli.main([command, "some/pipeline", *more, "--debug"])
    assert found == [asked, Setup("some/pipeline")] * len(needed)


def test_plan_show_prints_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = Plan.uniform(NAMED["pattern"](), "wan", {"transformer": ModelShape(2, 4, 64)})
    plan.save(tmp_path / "plan.json")
    run("plan", "show", tmp_path / "plan.json")
    assert capsys.readouterr().out == plan.show() + "\n"


def test_plan_diff_merge_and_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = {"transformer": ModelShape(2, 4, 64)}
    one = replace(Plan.uniform(NAMED["pattern"](), "wan", models), forwards=easycache())
    other = Plan.uniform(NAMED["draft"](), "wan", models)
    paths = [tmp_path / name for name in ("one.json", "other.json", "merged.json", "card.md")]
    one.save(paths[0])
    other.save(paths[1])
    run("plan", "diff", *paths[:2])
    assert capsys.readouterr().out == difference(one, other, ("one", "other")) + "\n"
    run("plan", "merge", *paths[:2], "--out", paths[2], "--until", "0.5")
    assert Plan.load(paths[2]) == merge_plans(one, other, until=0.5, labels=("one.json", "other.json"))
    said = capsys.readouterr().out
    assert "easycache" in said and f"look at it:  diffusers-accel plan show {paths[2]}" in said
    run("plan", "merge", *paths[:2], "--out", paths[2], "--forwards", "B")
    assert Plan.load(paths[2]) == merge_plans(one, other, forwards="second", labels=("one.json", "other.json"))
    capsys.readouterr()
    run("plan", "card", paths[0])
    assert capsys.readouterr().out == card(one, "one.json")
    run("plan", "card", paths[0], "--out", paths[3])
    assert paths[3].read_text(encoding="utf-8") == card(one, "one.json")


def test_a_refusal_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    path.write_text("{")
    assert f"error: {path}: expected JSON" in refused(capsys, "plan", "show", path)
    with pytest.raises(ValueError, match="expected JSON"):
        cli.main(["plan", "show", str(path), "--debug"])
    assert "found nothing there" in refused(capsys, "plan", "show", tmp_path / "gone.json")


def test_what_a_search_is_asked_for() -> None:
    def asked(density: float | None = None, epsilon: float | None = None, lam: float | None = None, **rest: Any) -> Any:
        proof = rest.pop("proof", True)
        return find_asked(
            {**dict.fromkeys(("speedup", "ms_per_step", "psnr", "ssim", "lpips")), **rest}, density, epsilon, lam, proof
        )

    assert asked() == Goal.speedup(1.5) and asked(speedup=2.0) == Goal.speedup(2.0)
    assert asked(psnr=32.0) == Goal.psnr(32) and asked(ms_per_step=80.0) == Goal.ms_per_step(80)
    assert asked(speedup=2.0, proof=False) == Budget.speedup(2.0)
    assert asked(0.4) == Budget.density(0.4)
    assert asked(None, 0.1) == Budget.sparse_vdit(0.1, 0.5) and asked(None, 0.1, 0.3) == Budget.sparse_vdit(0.1, 0.3)


def test_calls_hold_what_was_given() -> None:
    loaded = (None, None, "none")
    assert Setup("some/pipeline", *loaded, None, None, None, None, None).call() == {}
    assert Setup("toy", *loaded, None, None, None, None, None).call() == CALL
    assert Setup("toy", *loaded, 64, None, 9, 4, 0.0).call() == {
        **CALL,
        "height": 64,
        "num_frames": 9,
        "num_inference_steps": 4,
        "guidance_scale": 0.0,
    }


def test_prompts_of_search_and_report_differ(tmp_path: Path) -> None:
    for pipe in ("toy", "some/pipeline"):
        search, report = (find_prompts(pipe, None, None, for_search=which) for which in (True, False))
        validation = find_validation(pipe, None)
        assert len({*search, *report, *validation}) == 16 and len(validation) == 8  # the fewest that give an interval
    (tmp_path / "prompts.txt").write_text("a red circle\n\n  a blue square \n")
    assert find_prompts("toy", None, tmp_path / "prompts.txt", for_search=True) == ["a red circle", "a blue square"]
    assert find_prompts("toy", ["one"], None, for_search=False) == ["one"]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.txt: expected a prompt on each line, found none"):
        find_prompts("toy", None, tmp_path / "empty.txt", for_search=True)


def test_bench_hands_its_options_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "shapes must be among" in refused(capsys, "bench", "--shapes", "nope")
    run("bench", "--help")
    assert "usage: diffusers-accel bench" in capsys.readouterr().out
    given: dict[str, Any] = {}
    monkeypatch.setattr(kernel_bench, "run", lambda **options: given.update(options) or [])
    run("bench", "--shapes", "S4,S8", "--densities", "0.5,0.25", "--dtype", "fp32", "--device", "cpu", "--minutes", "2")
    assert (given["shapes"], given["densities"], given["dtype"]) == (["S4", "S8"], [0.5, 0.25], "fp32")
    assert (given["device"], given["minutes"]) == ("cpu", 2.0)


def test_doctor_search_and_report_of_a_pipeline_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_search, "COST_SECONDS", 0.2)
    run("doctor", folder, *SMALL, "--density", "0.5")
    text = capsys.readouterr().out
    assert "768 = 3 frames x 16 x 16" in text and "4 steps" in text and "0.50" in text

    out = tmp_path / "new" / "plan.json"
    search = [
        "search",
        folder,
        "--out",
        out,
        "--density",
        "0.7",
        "--prompt",
        "a red circle moves left",
        *SMALL,
        "--seed",
        "3",
        "--force",  # at this size no plan need be faster than dense
    ]
    run(*search)
    plan = Plan.load(out)
    assert plan.models == {"transformer": ModelShape(2, 2, 32)}
    assert plan.budget == {"kind": "density", "value": 0.7}
    assert plan.provenance["prompts"] == ["a red circle moves left"] and plan.provenance["search"]["seed"] == 3
    assert plan.provenance["search"]["call"]["num_inference_steps"] == 4
    assert str(out) in capsys.readouterr().out
    assert out.with_name("plan.scores.safetensors").is_file()
    front = tmp_path / "front"
    run(*search, "--dense-steps", "0.3", "--pareto", front, "--exact")
    found = capsys.readouterr()
    assert "finished before" in found.err and f"{front / 'front.html'}: the front as it is predicted" in found.out
    assert json.loads((front / "front.json").read_text())["predicted"] is True
    assert Plan.load(out).provenance["assignment"]["gap"] < 1e-6

    pages = tmp_path / "pages"
    quality = ["--metric", "psnr", "--metric", "ssim", "--prompt", "a red circle", "--seed", "1"]
    run("report", folder, "--plan", out, "--plan", "half=pattern", "--out", pages, *quality, *SMALL)
    printed = capsys.readouterr().out
    assert "half" in printed
    assert {"report.json", "report.md", "report.html"} <= {file.name for file in pages.iterdir()}
    rows = json.loads((pages / "report.json").read_text())["measurements"]
    assert {"dense", "floor", "plan", "half"} == {row["subject"] for row in rows}
    assert str(pages / "report.html") in printed and "plan" in printed
    run(
        "report",
        folder,
        "--plan",
        "half=pattern",
        "--no-floor",
        "--metric",
        "ssim",
        "--out",
        pages,
        *quality[4:],
        *SMALL,
    )
    rows = json.loads((pages / "report.json").read_text())["measurements"]
    assert {"dense", "half"} == {row["subject"] for row in rows}


def test_calibration_of_a_pipeline_folder(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"transformer": ModelShape(2, 2, 32)}
    Plan.uniform(NAMED["cached"](density=0.34), "wan", models).save(tmp_path / "plan.json")
    out = tmp_path / "new" / "gated.json"
    files = ["--plan", tmp_path / "plan.json", "--out", out]
    inputs = ["--prompt", "a red circle", "--prompt", "a blue square", "--seed", "3", *SMALL]
    run("calibrate", folder, *files, *inputs, "--gamma", "-1", "--max-lse-change", "99")
    printed = capsys.readouterr().out
    assert "1.0 refreshes per head (25%) by the gate, 2.0 refreshes per head (50%) by the interval" in printed
    assert f"--plan {out}" in printed
    plan = Plan.load(out)
    assert plan.tensors["refresh/transformer"].flatten(1).tolist() == [[1] * 4, [0] * 4, [0] * 4, [0] * 4]
    record = plan.provenance["gates"]
    assert record["prompts"] == ["a red circle", "a blue square"]
    assert (record["gamma"], record["max_lse_change"], record["seed"]) == (-1.0, 99.0, 3)

    monkeypatch.setattr(Setup, "load", lambda *_: pytest.fail("loaded a pipeline"))
    Plan.uniform(NAMED["draft"](), "wan", models).save(tmp_path / "draft.json")
    again = ["calibrate", folder, "--out", tmp_path / "again.json", "--plan"]
    assert "a gate is for heads that reuse" in refused(capsys, *again, tmp_path / "draft.json")
    assert "gamma must be" in refused(capsys, *again, tmp_path / "plan.json", "--gamma", "2")


def test_help_cuts_no_word_at_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")

    def params(group: Any, *names: str) -> Any:
        for name, command in group.commands.items():
            if hasattr(command, "commands"):
                yield from params(command, *names, name)
            else:
                yield [*names, name], command

    for names, command in params(typer.main.get_command(cli.app)):
        if names == ["bench"]:  # argparse's, which wraps
            continue
        run(*names, "--help")
        said = capsys.readouterr().out
        assert "…" not in said and max(map(len, said.splitlines())) <= 80, names
        words = " ".join(said.split())
        for parameter in command.params:
            text = getattr(parameter, "help", None) or ""
            assert " ".join(text.split()) in words, (names, parameter.name)
            assert all(option in words for option in parameter.opts if option.startswith("--"))
    for group in ([], ["plan"], ["metrics"], ["vbench"]):
        run(*group, "--help")
        listed = capsys.readouterr().out.split("Commands:\n")[1]
        assert "..." not in listed and max(map(len, listed.splitlines())) <= 80, group
