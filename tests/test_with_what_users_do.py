"""What people do to a pipeline, before and after patching: the patch stands beside it, and taking it off leaves what they did."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, UniPCMultistepScheduler, WanPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from diffusers_accel import patch, unpatch
from diffusers_accel.methods import Band, Method
from diffusers_accel.methods.named import FOR_EVERY_MODEL
from tests.tiny import LAYERS, tiny_wan, tiny_wan_call, tiny_wan_transformer

SPARSE = Method(select=Band(0.34))
Action = Callable[[Any], Any]


def lora_weights() -> dict[str, torch.Tensor]:
    """Of an adapter that was trained on the same model, in the format of a LoRA file."""
    torch.manual_seed(1)
    transformer = tiny_wan_transformer()
    modules = ["to_q", "to_k", "to_v", "to_out.0"]
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=modules, init_lora_weights=False))
    return {f"transformer.{name}": tensor for name, tensor in get_peft_model_state_dict(transformer).items()}


def load_lora(pipe: Any) -> None:
    pipe.load_lora_weights(lora_weights(), adapter_name="one")


def fuse_lora(pipe: Any) -> None:
    load_lora(pipe)
    pipe.fuse_lora()


def unload_lora(pipe: Any) -> None:
    load_lora(pipe)
    pipe.unload_lora_weights()


def layerwise_casting(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def group_offload(pipe: Any) -> None:
    cpu = torch.device("cpu")
    pipe.transformer.enable_group_offload(cpu, cpu, offload_type="block_level", num_blocks_per_group=1)


def quantized_linears(pipe: Any) -> None:
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao is not installed: weights stay as they are"
    )
    quantization.quantize_(pipe.transformer.blocks, quantization.Int8WeightOnlyConfig())


def other_scheduler(pipe: Any) -> None:
    pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config, flow_shift=5.0, use_flow_sigmas=True)


ACTIONS: dict[str, Action] = {
    "LoRA loaded": load_lora,
    "LoRA fused": fuse_lora,
    "LoRA unloaded": unload_lora,
    "projections fused": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "backend set": lambda pipe: pipe.transformer.set_attention_backend("_native_math"),
    "layerwise casting": layerwise_casting,
    "group offload": group_offload,
    "quantized linears": quantized_linears,
    "bfloat16": lambda pipe: pipe.to(torch.bfloat16),
    "another scheduler": other_scheduler,
    "VAE tiling": lambda pipe: pipe.vae.enable_tiling(),
    "progress bar": lambda pipe: pipe.set_progress_bar_config(disable=True),
}
# Fused projections are one product instead of three, whose rounding differs; everything else is to the bit.
every_action = pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)


def frames(pipe: Any, **overrides: Any) -> np.ndarray:
    return np.asarray(pipe(**tiny_wan_call(num_inference_steps=3, **overrides)).frames)


@every_action
def test_dense_frames_are_those_of_the_unpatched_pipeline(action: Action) -> None:
    stock = tiny_wan()
    action(stock)
    expected = frames(stock)
    before, after = tiny_wan(), tiny_wan()
    action(before)
    patch(before, "dense")
    patch(after, "dense")
    action(after)
    for pipe in (before, after):
        assert np.array_equal(frames(pipe), expected)
        unpatch(pipe)
        assert np.array_equal(frames(pipe), expected)  # what was done stays done


@every_action
def test_sparse_frames_do_not_depend_on_what_came_first(action: Action) -> None:
    before, after = tiny_wan(), tiny_wan()
    action(before)
    patch(before, SPARSE)
    done = patch(after, SPARSE)
    action(after)
    sparse = frames(after)
    assert np.array_equal(frames(before), sparse) and np.isfinite(sparse).all()
    assert all(row["density"] < 1 for row in done.report().rows)
    unpatch(after)
    assert not np.array_equal(frames(after), sparse)


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("subject", ["cached", "easycache"])
def test_an_interrupted_call_leaves_nothing_for_the_next(step: int, subject: str) -> None:
    options = {"cached": {"density": 0.4}, "easycache": {"threshold": 0.3, "warm_up": 1}}[subject]
    pipe = tiny_wan()
    with patch(pipe, subject, **options):
        expected = frames(pipe)

        def stop(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = index == step
            return given

        frames(pipe, callback_on_step_end=stop)

        def fail(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            if index == step:
                raise RuntimeError("as a user's callback may")
            return given

        with pytest.raises(RuntimeError, match="as a user's callback may"):
            frames(pipe, callback_on_step_end=fail)
        assert np.array_equal(frames(pipe), expected)


def test_saved_and_copied_pipelines_are_as_if_unpatched(tmp_path: Path) -> None:
    pipe = tiny_wan()
    stock = frames(pipe)
    with patch(pipe, ["easycache", "draft"]):
        pipe.transformer.save_pretrained(tmp_path)
        copies = [copy.deepcopy(pipe.transformer), pickle.loads(pickle.dumps(pipe.transformer))]
    copies.append(type(pipe.transformer).from_pretrained(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    for model in copies:
        other = WanPipeline(None, None, pipe.vae, pipe.scheduler, transformer=model.eval())
        other.set_progress_bar_config(disable=True)
        assert np.array_equal(frames(other), stock)


@pytest.mark.parametrize("first", ["cache", "patch"])
def test_clock_counts_true_steps_under_a_cache_of_diffusers(first: str) -> None:
    """A step that the cache leaves out never reaches the layers, and the next one knows its own number."""
    pipe = tiny_wan()
    config = FirstBlockCacheConfig(threshold=0.3)
    done = patch(pipe, SPARSE) if first == "patch" else None
    pipe.transformer.enable_cache(config)
    done = done or patch(pipe, SPARSE)
    calls = [(site.layer, []) for site in done.sites]
    for site, (_, seen) in zip(done.sites, calls, strict=True):
        engine = site.engine

        class Watch:
            def attend(self, call: Any, *qkv: Any, engine: Any = engine, seen: Any = seen) -> torch.Tensor:
                seen.append(call.now[0])
                return engine.attend(call, *qkv)

        site.engine = Watch()
    pipe(**tiny_wan_call(num_inference_steps=8))
    first_layer, later = calls[0][1], calls[-1][1]
    assert first_layer == [step for step in range(8) for _ in range(2)]
    assert len(later) < len(first_layer) and set(later) <= set(first_layer) and later == sorted(later)


def test_pyramid_attention_broadcast_is_remarked_upon() -> None:
    pipe = tiny_wan()
    done = patch(pipe, SPARSE)
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: pipe._current_timestep
        )
    )
    frames(pipe)
    assert "PyramidAttentionBroadcast is on" in str(done.report())


@pytest.mark.parametrize("steps", [4, 8])
@pytest.mark.parametrize("name", sorted(set(FOR_EVERY_MODEL) - {"dense"}))
def test_few_step_schedules_leave_sparse_steps(name: str, steps: int) -> None:
    """As with a distilled LoRA: dense steps are a share, so that sparse ones are left. What that costs is not tested."""
    pipe = tiny_wan()
    with patch(pipe, name, density=0.4) as done:
        out = np.asarray(pipe(**tiny_wan_call(num_inference_steps=steps)).frames)
        report = done.report()
    assert np.isfinite(out).all() and report.density < 1
    assert len(report.rows) == LAYERS


def test_siblings_share_a_patch() -> None:
    from diffusers import WanVideoToVideoPipeline

    pipe = tiny_wan()
    with patch(pipe, SPARSE) as done:
        sibling = WanVideoToVideoPipeline.from_pipe(pipe)
        sibling.set_progress_bar_config(disable=True)
        call = tiny_wan_call(num_inference_steps=4)
        call.pop("num_frames")
        video = [np.zeros((64, 64, 3), np.uint8)] * 5
        assert np.isfinite(np.asarray(sibling(video=video, strength=0.5, **call).frames)).all()
        assert all(row["calls"] == 2 * 2 for row in done.report().rows)  # two of four steps run, with two branches
