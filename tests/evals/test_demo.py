"""The demo from end to end on a pipeline of the toy model's own parts with random weights; and how it spends its time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_accel import Plan
from diffusers_accel.evals import demo, toy
from diffusers_accel.evals.generate import PipelineRun
from diffusers_accel.evals.measurement import read_rows
from diffusers_accel.files import WriteError
from diffusers_accel.methods.named import FOR_EVERY_MODEL
from diffusers_accel.search import plan_search

SMALL = {"height": 128, "width": 128, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 2.0}


@pytest.mark.parametrize(
    ("seconds", "clip", "expected"),
    [
        (700, 20, (4, 4)),
        (540, 20, (3, 4)),
        (400, 20, (2, 4)),
        (300, 20, (1, 4)),  # what a search of two and a half minutes leaves of eight
        (270, 25, (1, 4)),  # a slower machine: fewer prompts first
        (180, 20, (1, 2)),  # names last
        (100, 20, (1, 0)),
        (5, 20, (1, 0)),  # the searched plan whatever happens
        (-9, 20, (1, 0)),
    ],
)
def test_time_decides_how_much_is_compared(seconds: float, clip: float, expected: tuple[int, int]) -> None:
    assert demo.fit(seconds, clip) == expected


def test_what_fits_is_what_it_costs() -> None:
    """Dense, patched, the floor and dense for each prompt, the dense run under a patch and the warm-up; patched runs are 20 %
    cheaper, and the floor takes two dense clips."""
    for prompts, names in demo.CHOICES[:-1]:
        subjects = 1 + names
        warm_up = 2 / 10 * (1 + 2 + subjects)
        needed = prompts * (2 + 2 + 0.8 * subjects) + 1 + warm_up
        assert demo.fit(needed + 0.01, 1.0) == (prompts, names)
        assert demo.fit(needed - 0.01, 1.0) != (prompts, names)


def test_every_named_method_is_shown_unless_time_is_short() -> None:
    assert set(demo.NAMES) == set(FOR_EVERY_MODEL) - {"dense"}
    assert all(names == len(demo.NAMES) for prompts, names in demo.CHOICES if prompts > 1)


def test_a_clip_costs_its_steps_and_what_is_outside_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 12.0])  # ends of the two steps

    def generate(pipe: Any, prompt: str, noise: Any, call: dict[str, Any], on_step: Any) -> PipelineRun:
        for _ in range(call["num_inference_steps"]):
            on_step()
        return PipelineRun(np.zeros((1, 1, 1, 3), np.float32), 5000.0, 0)

    monkeypatch.setattr(demo, "generate", generate)
    monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    assert demo.clip_seconds(SimpleNamespace(), "a red circle") == 5 + 8 * 2


def random_pipeline() -> Any:
    from diffusers import WanPipeline

    from diffusers_accel.evals.toy.training import models

    torch.manual_seed(0)
    tokenizer = models.build_tokenizer()
    transformer = models.build_transformer(layers=2, heads=2, head_dim=32, ffn_dim=64)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=models.build_text_encoder(len(tokenizer)),
        vae=models.build_autoencoder(),
        scheduler=models.build_scheduler(),
        transformer=transformer,
    )


def test_demo_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(toy, "load_pipeline", random_pipeline)
    monkeypatch.setattr(toy, "verify_weights", lambda: {"files": {}})
    monkeypatch.setattr(toy, "CALL", SMALL)
    monkeypatch.setattr(plan_search, "COST_SECONDS", 0.5)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DIFFUSERS_ACCEL_OFFLINE", "1")
    monkeypatch.setattr(demo, "SPEEDUP", 50.0)  # out of reach, so that it has to say so and take the density
    out = tmp_path / "demo"
    demo.main(["--out", str(out), "--minutes", "0.1"])
    said = capsys.readouterr().out
    plan = Plan.load(out / "plan.json")
    assert plan.budget["value"] == demo.DENSITY
    assert "out of reach" in said and f"density {demo.DENSITY:g} instead" in said
    rows = read_rows(out / "report" / "report.json")
    speedup = next(row for row in rows if row.metric == "speedup" and row.clip is None)
    assert f"{speedup.value:.2f}x" in said and "0.1 minutes" in said
    assert "No time left for pattern, draft, cached, reordered: run it again" in said
    assert {row.subject for row in rows} == {"dense", "floor", "searched plan"}
    searched = toy.held_out_prompts(8, seed=0)[: demo.SEARCH_PROMPTS]
    seen = {row.clip["prompt"] for row in rows if row.clip}
    assert seen and not seen & set(searched)

    monkeypatch.setattr(demo, "CHOICES", ((1, 4),))  # as if there were time
    demo.main(["--out", str(out), "--minutes", "0.1"])
    again = capsys.readouterr()
    assert "finished before" in again.err  # the search goes on from what it had measured
    assert "No time left" not in again.out
    assert {path.name for path in out.iterdir()} >= {"plan.json", "report"}
    assert {path.name for path in (out / "report").iterdir()} == {"report.html", "report.json", "report.md"}
    assert f"Page: {out / 'report' / 'report.html'}" in again.out
    rows = read_rows(out / "report" / "report.json")
    assert list(dict.fromkeys(row.subject for row in rows)) == ["dense", "floor", "searched plan", *demo.NAMES]
    densities = {row.subject: row.value for row in rows if row.metric == "density"}
    assert all(0 < densities[name] < 1 for name in demo.NAMES)  # none of them stayed dense


def test_a_folder_that_cannot_be_written_is_refused_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toy, "load_pipeline", None)
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="file: .*there is a file of that name"):
        demo.main(["--out", str(tmp_path / "file")])
    (tmp_path / "demo" / "report").mkdir(parents=True)
    (tmp_path / "demo" / "report" / "notes.txt").touch()
    with pytest.raises(WriteError, match=r"report: .*other files \(notes.txt\)"):
        demo.main(["--out", str(tmp_path / "demo")])
