"""What is not read takes part as the means of its blocks: through the whole runtime, on the sampled rows of a search, and on
the trained model of this repository."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusers_accel import patch
from diffusers_accel.call import AttentionCall
from diffusers_accel.evals import toy
from diffusers_accel.kernels.merge import merge
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import BLOCK, DENSE, AxisOrder, Band, Draft, Drop, Method, Patches, Pooled, Skip, Stripe
from diffusers_accel.methods.rest import Read
from diffusers_accel.methods.steps import decide
from diffusers_accel.run.memory import LayerCache
from diffusers_accel.search.measure import SampledHeads, sample_rows
from diffusers_accel.search.running import Enough, run_pipeline
from diffusers_accel.search.selections import RowReader, Selections
from tests.stages import attend, call_of, pattern_of, sdpa
from tests.tiny import HEADS, LAYERS, tiny_cogvideox, tiny_cogvideox_call, tiny_wan, tiny_wan_call

LAYOUTS = (
    TokenLayout(5, 16, 16),
    TokenLayout(5, 9, 13),  # 585 tokens: the last block has 73
    TokenLayout(4, 16, 20, 226, "start"),
    TokenLayout(4, 12, 20, 140, "end", text_valid=3),
    TokenLayout(4, 13, 17, 140, "end", text_valid=0),
)
METHODS = (
    Method(select=Band(0.2, first_frame=False), rest=Pooled()),
    Method(AxisOrder("hwf"), Band(0.3), rest=Pooled()),
    Method(select=Stripe(0.3, first_frame=False), rest=Pooled()),
    Method(Patches(), Draft(0.2, first_frame=False), rest=Pooled()),
    Method(AxisOrder("whf"), Draft(0.2, min_blocks=0, diagonal=False, first_frame=False), rest=Pooled()),
    Method(AxisOrder("hwf"), Draft(None, top_p=0.5), rest=Pooled()),
)
DIM = 16
Qkv = tuple[Tensor, Tensor, Tensor]
everywhere = pytest.mark.parametrize("layout", LAYOUTS, ids=str)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)


def inputs(layout: TokenLayout, heads: int = 2, batch: int = 2) -> Qkv:
    """q of all tokens, k and v of those that exist."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, layout.tokens, heads, DIM, generator=generator) for _ in range(3))
    return 2 * q, k[:, : layout.keys], v[:, : layout.keys]


