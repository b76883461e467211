"""HunyuanVideo and CogVideoX on tiny real models: same output when dense, layouts from real calls, padding, clocks, refusals."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers import CogVideoXDPMScheduler, UniPCMultistepScheduler
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0
from torch._dynamo.testing import CompileCounter

from diffusers_accel import patch, unpatch
from diffusers_accel.api import Attachment, attach
from diffusers_accel.attach.site import Rows
from diffusers_accel.call import AttentionCall
from diffusers_accel.families import FAMILIES, find, list_families
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, AxisOrder, Band, Method
from diffusers_accel.step_timing import time_step
from tests.stages import mask_of
from tests.tiny import (
    HEAD_DIM,
    HEADS,
    LAYERS,
    POOLED_DIM,
    TEXT_DIM,
    TEXT_TOKENS,
    text_mask,
    tiny_cogvideox,
    tiny_cogvideox_call,
    tiny_cogvideox_transformer,
    tiny_hunyuan,
    tiny_hunyuan_call,
    tiny_hunyuan_transformer,
    tiny_wan_transformer,
)

HWF_WHOLE = Method(AxisOrder("hwf"), Band(1.0))
HWF_BAND = Method(AxisOrder("hwf"), Band(0.34))
HUNYUAN_TEXT = partial(TokenLayout, 3, 16, 16, TEXT_TOKENS, "end")

PIPELINES: dict[str, tuple[Callable[[], Any], Callable[..., dict[str, Any]]]] = {
    "hunyuan": (tiny_hunyuan, tiny_hunyuan_call),
    "hunyuan, true CFG": (tiny_hunyuan, partial(tiny_hunyuan_call, true_cfg=True)),
    "hunyuan, two prompts": (tiny_hunyuan, partial(tiny_hunyuan_call, lengths=(7, 13))),
    "cogvideox": (tiny_cogvideox, tiny_cogvideox_call),
    "cogvideox 1.5": (partial(tiny_cogvideox, "1.5"), tiny_cogvideox_call),
}


def hunyuan_inputs(*lengths: int, seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    prompts = len(lengths)
    return {
        "hidden_states": torch.randn(prompts, 4, 3, 32, 32, generator=generator),
        "timestep": torch.full((prompts,), 500),
        "encoder_hidden_states": torch.randn(prompts, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "encoder_attention_mask": text_mask(*lengths),
        "pooled_projections": torch.randn(prompts, POOLED_DIM, generator=generator),
        "guidance": torch.full((prompts,), 6000.0),
    }


def cogvideox_inputs(version: str = "1.0", seed: int = 3) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    frames = 3 if version == "1.0" else 4
    rope = tiny_cogvideox(version)._prepare_rotary_positional_embeddings(64, 64, frames, torch.device("cpu"))
    return {
        "hidden_states": torch.randn(2, frames, 4, 32, 32, generator=generator),
        "encoder_hidden_states": torch.randn(2, TEXT_TOKENS, TEXT_DIM, generator=generator),
        "timestep": torch.tensor([500, 500]),
        "image_rotary_emb": None if version == "1.0" else rope,
    }


def fused_cogvideox() -> Any:
    transformer = tiny_cogvideox_transformer("1.5")
    transformer.fuse_qkv_projections()
    return transformer


MODELS: dict[str, tuple[Callable[[], Any], Callable[[], dict[str, Any]]]] = {
    "hunyuan": (tiny_hunyuan_transformer, partial(hunyuan_inputs, TEXT_TOKENS)),
    "hunyuan, padded": (tiny_hunyuan_transformer, partial(hunyuan_inputs, 7)),
    "hunyuan, one token": (tiny_hunyuan_transformer, partial(hunyuan_inputs, 1, 7)),
    "hunyuan, three prompts": (tiny_hunyuan_transformer, partial(hunyuan_inputs, 7, 7, 13)),
    "hunyuan, latent_concat": (partial(tiny_hunyuan_transformer, image="latent_concat"), partial(hunyuan_inputs, 7)),
    "hunyuan, token_replace": (partial(tiny_hunyuan_transformer, image="token_replace"), partial(hunyuan_inputs, 7)),
    "cogvideox": (tiny_cogvideox_transformer, cogvideox_inputs),
    "cogvideox 1.5": (partial(tiny_cogvideox_transformer, "1.5"), partial(cogvideox_inputs, "1.5")),
    "cogvideox 1.5, fused": (fused_cogvideox, partial(cogvideox_inputs, "1.5")),
}


def latents(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    return pipe(**{**call, "output_type": "latent"}).frames.numpy()


def sample(transformer: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**inputs).sample


def snapshot(module: torch.nn.Module) -> dict[str, Any]:
    """Everything that a patch could leave behind."""
    return {
        "attributes": {name: id(value) for name, value in vars(module).items() if name != "_diffusers_hook"},
        "keys": list(module.state_dict()),
        "processors": {name: id(processor) for name, processor in module.attn_processors.items()},
        "settings": [dict(vars(processor)) for processor in module.attn_processors.values()],
        "hooks": (list(module._forward_pre_hooks), list(module._forward_hooks)),
        "forward": module.forward.__func__,
    }


class Watch:
    """An engine that attends densely and notes what it was given and where."""

    def __init__(self, seen: list[dict[str, Any]]) -> None:
        self.seen = seen

    def attend(self, call: AttentionCall, q: Any, k: Any, v: Any) -> torch.Tensor:
        assert call.dense is not None
        out = call.dense(q, k, v)
        self.seen.append(
            {
                "layer": call.layer,
                "now": call.now,
                "branch": call.branch,
                "layout": call.layout,
                "rows": call.rows,
                "qkv": (q, k, v),
                "out": out,
            }
        )
        return out


def watched(pipe: Any) -> tuple[Attachment, list[dict[str, Any]]]:
    seen: list[dict[str, Any]] = []
    return attach(pipe, lambda site: Watch(seen)), seen


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


# The stock model, dense and restored


@pytest.mark.parametrize("name", MODELS)
def test_dense_gives_the_output_of_the_stock_model(name: str) -> None:
    transformer, inputs = MODELS[name][0](), MODELS[name][1]()
    stock = sample(transformer, inputs)
    with patch(transformer, "dense") as done:
        dense = sample(transformer, inputs)
        assert all(row["calls"] >= 1 for row in done.report().rows), "every layer went through its site"
    assert (dense - stock).abs().max() <= 1e-6
    assert stock.std() > 0.1, "the comparison says something"


@pytest.mark.parametrize("name", PIPELINES)
def test_dense_gives_the_frames_of_the_stock_pipeline_and_unpatch_restores_it(name: str) -> None:
    pipe, call = PIPELINES[name][0](), PIPELINES[name][1]
    stock, video = latents(pipe, call()), pipe(**call(num_inference_steps=2)).frames
    before = snapshot(pipe.transformer)
    with patch(pipe, "dense"):
        assert np.abs(latents(pipe, call()) - stock).max() <= 1e-6 * max(1.0, np.abs(stock).max())
        assert np.allclose(pipe(**call(num_inference_steps=2)).frames, video, atol=1e-5)
    assert snapshot(pipe.transformer) == before
    assert np.array_equal(latents(pipe, call()), stock)


@pytest.mark.parametrize("name", ["hunyuan, padded", "hunyuan, three prompts", "cogvideox", "cogvideox 1.5"])
def test_another_order_at_density_1_is_dense(name: str) -> None:
    """Holds only if the layout says where each token lies: a wrong one would move text among the video's blocks."""
    transformer, inputs = MODELS[name][0](), MODELS[name][1]()
    stock = sample(transformer, inputs)
    with patch(transformer, HWF_WHOLE) as done:
        assert torch.allclose(sample(transformer, inputs), stock, atol=1e-5)
        assert all(row["methods"] == {HWF_WHOLE.label: HEADS * row["calls"]} for row in done.report().rows)


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("hunyuan, padded", HUNYUAN_TEXT(7)),
        ("cogvideox", TokenLayout(3, 16, 16, TEXT_TOKENS, "start")),
        ("cogvideox 1.5", TokenLayout(2, 16, 16, TEXT_TOKENS, "start")),
    ],
)
def test_sparse_layers_read_the_blocks_of_the_method_and_no_padding(name: str, layout: TokenLayout) -> None:
    transformer, inputs = MODELS[name][0](), MODELS[name][1]()
    batch = len(inputs["hidden_states"])
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, layout.tokens, HEADS, HEAD_DIM, generator=generator) for _ in range(3))
    k[:, layout.keys :], v[:, layout.keys :] = torch.nan, torch.nan
    with patch(transformer, HWF_BAND) as done:
        sample(transformer, inputs)  # the layout is what the model last saw
        assert done.sites[0].model.rows(batch, 0) == [Rows(0, batch, layout)]
        out = done.sites[0].attend(q, k, v)
    order = HWF_BAND.order.index(layout)
    (blocks,) = mask_of(HWF_BAND, layout)
    assert not blocks.all()
    mask = blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: layout.tokens, : layout.keys]
    q, k, v = (x[:, order].transpose(1, 2) for x in (q, k, v))
    expected = F.scaled_dot_product_attention(q, k[:, :, : layout.keys], v[:, :, : layout.keys], attn_mask=mask)
    assert torch.allclose(out[:, order], expected.transpose(1, 2), atol=2e-6)


