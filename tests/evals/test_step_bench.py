"""Times of a step, extrapolated from a few layers of a real shape."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import typer

from diffusers_accel.evals import step_bench
from diffusers_accel.evals.step_bench import MODELS, BenchModel, _built, _whole, measure
from diffusers_accel.files import WriteError, read_lines
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
    rows = measure("tiny", TINY, CPU, torch.float32, steps=5, methods=methods, on_row=told.append)
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


def test_rows_are_kept_as_they_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    out = tmp_path / "steps.jsonl"
    step_bench.main("tiny", "pattern", "", 1, 5, "fp32", "cpu", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["method"] for row in rows] == ["stock", "pattern"] and rows[0]["machine"]["cores"] > 0
    assert "extrapolated" in capsys.readouterr().out
    with pytest.raises(typer.BadParameter, match="found '21x60'"):
        step_bench.main("tiny", "pattern", "21x60", 1, 5, "fp32", "cpu", out)
    with pytest.raises(typer.BadParameter, match="models must be among .*found wan9"):
        step_bench.main("wan9", "pattern", "", 1, 5, "fp32", "cpu", out)
    with pytest.raises(typer.BadParameter, match="methods must be among .*found pattrn"):
        step_bench.main("tiny", "pattrn", "", 1, 5, "fp32", "cpu", out)
    with pytest.raises(ValueError, match="multiples of 2x2x2, found 21x60x104"):
        step_bench.main("tiny,cogvideox1.5-5b 768p", "pattern", "21x60x104", 1, 5, "fp32", "cpu", out)
    assert len(out.read_text().splitlines()) == 2


def test_a_cut_off_row_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "tiny", TINY)
    out = tmp_path / "steps.jsonl"
    out.write_text('{"method": "dra')
    step_bench.main("tiny", "dense", "", 1, 5, "fp32", "cpu", out)
    assert [row["method"] for row in read_lines(out, "a row", "run it again")] == ["stock", "dense"]


def test_a_file_that_cannot_be_written_is_refused_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_bench, "measure", None)
    with pytest.raises(WriteError, match="it is a folder; name a file"):
        step_bench.main("wan2.1-1.3b 480p", "pattern", "", 1, 5, "fp32", "cpu", tmp_path)
