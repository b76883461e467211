"""Wrong command lines: each is refused with one message, before a model is loaded and before anything is written."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffusers_accel import Plan, cli
from diffusers_accel.cli.arguments import find_prompts
from diffusers_accel.cli.options import Setup
from diffusers_accel.evals import compare, kernel_bench
from diffusers_accel.methods import NAMED
from diffusers_accel.search import gates
from diffusers_accel.shape import ModelShape
from diffusers_accel.support.interrupted import Interrupted

MODELS = {"transformer": ModelShape(2, 2, 32)}
posix = pytest.mark.skipif(sys.platform == "win32", reason="named pipes and permissions of POSIX")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with plans, prompts and broken things, into which nothing can be written by a wrong command line."""
    folder = tmp_path_factory.mktemp("here")
    Plan.uniform(NAMED["cached"](), "wan", MODELS).save(folder / "searched.json")
    Plan.uniform(NAMED["draft"](), "wan", MODELS).save(folder / "draft.json")
    Plan.uniform(NAMED["draft"](), "wan", {"transformer": ModelShape(3, 2, 32)}).save(folder / "large-model.json")
    (folder / "file").write_text("x")
    (folder / "taken.partial").write_text("somebody else's")
    (folder / "half.json").write_text("{")
    (folder / "folder.json").mkdir()
    (folder / "folder.safetensors").mkdir()
    (folder / "other.safetensors").write_text("not tensors")
    (folder / "link.safetensors").symlink_to("searched.json")
    (folder / "prompts.txt").write_text("a red circle\n")
    (folder / "blank.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes("grün".encode("latin-1"))
    (folder / "utf16.txt").write_bytes("a red circle".encode("utf-16"))
    (folder / "zero.txt").write_bytes(b"a\0b")
    (folder / "large.txt").write_bytes(b"a red circle\n" * 100_000)
    if sys.platform != "win32":
        os.mkfifo(folder / "fifo")
    for name, index in {
        "my-wan": {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]},
        "my-flux": {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]},
        "my-unet": {"_class_name": "StableDiffusionPipeline", "transformer_2": [None, None]},
        "my-future": {"_class_name": "WanPipelin", "transformer": ["diffusers", "WanTransformer3DModel"]},
        "my-list": [],
    }.items():
        (folder / name / "transformer").mkdir(parents=True)
        (folder / name / "model_index.json").write_text(json.dumps(index))
    return folder