# Where attention is, and how tokens lie


@pytest.mark.parametrize("name", MODELS)
def test_sites_are_the_self_attention_modules_in_module_order(name: str) -> None:
    transformer = MODELS[name][0]()
    expected = [
        path
        for path, module in transformer.named_modules()
        if hasattr(module, "set_processor") and "refiner" not in path
    ]
    others = {path: id(one) for path, one in transformer.attn_processors.items() if "refiner" in path}
    attachment, _ = watched(transformer)
    with attachment:
        assert [site.name for site in attachment.sites] == expected and len(expected) == LAYERS
        assert [site.layer for site in attachment.sites] == list(range(LAYERS))
        left = {path: id(one) for path, one in transformer.attn_processors.items() if "refiner" in path}
        assert left == others


@pytest.mark.parametrize("name", ["hunyuan", "cogvideox", "cogvideox 1.5, fused"])
def test_output_projection_is_the_linear_map_that_attention_goes_through(name: str) -> None:
    transformer, inputs = MODELS[name][0](), MODELS[name][1]()
    (_, family), *_ = find(transformer).values()
    attachment, seen = watched(transformer)
    linears = {
        path: module
        for path, module in transformer.named_modules()
        if path.endswith(("attn.to_out.0", "attn1.to_out.0"))
        or (path.startswith("single") and path.endswith("proj_out"))
    }
    linears = {path: module for path, module in linears.items() if "refiner" not in path}
    entered: list[torch.Tensor] = []
    with attachment, torch.no_grad():
        hooks = [one.register_forward_pre_hook(lambda _, args: entered.append(args[0])) for one in linears.values()]
        sample(transformer, inputs)
        for hook in hooks:
            hook.remove()
        assert len(entered) == len(seen) == LAYERS
        for columns, call, linear, site in zip(entered, seen, linears.values(), attachment.sites, strict=True):
            attended = call["out"].flatten(2)[:, : columns.shape[1]]
            assert torch.equal(columns[..., : HEADS * HEAD_DIM], attended)
            rest = columns.clone()
            rest[..., : HEADS * HEAD_DIM] = 0
            project = family.output_projection(transformer, site.name)
            part = project(attended) - project(torch.zeros_like(attended))
            assert torch.allclose(part, linear(columns) - linear(rest), atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ((7,), [((0, 1), 7)]),
        ((7, 7), [((0, 2), 7)]),
        ((7, 13), [((0, 1), 7), ((1, 2), 13)]),
        ((7, 7, 13), [((0, 2), 7), ((2, 3), 13)]),
        ((TEXT_TOKENS, 0), [((0, 1), None), ((1, 2), 0)]),
    ],
)
def test_rows_with_equal_text_attend_together_without_their_padding(lengths: Any, expected: Any) -> None:
    transformer = tiny_hunyuan_transformer()
    attachment, seen = watched(transformer)
    with attachment:
        sample(transformer, hunyuan_inputs(*lengths))
    assert [(call["rows"], call["layout"].text_valid) for call in seen] == expected * LAYERS
    for call in seen:
        layout, (q, k, v) = call["layout"], call["qkv"]
        assert layout == HUNYUAN_TEXT(layout.text_valid)
        assert len(q) == call["rows"][1] - call["rows"][0] and q.shape[1] == layout.tokens == 788
        assert k.shape[1] == v.shape[1] == layout.keys


