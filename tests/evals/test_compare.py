"""compare on a tiny real pipeline: what it measures, what it refuses, and that it leaves the pipeline as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_accel.api import patch
from diffusers_accel.evals import compare as comparing
from diffusers_accel.evals import generate as generating
from diffusers_accel.evals.compare import compare
from diffusers_accel.evals.generate import SharedNoise, generate
from diffusers_accel.evals.measurement import read_rows
from diffusers_accel.evals.metrics import METRICS
from diffusers_accel.evals.report import render
from diffusers_accel.methods import Band, Method, Stored
from diffusers_accel.plan import Plan, Span
from diffusers_accel.shape import ModelShape
from diffusers_accel.support.log import LOG
from tests.families.skyreels_v2 import tiny_forcing
from tests.tiny import HEAD_DIM, HEADS, LAYERS, tiny_wan, tiny_wan_call

EMBEDS = ("prompt_embeds", "negative_prompt_embeds")
CALL = {key: tiny_wan_call()[key] for key in ("height", "width", "num_frames", "guidance_scale")} | {
    "num_inference_steps": 4
}
PROMPT = {key: tiny_wan_call()[key] for key in EMBEDS}
FAST = ("psnr", "ssim")


def state(pipe: Any) -> dict[str, Any]:
    """Everything of a pipeline that a comparison touches."""
    modules = {
        name: (type(m).__name__, type(getattr(m, "processor", None))) for name, m in pipe.transformer.named_modules()
    }
    hooks = sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in pipe.transformer.modules())
    own = {name for name in vars(pipe) if not name.startswith("_")}
    return {"modules": modules, "hooks": hooks, "own": own, "bar": dict(pipe._progress_bar_config)}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = tiny_wan()
    pipe.set_progress_bar_config(disable=False, desc="mine")
    return pipe


@pytest.fixture(scope="module")
def plan() -> Plan:
    return Plan.uniform(
        Method(select=Band(0.34)), family="wan", models={"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)}
    )


@pytest.fixture(scope="module")
def found(pipe: Any, plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One comparison that several tests look at."""
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    before = state(pipe)
    subjects = {"file": path, "all dense": "dense", "named": ("pattern", {"density": 0.5})}
    report = compare(
        pipe, subjects, [PROMPT], call=CALL, seeds=(0, 1, 2), metrics=FAST, show=1, floor=False, progress=False
    )
    return {"report": report, "before": before, "after": state(pipe)}


