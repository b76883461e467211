"""The demo from end to end on a pipeline of the shapes model's own parts with random weights; and how it spends its time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusers_accel import Plan
from diffusers_accel.evals import demo, shapes
from diffusers_accel.evals.measurement import read_rows
from diffusers_accel.search import plan_search

SMALL = {"height": 128, "width": 128, "num_frames": 5, "num_inference_steps": 4, "guidance_scale": 2.0}


@pytest.mark.parametrize(
    ("seconds", "clip", "expected"),
    [
        (400, 18, (4, True)),
        (300, 18, (4, True)),
        (260, 18, (4, False)),
        (200, 18, (3, False)),
        (5, 18, (1, False)),
        (-9, 18, (1, False)),
    ],
)
def test_time_decides_how_much_is_compared(seconds: float, clip: float, expected: tuple[int, bool]) -> None:
    assert demo.fit(seconds, clip) == expected


def test_what_fits_is_what_it_costs() -> None:
    """Dense, patched, dense for each prompt, the dense run under a patch and the warm-up, with patched runs 20 % cheaper."""
    for prompts, both in demo.CHOICES[:-1]:
        subjects = 1 + both
        warm_up = demo.TRIAL_STEPS / shapes.CALL["num_inference_steps"] * (1 + subjects)
        needed = prompts * (2 + 0.8 * subjects) + 1 + warm_up
        assert demo.fit(needed + 0.2, 1.0)[0] >= prompts
        assert demo.fit(needed - 0.2, 1.0) != (prompts, both)


def random_pipeline() -> Any:
    from diffusers import WanPipeline

    from diffusers_accel.evals.shapes import models

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
    monkeypatch.setattr(shapes, "load_pipeline", random_pipeline)
    monkeypatch.setattr(shapes, "verify_weights", lambda: {"files": {}})
    monkeypatch.setattr(shapes, "CALL", SMALL)
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
    rows = read_rows(out / "report.json")
    speedup = next(row for row in rows if row.metric == "speedup" and row.clip is None)
    assert f"{speedup.value:.2f}x" in said and "0.1 minutes" in said
    seen = [row.clip["prompt"] for row in rows if row.clip]
    assert seen and not set(seen) & set(
        shapes.held_out_prompts(8, seed=0)[: demo.SEARCH_PROMPTS]
    )  # none that was searched on

    demo.main(["--out", str(out), "--minutes", "0.1"])
    assert "finished before" in capsys.readouterr().err  # the search goes on from what it had measured
    assert {path.name for path in out.iterdir()} >= {"plan.json", "report.html", "report.json", "report.md"}
