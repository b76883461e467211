"""What people do to a pipeline, before and after patching: the patch stands beside it, and taking it off leaves what they did."""

from __future__ import annotations

import copy
import pickle
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import diffusers.guiders as guiders
import numpy as np
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    UniPCMultistepScheduler,
    WanPipeline,
)
from diffusers.hooks import SeaCacheConfig, SmoothedEnergyGuidanceConfig, TextKVCacheConfig, apply_layer_skip
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from diffusers_accel import patch, unpatch
from diffusers_accel.methods import Band, Method
from diffusers_accel.methods.named import FOR_EVERY_MODEL
from tests.families import TINY
from tests.families.hunyuan_video15 import tiny_hunyuan15, tiny_hunyuan15_call
from tests.families.latte import tiny_latte, tiny_latte_call
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


def sequential_offload(pipe: Any) -> None:
    """What `enable_sequential_cpu_offload` does; itself, it offloads to an accelerator only."""
    for model in (pipe.vae, pipe.transformer):
        accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=bool(model._parameters))


def device_map(pipe: Any) -> None:
    """Layers in several places, one of them the disk."""
    places = {
        name: "cpu"
        for name, _ in [*pipe.transformer.named_children(), *pipe.transformer.named_parameters(recurse=False)]
    }
    del places["blocks"]
    blocks = {f"blocks.{number}": "disk" if number == 1 else "cpu" for number in range(LAYERS)}
    folder = tempfile.mkdtemp()
    weakref.finalize(pipe, shutil.rmtree, folder)
    accelerate.dispatch_model(pipe.transformer, {**places, **blocks}, main_device="cpu", offload_dir=folder)


def bitsandbytes_linears(bits: int) -> Action:
    """As `BitsAndBytesConfig` makes them; itself, it asks for a GPU."""

    def quantize(pipe: Any) -> None:
        bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: weights stay as they are").nn
        linears = [(name, part) for name, part in pipe.transformer.blocks.named_modules() if type(part) is nn.Linear]
        for name, linear in linears:
            size = (linear.in_features, linear.out_features, linear.bias is not None)
            quantized = bnb.Linear8bitLt(*size, has_fp16_weights=False) if bits == 8 else bnb.Linear4bit(*size)
            quantized.load_state_dict(linear.state_dict())
            pipe.transformer.blocks.set_submodule(name, quantized.to("cpu"))

    return quantize


def compiled_wrapper(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


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
    "sequential offload": sequential_offload,
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "device map": device_map,
    "quantized linears": quantized_linears,
    "bitsandbytes 8 bit": bitsandbytes_linears(8),
    "bitsandbytes 4 bit": bitsandbytes_linears(4),
    "compiled in a wrapper": compiled_wrapper,
    "compiled in place": lambda pipe: pipe.transformer.compile(backend="eager"),
    "compiled blocks": lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager"),
    "bfloat16": lambda pipe: pipe.to(torch.bfloat16),
    "another scheduler": other_scheduler,
    "VAE tiling": lambda pipe: pipe.vae.enable_tiling(),
    "progress bar": lambda pipe: pipe.set_progress_bar_config(disable=True),
}
# Fused projections are one product instead of three, whose rounding differs; everything else is to the bit.
every_action = pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)


def frames(pipe: Any, **overrides: Any) -> np.ndarray:
    """Decoded only where something was done to the decoder."""
    kind = "np" if pipe.vae.use_tiling else "latent"
    out = pipe(**tiny_wan_call(num_inference_steps=3, output_type=kind, **overrides)).frames
    return np.asarray(out.float() if kind == "latent" else out)


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
        # Weights that lie elsewhere in memory may be summed up in another order.
        assert np.abs(frames(other) - stock).max() < 1e-4
        own = pipe.transformer.state_dict()
        assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())


def at(pipe: Any) -> Callable[[], Any]:
    return lambda: pipe._current_timestep