SEARCH, REPORT, CALIBRATE = "search toy --out p.json", "report toy --plan draft", "calibrate toy --out p.json"
WRONG = [
    # names of commands, options and values
    ("serach toy", "search"),
    ("plan sho", "show"),
    ("plan", "Missing command"),
    ("search toy", "--out"),
    ("search --out p.json", "pipe"),
    (f"{SEARCH} more", "more"),
    (f"{SEARCH} --offlaod model", 'there is no option --offlaod; did you mean "--offload"?'),
    (f"{SEARCH} --offload modl", "offload: expected one of none, model, group, found 'modl'; did you mean \"model\"?"),
    (f"{SEARCH} --dtype bf16", "dtype: expected one of float32, bfloat16, float16, found 'bf16'"),
    (f"{SEARCH} --dtype Float32", 'did you mean "float32"?'),
    (f"{SEARCH} --device gpu", "device: expected a name such as cpu, cuda or cuda:1, found 'gpu'"),
    (f"{SEARCH} --device meta", "device: torch"),
    (f"{SEARCH} --device cuda:99", "device: torch"),
    (f"{SEARCH} --device cpu --offload model", "offload 'model' moves weights"),
    (f"{SEARCH} --methods draft,cahced", "found 'cahced'; did you mean \"cached\"?"),
    (f"{SEARCH} --methods ''", "methods: expected some of"),
    (f"{REPORT} --metric pnsr", "found 'pnsr'; did you mean \"psnr\"?"),
    (f"{REPORT} --metric psnr --metric psnr", "metrics: expected each once"),
    (f"report toy --plan {'d' * 5000}", "and 4,800 characters more"),
    (f"{SEARCH} --steps {'9' * 4000}", "--steps: expected a whole number from 1 to 65,536"),
    # numbers
    (f"{SEARCH} --steps 0", "--steps: expected a whole number from 1 to 65,536, found 0"),
    (f"{SEARCH} --steps five", "integer"),
    (f"{SEARCH} --height -1", "--height: expected a whole number"),
    (f"{SEARCH} --frames 99999999999999999999", "--frames: expected a whole number"),
    (f"{SEARCH} --guidance nan", "--guidance: expected a number, found nan"),
    (f"{REPORT} --guidance inf", "--guidance: expected a number, found inf"),
    (f"{SEARCH} --seed -1", "--seed: expected a whole number from 0"),
    (f"{REPORT} --seed 9223372036854775808", "--seed: expected a whole number from 0"),
    (f"{REPORT} --seed 1 --seed 1", "seeds: expected one or more different whole numbers"),
    (f"{REPORT} --rounds 0", "--rounds: expected a whole number from 1"),
    (f"{REPORT} --out taken", "taken.partial: cannot be written: there is a file of that name"),
    (f"{SEARCH} --density 1.5", "a density is a share of block pairs"),
    (f"{SEARCH} --density nan", "a density is a share of block pairs"),
    (f"{SEARCH} --speedup 1", "--speedup: expected a factor above 1, such as 1.4, found 1.0"),
    (f"{SEARCH} --speedup nan", "--speedup: expected a number, found nan"),
    (f"{SEARCH} --speedup inf", "--speedup: expected a number, found inf"),
    (f"{SEARCH} --epsilon inf", "--epsilon: expected a number"),
    (f"{SEARCH} --epsilon 1 --lambda -1", "epsilon"),
    (f"{SEARCH} --pareto file", "file: cannot be written: there is a file of that name"),
    (f"{SEARCH} --epsilon 1 --pareto front", "--pareto: expected beside a goal or --density, found --epsilon"),
    (f"{SEARCH} --lambda 1", "--lambda: expected beside --epsilon"),
    (f"{SEARCH} --speedup 2 --density 0.5", "found --speedup and --density"),
    (f"{SEARCH} --dense-steps 1.5", "--dense-steps: expected a share in 0..1"),
    (f"{SEARCH} --dense-steps nan", "--dense-steps: expected a share in 0..1"),
    (f"{CALIBRATE} --plan searched.json --gamma nan", "gamma must be"),
    (f"{CALIBRATE} --plan searched.json --max-lse-change inf", "max_lse_change must be finite"),
    ("doctor my-wan --density 0", "densities: expected shares of key blocks"),
    ("doctor --height 64", "doctor: expected a pipeline beside --height"),
    # texts
    (f"{SEARCH} --prompt ''", "prompts: expected texts, found the empty one"),
    (f"{REPORT} --prompt a --prompt a", "prompts: expected each once"),
    (f"{SEARCH} --prompt 'a\udcff'", "prompts: expected texts in UTF-8"),
    (f"{SEARCH} --prompt a --prompts prompts.txt", "found both"),
    (f"{SEARCH} --prompts promts.txt", 'found nothing there; did you mean "prompts.txt"?'),
    (f"{SEARCH} --prompts my-wan", "found a folder"),
    (f"{SEARCH} --prompts blank.txt", "blank.txt: expected a prompt on each line, found none"),
    (f"{SEARCH} --prompts latin.txt", "latin.txt: expected text in UTF-8, found the byte 0xfc at 2"),
    (f"{SEARCH} --prompts utf16.txt", "utf16.txt: expected text in UTF-8, found the byte 0xff at 0"),
    (f"{SEARCH} --prompts zero.txt", "zero.txt: expected text in UTF-8, found a zero byte"),
    (f"{SEARCH} --prompts large.txt", "large.txt: expected at most 1,048,576 bytes, found 1,300,000"),
    pytest.param(f"{SEARCH} --prompts fifo", "found a device, pipe or socket", marks=posix),
    # plans
    ("report toy --plan drat", "found 'drat'; did you mean \"draft\"?"),
    ("report toy --plan drat:density=0.3", "found 'drat:density=0.3'; did you mean \"draft\"?"),
    ("report toy --plan draft:densty=0.3", "'draft' has no parameter 'densty'; did you mean 'density'?"),
    ("report toy --plan draft:density=half", "density of 'draft': expected a number, found 'half'"),
    ("report toy --plan draft:density=nan", "density of 'draft': expected a number, found 'nan'"),
    ("report toy --plan draft:density=null", "density of 'draft': expected a number, found 'null'"),
    ("report toy --plan draft:density=2", "--plan draft:density=2: density is the share of the video's key blocks"),
    ("report toy --plan draft:patch=8", "patch of 'draft': expected 2 whole numbers with / between them, found '8'"),
    ("report toy --plan draft:dense_layers=1.5", "dense_layers of 'draft': expected a whole number, found '1.5'"),
    ("report toy --plan draft:diagonal=maybe", "diagonal of 'draft': expected true or false, found 'maybe'"),
    ("report toy --plan draft:per=column", 'per is "head" or "row", found \'column\''),
    ("report toy --plan draft:", "expected draft:PARAMETER=VALUE, as in draft:density=0.3:per=row"),
    ("report toy --plan draft:density", "found 'density'"),
    ("report toy --plan draft:density=", "found 'density='"),
    ("report toy --plan draft:density=.3:density=.4", "expected 'density' of 'draft' once, found it twice"),
    ("report toy --plan searched.json:density=.3", "found 'searched.json:density=.3'"),
    (
        "report toy --plan schedule:steps=0/x",
        "steps of 'schedule': expected whole numbers with / between them, found '0/x'",
    ),
    ("report toy --plan schedule:steps=4/0", "steps: expected indices from 0, each larger than the one before"),
    ("report toy --plan schedule:steps=0/4:shares=0/.5", "a schedule takes either steps or shares"),
    ("report toy --plan a=schedule:steps=0/99", "subjects['a']: the schedule computes step 99, but this call has"),
    ("report my-wan --plan schedule:steps=0/9 --steps 8", "the schedule computes step 9, but this call has 8 steps"),
    ("report toy --plan easycache:branches=cond+uncond", "found 'uncond'"),
    ("report toy --plan first_block_cache:treshold=0.1", "no parameter 'treshold'; did you mean 'threshold'?"),
    ("report toy --plan first_block_cache:threshold=much", "threshold of 'first_block_cache': expected a number"),
    ("report toy --plan first_block_cache:", "expected first_block_cache:PARAMETER=VALUE"),
    ("report toy --plan first_blok_cache", 'did you mean "first_block_cache"?'),
    ("report toy --plan backend", "expected the name of one of diffusers'"),
    ("report toy --plan backend:name=flahs", "found 'flahs'; did you mean \"flash\"?"),
    ("report toy --plan first_block_cache+sea_cache", "one cache and one backend of attention at a time"),
    (
        "report toy --plan draft --export my-wan",
        "my-wan: cannot be written: it is replaced as a whole and holds other files",
    ),
    ("report toy --plan radial", 'Method(select=Radial())).plan.save("radial.json")'),
    ("report toy --plan serched.json", 'did you mean "searched.json"?'),
    ("report toy --plan half.json", "half.json: expected JSON"),
    ("report toy --plan folder.json", "folder.json: expected a JSON file, found a folder"),
    ("report toy --plan draft --plan draft.json", "two plans are called 'draft'"),
    ("report toy --plan dense", "'dense' is the baseline's name"),
    ("report toy --plan =draft", "expected names with letters in them"),
    (f"{CALIBRATE} --plan serched.json", 'did you mean "searched.json"?'),
    (f"{CALIBRATE} --plan draft.json", "a gate is for heads that reuse"),
    ("plan show serched.json", 'did you mean "searched.json"?'),
    ("plan show my-wan", "found a folder"),
    ("plan diff searched.json", "B"),
    ("plan diff searched.json drat.json", 'did you mean "draft.json"?'),
    ("plan merge searched.json draft.json", "--out"),
    ("plan merge searched.json draft.json --out c.txt", '--out: expected a file name that ends in ".json"'),
    (
        "plan merge searched.json draft.json --out c.json --until 1",
        "--until: expected a share of the steps, or a sigma",
    ),
    ("plan merge searched.json draft.json --out c.json --until nan", "--until: expected a number, found nan"),
    ("plan merge searched.json draft.json --out c.json --forwards C", "--forwards: expected A or B, found 'C'"),
    ("plan merge searched.json large-model.json --out c.json", "transformers of the same sizes"),
    ("plan merge searched.json draft.json --out folder.json", "folder.json: cannot be written: it is a folder"),
    ("plan card serched.json", 'did you mean "searched.json"?'),
    (
        "plan card searched.json --out draft.json",
        "--out: expected a file name that ends in \".md\", found 'draft.json'",
    ),
    ("plan card searched.json --out file/card.md", "file/card.md: cannot be written"),
    # places to write
    ("search toy --out plan.txt", '--out: expected a file name that ends in ".json"'),
    ("search toy --out folder.json", "folder.json: cannot be written: it is a folder"),
    ("search toy --out file/p.json", "file/p.json: cannot be written"),
    (f"search toy --out {'p' * 300}.json", "cannot be written: File name too long"),
    (f"{SEARCH} --scores folder.safetensors", "folder.safetensors: cannot be written: it is a folder"),
    (f"{SEARCH} --scores p.json", "the scores and the plan would be one file"),
    (f"{SEARCH} --scores ./my-wan/../p.json", "the scores and the plan would be one file"),
    ("search toy --out searched.json --scores link.safetensors", "the scores and the plan would be one file"),
    ("search toy --out a.cost.json --scores a.safetensors", "the kernel times beside the scores and the plan"),
    (f"{SEARCH} --scores a.json", '--scores: expected a file name that ends in ".safetensors"'),
    (f"{SEARCH} --scores other.safetensors", "other.safetensors"),
    (f"{SEARCH} --scores file/a.safetensors", "file/a.safetensors: cannot be written"),
    ("calibrate toy --plan searched.json --out folder.json", "cannot be written: it is a folder"),
    (f"{REPORT} --out file", "file: cannot be written: there is a file of that name"),
    (f"{REPORT} --out file/below", "cannot be written"),
    # pipelines
    ("search tooy --out p.json", 'did you mean "toy"?'),
    ("search my-wn --out p.json", 'did you mean "my-wan"?'),
    ("search ./my-wn --out p.json", "./my-wn: expected the folder of a diffusers pipeline, found nothing there"),
    ("search my-wan/transfomer --out p.json", 'did you mean "my-wan/transformer"?'),
    ("search /nowhere/at/all --out p.json", "/nowhere/at/all: expected the folder"),
    ("search a/b/c --out p.json", "a/b/c: expected the folder of a diffusers pipeline, found nothing there"),
    ("search ~/surely-not-there --out p.json", "found nothing there"),
    ("search 'C:\\models\\wan' --out p.json", "found nothing there"),
    ("search file --out p.json", "file: expected the folder of a diffusers pipeline, found a file"),
    ("search my-wan/transformer --out p.json", "found no model_index.json in it; that of the whole pipeline is"),
    ("search my-flux --out p.json", "its transformer is a FluxTransformer2DModel; supported: wan"),
    ("search my-unet --out p.json", "has no transformer or transformer_2 or transformer_ref; supported: wan"),
    ("search my-future --out p.json", "found 'WanPipelin'; did you mean \"WanPipeline\"?"),
    ("search my-list --out p.json", "without _class_name"),
    ("search https://huggingface.co/Wan-AI/Wan2.1 --out p.json", "found a web address"),
    ("search 'not a name' --out p.json", "found none of them"),
    ("search '' --out p.json", "found none of them"),
    # VBench
    ("vbench rn", "run"),
    ("vbench setup --build rocm", "--build: expected cpu or cuda, found 'rocm'"),
    ("vbench setup --python file", "python: expected CPython 3.11 on Linux x86_64"),
    ("vbench setup --env my-wan", "my-wan: expected an empty folder or a venv, found model_index.json in it"),
    ("vbench run", "expected a folder of films, or --standard and a pipeline, found neither"),
    ("vbench run my-wan --standard toy", "or --standard and a pipeline, found both"),
    ("vbench run my-wn", "my-wn: expected a folder of films, found nothing there"),
    ("vbench run file", "file: expected a folder of films, found a file"),
    ("vbench run my-wan", "my-wan: expected films that end in .mp4, found none"),
    ("vbench run my-wan --dimension scne", "found 'scne'; did you mean \"scene\"?"),
    ("vbench run my-wan --dimension scene", "scene compares with labels of VBench's own prompts"),
    ("vbench run my-wan --plan draft", "expected --standard and a pipeline beside --plan"),
    ("vbench run my-wan --steps 4", "expected --standard and a pipeline beside --steps"),
    ("vbench run --standard toy --samples 6", "--samples: expected a whole number from 1 to 5, found 6"),
    ("vbench run --standard toy --plan drat", "found 'drat'; did you mean \"draft\"?"),
    ("vbench run --standard toy --plan first_block_cache", "is diffusers' own, which a report compares with"),
    ("vbench run --standard toy --prompts half.json", "--prompts: expected beside a folder of films"),
    ("vbench run --standard toy --env my-wan", "my-wan: expected VBench's environment, found none that is whole"),
    ("vbench show --env my-wan", "my-wan: expected VBench's environment, found none that is whole"),
    ("vbench show my-wan", "vbench.json: expected a JSON file, found nothing there"),
    ("vbench show half.json", "half.json: expected JSON"),
    ("vbench show half.json --env my-wan", "--env: expected without RESULT"),
    # metrics
    ("metrics shwo", "show"),
    ("metrics fetch", "name"),
    ("metrics fetch lpisp", "found 'lpisp'; did you mean \"lpips\"?"),
    ("metrics fetch psnr", "expected a metric with weights to fetch (lpips, lpips_vgg, dists), found 'psnr'"),
    # the benchmark
    ("bench --shapes tooy", "found 'tooy'; did you mean \"toy\"?"),
    ("bench --operators attentoin", 'did you mean "attention"?'),
    ("bench --impls portabl", 'did you mean "portable"?'),
    ("bench --patterns widow", 'did you mean "window"?'),
    ("bench --shaps S8", 'did you mean "--shapes"?'),
    ("bench --densities half", "argument --densities: invalid list of float value: 'half'"),
    ("bench --densities nan", "densities must lie in 0..1"),
    ("bench --device gpu", "device: expected a name such as cpu, cuda or cuda:1, found 'gpu'"),
    ("bench --minutes nan", "minutes must be 0 or more"),
    ("bench --rep-ms nan", "rep_ms must be milliseconds"),
    ("bench --threads 0", "threads must be 1 to 4,096, found 0"),
    ("bench --seed -1", "seed must be 0 or more"),
    ("bench --minutes 0", "expected one as out, found none"),
    ("bench --minutes 0 --out other.safetensor", 'did you mean "other.safetensors"?'),
    ("bench --device cpu --out my-wan", "my-wan: cannot be written: it is a folder"),
    ("bench --device cpu --out file/rows.jsonl", "cannot be written"),
    ("bench --device cpu --report file", "file: cannot be written: there is a file of that name"),
]