def test_cropping_copies_nothing_and_equals_the_models_mask() -> None:
    transformer = tiny_hunyuan_transformer()
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 788, HEADS, HEAD_DIM, generator=generator) for _ in range(3))
    attachment, seen = watched(transformer)
    with attachment:
        for lengths in ((7, 7), (7, 13)):
            sample(transformer, hunyuan_inputs(*lengths))
            seen.clear()
            out = attachment.sites[0].attend(q, k, v)
            exists = F.pad(text_mask(*lengths), (768, 0), value=1).bool()[:, None, None]
            expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=exists)
            assert torch.allclose(out, expected.transpose(1, 2), atol=1e-6)
            for call in seen:
                start = call["rows"][0]
                given = (q[start], k[start], v[start])
                assert [x.data_ptr() for x in call["qkv"]] == [x.data_ptr() for x in given], "views, not copies"


def test_cogvideox_layouts() -> None:
    for version, frames in (("1.0", 3), ("1.5", 2)):
        transformer = tiny_cogvideox_transformer(version)
        attachment, seen = watched(transformer)
        with attachment:
            sample(transformer, cogvideox_inputs(version))
        assert {call["layout"] for call in seen} == {TokenLayout(frames, 16, 16, TEXT_TOKENS, "start")}
        assert {call["rows"] for call in seen} == {(0, 2)}
        assert {call["qkv"][0].shape for call in seen} == {(2, frames * 256 + TEXT_TOKENS, HEADS, HEAD_DIM)}