def test_a_step_cache_is_held_against_the_steps_of_the_call(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not against those of the warm-up, which has fewer; and before any clip."""
    pipe = tiny_wan()
    generated: list[int] = []

    def stop(pipe: Any, prompt: Any, noise: Any, call: Any, *_: Any) -> Any:
        generated.append(call["num_inference_steps"])
        raise KeyboardInterrupt

    monkeypatch.setattr(comparing, "generate", stop)
    monkeypatch.setattr(LOG, "propagate", True)
    with pytest.raises(
        ValueError, match=r"subjects\['fixed'\]: the schedule computes step 4, but this call has 4 steps"
    ):
        compare(pipe, {"fixed": ("schedule", {"steps": [0, 4]})}, [PROMPT], call=CALL)
    assert not generated
    with pytest.raises(KeyboardInterrupt):
        compare(pipe, {"mine": "easycache", "fixed": ("schedule", {"steps": [0, 3]})}, [PROMPT], call=CALL)
    assert generated == [2]
    assert [text for text in caplog.messages if "predicts none of the 4 steps" in text and text.startswith("mine: ")]


def test_pipeline_is_left_as_found(found: dict[str, Any]) -> None:
    assert found["before"] == found["after"]
    assert found["after"]["bar"] == {"disable": False, "desc": "mine"}


def test_all_dense_subject_is_identical(found: dict[str, Any]) -> None:
    report = found["report"]
    for clip in (None, *report.clips):
        row = report.row("psnr", "all dense", clip)
        assert row.value is None and row.note == "identical"
        assert report.row("ssim", "all dense", clip).value == 1
    for metric in ("repeat_difference", "dense_patch_difference"):
        row = report.row(metric, "dense")
        assert (row.value, row.note) == (0.0, "identical")
    assert "frames identical to dense" in report.headline


def test_density_is_that_of_the_whole_run(found: dict[str, Any]) -> None:
    report = found["report"]
    assert report.row("density", "all dense").value == 1
    assert report.row("density", "file").value == pytest.approx(
        1 / 3, abs=0.17
    )  # 2 of 6 blocks, within one block a row
    by_hand = np.mean([row["density"] for row in report.subjects[0].layers])
    assert report.row("density", "file").value == pytest.approx(by_hand)
    # One of four steps dense, the others at half the blocks; bands may read one block a row more.
    assert 0.6 <= report.row("density", "named").value <= 0.76


def test_what_the_patch_noted_is_kept(pipe: Any) -> None:
    subjects = {"quantized": ("pattern", {"precision": "int8"}), "exact": "pattern"}
    report = compare(pipe, subjects, [PROMPT], call=CALL, metrics=(), show=0, floor=False, progress=False)
    said = "quantized products are simulated on a CPU: their numbers, not their speed"
    sparse = "18 of 24 calls"  # 3 of 4 steps, in 3 layers, for both branches
    small = "768 tokens are 6 blocks of 128, too few to leave any out"
    notes = [str(report.row("time", name).note) for name in ("quantized", "exact", "dense")]
    assert [f"{said} ({sparse})" in note for note in notes] == [True, False, False]
    assert [small in note for note in notes] == [True, True, False]
    assert [said in line for line in report.headline.splitlines()] == [True, False]


def test_what_is_said_of_the_patch_as_a_whole_is_in_every_part_of_the_report(pipe: Any, tmp_path: Path) -> None:
    """And stays there where the clips come from a comparison that was interrupted."""
    subjects = {"small": ("draft", {"density": 0.01}), "nothing": "dense"}
    found = compare(
        pipe, subjects, [PROMPT], call=CALL, metrics=(), show=0, floor=False, progress=False, keep=tmp_path / "kept"
    )
    said = "draft 8x16 0.01: density 0.01 was asked for"
    for report in (
        found,
        compare(
            pipe, subjects, [PROMPT], call=CALL, metrics=(), show=0, floor=False, progress=False, keep=tmp_path / "kept"
        ),
    ):
        note = report.row("time", "small").note
        assert note and said in note and report.row("time", "nothing").note is None
        assert [said in line for line in report.headline.splitlines()] == [True, False]
    found.save(tmp_path / "report")
    assert any(said in row.note for row in read_rows(tmp_path / "report" / "report.json") if row.note)
    for name in ("report.md", "report.html", "report.json"):
        assert said in (tmp_path / "report" / name).read_text(), name


def test_the_cache_budget_of_a_subject_holds_in_its_runs(pipe: Any) -> None:
    subjects = {"room": "cached", "none": ("cached", {"cache_memory_fraction": 0.0})}
    report = compare(pipe, subjects, [PROMPT], call=CALL, metrics=("psnr",), show=0, floor=False, progress=False)
    assert report.row("density", "room").value < report.row("density", "none").value == 1
    assert report.row("time", "none").note == "its cache does not fit into 0% of the free memory: dense"
    assert report.row("psnr", "none").note == "identical"
    assert all(row["reused"] and row["cache_bytes"] for row in report.subjects[0].layers)


def test_quality_is_of_raw_frames_against_dense(found: dict[str, Any], pipe: Any, plan: Plan) -> None:
    report = found["report"]
    values = []
    for seed in (0, 1, 2):
        arguments = {**PROMPT, **CALL, "output_type": "np"}
        dense = pipe(**arguments, generator=torch.Generator().manual_seed(seed)).frames[0]
        with patch(pipe, plan):
            patched = pipe(**arguments, generator=torch.Generator().manual_seed(seed)).frames[0]
        psnr = METRICS["psnr"].load()(dense, patched)
        values.append(psnr[np.isfinite(psnr)].mean())
        assert report.row("psnr", "file", report.clips[seed]).value == pytest.approx(values[-1])
    total = report.row("psnr", "file")
    assert total.value == pytest.approx(np.mean(values))
    assert total.spread.std == pytest.approx(np.std(values, ddof=1), rel=1e-4)
    assert (total.spread.n, total.spread.prompts, total.spread.comparisons) == (3, 1, 3)
    assert total.spread.low is None, "three clips of one prompt are too few"


def test_speed_rows_agree(found: dict[str, Any]) -> None:
    report = found["report"]
    ratios = [report.row("speedup", "file", clip).value for clip in report.clips]
    assert report.row("speedup", "file").value == pytest.approx(np.prod(ratios) ** (1 / 3))
    for subject in ("dense", "file", "all dense", "named"):
        assert 0 < report.row("attention_time", subject).value < 10 * report.row("time", subject).value
        assert 0 < report.row("attention_share", subject).value < 1
        assert report.row("peak_memory", subject).value > 2**20
        assert "resident" in report.row("peak_memory", subject).note
        assert report.row("warm_up", subject).value > 0
    text = render.markdown(report)
    assert "| peak memory of the process |" in text and "Warm-up, which is in no time above: dense " in text


def test_subjects_are_compared_with_each_other_clip_by_clip(found: dict[str, Any]) -> None:
    report = found["report"]
    ratios, more = [], []
    for clip in report.clips:
        speed, psnr = (
            [report.row(metric, name, clip).value for name in ("file", "named")] for metric in ("speedup", "psnr")
        )
        ratios.append(speed[0] / speed[1])
        more.append(psnr[0] - psnr[1])
    assert report.pair("speed_ratio", "file", "named").value == pytest.approx(np.prod(ratios) ** (1 / 3))
    row = report.pair("psnr_difference", "file", "named")
    assert row.value == pytest.approx(np.mean(more)) and row.spread.median == pytest.approx(np.median(more))
    assert (row.spread.comparisons, row.unit, row.better) == (3, "dB", "higher")
    identical = report.pair("psnr_difference", "file", "all dense")
    assert identical.value is None and identical.note == "identical"


def test_the_order_of_subjects_turns_from_clip_to_clip(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    stock = comparing._Session._run
    monkeypatch.setattr(comparing._Session, "_run", lambda self, name, *a: (ran.append(name), stock(self, name, *a))[1])
    call = {**CALL, "num_inference_steps": 1}
    compare(
        pipe,
        {"a": "dense", "b": "dense"},
        [PROMPT],
        call=call,
        seeds=(0, 1),
        metrics=(),
        show=0,
        floor=False,
        progress=False,
    )
    assert ran[0] == ran[3] == ran[4] == ran[7] == "dense"
    assert ran[1:3] == ran[6:4:-1] and sorted(ran[1:3]) == ["a", "b"]


def test_provenance_is_whole(found: dict[str, Any]) -> None:
    provenance = found["report"].provenance
    assert provenance["call"] == CALL
    assert provenance["clip"] == {"frames": 5, "height": 64, "width": 64}
    assert provenance["tokens"] == {"frames": 3, "height": 16, "width": 16, "text": 0}
    assert sorted(provenance["order"]["first"]) == ["all dense", "file", "named"]
    assert provenance["seeds"] == [0, 1, 2] and provenance["prompts"] == ["embedded prompt 1"]
    assert provenance["pipeline"]["transformers"]["transformer"]["heads"] == HEADS
    assert provenance["versions"]["torch"] and "pytorch-msssim" not in provenance["versions"]
    assert any("PSNR" in line for line in provenance["protocol"])


def test_shown_clips_have_films(found: dict[str, Any], tmp_path: Path) -> None:
    report = found["report"]
    (shown,) = [clip for clip in report.clips if clip.media]
    assert list(shown.media.videos) == ["dense", "file", "all dense", "named"]
    report.save(tmp_path / "new")
    assert (tmp_path / "new" / "report.html").read_text().count("data-mp4=") == 4 + 3


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"subjects": {}}, ValueError, "subjects: expected one or more"),
        ({"subjects": "draft"}, TypeError, r"subjects: expected a mapping of names, such as .*, found 'draft'"),
        ({"subjects": {"dense": "pattern"}}, ValueError, "baseline's name"),
        ({"subjects": {"Plan a": "pattern", " plan  A": "dense"}}, ValueError, "would look the same"),
        ({"subjects": {3: "pattern"}}, ValueError, "expected names with letters"),
        ({"subjects": {"a" * 101: "pattern"}}, ValueError, "names of at most 100 characters"),
        ({"subjects": {"\ud800": "pattern"}}, ValueError, "half a character"),
        ({"subjects": {"a": ("pattern", 0.3)}}, TypeError, r"subjects\['a'\]: expected .*its parameters"),
        ({"subjects": {"a": "nonsense"}}, ValueError, "neither a method"),
        ({"subjects": {"a": ("pattern", {"sparsity": 0.5})}}, TypeError, "no parameter 'sparsity'"),
        ({"prompts": []}, ValueError, "prompts: expected one or more"),
        ({"prompts": "a red circle"}, TypeError, "expected a list of texts"),
        ({"prompts": 3}, TypeError, "prompts: expected a list of texts, found 3"),
        ({"prompts": {"prompt_embeds": 1}}, TypeError, "prompts: expected a list of texts"),
        ({"subjects": {"a": None}}, TypeError, "subjects: expected one plan .*found None"),
        ({"prompts": [" "]}, ValueError, "empty string"),
        ({"prompts": ["x" * 5_000_000]}, ValueError, r"prompts\[0\]: expected at most 10,000 characters"),
        ({"prompts": ["half \udfff"]}, ValueError, r"prompts\[0\]: expected Unicode"),
        ({"prompts": [3]}, ValueError, r"prompts\[0\]: expected a string, .*found 3"),
        ({"prompts": [{"nonsense": 1}]}, ValueError, r"prompts\[0\]: .*found \['nonsense'\]"),
        ({"prompts": [{**PROMPT, "generator": None}]}, ValueError, r"prompts\[0\]: .*'generator'"),
        ({"prompts": ["a", "a"]}, ValueError, "expected each once"),
        (
            {"prompts": [str(n) for n in range(9000)]},
            ValueError,
            "found 126,000 .9,000 clips x 1 subjects and the floor x 7.: compare fewer clips",
        ),
        ({"metrics": "psnr"}, TypeError, "metrics: expected a list of names"),
        ({"metrics": ("psnr", "fvd")}, ValueError, "psnr, ssim, lpips, .*found 'fvd'"),
        ({"metrics": ["pnsr"]}, ValueError, "found 'pnsr'; did you mean \"psnr\"?"),
        ({"metrics": ("psnr", "psnr")}, ValueError, "metrics: expected each once"),
        ({"metrics": [None]}, ValueError, "metrics: expected some of .*found None"),
        ({"seeds": (1, 1)}, ValueError, "seeds: expected one or more different"),
        ({"seeds": "0"}, TypeError, "seeds: expected a list of whole numbers"),
        ({"seeds": 5}, TypeError, "seeds: expected a list of whole numbers.*found 5"),
        ({"seeds": ["0"]}, ValueError, "seeds: expected .*found \\['0'\\]"),
        ({"seeds": [True]}, ValueError, "seeds: expected .*found \\[True\\]"),
        ({"seeds": [2**63]}, ValueError, "seeds: expected"),
        ({"rounds": 0}, ValueError, "rounds: expected a whole number from 1 .*found 0"),
        ({"rounds": True}, ValueError, "rounds: expected a whole number .*found True"),
        ({"rounds": 1.5}, ValueError, "rounds: .*found 1.5"),
        ({"show": -1}, ValueError, "show: expected a whole number from 0"),
        ({"fps": "16"}, ValueError, "fps: expected a whole number .*found '16'"),
        ({"subjects": {"Floor": "pattern"}}, ValueError, "'Floor' is the floor's name; give the subject another"),
        ({"floor": 1}, TypeError, "floor: expected True or False, found 1"),
        ({"keep": 3}, TypeError, "keep: expected the path of a folder"),
        ({"call": 3}, TypeError, "call: expected a mapping of arguments"),
        ({"call": {**CALL, "generator": None}}, ValueError, "'generator' is set by compare; give `seeds`"),
        ({"call": {**CALL, "num_frame": 5}}, ValueError, "no 'num_frame'; .*did you mean \"num_frames\"?"),
        ({"call": {**CALL, "guidance_scale": float("nan")}}, ValueError, "guidance_scale: expected a finite number"),
        ({"call": {**CALL, "num_inference_steps": "4"}}, ValueError, "num_inference_steps: expected a whole number"),
    ],
)
def test_wrong_arguments_are_refused_before_any_clip(
    pipe: Any, change: dict[str, Any], error: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments: dict[str, Any] = {"subjects": {"a": "pattern"}, "prompts": [PROMPT], "call": CALL, **change}
    subjects, prompts = arguments.pop("subjects"), arguments.pop("prompts")
    monkeypatch.setattr(type(pipe), "prepare_latents", None)  # no clip can be made
    with pytest.raises(error, match=says) as refused:
        compare(pipe, subjects, prompts, progress=False, **arguments)
    assert len(str(refused.value)) < 1000 and str(refused.value).isprintable()


def test_what_is_no_pipeline_is_refused(pipe: Any) -> None:
    for wrong, says in (
        (pipe.transformer, "found a bare WanTransformer3DModel: give the pipeline"),
        ("x", "found str"),
    ):
        with pytest.raises(TypeError, match=f"pipe: expected a .*{says}"):
            compare(wrong, {"a": "pattern"}, [PROMPT], call=CALL, progress=False)


def test_a_pipeline_whose_processes_share_a_sequence_is_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would exchange pieces of different clips."""
    monkeypatch.setattr(pipe.transformer, "_parallel_config", object(), raising=False)
    with pytest.raises(ValueError, match="transformer shares each sequence with other processes.* not parallel"):
        compare(pipe, {"a": "pattern"}, [PROMPT], call=CALL, progress=False)


@pytest.mark.parametrize("late", [False, True], ids=["at once", "in the last tenth of the schedule"])
def test_stored_masks_for_another_size_are_refused_before_the_first_clip(
    late: bool, pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {"transformer": ModelShape(LAYERS, HEADS, HEAD_DIM)}
    stored, row = Method(select=Stored(0.5)), ("S" * HEADS,) * LAYERS
    bits_name, heads_name = stored.select.names(stored.order, "transformer")
    tensors = {
        bits_name: torch.tensor([255, 1], dtype=torch.uint8).expand(1, 1, 9, 2).clone(),  # of 9 blocks; the call has 6
        heads_name: torch.zeros(LAYERS, HEADS, dtype=torch.int32),
    }
    spans = (Span(0.0, 1.0, {"transformer": row}),)
    if late:
        spans = (
            Span(0.0, 0.9, {"transformer": ("." * HEADS,) * LAYERS}),
            Span(0.9, 1.0, {"transformer": row}),
        )
    methods = {".": Method(), "S": stored} if late else {"S": stored}
    plan = Plan("wan", models, methods, spans, tensors=tensors)
    monkeypatch.setattr(comparing._Session, "clip", None)
    says = (
        r"subjects\['other size'\]: the plan's stored masks are for 9 blocks of 128 tokens; this call has .*, 6 blocks"
    )
    with pytest.raises(ValueError, match=says):
        compare(pipe, {"a": "pattern", "other size": plan}, [PROMPT], call=CALL, metrics=(), progress=False)


def test_patched_pipeline_is_refused() -> None:
    pipe = tiny_wan()
    with patch(pipe, "pattern"), pytest.raises(ValueError, match="patched already"):
        compare(pipe, {"a": "pattern"}, [PROMPT], call=CALL, progress=False)


@pytest.mark.parametrize("fails_at", [2, 4, 6, 12, 16])
def test_failure_in_mid_run_leaves_the_pipeline_as_found(
    pipe: Any, fails_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the warm-up, of the floor too, in a dense and in the two others."""
    before, calls = state(pipe), 0
    stock = type(pipe.scheduler).step

    def step(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise RuntimeError("out of luck")
        return stock(*arguments, **keywords)

    monkeypatch.setattr(type(pipe.scheduler), "step", step)
    with pytest.raises(RuntimeError, match="out of luck"):
        compare(pipe, {"a": "pattern"}, [PROMPT], call=CALL, metrics=(), show=0, progress=False)
    assert state(pipe) == before


def test_other_noise_is_noticed(pipe: Any) -> None:
    noise = SharedNoise(0)
    generate(pipe, PROMPT, noise, CALL)
    stock = pipe.prepare_latents
    with (
        generating.attribute(pipe, "prepare_latents", lambda *a, **k: stock(*a, **k) + 1e-3),
        pytest.raises(RuntimeError, match="found another"),
    ):
        generate(pipe, PROMPT, noise, CALL)
    assert "prepare_latents" not in vars(pipe)


def test_more_noise_behind_the_first_is_noticed(pipe: Any) -> None:
    noise = SharedNoise(0)
    generate(pipe, PROMPT, noise, CALL)
    stock = pipe.prepare_latents
    with (
        generating.attribute(pipe, "prepare_latents", lambda *a, **k: (stock(*a, **k), torch.rand(1))[0]),
        pytest.raises(RuntimeError, match="expected a run to draw as much noise as the first of this clip"),
    ):
        generate(pipe, PROMPT, noise, CALL)
    generate(pipe, PROMPT, noise, CALL)


def test_runs_of_several_chunks_have_one_noise() -> None:
    """Also one that draws for its later chunks from torch's own generator, which is left as it was."""
    pipe, noise = tiny_forcing(), SharedNoise(0)
    long_video = {
        "num_frames": 9,
        "base_num_frames": 5,
        "overlap_history": 3,
        "addnoise_condition": 500,
        "prompt": None,
    }
    call = {**CALL, "num_inference_steps": 1, **long_video}
    before = torch.get_rng_state()
    one, other = (generate(pipe, PROMPT, noise, call) for _ in range(2))
    assert np.array_equal(one.frames, other.frames) and len(one.frames) == 9
    assert torch.equal(torch.get_rng_state(), before)
    assert noise._drawn is not None and len(noise._drawn) > 2, "of each chunk, and of the end"
    torch.manual_seed(1)
    alone = pipe(**PROMPT, **call, output_type="np", generator=torch.Generator().manual_seed(0)).frames[0]
    assert not np.array_equal(one.frames, alone), "without that it draws others"


def test_missing_metric_is_said_before_anything_is_generated_and_in_its_rows(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    said_before: list[str] = []

    def generated(*arguments: Any, **named: Any) -> Any:
        said_before.append(caplog.text)
        return generate(*arguments, **named)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(LOG, "propagate", True)
    monkeypatch.setattr(comparing, "generate", generated)
    report = compare(
        pipe, {"a": "pattern"}, [PROMPT], call=CALL, metrics=("lpips",), show=0, floor=False, progress=False
    )
    row = report.row("lpips", "a")
    command = "diffusers-accel metrics fetch lpips"
    assert row.value is None and row.note.endswith(f"not on this machine: {command}")
    assert f"LPIPS will not be measured: its weights are not on this machine: {command}" in said_before[0]
    assert not list(tmp_path.iterdir()), "nothing is fetched unasked"
    assert "LPIPS not measured" in report.headline


def test_progress_counts_every_step(pipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    compare(pipe, {"a": "pattern"}, [PROMPT], call=CALL, metrics=(), show=0, floor=False, progress=True)
    said = capsys.readouterr().err.splitlines()  # no terminal, so lines
    assert said[0] == "0 %: warm-up"
    # Of dense, patched, dense, and dense under a patch, 4 runs of 4 steps, the last one and no other.
    assert [line for line in said if line.startswith("100 % in ")] == said[-1:]


def test_progress_shows_any_text_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with comparing._bar(True, 1) as say:
        say("a sign says [/b] :smile: \x1b[31m" + "\n" * 50)
    assert "a sign says [/b] :smile: \\x1b[31m\\n\\n" in capsys.readouterr().err


def test_step_caches_are_compared_with_and_without_a_method_for_the_heads(pipe: Any, tmp_path: Path) -> None:
    """A step cache alone runs above dense attention, whose time is measured; predicted forwards count as zeros."""
    subjects: dict[str, Any] = {
        "cache": ("schedule", {"steps": [0, 1]}),
        "both": [("schedule", {"steps": [0, 1]}), Method(select=Band(0.34))],
        "nothing": ("easycache", {"threshold": 0}),
    }
    report = compare(
        pipe,
        subjects,
        [PROMPT],
        call=CALL,
        metrics=("psnr",),
        show=0,
        floor=False,
        progress=False,
        keep=tmp_path / "kept",
    )
    rows = {(row.subject, row.metric): row.value for row in report.rows}
    assert rows["cache", "density"] == pytest.approx(3 / 4), "of 4 steps, the last computes too"
    assert 0 < rows["both", "density"] < 0.5 and rows["both", "psnr"] > 0
    assert rows["nothing", "density"] == 1 and rows["nothing", "psnr"] is None, "no error: no finite number"
    assert list(report.provenance["forwards"]) == list(subjects)
    assert report.provenance["forwards"]["cache"]["rule"] == {"kind": "schedule", "steps": [0, 1]}
    assert not pipe.transformer._forward_hooks


def test_the_last_latents_are_those_that_are_decoded(pipe: Any) -> None:
    run = generate(pipe, PROMPT, SharedNoise(0), CALL)
    expected = pipe(**PROMPT, **CALL, output_type="latent", generator=torch.Generator().manual_seed(0)).frames
    (latents,) = run.latents
    assert latents.dtype == np.float32 and np.array_equal(latents, expected.float().numpy())


def test_the_latents_of_each_chunk_are_kept() -> None:
    pipe = tiny_forcing()
    chunks = {"num_frames": 9, "base_num_frames": 5, "overlap_history": 3, "prompt": None}
    run = generate(pipe, PROMPT, SharedNoise(0), {**CALL, "num_inference_steps": 2, **chunks})
    assert len(run.latents) == len({each.tobytes() for each in run.latents}) > 1
    alone = generate(pipe, PROMPT, SharedNoise(0), {**CALL, "num_inference_steps": 2, "prompt": None})
    assert len(alone.latents) == 1


def test_a_pipeline_that_shows_no_latents_has_none_and_the_report_says_so(pipe: Any) -> None:
    own = {**CALL, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert generate(pipe, PROMPT, SharedNoise(0), own).latents == ()
    asked: dict[str, Any] = {"metrics": ("latent_cosine", "psnr"), "show": 0, "floor": False, "progress": False}
    report = compare(pipe, {"a": Method(select=Band(0.34))}, [PROMPT], call=own, **asked)
    row = report.row("latent_cosine", "a")
    assert row.value is None and row.note.startswith("not measured: the pipeline shows no latents")
    seen = compare(pipe, {"a": Method(select=Band(0.34)), "b": "dense"}, [PROMPT], call=CALL, **asked)
    assert 0.9 < seen.row("latent_cosine", "a").value < 1 == seen.row("latent_cosine", "b").value
    assert seen.row("latent_cosine", "dense") is None and seen.pair("latent_cosine_difference", "a", "b").value < 0
