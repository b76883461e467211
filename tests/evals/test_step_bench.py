"""Times of a step, extrapolated from a few layers of a real shape."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import typer

from diffusers_accel.evals import step_bench
from diffusers_accel.evals.step_bench import MODELS, Model, measure
from tests.tiny import POOLED_DIM, TEXT_DIM, TEXT_TOKENS, tiny_hunyuan_transformer

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


TINY = Model(
    lambda layers: tiny_hunyuan_transformer(),
    tiny_inputs,
    {"transformer_blocks": 20, "single_transformer_blocks": 40},
    (3, 32, 32),
    2,
)


def test_a_step_is_its_layers_times_their_number_and_what_lies_around_them() -> None:
    told: list[dict] = []
    rows = measure("tiny", TINY, CPU, torch.float32, steps=5, methods=("pattern", "cached"), on_row=told.append)
    assert rows == told and [row["method"] for row in rows] == ["dense", "pattern", "cached"]
    for row in rows:
        double, single = row["ms_layer"]["transformer_blocks"], row["ms_layer"]["single_transformer_blocks"]
        assert double > 0 and single > 0 and row["ms_around"] > 0
        assert row["ms_pass"] == pytest.approx(row["ms_around"] + 20 * double + 40 * single)
        assert row["ms_step"] == 2 * row["ms_pass"]
    for row in rows[1:]:
        assert 0 < row["density"] < 1
        assert row["speedup"] == pytest.approx(row["dense_ms_step"] / row["ms_step"])


def test_hooks_and_patches_are_taken_off_again() -> None:
    kept = tiny_hunyuan_transformer()
    stock = [type(block.attn.processor) for block in kept.transformer_blocks]
    measure("tiny", Model(lambda layers: kept, *list(vars(TINY).values())[1:]), CPU, torch.float32, steps=5)
    assert [type(block.attn.processor) for block in kept.transformer_blocks] == stock
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in kept.transformer_blocks)


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


def test_rows_are_kept_as_they_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    out = tmp_path / "steps.jsonl"
    step_bench.main("tiny", "pattern", "", 1, 5, "fp32", "cpu", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["dense", "pattern"] and rows[0]["machine"]["cores"] > 0
    assert "extrapolated" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter, match="found '21x60'"):
        step_bench.main("tiny", "pattern", "21x60", 1, 5, "fp32", "cpu", out)
    with pytest.raises(typer.BadParameter, match="models must be among .*found wan9"):
        step_bench.main("wan9", "pattern", "", 1, 5, "fp32", "cpu", out)