CACHES: dict[str, Callable[[Any], Any]] = {
    "FirstBlockCache": lambda pipe: FirstBlockCacheConfig(threshold=0.3),
    "MagCache": lambda pipe: MagCacheConfig(
        threshold=0.3, max_skip_steps=2, num_inference_steps=8, mag_ratios=[1.0] * 16
    ),
    "SeaCache": lambda pipe: SeaCacheConfig(threshold=0.9),
    "TaylorSeer": lambda pipe: TaylorSeerCacheConfig(
        cache_interval=3, disable_cache_before_step=2, cache_identifiers=["blocks.*attn1"]
    ),
    "PyramidAttentionBroadcast": lambda pipe: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=at(pipe)
    ),
    "FasterCache": lambda pipe: FasterCacheConfig(
        spatial_attention_timestep_skip_range=(-1, 901),
        attention_weight_callback=lambda _: 0.5,
        is_guidance_distilled=True,
        current_timestep_callback=at(pipe),
    ),
    "text keys and values": lambda pipe: TextKVCacheConfig(),
}


@pytest.mark.parametrize("first", ["cache", "patch"])
@pytest.mark.parametrize("name", CACHES)
def test_a_cache_of_diffusers_stays_as_it_is_and_true_steps_are_counted(name: str, first: str) -> None:
    """A step that the cache leaves out never reaches the layers, and the next one knows its own number."""
    stock, pipe = tiny_wan(), tiny_wan()
    stock.transformer.enable_cache(CACHES[name](stock))
    done = patch(pipe, "dense") if first == "patch" else None
    pipe.transformer.enable_cache(CACHES[name](pipe))
    done = done or patch(pipe, "dense")
    seen: list[tuple[int, int, int]] = []  # layer, step, true step

    class Watch:
        def __init__(self, engine: Any) -> None:
            self.engine = engine

        def attend(self, call: Any, *qkv: Any) -> torch.Tensor:
            times = pipe.scheduler.timesteps.tolist()
            seen.append((call.layer, call.now[0], times.index(pipe._current_timestep.item())))
            return self.engine.attend(call, *qkv)

    for site in done.sites:
        site.engine = Watch(site.engine)
    expected, found = (
        each(**tiny_wan_call(num_inference_steps=8, output_type="latent")).frames for each in (stock, pipe)
    )
    assert torch.equal(found, expected)
    assert all(step == true for _, step, true in seen) and {step for layer, step, _ in seen if layer == 0} > {0, 1}
    if name == "text keys and values":
        assert len(seen) == 2 * 8 * LAYERS and "diffusers'" not in str(done.report())
    else:
        assert len(seen) < 2 * 8 * LAYERS and f"diffusers' {name} is on" in str(done.report())


GUIDERS: dict[str, Callable[[], Any]] = {
    "ClassifierFreeGuidance": lambda: guiders.ClassifierFreeGuidance(guidance_scale=3.0),
    "on for two steps": lambda: guiders.ClassifierFreeGuidance(guidance_scale=3.0, start=0.3, stop=0.7),
    "AdaptiveProjectedGuidance": lambda: guiders.AdaptiveProjectedGuidance(guidance_scale=3.0),
    "AutoGuidance": lambda: guiders.AutoGuidance(
        guidance_scale=3.0,
        auto_guidance_config=LayerSkipConfig(indices=[1], fqn="transformer_blocks", skip_attention=False),
    ),
    "ClassifierFreeZeroStarGuidance": lambda: guiders.ClassifierFreeZeroStarGuidance(guidance_scale=3.0),
    "SmoothedEnergyGuidance": lambda: guiders.SmoothedEnergyGuidance(
        guidance_scale=3.0,
        seg_guidance_start=0.0,
        seg_guidance_config=SmoothedEnergyGuidanceConfig(indices=[1], fqn="transformer_blocks"),
    ),
    "TangentialClassifierFreeGuidance": lambda: guiders.TangentialClassifierFreeGuidance(guidance_scale=3.0),
}


