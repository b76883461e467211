"""The error of a candidate: against running it for real and projecting what comes out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusers_accel.call import AttentionCall
from diffusers_accel.kernels.merge import merge
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import DENSE, AxisOrder, Band, Draft, Kept, Method, Patches, Pooled, Skip, Stripe
from diffusers_accel.methods.rest import Read
from diffusers_accel.methods.steps import decide, read_blocks
from diffusers_accel.run.memory import LayerCache
from diffusers_accel.search.measure import (
    SampledHeads,
    column_mass,
    deviations,
    head_grams,
    layer_energy,
    projection,
    sample_rows,
)
from diffusers_accel.search.row import Chunk, RowProbe, keep
from diffusers_accel.search.selections import KeptRows, RowReader, Selections
from tests.stages import attend, call_of, pattern_of, sdpa

LAYOUTS = [
    TokenLayout(4, 10, 12),
    TokenLayout(3, 9, 13, text_tokens=20, text_at="end"),
    TokenLayout(3, 9, 13, 30, "start"),
    TokenLayout(3, 9, 13, 60, "end", text_valid=7),
]
HEADS, DIM = 3, 16
METHODS = (
    DENSE,
    Method(select=Skip()),
    Method(select=Band(0.3)),
    Method(AxisOrder("hwf"), Band(0.5)),
    Method(select=Stripe(0.3)),
    Method(Patches(4, 8), Draft(0.4)),
    Method(AxisOrder("whf"), Draft(None, top_p=0.6)),
    Method(precision="int8"),
    Method(Patches(4, 8), Draft(0.4), "int8"),
    Method(Patches(4, 8), Draft(0.4), rest=Pooled()),
    Method(select=Band(0.3), rest=Pooled()),
    Method(AxisOrder("hwf"), Band(0.3), "int8", Pooled()),
)


def qkv(layout: TokenLayout, seed: int = 0):
    """q of all tokens, k and v of those that exist."""
    generator = torch.Generator().manual_seed(seed)
    # Strong logits: with weak ones all candidates would look alike.
    q, k, v = (torch.randn(1, layout.tokens, HEADS, DIM, generator=generator) * scale for scale in (2, 2, 1))
    return q, k[:, : layout.keys], v[:, : layout.keys]


def sampled_output(
    method: Method, call: AttentionCall, heads: SampledHeads, kept: KeptRows | None = None
) -> torch.Tensor:
    """[heads, rows, D] of a method that runs on sampled rows."""
    reader, selections = RowReader(heads, method.order, method.precision), Selections({})
    assert call.now is not None
    decision = decide(method, HEADS, kept.held if kept else None, call.now, None, None)
    pattern = read_blocks(method, decision, lambda: selections.rows(method, call, heads).pattern)
    unread, _ = method.rest.unread(Read(pattern, shared=False), decision, reader)
    part = merge([each for each in (reader.attend(pattern), unread) if each is not None])
    return part[0][0].transpose(0, 1)


def sampled_outputs(layout: TokenLayout, rows: torch.Tensor, methods=METHODS) -> torch.Tensor:
    """[heads, candidates, rows, D] from the sampled logits."""
    heads = SampledHeads(*(x[0] for x in qkv(layout)), rows, layout)
    call = call_of(layout, HEADS, now=(0, 1))
    return torch.stack([sampled_output(method, call, heads) for method in methods], 1)


def head_errors(outputs: torch.Tensor, weight: torch.Tensor):
    """Errors [heads, candidates] after the projection, and MSEs; candidate 0 is dense."""
    off = deviations(outputs, outputs[:, 0], head_grams(weight, len(outputs)))
    return off.felt / layer_energy(outputs[:, 0], weight), off.mse


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sampled_rows_equal_the_kernel(layout):
    rows = sample_rows(layout.tokens, 40, (0,))
    found = sampled_outputs(layout, rows)
    for index, method in enumerate(METHODS):
        expected = attend((method,) * HEADS, layout, qkv(layout)).out[0, rows].transpose(0, 1)
        assert (found[:, index] - expected).abs().max() < 1e-5, method.label


def test_rounded_weights_of_fp8_are_nearly_those_of_the_kernel():
    """Rounded relative to the largest weight of a block, not of the row so far: small beside what rounding does at all."""
    layout = LAYOUTS[0]
    rows = torch.arange(layout.tokens)
    method = Method(Patches(4, 8), Draft(0.5), "int8_fp8")
    found = sampled_outputs(layout, rows, [method])[:, 0]
    exact = sampled_outputs(layout, rows, [Method(Patches(4, 8), Draft(0.5))])[:, 0]
    kernel = attend((method,) * HEADS, layout, qkv(layout)).out[0].transpose(0, 1)
    real, estimated = ((each - exact).square().mean() for each in (kernel, found))
    assert 0.8 * real < estimated < 1.25 * real


@pytest.mark.parametrize("precision", ["input", "int8"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_reused_part_is_that_of_the_engine(layout, precision):
    """A refresh, and a step later with other q, k and v: blocks as they were selected, and the rest as it was."""
    method = Method(Patches(4, 8), Draft(0.4), precision, Kept(3))
    first, second = qkv(layout), tuple(a + 0.3 * b for a, b in zip(qkv(layout), qkv(layout, 1)))
    memory = LayerCache()
    attend((method,) * HEADS, layout, first, memory=memory, now=(3, 9))
    expected = attend((method,) * HEADS, layout, second, memory=memory, now=(4, 9)).out[0].transpose(0, 1)

    rows = sample_rows(layout.keys, 50, (0,))
    then, here = (SampledHeads(*(x[0] for x in each), rows, layout) for each in (first, second))
    before, now = (call_of(layout, HEADS, now=(step, 9)) for step in (3, 4))
    kept = keep(method, before, then, RowReader(then, method.order, precision), Selections({}))
    found = sampled_output(method, now, here, kept)
    assert (found - expected[:, rows]).abs().max() < 1e-5
    exact = sampled_output(DENSE, now, here)
    assert (found - exact).abs().max() > 0.1
    order = method.order.index(layout)
    mask = pattern_of(method, layout, first[0][:, order], first[1][:, order[: layout.keys]]).mask()[0]
    assert kept.density.tolist() == pytest.approx(mask.double().mean((1, 2)).tolist())

    probe = RowProbe((DENSE, method), Selections({}), {1: kept}, (1, 2), HEADS, DIM)
    grams = head_grams(torch.randn(HEADS * DIM, 40, generator=torch.Generator().manual_seed(0)), HEADS)
    probe.add(Chunk(now, here, torch.zeros_like(exact), grams))
    off = deviations(torch.stack([exact, expected[:, rows]], 1), exact, grams)
    assert probe.felt[:, 1] == pytest.approx(off.felt[:, 1] / 2, rel=1e-4), "divided by its age"
    assert probe.mse[:, 1] == pytest.approx(off.mse[:, 1] / 2, rel=1e-4)
    assert probe.density[:, 1] == pytest.approx(kept.density.numpy()) and (probe.samples == 1).all()


def test_errors_equal_running_the_sparse_head_and_projecting():
    layout = LAYOUTS[0]
    torch.manual_seed(0)
    linear = nn.Linear(HEADS * DIM, 40)
    everything = torch.arange(layout.tokens)
    with torch.no_grad():
        weight = projection(linear, HEADS * DIM, torch.zeros(1))
    error, mse_found = head_errors(sampled_outputs(layout, everything), weight)
    q, k, v = qkv(layout)
    reference = sdpa(q, k, v)
    with torch.no_grad():
        layer = (linear(reference.flatten(2)) - linear.bias).double().square().sum()
        for head in range(HEADS):
            for index, method in enumerate(METHODS):
                mixed = [DENSE] * HEADS
                mixed[head] = method
                out = attend(mixed, layout, (q, k, v)).out
                change = (linear(out.flatten(2)) - linear(reference.flatten(2))).double().square().sum()
                assert error[head, index] == pytest.approx(float(change / layer), rel=1e-3, abs=1e-8)
                mse = (out - reference)[:, :, head].double().square().mean()
                assert mse_found[head, index] == pytest.approx(float(mse), rel=1e-3, abs=1e-9)


def test_dense_has_no_error_and_skip_loses_the_contribution():
    layout = LAYOUTS[0]
    torch.manual_seed(0)
    weight = torch.randn(HEADS * DIM, 40)
    outputs = sampled_outputs(layout, sample_rows(layout.tokens, 64, (0,)))
    error, mse = head_errors(outputs, weight)
    assert (error[:, 0] == 0).all() and (mse[:, 0] == 0).all()
    contribution = torch.einsum("hrd,hdc->hrc", outputs[:, 0], weight.unflatten(0, (HEADS, DIM)))
    layer = contribution.sum(0).square().sum()
    assert error[:, 1] == pytest.approx((contribution.square().sum((1, 2)) / layer).numpy(), rel=1e-4)
    assert mse[:, 1] == pytest.approx(outputs[:, 0].square().mean((1, 2)).numpy())


def test_errors_of_independent_heads_add_up():
    """Why the layer's whole output is the unit: the sum over heads predicts the error of the layer."""
    torch.manual_seed(0)
    heads, rows, dim = 8, 4096, 16
    dense_rows = torch.randn(heads, rows, dim)
    wrong = dense_rows + 0.3 * torch.randn(heads, rows, dim) * torch.linspace(0.1, 1, heads)[:, None, None]
    weight = torch.randn(heads * dim, 64)
    error, _ = head_errors(torch.stack([dense_rows, wrong], 1), weight)

    def project(x):
        return x.transpose(0, 1).flatten(1) @ weight

    layer = (project(wrong) - project(dense_rows)).square().sum() / project(dense_rows).square().sum()
    assert error[:, 1].sum() == pytest.approx(float(layer), rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_projection_is_read_through_the_module(dtype):
    """A bias a thousand times the weights must not round them away, and whatever wraps the module counts."""
    torch.manual_seed(0)
    linear = nn.Linear(48, 40).to(dtype)
    with torch.no_grad():
        linear.weight.mul_(0.05)
        linear.bias.fill_(3.0)
    low_rank = torch.randn(48, 40, dtype=dtype) * 0.01
    linear.register_forward_hook(lambda module, inputs, out: out + inputs[0] @ low_rank)
    with torch.no_grad():
        weight = projection(linear, 48, torch.zeros(1, dtype=dtype))
    expected = linear.weight.T.float() + low_rank.float()
    assert weight.dtype == torch.float32
    # Scaled by 1024 the largest entry is ~7.8 + 3 of bias: three roundings of values below 16.
    assert (weight - expected).abs().max() <= 3 * 16 * torch.finfo(dtype).eps / 1024


def test_sampled_rows_are_stratified_and_repeatable():
    rows = sample_rows(1000, 100, (1, 2))
    assert (rows // 10).tolist() == list(range(100))
    assert rows.tolist() == sample_rows(1000, 100, (1, 2)).tolist() != sample_rows(1000, 100, (1, 3)).tolist()
    assert sample_rows(7, 100, (0,)).tolist() == list(range(7))
    ragged = sample_rows(100, 64, (0,))
    assert len(ragged) == 64 and ragged[0] >= 0 and ragged[-1] < 100 and (ragged.diff() >= 0).all()


def test_column_mass_is_the_probability_that_a_key_receives():
    layout = TokenLayout(3, 4, 5, text_tokens=6, text_at="start")
    logits = torch.randn(2, 9, layout.tokens)
    logits[1, :, 6 + 20 + 5 : 6 + 20 + 10] += 50  # head 1 looks at frame 1, row 1 only
    mass = column_mass(logits, layout)
    probability = logits.softmax(-1)
    assert mass[0, 2, 3] == pytest.approx(float(probability[0, :, 6 + 55 : 6 + 60].mean()), rel=1e-5)
    assert mass[1, 1, 1] == pytest.approx(1 / 5, rel=1e-4)
    assert mass.shape == (2, 3, 4)