def alike(x: Tensor, method: Method, layout: TokenLayout) -> Tensor:
    """x [B, keys, H, D] of which, in the method's order, every token of a block is its first one."""
    order = method.order.index(layout)[: layout.keys]
    out = torch.empty_like(x)
    out[:, order] = x[:, order][:, torch.arange(layout.keys) // BLOCK * BLOCK]
    return out


def on_rows(method: Method, layout: TokenLayout, qkv: Qkv, rows: Tensor) -> Tensor:
    """[rows, H, D]: what a search finds at some rows of the first batch row."""
    call = call_of(layout, qkv[0].shape[2], now=(0, 1))
    sampled = SampledHeads(*(x[0] for x in qkv), rows, layout)
    reader = RowReader(sampled, method.order, method.precision)
    pattern = Selections({}).rows(method, call, sampled).pattern
    decision = decide(method, len(call.heads), None, (0, 1), None, None)
    unread, _ = method.rest.unread(Read(pattern, shared=False), decision, reader)
    part = merge([each for each in (reader.attend(pattern), unread) if each is not None])
    return part[0][0]


def unread(method: Method, layout: TokenLayout, qkv: Qkv) -> Tensor:
    """bool [B or 1, H, S, keys], in the method's order: what its queries do not read."""
    order = method.order.index(layout)
    return ~pattern_of(method, layout, qkv[0][:, order], qkv[1][:, order[: layout.keys]]).token_mask()


@everywhere
@every_method
def test_no_weight_is_lost(method: Method, layout: TokenLayout) -> None:
    q, k, v = inputs(layout)
    ones = torch.ones_like(v)
    assert torch.allclose(attend((method,) * 2, layout, (q, k, ones)).out, torch.ones_like(q), atol=1e-5)
    rows = sample_rows(layout.tokens, 50, (0,))
    assert torch.allclose(on_rows(method, layout, (q, k, ones), rows), torch.tensor(1.0), atol=1e-5)


@everywhere
@every_method
def test_blocks_of_equal_keys_give_dense_attention(method: Method, layout: TokenLayout) -> None:
    """The last block, which is ragged, weighs as many tokens as it has."""
    q, k, v = inputs(layout)
    k, v = alike(k, method, layout), alike(v, method, layout)
    assert unread(method, layout, (q, k, v)).any(), "something is left out"
    dense = sdpa(q, k, v)
    ran = attend((method,) * 2, layout, (q, k, v))
    assert torch.allclose(ran.out, dense, atol=2e-5, rtol=1e-5) and float(ran.density) < 1
    dropped = attend((replace(method, rest=Drop()),) * 2, layout, (q, k, v))
    assert not torch.allclose(dropped.out, dense, atol=1e-2) and float(dropped.density) == float(ran.density)
    rows = sample_rows(layout.tokens, 50, (0,))
    assert torch.allclose(on_rows(method, layout, (q, k, v), rows), dense[0, rows], atol=2e-5, rtol=1e-5)


@everywhere
@every_method
def test_what_is_pooled_is_written_out_by_hand(method: Method, layout: TokenLayout) -> None:
    """Any keys: each unread token has the mean key and value of its block."""
    q, k, v = inputs(layout)
    order = method.order.index(layout)
    keys = order[: layout.keys]
    left = unread(method, layout, (q, k, v))
    means = [
        torch.cat([block.mean(1, keepdim=True).expand_as(block) for block in x[:, keys].split(BLOCK, 1)], 1)
        for x in (k, v)
    ]
    scores = [torch.einsum("bqhd,bkhd->bhqk", q[:, order], x) * DIM**-0.5 for x in (k[:, keys], means[0])]
    weights = torch.where(left, scores[1], scores[0]).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights.masked_fill(left, 0), v[:, keys])
    expected += torch.einsum("bhqk,bkhd->bqhd", weights.masked_fill(~left, 0), means[1])
    out = attend((method,) * 2, layout, (q, k, v)).out[:, order]
    assert torch.allclose(out, expected, atol=1e-5, rtol=1e-5)
    rows = sample_rows(layout.tokens, 50, (0,))
    found = on_rows(method, layout, (q, k, v), order[rows])
    assert torch.allclose(found, expected[0, rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS[2:4], ids=str)
@pytest.mark.parametrize("method", METHODS[:4], ids=lambda method: method.label)
def test_text_is_read_and_never_pooled(method: Method, layout: TokenLayout) -> None:
    """A value of one text token counts with its own weight, whatever its neighbours in the block have; and text reads all."""
    q, k, v = inputs(layout)
    text = range(layout.text_start, layout.text_start + (layout.text_tokens if layout.text_valid is None else 3))
    some = list(text)[::2]
    marked = torch.zeros_like(v)
    marked[:, some] = 1.0  # every second one, so that their mean would show
    order = method.order.index(layout)
    keys = order[: layout.keys]
    is_text = torch.zeros(layout.tokens, dtype=torch.bool)
    is_text[layout.text_start : layout.text_start + layout.text_tokens] = True
    left = unread(method, layout, (q, k, v))
    assert not left[:, :, is_text[order]].any() and not left[..., is_text[keys]].any() and left.any()
    out = attend((method,) * 2, layout, (q, k, marked)).out
    assert torch.allclose(out[:, is_text], sdpa(q, k, marked)[:, is_text], atol=1e-5)
    # Of a video query the weight of the marked text among all that it reads, the rest being its means.
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k[:, some]) * DIM**-0.5
    whole = torch.zeros(q.shape[0], q.shape[2], q.shape[1])
    means = torch.cat([block.mean(1, keepdim=True).expand_as(block) for block in k[:, keys].split(BLOCK, 1)], 1)
    for_read = torch.einsum("bqhd,bkhd->bhqk", q[:, order], k[:, keys]) * DIM**-0.5
    for_left = torch.einsum("bqhd,bkhd->bhqk", q[:, order], means) * DIM**-0.5
    whole[..., order] = torch.where(left, for_left, for_read).logsumexp(-1)
    share = (scores.logsumexp(-1) - whole).exp().transpose(1, 2)[..., None]
    assert torch.allclose(out, share.expand_as(out), atol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
def test_quantized_heads_pool_what_is_not_quantized(precision: str) -> None:
    layout = LAYOUTS[1]
    qkv = inputs(layout)
    for method in METHODS[:4]:
        exact, rounded = (
            attend((replace(method, precision=each),) * 2, layout, qkv).out for each in ("input", precision)
        )
        error = (rounded - exact).square().mean() / exact.square().mean()
        assert 0 < error < (1e-3 if precision == "int8" else 5e-3)


def test_a_batch_of_kinds_keeps_to_itself() -> None:
    """Beside dense, skipped, dropping and quantized heads in one layer."""
    layout = LAYOUTS[2]
    pooling = METHODS[0]
    heads = (
        DENSE,
        pooling,
        Method(select=Skip()),
        replace(pooling, rest=Drop()),
        replace(pooling, precision="int8"),
        pooling,
    )
    q, k, v = inputs(layout, len(heads))
    out = attend(heads, layout, (q, k, v)).out
    for head, method in enumerate(heads):
        one = slice(head, head + 1)
        alone = attend((method,), layout, (q[:, :, one], k[:, :, one], v[:, :, one])).out
        assert torch.allclose(out[:, :, one], alone, atol=2e-6)


def test_a_held_selection_pools_what_it_does_not_read_now() -> None:
    """Means are of this step's keys, though the blocks were selected at an earlier one."""
    layout = LAYOUTS[0]
    method = Method(Patches(), Draft(0.3, first_frame=False, reselect_every=3), rest=Pooled())
    memory, ones = LayerCache(), torch.ones(2, layout.tokens, 2, DIM)
    q, k, _ = inputs(layout)
    for step in range(3):
        moved = alike(k.roll(37 * step, 1), method, layout), alike(ones.cumsum(1), method, layout)
        out = attend((method,) * 2, layout, (q, *moved), memory=memory, now=(step, 3)).out
        assert torch.allclose(out, sdpa(q, *moved), rtol=1e-4)


@pytest.mark.parametrize(("select", "kind"), [(DENSE.select, "all"), (Skip(), "skip")])
def test_there_must_be_something_to_pool_beside_what_is_read(select: Any, kind: str) -> None:
    with pytest.raises(ValueError, match=f'"{kind}" leaves no blocks beside others that are read: leave the rest out'):
        Method(select=select, rest=Pooled())


@pytest.mark.parametrize(("make", "call"), [(tiny_wan, tiny_wan_call), (tiny_cogvideox, tiny_cogvideox_call)])
def test_in_a_pipeline(make: Any, call: Any) -> None:
    """It runs at every step, costs no memory, and differs from dropping."""
    pipe, found = make(), {}
    for rest in (Drop(), Pooled()):
        with patch(pipe, Method(Patches(), Draft(0.34), rest=rest)) as done:
            found[rest.kind] = pipe(**call(output_type="latent")).frames
            rows = done.report().rows
        assert all(row["reused"] == 0 and row["cache_bytes"] == 0 for row in rows)
        label = "draft 8x16 0.34" + (", pooled" if rest == Pooled() else "")
        assert [set(row["methods"]) for row in rows] == [{label}] * LAYERS
        assert sum(row["methods"][label] for row in rows) == sum(row["calls"] for row in rows) * HEADS
    assert torch.isfinite(found["pooled"]).all() and not torch.allclose(found["pooled"], found["drop"], atol=1e-4)


# On the trained model

DENSITY = 0.2
STEPS = (1, 3)  # of the ten of its call


class Compare:
    """Attends densely and notes, of each layer at some steps, the squared errors of pooling and of dropping."""

    def __init__(self, errors: dict[tuple[int, int], tuple[float, float]]) -> None:
        self.errors = errors

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert call.dense is not None and call.now is not None
        out, (step, _) = call.dense(q, k, v), call.now
        if step > STEPS[-1]:
            raise Enough
        if step in STEPS:
            off = []
            for rest in (Pooled(), Drop()):
                methods = (Method(Patches(), Draft(DENSITY), rest=rest),) * q.shape[2]
                off.append(float((attend(methods, call.layout, (q, k, v), now=call.now).out - out).square().sum()))
            self.errors[call.layer, step] = off[0], off[1]
        return out


def test_pooling_errs_less_than_dropping_on_the_trained_model() -> None:
    """Draft blocks at a density of 0.2, six layers at two steps."""
    pipe, errors = toy.load_pipeline(), {}
    pipe.set_progress_bar_config(disable=True)
    call = {**toy.CALL, "guidance_scale": 1.0}  # one pass
    run_pipeline(pipe, lambda site: Compare(errors), toy.held_out_prompts(1)[0], call, 0)
    assert len(errors) == len(pipe.transformer.blocks) * len(STEPS)
    ratios = {place: pooled / dropped for place, (pooled, dropped) in errors.items()}
    shown = ", ".join(f"layer {layer} step {step}: {ratio:.2f}" for (layer, step), ratio in sorted(ratios.items()))
    print(shown)
    assert np.mean(list(ratios.values())) < 0.85, shown
    assert not [place for place, ratio in ratios.items() if ratio >= 1], f"a layer that loses by it: {shown}"