def test_a_mask_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading waits for the device: not at every layer, nor at every step."""
    read: list[torch.Tensor] = []
    stock = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(self) or stock(self))

    def masks() -> int:
        return [tensor.dtype for tensor in read].count(torch.int32)

    pipe = tiny_hunyuan()
    attachment, seen = watched(pipe)
    with attachment:
        latents(pipe, tiny_hunyuan_call(true_cfg=True))
        assert masks() == 2 and len(seen) == 2 * 5 * LAYERS
        assert len(read) == 3, "beside the masks, the sigmas of the schedule"
        inputs = hunyuan_inputs(7)
        sample(pipe.transformer, inputs)
        inputs["encoder_attention_mask"][:, 7:11] = 1
        sample(pipe.transformer, inputs)
    assert [call["layout"].text_valid for call in seen[-2 * LAYERS :: LAYERS]] == [7, 11], (
        "changed in place, read again"
    )
    assert masks() == 4


def test_masks_of_inference_mode_are_read_at_every_call() -> None:
    transformer = tiny_hunyuan_transformer()
    attachment, seen = watched(transformer)
    with attachment, torch.inference_mode():
        inputs = hunyuan_inputs(7)
        transformer(**inputs)
        inputs["encoder_attention_mask"][:, 7:11] = 1
        transformer(**inputs)
    assert [call["layout"].text_valid for call in seen[::LAYERS]] == [7, 11]


def test_a_layout_counts_existing_text_only_behind_the_video() -> None:
    layout = TokenLayout(3, 16, 16, 300, "end", text_valid=129)
    assert (layout.tokens, layout.keys) == (1068, 897)
    assert (layout.blocks(BLOCK), layout.key_blocks(BLOCK)) == (9, 8)
    whole = TokenLayout(3, 16, 16, 300, "end")
    assert whole.keys == whole.tokens and whole.key_blocks(BLOCK) == 9
    for text_at, valid in (("start", 3), ("end", -1), ("end", 301)):
        with pytest.raises(ValueError, match="text_valid"):
            TokenLayout(3, 16, 16, 300, text_at, text_valid=valid)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="text_valid"):
        TokenLayout(3, 16, 16, text_valid=0)


# Steps and branches


@pytest.mark.parametrize(
    ("name", "scheduler", "branches"),
    [
        ("hunyuan", None, ("cond",)),
        ("hunyuan, true CFG", None, ("cond", "uncond")),
        ("hunyuan, true CFG", UniPCMultistepScheduler, ("cond", "uncond")),
        ("cogvideox", None, ("cond_uncond",)),
        ("cogvideox 1.5", CogVideoXDPMScheduler, ("cond_uncond",)),
    ],
)
def test_clock_reads_step_and_branch_in_two_calls(name: str, scheduler: Any, branches: tuple[str, ...]) -> None:
    pipe, call = PIPELINES[name][0](), PIPELINES[name][1]
    if scheduler is UniPCMultistepScheduler:
        pipe.scheduler = scheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    elif scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    attachment, seen = watched(pipe)
    with attachment:
        latents(pipe, call())
        latents(pipe, call(num_inference_steps=3))
    expected = [((i, n), branch) for n in (5, 3) for i in range(n) for branch in branches]
    assert [(call["now"], call["branch"]) for call in seen if call["layer"] == 0] == expected


def test_branches_that_the_pipeline_does_not_name_are_told_apart_by_their_text() -> None:
    transformer = tiny_hunyuan_transformer()
    attachment, seen = watched(transformer)
    with attachment:
        cond, uncond = hunyuan_inputs(7), hunyuan_inputs(4, seed=4)
        for _ in range(2):
            sample(transformer, cond)
            sample(transformer, uncond)
        del uncond
        gc.collect()
        sample(transformer, hunyuan_inputs(4, seed=5))
    branches = [call["branch"] for call in seen[::LAYERS]]
    assert branches[:2] == branches[2:4] and len(set(branches)) == 3, "a new text never takes the place of an old one"


def test_two_threads_with_other_prompts_share_a_model() -> None:
    transformer = tiny_hunyuan_transformer()
    inputs = [hunyuan_inputs(7), hunyuan_inputs(13, 2, seed=5)]
    with patch(transformer, "dense"):
        alone = [sample(transformer, one) for one in inputs]
        together: dict[int, list[torch.Tensor]] = {0: [], 1: []}

        def work(number: int) -> None:
            together[number] += [sample(transformer, inputs[number]) for _ in range(4)]

        threads = [threading.Thread(target=work, args=(number,)) for number in together]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(out, alone[number]) for number, outs in together.items() for out in outs)
    assert [len(outs) for outs in together.values()] == [4, 4]


@pytest.mark.parametrize("name", ["hunyuan", "cogvideox"])
def test_a_step_is_timed_at_the_length_of_its_keys(name: str) -> None:
    pipe, call = PIPELINES[name][0](), PIPELINES[name][1]
    timing = time_step(pipe, call(num_inference_steps=2))
    assert timing.layout.keys == {"hunyuan": 775, "cogvideox": 788}[name]
    assert 0 < timing.attention_ms < timing.step_ms and all(timing.efficiencies((0.5,)).values())


# Compiling, copies, other surgery on the model


@pytest.mark.parametrize("name", ["hunyuan, padded", "cogvideox", "cogvideox 1.5", "cogvideox 1.5, fused"])
def test_fullgraph_compile_keeps_one_graph(name: str) -> None:
    transformer, inputs = MODELS[name][0](), MODELS[name][1]()
    with patch(transformer, "dense") as done, torch.no_grad():
        eager = [sample(transformer, {**inputs, "timestep": inputs["timestep"] + more}) for more in (0, 100)]
        counter = CompileCounter()
        compiled = torch.compile(transformer, backend=counter, fullgraph=True)
        done.clear()
        for more, expected in zip((0, 100), eager, strict=True):
            out = compiled(**{**inputs, "timestep": inputs["timestep"] + more}).sample
            assert torch.allclose(out, expected, atol=1e-5)
        assert counter.frame_count == 1
        assert [row["calls"] for row in done.report().rows] == [2] * LAYERS, "the op ran, and at each layer's own site"


def test_compile_repeated_blocks_keeps_the_graphs_of_the_stock_model() -> None:
    inputs, graphs = hunyuan_inputs(7), []
    for patched in (False, True):
        transformer = tiny_hunyuan_transformer()
        if patched:
            done = patch(transformer, "dense")
        eager = sample(transformer, inputs)
        counter = CompileCounter()
        transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
        assert torch.allclose(sample(transformer, inputs), eager, atol=1e-5)
        graphs.append(counter.frame_count)
        torch._dynamo.reset()
    assert graphs[0] == graphs[1]
    assert [row["calls"] for row in done.report().rows] == [2] * LAYERS


@pytest.mark.parametrize("whole", [False, True])
def test_a_compiled_model_sees_the_mask_of_the_call_that_runs(whole: bool) -> None:
    """Also inside a larger compiled function, where the effects of a traced hook would come after the graph."""
    transformer = tiny_hunyuan_transformer()
    lengths = (7, 13, 7)
    stock = [sample(transformer, hunyuan_inputs(length)) for length in lengths]
    attachment, seen = watched(transformer)
    with attachment, torch.no_grad():
        if whole:
            compiled = torch.compile(lambda **inputs: transformer(**inputs).sample, backend="eager")
        else:
            module = torch.compile(transformer, backend="eager", fullgraph=True)
            compiled = lambda **inputs: module(**inputs).sample  # noqa: E731
        for length, expected in zip(lengths, stock, strict=True):
            assert torch.allclose(compiled(**hunyuan_inputs(length)), expected, atol=1e-5)
    assert [call["layout"].text_valid for call in seen[::LAYERS]] == list(lengths)


@pytest.mark.parametrize("name", ["hunyuan, padded", "cogvideox 1.5"])
def test_copies_and_pickles_hold_stock_processors(name: str) -> None:
    transformer, inputs = MODELS[name][0](), MODELS[name][1]()
    stock = sample(transformer, inputs)
    types = {path: type(processor) for path, processor in transformer.attn_processors.items()}
    with patch(transformer, HWF_BAND):
        for other in (copy.deepcopy(transformer), pickle.loads(pickle.dumps(transformer))):
            assert {path: type(processor) for path, processor in other.attn_processors.items()} == types
            assert torch.equal(sample(other, inputs), stock)


def test_fusing_after_patching_takes_the_patch_off_and_unpatch_says_so(caplog: pytest.LogCaptureFixture) -> None:
    transformer, inputs = tiny_cogvideox_transformer("1.5"), cogvideox_inputs("1.5")
    stock = sample(transformer, inputs)
    done = patch(transformer, HWF_BAND)
    transformer.fuse_qkv_projections()
    assert torch.allclose(sample(transformer, inputs), stock, atol=1e-5)
    transformer.unfuse_qkv_projections()
    assert not torch.allclose(sample(transformer, inputs), stock, atol=1e-5), "and unfusing puts it on again"
    done.unpatch()
    assert {type(processor) for processor in transformer.attn_processors.values()} == {CogVideoXAttnProcessor2_0}


def test_one_fused_processor_for_all_layers_is_given_back() -> None:
    transformer = fused_cogvideox()
    (fused,) = {id(processor) for processor in transformer.attn_processors.values()}
    patch(transformer, HWF_BAND)
    assert len({id(processor) for processor in transformer.attn_processors.values()}) == LAYERS
    unpatch(transformer)
    assert {id(processor) for processor in transformer.attn_processors.values()} == {fused}
    assert type(next(iter(transformer.attn_processors.values()))) is FusedCogVideoXAttnProcessor2_0


@pytest.mark.parametrize("first", ["hooks", "patch"])
@pytest.mark.parametrize("offload", ["model", "group"])
def test_offload_hooks_go_with_a_patch(offload: str, first: str) -> None:
    """As the pipelines' model and group offload hang them on, with the CPU for both devices."""
    transformer, inputs = tiny_hunyuan_transformer(), hunyuan_inputs(7, 13)
    stock = sample(transformer, inputs)
    if first == "patch":
        done = patch(transformer, "dense")
    if offload == "model":
        add_hook_to_module(transformer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    else:
        cpu = torch.device("cpu")
        transformer.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    if first == "hooks":
        done = patch(transformer, "dense")
    assert torch.allclose(sample(transformer, inputs), stock, atol=1e-6)
    assert [row["calls"] for row in done.report().rows] == [2] * LAYERS


# Refusals


class Bent:
    """CogVideoX' way of calling attention, with arguments that no family here has."""

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments

    def __call__(self, attn: Any, hidden_states: Any, encoder_hidden_states: Any, **_: Any) -> Any:
        q = torch.cat([encoder_hidden_states, hidden_states], 1).unflatten(2, (HEADS, HEAD_DIM)).transpose(1, 2)
        heads, keys = self.arguments.get("heads", HEADS), self.arguments.get("keys", q.shape[2])
        k = F.dropout(q[:, :heads, :keys], training=False)  # the rest of torch.nn.functional is as it was
        out = F.scaled_dot_product_attention(q, k, k, **self.arguments.get("call", {}))
        return tuple(part.transpose(1, 2).flatten(2) for part in (out[:, :, TEXT_TOKENS:], out[:, :, :TEXT_TOKENS]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"call": {"is_causal": True}}, "causality"),
        ({"heads": 1}, "q, k and v of one shape"),
        ({"call": {"enable_gqa": True}, "heads": 3}, "a multiple of the heads"),
        ({"keys": 100}, "expected the 788 tokens.*found 788 queries and 100 keys"),
        ({"call": {"scale": 1.0}}, "a scale"),
        ({"call": {"attn_mask": torch.ones(788, 788, dtype=torch.bool)}}, "a mask"),
        ({"call": {"attn_mask": torch.ones(2, 1, 1, 788, dtype=torch.bool)}}, "a mask"),
    ],
)
def test_attention_that_is_not_plain_is_refused(arguments: dict[str, Any], message: str) -> None:
    transformer, inputs = tiny_cogvideox_transformer(), cogvideox_inputs()
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(Bent(**arguments))
    with patch(transformer, "dense"), pytest.raises((ValueError, RuntimeError), match=f"{message}.*unpatch"):
        sample(transformer, inputs)


