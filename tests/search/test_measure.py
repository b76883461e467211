"""The error of a candidate: against running it for real and projecting what comes out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusers_accel.engine import deal, run
from diffusers_accel.layout import TokenLayout
from diffusers_accel.methods import DENSE, AxisOrder, Band, Context, Method, Skip, Stripe
from diffusers_accel.search.measure import BlockParts, column_mass, head_errors, projection, sample_rows

LAYOUTS = [
    TokenLayout(4, 10, 12),
    TokenLayout(3, 9, 13, text_tokens=20, text_at="end"),
    TokenLayout(3, 9, 13, 30, "start"),
]
HEADS, DIM = 3, 16
METHODS = (
    DENSE,
    Method(select=Skip()),
    Method(select=Band(0.3)),
    Method(AxisOrder("hwf"), Band(0.5)),
    Method(select=Stripe(0.3)),
)


def qkv(layout: TokenLayout, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    # Strong logits: with weak ones all candidates would look alike.
    return [torch.randn(1, layout.tokens, HEADS, DIM, generator=generator) * scale for scale in (2, 2, 1)]


def dense(q, k, v):
    return nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def sampled_outputs(layout: TokenLayout, rows: torch.Tensor) -> torch.Tensor:
    """[heads, candidates, rows, D] from the sampled logits."""
    q, k, v = (x[0].transpose(0, 1) for x in qkv(layout))
    logits = q[:, rows] @ k.transpose(1, 2) * DIM**-0.5
    outputs = []
    for method in METHODS:
        mask = method.mask(Context(layout, "transformer", 0, (0,)))
        outputs.append(BlockParts(logits, v, rows, method.order, layout).merge(mask[None])[:, 0])
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sampled_rows_equal_the_kernel(layout):
    rows = sample_rows(layout.tokens, 40, (0,))
    found = sampled_outputs(layout, rows)
    q, k, v = qkv(layout)
    for index, method in enumerate(METHODS):
        launch = deal((method,) * HEADS, Context(layout, "transformer", 0, ()), torch.device("cpu"))
        expected = run(launch, q, k, v, dense)[0, rows].transpose(0, 1)
        assert (found[:, index] - expected).abs().max() < 1e-5, method.label


def test_errors_equal_running_the_sparse_head_and_projecting():
    layout = LAYOUTS[0]
    torch.manual_seed(0)
    linear = nn.Linear(HEADS * DIM, 40)
    everything = torch.arange(layout.tokens)
    with torch.no_grad():
        weight = projection(linear, HEADS * DIM, torch.zeros(1))
    found = head_errors(sampled_outputs(layout, everything), weight)
    q, k, v = qkv(layout)
    reference = dense(q, k, v)
    with torch.no_grad():
        layer = (linear(reference.flatten(2)) - linear.bias).double().square().sum()
        for head in range(HEADS):
            for index, method in enumerate(METHODS):
                mixed = [DENSE] * HEADS
                mixed[head] = method
                out = run(
                    deal(tuple(mixed), Context(layout, "transformer", 0, ()), torch.device("cpu")), q, k, v, dense
                )
                change = (linear(out.flatten(2)) - linear(reference.flatten(2))).double().square().sum()
                assert found.error[head, index] == pytest.approx(float(change / layer), rel=1e-3, abs=1e-9)
                mse = (out - reference)[:, :, head].double().square().mean()
                assert found.mse[head, index] == pytest.approx(float(mse), rel=1e-3, abs=1e-9)
    assert found.energy == pytest.approx(reference[0].square().mean((0, 2)).numpy(), rel=1e-4)


def test_dense_has_no_error_and_skip_loses_the_contribution():
    layout = LAYOUTS[0]
    torch.manual_seed(0)
    weight = torch.randn(HEADS * DIM, 40)
    outputs = sampled_outputs(layout, sample_rows(layout.tokens, 64, (0,)))
    found = head_errors(outputs, weight)
    assert (found.error[:, 0] == 0).all() and (found.mse[:, 0] == 0).all()
    contribution = torch.einsum("hrd,hdc->hrc", outputs[:, 0], weight.unflatten(0, (HEADS, DIM)))
    layer = contribution.sum(0).square().sum()
    assert found.error[:, 1] == pytest.approx((contribution.square().sum((1, 2)) / layer).numpy(), rel=1e-4)
    assert found.mse[:, 1] == pytest.approx(found.energy)


def test_errors_of_independent_heads_add_up():
    """Why the layer's whole output is the unit: the sum over heads predicts the error of the layer."""
    torch.manual_seed(0)
    heads, rows, dim = 8, 4096, 16
    dense_rows = torch.randn(heads, rows, dim)
    wrong = dense_rows + 0.3 * torch.randn(heads, rows, dim) * torch.linspace(0.1, 1, heads)[:, None, None]
    weight = torch.randn(heads * dim, 64)
    found = head_errors(torch.stack([dense_rows, wrong], 1), weight)

    def project(x):
        return x.transpose(0, 1).flatten(1) @ weight

    layer = (project(wrong) - project(dense_rows)).square().sum() / project(dense_rows).square().sum()
    assert found.error[:, 1].sum() == pytest.approx(float(layer), rel=0.05)


def test_a_layer_without_output_has_no_error():
    found = head_errors(torch.zeros(HEADS, 2, 8, DIM), torch.randn(HEADS * DIM, 40))
    assert (found.error == 0).all()


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