def stopped(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str]:
    """The exit code of a command, and what it says on stderr."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    found = capsys.readouterr()
    assert found.out == ""
    return ended.value.code if isinstance(ended.value.code, int) else -1, found.err


@pytest.mark.parametrize(("line", "says"), WRONG)
def test_a_wrong_command_line_is_refused_in_one_message_before_the_work(
    line: str, says: str, here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here)
    monkeypatch.setattr(Setup, "load", lambda *_: pytest.fail("loaded a pipeline"))
    monkeypatch.setattr(kernel_bench, "watched", lambda *_: pytest.fail("measured"))
    before = sorted(here.rglob("*"))
    code, text = stopped(capsys, shlex.split(line))
    assert code == 2 and text.startswith("error: ") and text.count("error: ") == 1, text
    assert says in text and "Traceback" not in text and len(text) < 600, text
    assert text.count("\n") == 1, "one line"
    assert sorted(here.rglob("*")) == before


@posix
@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_read_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Setup, "load", lambda *_: pytest.fail("loaded a pipeline"))
    tmp_path.chmod(0o500)
    for line in (f"search toy --out {tmp_path}/p.json", f"report toy --plan draft --out {tmp_path}/pages"):
        code, text = stopped(capsys, shlex.split(line))
        assert code == 2 and "cannot be written: Permission denied" in text


def test_debug_anywhere_keeps_the_traceback() -> None:
    for line in ("--debug plan show gone.json", "plan show --debug gone.json", "plan show gone.json --debug"):
        with pytest.raises(FileNotFoundError, match="found nothing there"):
            cli.main(shlex.split(line))


def test_a_byte_order_mark_is_no_part_of_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\nein gr\xc3\xbcner\r\n")
    assert find_prompts("toy", None, tmp_path / "prompts.txt", for_search=True) == ["a red circle", "ein grüner"]


@pytest.mark.parametrize("line", ["doctor shapes", "search shapes --out p.json", "report shapes --plan draft"])
def test_the_small_models_former_name_is_understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(setup: Setup) -> Setup:
        raise ValueError(f"asked for {setup.pipe}")

    monkeypatch.setattr(Setup, "check", check)
    former = pytest.warns(FutureWarning, match="PIPE: 'shapes' is now called 'toy'")
    with former as said, pytest.raises(ValueError, match="asked for toy"):
        cli.main([*shlex.split(line), "--debug"])
    assert [each.filename for each in said] == [__file__], "at the line that called"


GIVEN = "--dtype bfloat16 --device cpu --height 128 --width 96 --frames 5 --steps 4 --guidance 2.5"


class Loaded:
    """Stands for a pipeline."""


@pytest.fixture
def loaded(here: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Commands run in `here` and load nothing; a search returns a plan."""
    monkeypatch.chdir(here)
    monkeypatch.setattr(Setup, "load", lambda *_: Loaded())
    monkeypatch.setattr("diffusers_accel.search.candidates.candidates_for", lambda *_: ())
    return monkeypatch


