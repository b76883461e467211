"""Times of a step, extrapolated from a few layers of a real shape."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer

from diffusers_accel.evals import step_bench
from diffusers_accel.evals.step_bench import timing, watch
from diffusers_accel.evals.step_bench.models import MODELS, BenchModel
from diffusers_accel.evals.step_bench.timing import _built, _whole, measure
from diffusers_accel.files import WriteError, encode_line, read_lines
from tests.tiny import POOLED_DIM, TEXT_DIM, TEXT_TOKENS, tiny_hunyuan_transformer, tiny_wan_transformer

CPU = torch.device("cpu")


def tiny_inputs(size: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {
        "hidden_states": torch.randn(1, 4, *size),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, TEXT_DIM),
        "encoder_attention_mask": torch.ones(1, TEXT_TOKENS),
        "pooled_projections": torch.randn(1, POOLED_DIM),
        "guidance": torch.tensor([6000.0]),
    }


TINY = BenchModel(
    lambda layers: tiny_hunyuan_transformer(),
    tiny_inputs,
    {"transformer_blocks": 20, "single_transformer_blocks": 40},
    (3, 32, 32),
    2,
)


def test_a_step_is_its_layers_times_their_number_and_what_lies_around_them() -> None:
    told: list[dict] = []
    methods = ("dense", "pattern", "draft", "cached")
    begun: list[dict] = []
    rows = measure(
        "tiny", TINY, CPU, torch.float32, steps=5, methods=methods, on_row=told.append, on_begin=begun.append
    )
    assert [row["method"] for row in begun] == ["stock", *(each for method in methods for each in (method, method))]
    assert rows == told and [row["method"] for row in rows] == ["stock", *methods]
    for row in rows:
        double, single = row["ms_layer"]["transformer_blocks"], row["ms_layer"]["single_transformer_blocks"]
        assert double > 0 and single > 0 and row["ms_around"] > 0 and row["ms_step"] == 2 * row["ms_pass"]
        if row["method"] != "draft":
            assert row["ms_pass"] == pytest.approx(row["ms_around"] + 20 * double + 40 * single)
    for row in rows[1:]:
        assert row["speedup"] == pytest.approx(row["stock_ms_step"] / row["ms_step"])
        assert (row["density"] < 1) == (row["method"] != "dense")
    assert [row["cache_bytes"] > 0 for row in rows[1:]] == [False, False, False, True]


def test_layers_that_a_method_keeps_dense_are_those_of_the_whole_model() -> None:
    times, stock = {"around": 1.0, "a": 2.0, "b": 3.0}, {"around": 9.0, "a": 20.0, "b": 30.0}
    model = dataclasses.replace(TINY, stacks={"a": 4, "b": 2}, passes=1)
    assert _whole(model, times, stock, 0)["ms_pass"] == 1 + 4 * 2 + 2 * 3
    assert _whole(model, times, stock, 1)["ms_pass"] == 1 + 20 + 3 * 2 + 2 * 3
    assert _whole(model, times, stock, 5)["ms_pass"] == 1 + 4 * 20 + 30 + 3
    # A draft keeps the first of 60 layers dense, and of the few that were built none.
    (_, row) = measure("tiny", TINY, CPU, torch.float32, steps=4, methods=("draft",))
    sparse = (row["density"] * 60 - 1) / 59
    assert 0 < sparse < row["density"] < 1


def test_hooks_and_patches_are_taken_off_again() -> None:
    kept = tiny_hunyuan_transformer()
    blocks = [*kept.transformer_blocks, *kept.single_transformer_blocks]
    stock = [type(block.attn.processor) for block in blocks]
    measure("tiny", dataclasses.replace(TINY, build=lambda layers: kept), CPU, torch.float32, steps=5)
    assert [type(block.attn.processor) for block in blocks] == stock
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks)


def test_what_diffusers_keeps_in_fp32_stays_there() -> None:
    model = dataclasses.replace(TINY, build=lambda layers: tiny_wan_transformer())
    built = _built(model, 1, CPU, torch.bfloat16)
    assert built.blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
    assert built.rope.freqs_cos.dtype != torch.bfloat16 and built.blocks[0].scale_shift_table.dtype == torch.float32


@pytest.mark.parametrize("name", MODELS)
def test_the_real_models_fit_their_inputs(name: str) -> None:
    """On the meta device: the shapes go through, nothing is computed."""
    model, meta = MODELS[name], torch.device("meta")
    with meta, torch.no_grad():
        transformer = model.build(1)
    inputs = model.inputs(model.size, CPU, torch.float32)
    moved = {
        key: tuple(x.to(meta) for x in value) if isinstance(value, tuple) else value.to(meta)
        for key, value in inputs.items()
    }
    with torch.no_grad():
        (out,) = transformer(**moved, return_dict=False)
    assert out.shape == moved["hidden_states"].shape


def test_a_warm_up_is_the_last_two_steps_and_every_step_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first steps a method may be dense, so that its kernels would be compiled within what is timed."""
    seen: list[tuple[str, int]] = []

    class Told:
        def clear(self) -> None:
            seen.append(("clear", 0))

        def step(self, index: int, steps: int) -> None:
            seen.append(("step", index))

    transformer = tiny_wan_transformer()
    times: list[int] = []
    transformer.register_forward_pre_hook(
        lambda _, args, kwargs: times.append(int(kwargs["timestep"])), with_kwargs=True
    )
    model = dataclasses.replace(TINY, stacks={"blocks": 30}, passes=1)
    inputs = {name: TINY.inputs(TINY.size, CPU, torch.float32)[name] for name in WAN}
    timing._schedule(transformer, inputs, model, CPU, 6, Told())  # type: ignore[arg-type]
    warm_up = [("clear", 0), ("step", 4), ("step", 5)]
    assert seen == [*warm_up, ("clear", 0), *(("step", step) for step in range(6))]
    assert times[2:] == sorted(times[2:], reverse=True) and len(set(times[2:])) == 6 and times[:2] == times[-2:]