@pytest.mark.parametrize("name", GUIDERS)
def test_guiders_of_diffusers_guide_as_without_a_patch(name: str) -> None:
    """Each of their passes is a branch of its own. Those that are not here refuse this model without a patch too."""
    stock, pipe = tiny_hunyuan15(), tiny_hunyuan15()
    stock.guider = GUIDERS[name]()
    call = {"num_inference_steps": 4, "output_type": "latent"}
    expected = stock(**tiny_hunyuan15_call(**call)).frames
    pipe.guider = GUIDERS[name]()
    with patch(pipe, "dense") as done:
        passes: list[tuple[int, str]] = []
        engine = done.sites[0].engine

        class Watch:
            def attend(self, call: Any, *qkv: Any) -> torch.Tensor:
                passes.append((call.now[0], call.branch))
                return engine.attend(call, *qkv)

        done.sites[0].engine = Watch()
        found = pipe(**tiny_hunyuan15_call(**call)).frames
    assert torch.allclose(found, expected, atol=1e-4)
    assert sorted({step for step, _ in passes}) == [0, 1, 2, 3] and len(set(passes)) == len(passes)


@pytest.mark.parametrize("left_out", ["skip_attention", "skip_attention_scores"])
def test_attention_that_perturbed_guidance_leaves_out_is_left_out(left_out: str) -> None:
    """Its hook speaks to `F.scaled_dot_product_attention` alone, which we stand in for; it looks the processor's class up in a
    table of diffusers, so it has to be there first."""
    options = {"skip_attention": False, "skip_ff": False, left_out: True}
    config = LayerSkipConfig(indices=[0], fqn="transformer_blocks", **options)

    def latents(pipe: Any) -> torch.Tensor:
        return pipe(**tiny_latte_call(num_inference_steps=2, output_type="latent")).frames

    stock, pipe = tiny_latte(), tiny_latte()
    plain = latents(stock)
    for each in (stock, pipe):
        apply_layer_skip(each.transformer, config)
    patch(pipe, "dense")
    assert torch.equal(latents(pipe), latents(stock)) and not torch.allclose(latents(stock), plain)
    with pytest.raises(ValueError, match=r"AcceleratedAttnProcessor2_0.* not registered"):
        apply_layer_skip(pipe.transformer, config)


def test_no_supported_pipeline_takes_ip_adapters() -> None:
    """They bring processors of their own. One that takes them needs a test of both here."""
    assert not [name for name, tiny in TINY.items() if hasattr(tiny.pipe(), "load_ip_adapter")]


def test_callbacks_change_what_they_change_without_a_patch() -> None:
    def halfway(pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale = 1.0 if index == 0 else pipe._guidance_scale  # one pass from the next step on
        return {"latents": given["latents"] * 0.9, "prompt_embeds": given["prompt_embeds"] + index}

    pipe = tiny_wan()
    options = {"callback_on_step_end": halfway, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    expected = frames(pipe, **options)
    with patch(pipe, "dense") as done:
        assert np.array_equal(frames(pipe, **options), expected) and not np.array_equal(frames(pipe), expected)
        done.clear()
        frames(pipe, **options)
        assert [row["calls"] for row in done.report().rows] == [2 + 1 + 1] * LAYERS


def test_an_offloaded_transformer_is_patched_for_where_it_runs() -> None:
    """Its weights are on no device until then."""
    pipe = tiny_wan()
    accelerate.cpu_offload(pipe.transformer, torch.device("cpu"))
    assert pipe.transformer.device.type == "meta"
    with patch(pipe.transformer, SPARSE) as done:
        assert done.plan.methods


def test_a_dtype_that_no_kernel_takes_is_refused_and_later_told() -> None:
    pipe = tiny_wan()
    done = patch(pipe, SPARSE)
    pipe.transformer.to(torch.float64)
    frames(pipe)
    assert "the reference runs" in str(done.report()) and "torch.float64 on cpu" in str(done.report())
    unpatch(pipe)
    with pytest.raises(ValueError, match="found torch.float64"):
        patch(pipe, SPARSE)


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