@pytest.mark.parametrize("arguments", [{}, {"call": {"enable_gqa": True}, "heads": 2}])
def test_plain_attention_of_a_foreign_processor_is_taken(arguments: dict[str, Any]) -> None:
    transformer, inputs = tiny_cogvideox_transformer(), cogvideox_inputs()
    for block in transformer.transformer_blocks:
        block.attn1.set_processor(Bent(**arguments))
    stock = sample(transformer, inputs)
    with patch(transformer, "dense"):
        assert torch.equal(sample(transformer, inputs), stock)


def test_masks_are_refused_where_no_layout_describes_them() -> None:
    cogvideox, inputs = tiny_cogvideox_transformer(), cogvideox_inputs()
    with patch(cogvideox, "dense"), pytest.raises(ValueError, match=r"a mask.*unpatch"):
        sample(cogvideox, {**inputs, "attention_kwargs": {"attention_mask": torch.zeros(2, 788)}})
    hidden = torch.randn(1, 768, HEADS * HEAD_DIM)
    wan = tiny_wan_transformer()
    with patch(wan, "dense"), pytest.raises(ValueError, match=r"a mask.*unpatch"):
        wan.blocks[0].attn1(hidden, attention_mask=torch.ones(1, 1, 1, 768, dtype=torch.bool))
    hunyuan = tiny_hunyuan_transformer()
    text, mask = torch.randn(1, TEXT_TOKENS, HEADS * HEAD_DIM), torch.ones(1, 1, 788, 788, dtype=torch.bool)
    with patch(hunyuan, "dense"), pytest.raises(ValueError, match=r"a mask.*unpatch"):
        hunyuan.transformer_blocks[0].attn(hidden, encoder_hidden_states=text, attention_mask=mask)