def test_a_method_that_fails_costs_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    real = timing.patch

    def failing(transformer: Any, method: str, **options: Any) -> Any:
        if method == "draft":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
        return real(transformer, method, **options)

    monkeypatch.setattr(timing, "patch", failing)
    rows = measure("tiny", TINY, CPU, torch.float32, steps=2, methods=("draft", "pattern"))
    assert [row["status"] for row in rows] == ["ok", "failed: OutOfMemoryError: CUDA out of memory. Tried", "ok"]
    assert "ms_step" not in rows[1] and rows[2]["speedup"] > 0


# Other packages


class Sparsevideo(SimpleNamespace):
    """What this benchmark asks of sparsevideo 0.1.0, which replaces processors."""

    def list_methods(self) -> list[str]:
        return ["dense", "svg1", "sta"]

    def apply(self, pipe: Any, method: str = "dense", config: dict[str, Any] | None = None) -> Any:
        if method == "sta":
            raise NotImplementedError("STA is not supported")
        assert len(pipe.scheduler.timesteps) == 2 and "1.3b" in pipe.name_or_path
        block = pipe.transformer.blocks[0].attn1
        stock, options = block.processor, {"dense_warmup_layer_ratio": 0.5, "sparsity": 0.3} | (config or {})
        self.applied.append(options["dense_warmup_layer_ratio"])
        block.processor = lambda *args, **kwargs: stock(*args, **kwargs)
        return SimpleNamespace(
            summary=lambda: {"method_config": options}, restore=lambda: setattr(block, "processor", stock)
        )


WAN = ("hidden_states", "timestep", "encoder_hidden_states")


def wan_model(kept: Any) -> BenchModel:
    inputs = {name: value for name, value in tiny_inputs(TINY.size, CPU, torch.float32).items() if name in WAN}
    return BenchModel(lambda layers: kept, lambda *_: inputs, {"blocks": 30}, TINY.size, 2)