def searched(monkeypatch: pytest.MonkeyPatch, **provenance: Any) -> None:
    plan = Plan.uniform(NAMED["draft"](), "wan", MODELS)
    plan.provenance.update(provenance)
    monkeypatch.setattr("diffusers_accel.search_plan", lambda *_, **__: plan, raising=False)
    tuned = SimpleNamespace(plan=plan, met=True, verdict="1.5x: met", report=None)
    monkeypatch.setattr("diffusers_accel.tune_plan", lambda *_, **__: tuned, raising=False)


def interrupted(stop: KeyboardInterrupt) -> Any:
    def work(*_: Any, **__: Any) -> Any:
        raise stop

    return work


def test_a_search_says_how_to_go_on_with_the_flags_that_were_given(
    loaded: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searched(loaded)
    out = tmp_path / "my plan.json"
    with pytest.raises(SystemExit) as ended:
        cli.main(["search", "my-wan", "--out", str(out), *shlex.split(GIVEN), "--density", "0.5"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"look at it:  diffusers-accel plan show '{out}'"
    assert lines[2] == f"measure it:  diffusers-accel report my-wan --plan '{out}' {GIVEN}"


def test_a_calibration_says_it_too(
    loaded: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan.load("searched.json")
    counts = {"heads": 1, "head_steps": 4, "steps": 4, "refreshes": 1, "by_interval": 2}
    plan.provenance["gates"] = counts
    loaded.setattr(gates, "calibrate_gates", lambda *_, **__: plan)
    out = tmp_path / "gated.json"
    with pytest.raises(SystemExit) as ended:
        cli.main(["calibrate", "my-wan", "--plan", "searched.json", "--out", str(out), "--steps", "4"])
    assert ended.value.code == 0
    assert f"measure it:  diffusers-accel report my-wan --plan {out} --steps 4\n" in capsys.readouterr().out


def test_a_plan_that_the_search_warns_of_is_written_only_when_forced(
    loaded: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    searched(loaded, warnings=["slower than dense", "in \x1b[31m colours"])
    out = tmp_path / "my plan.json"
    line = ["search", "my-wan", "--out", str(out)]
    code, text = stopped(capsys, line)
    assert code == 3 and not out.exists()
    assert text.startswith(f"error: {out}: not written: slower than dense; in \\x1b[31m colours. What")
    assert f"What was measured is kept in {tmp_path}/my plan.scores.safetensors" in text
    assert text.endswith(f"write it all the same:  diffusers-accel search my-wan --out '{out}' --force\n")
    with pytest.raises(SystemExit) as ended:
        cli.main([*line, "--force"])
    assert ended.value.code == 0 and out.exists()


def test_a_goal_that_is_not_met_is_a_reason_to_write_no_plan(
    loaded: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = Plan.uniform(NAMED["draft"](), "wan", MODELS)
    asked: dict[str, Any] = {}

    def tune(pipe: Any, texts: list[str], goal: Any, **options: Any) -> Any:
        asked.update(options, goal=goal, texts=texts)
        return SimpleNamespace(plan=plan, met=False, verdict="PSNR 40 dB: NOT met: 1.00x, PSNR 35 dB", report=None)

    loaded.setattr("diffusers_accel.tune_plan", tune, raising=False)
    (tmp_path / "decide.txt").write_text("one\ntwo\n")
    out = tmp_path / "p.json"
    line = ["search", "my-wan", "--out", str(out), "--psnr", "40", "--validation", str(tmp_path / "decide.txt")]
    code, text = stopped(capsys, line)
    assert code == 3 and not out.exists() and "not written: PSNR 40 dB: NOT met: 1.00x, PSNR 35 dB. What was" in text
    assert str(asked["goal"]) == "PSNR 40 dB" and asked["validation"] == ["one", "two"] and asked["held_out"] == ()
    assert asked["step_caches"] is True and len(asked["texts"]) == 4


def test_ctrl_c_says_what_is_kept_and_the_command_that_goes_on(
    loaded: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["search", "my-wan", "--out", str(tmp_path / "p.json"), "--prompt", "it's red"]
    stop = Interrupted("2 of 4 prompts are kept in p.scores.safetensors.")
    loaded.setattr("diffusers_accel.tune_plan", interrupted(stop), raising=False)
    code, text = stopped(capsys, line)
    assert code == 130
    assert text == (
        "\ninterrupted: 2 of 4 prompts are kept in p.scores.safetensors.\n"
        f"go on with:  {shlex.join(['diffusers-accel', *line])}\n"
    )
    loaded.setattr(Setup, "load", interrupted(KeyboardInterrupt()))
    assert stopped(capsys, line) == (130, "\ninterrupted\n")
    loaded.setattr(kernel_bench, "run", interrupted(KeyboardInterrupt()))
    code, text = stopped(capsys, ["bench", "--device", "cpu", "--out", str(tmp_path / "rows.jsonl")])
    assert code == 130 and f"all of them are in {tmp_path / 'rows.jsonl'}" in text and "go on with:" in text
    assert stopped(capsys, ["bench", "--device", "cpu"]) == (130, "\ninterrupted\n")


def test_nobodys_text_steers_the_terminal(
    loaded: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "[/b]\x1b[2J\nfake: line\r\u202eevil"
    plan = Plan.uniform(NAMED["draft"](), "wan", MODELS)
    plan.provenance[hostile] = hostile
    plan.save(tmp_path / "p.json")
    with pytest.raises(SystemExit):
        cli.main(["plan", "show", str(tmp_path / "p.json")])
    shown = capsys.readouterr().out
    assert "[/b]" in shown and "\x1b" not in shown and "\nfake" not in shown and "\u202e" not in shown
    _, text = stopped(capsys, ["plan", "show", "a\x1b[2J\nb.json"])
    assert "a\\x1b[2J\\nb.json" in text
    searched(loaded)
    with pytest.raises(SystemExit):
        cli.main(["search", "my-wan", "--out", str(tmp_path / "a\x1b[2Jb.json")])
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.skipif(sys.platform == "win32", reason="pipes of POSIX")
def test_a_reader_that_has_read_enough_is_no_error(here: Path) -> None:
    code = "import os, sys; from diffusers_accel import cli; sys.stdin.read(); cli.main(sys.argv[1:])"
    writer = subprocess.Popen(
        [sys.executable, "-c", code, "plan", "show", str(here / "draft.json")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert writer.stdin and writer.stdout and writer.stderr
    writer.stdout.close()
    writer.stdin.close()
    assert writer.stderr.read() == b"" and writer.wait() == 1


def test_plans_are_read_once_and_named_by_what_was_given(
    loaded: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given: dict[str, Any] = {}

    def compared(pipe: Any, subjects: Any, texts: Any, **options: Any) -> Any:
        given.update(options, subjects=subjects, texts=texts)
        raise ValueError("enough")

    loaded.setattr(compare, "compare", compared)
    line = "report my-wan --plan searched.json --plan draft --plan fast=draft.json --prompt a --seed 3 --rounds 2"
    assert stopped(capsys, [*shlex.split(line), "--out", str(tmp_path / "pages")]) == (2, "error: enough\n")
    subjects = given["subjects"]
    assert list(subjects) == ["searched", "draft", "fast"] and subjects["draft"] == "draft"
    assert subjects["fast"] == Plan.load("draft.json")
    assert (given["texts"], given["seeds"], given["rounds"]) == (["a"], [3], 2)
    assert given["keep"] == tmp_path / "pages.partial", "report, stopped, goes on from there"
