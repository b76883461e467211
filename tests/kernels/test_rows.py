"""What kernels are told of the strides of their inputs, and that inputs with any strides have the same results."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

rows = pytest.importorskip("diffusers_accel.kernels.rows", reason="needs Triton", exc_type=ImportError)

from diffusers_accel.kernels.pattern import BlockPattern  # noqa: E402
from diffusers_accel.kernels.pool import pool  # noqa: E402
from diffusers_accel.kernels.pooled import pooled  # noqa: E402
from diffusers_accel.kernels.prep import prep  # noqa: E402
from diffusers_accel.kernels.quantize import Quantized, quantize  # noqa: E402
from tests.kernels.oracle import qkv  # noqa: E402

F32 = torch.float32
DIM = 72


def gaps(x: Tensor) -> Tensor:
    """The same values; rows of channels begin at odd places."""
    return torch.cat([x, torch.full_like(x[..., :1], torch.nan)], 3)[..., :-1]


def odd_batches(x: Tensor) -> Tensor:
    """The same values; only batch rows begin at odd places."""
    wide = torch.cat([x.flatten(1), torch.full_like(x.flatten(1)[:, :1], torch.nan)], 1)
    return wide[:, :-1].view(x.shape)


def channels_apart(x: Tensor) -> Tensor:
    """The same values; heads and channels are swapped in memory."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


LAYOUTS = [gaps, odd_batches, channels_apart]


def test_what_is_in_eights() -> None:
    x = torch.zeros(2, 6, 3 * 3, DIM)
    assert rows.rows_in_eights(x) and rows.loadable(x) is x
    part = x[:, ::2, 3:6]  # as of fused q, k, v: nothing is copied
    assert rows.rows_in_eights(part) and rows.loadable(part) is part
    for layout in LAYOUTS:
        odd = layout(x)
        assert not rows.rows_in_eights(odd)
        assert rows.rows_in_eights(rows.loadable(odd)) and torch.equal(rows.loadable(odd), x)
    assert not rows.rows_in_eights(torch.zeros(2, 6, 3, 20))


def test_strides_that_are_never_taken_do_not_count() -> None:
    single = odd_batches(torch.zeros(2, 6, 3, DIM))[:1]
    assert rows.rows_in_eights(single) and rows.loadable(single) is single
    one_head = torch.zeros(1, 6, DIM)[..., None].permute(0, 1, 3, 2)
    assert one_head.stride(2) == 1 and rows.rows_in_eights(one_head)


def pooled_part(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    pattern = BlockPattern.from_mask(torch.eye(2, dtype=torch.bool).expand(1, 2, 2, 2), 64, 64, 32, 32)
    return pooled(q, k[:, ::32], v[:, ::32], pattern, impl="portable")[0]  # any key may be a mean


def prepared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    found = prep(q, k, v, torch.arange(64 * 2).flip(0), 2, precision="int8_fp8", impl="portable")
    assert isinstance(found.operands, Quantized) and found.means is not None
    return torch.cat([x.flatten() for x in (*found.operands.dequantize(), *found.means)])


def quantized(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([x.flatten() for x in quantize(q, k, v, "int8_fp8", impl="portable").dequantize()])


def means(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([pool(x, 50, impl="portable") for x in (q, k, v)])


@pytest.mark.interpreter
@pytest.mark.parametrize("operator", [pooled_part, prepared, quantized, means])
@pytest.mark.parametrize(("layout", "batch"), [(gaps, 2), (odd_batches, 2), (odd_batches, 1), (channels_apart, 2)])
def test_any_strides_give_the_same(
    operator: Callable[..., Tensor], layout: Callable[[Tensor], Tensor], batch: int
) -> None:
    inputs = qkv(batch, 64, 64, 2, DIM, F32, "cpu")
    expected = operator(*inputs)
    assert expected.isfinite().all()
    for place in range(3):  # one of the three has such strides
        mixed = [layout(x) if i == place else x for i, x in enumerate(inputs)]
        assert torch.equal(operator(*mixed), expected)