def test_another_package_is_measured_as_its_users_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    package, kept = Sparsevideo(applied=[]), tiny_wan_transformer()
    monkeypatch.setitem(sys.modules, "sparsevideo", package)  # type: ignore[arg-type]
    stock, dense, whole = kept.blocks[0].attn1.processor, list[int](), timing._whole
    monkeypatch.setattr(timing, "_whole", lambda *args: dense.append(args[3]) or whole(*args))
    asked = ("sparsevideo:svg1", "sparsevideo:sta", "sparsevideo:svg9", "pattern")
    rows = measure("wan 1.3b", wan_model(kept), CPU, torch.float32, steps=2, methods=asked)
    assert [row["status"] for row in rows] == [
        "ok",
        "ok",
        "missing: sparsevideo sta: STA is not supported",
        "missing: sparsevideo has dense, sta, svg1, not 'svg9'",
        "ok",
    ]
    rival = rows[1]
    # Of the layers that are built none stays dense; of the whole model half of them do.
    assert package.applied == [0.5, 0.0, 0.0, 0.0] and rival["config"]["sparsity"] == 0.3
    assert dense[:3] == [0, 15, 0] and rival["speedup"] > 0  # the first stock run, the rival, the stock runs around it
    assert kept.blocks[0].attn1.processor is stock and "density" not in rival


def test_a_package_that_is_not_there_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sparsevideo", None)  # type: ignore[arg-type]
    (_, row) = measure(
        "wan 1.3b", wan_model(tiny_wan_transformer()), CPU, torch.float32, steps=2, methods=("sparsevideo:svg2",)
    )
    assert row["status"].startswith("missing: import sparsevideo: ModuleNotFoundError") and "ms_step" not in row


# The command, with workers that measure nothing

WORKER = """
import json, sys, time
job = json.load(open(sys.argv[1]))
open(FOLDER + "/jobs", "a").write(json.dumps(job["methods"]) + "\\n")
def say(**message):
    print(json.dumps(message), flush=True)
if WAY == "silent":
    time.sleep(600)
say(hello={"machine": {"gpu": "A", "driver": DRIVER, "device": "cuda"}, "versions": {"torch": "1"}, "git_sha": None})
times = {"ms_step": 2.0, "ms_layer": {"blocks": 1.0}, "ms_around": 0.0, "status": "ok"}
for method in ("stock", *job["methods"]):
    row = PLACE | {"model": job["model"], "method": method}
    say(begin=row)
    if method == BAD and WAY == "hang":
        time.sleep(600)
    if method == BAD and WAY == "die":
        sys.exit("RuntimeError: illegal memory access")
    if method == BAD and WAY == "missing":
        say(row=row | {"status": "missing: not here"})
        continue
    more = {} if method == "stock" else {"speedup": 1.5, "stock_drift": 0.0, "density": 0.5, "cache_bytes": 0}
    say(row=row | times | more)
say(end=True)
"""
MODEL = "wan2.1-1.3b 480p"


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the command with a worker that behaves in some way: well, hang, die, silent, missing."""

    def run(
        way: str, methods: str = "dense,pattern,draft", bad: str = "pattern", driver: str = "1", **options: Any
    ) -> Any:
        place = timing.place(MODEL, MODELS[MODEL], MODELS[MODEL].size, torch.bfloat16, 2, 6)
        names = f"WAY, BAD, DRIVER, FOLDER, PLACE = {way!r}, {bad!r}, {driver!r}, {str(tmp_path)!r}, {place!r}"
        script = tmp_path / f"{way}.py"
        script.write_text(f"{names}\n{WORKER}")
        monkeypatch.setattr(watch, "COMMAND", (sys.executable, "-I", str(script)))
        (tmp_path / "jobs").write_text("")
        step_bench.main(models=MODEL, methods=methods, device="cpu", out=tmp_path / "steps.jsonl", **options)
        rows = [(row["method"], row["status"]) for row in read_lines(tmp_path / "steps.jsonl", "a row", "")]
        return rows, [json.loads(line) for line in (tmp_path / "jobs").read_text().splitlines()]

    return run


def statuses(*bad: tuple[str, str], methods: Sequence[str] = ("stock", "dense", "pattern", "draft")) -> list[Any]:
    return [(method, dict(bad).get(method, "ok")) for method in methods]


def test_a_method_that_hangs_is_killed_and_the_rest_goes_on(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    rows, jobs = command("hang", timeout=2.0)
    assert rows == statuses(("pattern", "hung: silent for 2 s, killed"))
    assert jobs == [["dense", "pattern", "draft"], ["draft"]]
    assert f"{MODEL}, pattern: hung: silent for 2 s" in capsys.readouterr().out
    rows, jobs = command("well")
    assert rows == statuses(("pattern", "hung: silent for 2 s, killed")) and jobs == []  # nothing is left to do


def test_a_method_that_kills_its_process_is_named(command: Any) -> None:
    rows, _ = command("die")
    assert rows == statuses(("pattern", "crashed: exit code 1: RuntimeError: illegal memory access"))


def test_a_model_whose_stock_run_hangs_is_given_up(command: Any) -> None:
    rows, jobs = command("hang", bad="stock", timeout=2.0)
    assert rows == [("stock", "hung: silent for 2 s, killed")] and len(jobs) == 1
    assert command("well")[1] == []


def test_a_second_run_measures_what_is_new_or_was_missing(command: Any) -> None:
    assert command("missing", methods="dense,pattern")[0] == statuses(("pattern", "missing: not here"))[:3]
    rows, jobs = command("missing")
    assert jobs == [["pattern", "draft"]] and rows == statuses(("pattern", "missing: not here"))
    rows, jobs = command("well", driver="2")  # of another lease
    assert jobs == [["pattern"]] and rows == [*statuses(("pattern", "missing: not here")), ("pattern", "ok")]


def test_a_run_ends_when_its_time_is_over(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    begin = time.monotonic()
    rows, _ = command("hang", timeout=500.0, minutes=0.1)
    assert time.monotonic() - begin < 30 and rows == statuses()[:2]  # what was cut off may be tried again
    monkeypatch.setattr(watch, "START_SECONDS", 1.0)
    with pytest.raises(RuntimeError, match="went before it had built wan2.1-1.3b 480p. It hung: silent for 1 s"):
        command("silent", methods="reordered")


def test_rows_of_two_machines_are_not_mixed(command: Any, tmp_path: Path) -> None:
    command("well", methods="dense")
    out = tmp_path / "steps.jsonl"
    rows = read_lines(out, "a row", "")
    out.write_bytes(b"".join(encode_line(row | {"machine": row["machine"] | {"gpu": "B"}}) for row in rows))
    with pytest.raises(
        ValueError, match="machine .*found .*'B'.*earlier run; such rows do not compare: give another --out"
    ):
        command("well")
    assert len(read_lines(out, "a row", "")) == 2


def test_a_real_worker_measures_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a process of its own, at the model's width and a size that takes seconds."""
    out = tmp_path / "steps.jsonl"
    asked: dict[str, Any] = {"models": MODEL, "methods": "pattern,sparsevideo:svg1", "size": "2x16x16", "layers": 1}
    step_bench.main(**asked, steps=2, dtype="fp32", device="cpu", out=out)
    rows = read_lines(out, "a row", "")
    assert [(row["method"], row["status"].partition(":")[0]) for row in rows][:2] == [
        ("stock", "ok"),
        ("pattern", "ok"),
    ]
    assert rows[2]["method"] == "sparsevideo:svg1"  # whatever became of it here
    assert rows[0]["machine"]["cpu_capability"] and rows[0]["machine"]["cores"] > 0 and rows[1]["kernels"]
    assert "extrapolated" in capsys.readouterr().out