def test_another_sequence_than_the_layout_says_is_refused() -> None:
    transformer = tiny_hunyuan_transformer()
    q = torch.zeros(1, 788, HEADS, HEAD_DIM)
    with patch(transformer, "dense") as done:
        with pytest.raises(RuntimeError, match="layout is unknown"):
            done.sites[0].attend(q, q, q)
        sample(transformer, hunyuan_inputs(7))
        with pytest.raises(RuntimeError, match=r"expected the 788 tokens.*found 700"):
            done.sites[0].attend(q[:, :700], q[:, :700], q[:, :700])
        with pytest.raises(RuntimeError, match="expected a value for each of 788 keys, found 700"):
            done.sites[0].attend(q, q, q[:, :700])
        assert len(done.sites[0].attend(*[q.expand(2, -1, -1, -1)] * 3)) == 2, (
            "a mask of one row holds for several videos"
        )
        sample(transformer, hunyuan_inputs(7, 9))
        with pytest.raises(RuntimeError, match="text lengths of 3 rows, as q has, found 2"):
            done.sites[0].attend(*[q.expand(3, -1, -1, -1)] * 3)
        with pytest.raises(TypeError, match="encoder_attention_mask"):
            transformer(torch.randn(1, 4, 3, 32, 32), torch.tensor([5]), torch.randn(1, TEXT_TOKENS, TEXT_DIM))


@pytest.mark.parametrize("name", ["hunyuan, padded", "cogvideox"])
def test_nan_is_refused_by_name_when_checks_are_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    transformer, inputs = MODELS[name][0](), MODELS[name][1]()
    first = find(transformer)["transformer"][1].self_attention(transformer)[0][0]
    transformer.get_submodule(first).to_k.bias.data[3] = torch.nan
    with patch(transformer, "dense"):
        assert sample(transformer, inputs).isnan().any(), "unchecked, it passes through as in the stock model"
        monkeypatch.setenv("DIFFUSERS_ACCEL_CHECKS", "1")
        with pytest.raises(
            ValueError, match=rf"{first} of transformer.*found [\d,]+ NaN among the [\d,]+ values of key"
        ):
            sample(transformer, inputs)


def test_all_are_listed() -> None:
    listed = list_families()
    assert len(listed) == len(FAMILIES) and listed[0] == "wan (WanTransformer3DModel)"
    assert "hunyuan_video15 (HunyuanVideo15Transformer3DModel)" in listed