def test_what_is_wrong_is_refused_before_anything_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_bench, "watched", None)
    usual: dict[str, Any] = {"models": MODEL, "methods": "pattern", "device": "cpu", "out": tmp_path / "steps.jsonl"}
    for given, error, message in (
        ({"size": "21x60"}, typer.BadParameter, "found '21x60'"),
        ({"models": "wan9"}, typer.BadParameter, "models must be among .*found wan9"),
        ({"methods": "pattrn"}, typer.BadParameter, "methods must be among .*sparsevideo:<its method>, found pattrn"),
        ({"dtype": "fp8"}, typer.BadParameter, "dtype must be one of .*found fp8"),
        ({"models": "cogvideox1.5-5b 768p", "size": "21x60x104"}, ValueError, "multiples of 2x2x2, found 21x60x104"),
        ({"out": tmp_path}, WriteError, "it is a folder; name a file"),
    ):
        with pytest.raises(error, match=message):
            step_bench.main(**{**usual, **given})
    assert not (tmp_path / "steps.jsonl").exists()


def test_a_cut_off_row_spoils_no_other(command: Any, tmp_path: Path) -> None:
    (tmp_path / "steps.jsonl").write_text('{"method": "dra')
    assert command("well", methods="dense")[0] == statuses()[:2]
