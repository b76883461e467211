"""Quantization: every implementation, held to what a code and a scale promise."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel.kernels.quantize import KEY_GROUP, PRECISIONS, Quantized, quantize
from diffusers_accel.kernels.quantize.reference import int8, scale_of
from tests.kernels.oracle import SIMPLE, qkv

everywhere = pytest.mark.parametrize(("impl", "device"), SIMPLE)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
dtypes = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
# (x * 1/scale) is rounded three times in fp32 before it becomes a code.
HALF = 0.5 + 1e-4


def offset_qkv(queries: int, keys: int, dim: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Two batch rows and three heads, whose keys have a large mean in some channels."""
    q, k, v = qkv(2, queries, keys, 3, dim, torch.float32, device, seed=keys)
    return q.to(dtype), (k + 4 * (torch.arange(dim, device=device) % 7 == 0)).to(dtype), v.to(dtype)


def k_scales(x: Quantized) -> Tensor:
    """The scale of each key, `[B, S, H, 1]`."""
    return x.k_scale.repeat_interleave(KEY_GROUP, 2)[..., : x.k.shape[1]].transpose(1, 2)[..., None]


@everywhere
@dtypes
@every_precision
@pytest.mark.parametrize(("queries", "keys", "dim"), [(63, 100, 64), (100, 63, 96), (130, 200, 128), (65, 64, 40)])
def test_a_code_is_the_nearest_one(
    impl: str, device: str, dtype: torch.dtype, precision: str, queries: int, keys: int, dim: int
) -> None:
    q, k, v = offset_qkv(queries, keys, dim, dtype, device)
    x = quantize(q, k, v, precision, impl=impl)
    found_q, found_k, found_v = x.dequantize()
    mean = x.k_mean[:, None]
    torch.testing.assert_close(x.k_mean.double(), k.double().mean(1), rtol=1e-5, atol=1e-5)
    assert ((found_q - q).abs() <= HALF * x.q_scale.transpose(1, 2)[..., None]).all()
    assert ((found_k - (k.float() - mean)).abs() <= HALF * k_scales(x)).all()
    if precision == "int8":
        assert x.v_scale is None and torch.equal(x.v, v)
    else:
        assert x.v_scale is not None
        # e4m3 has three bits behind the point, and 2**-9 between the smallest values.
        step = torch.maximum(v.float().abs() * 2**-4, x.v_scale[:, None] * 2**-10)
        assert ((found_v - v.float()).abs() <= 1.001 * step).all()
    # A sum of n terms in fp32, in any order, errs by at most n roundings of the sum of their sizes.
    terms = (q.double() * x.k_mean.double()[:, None]).transpose(1, 2)
    assert ((x.offset - terms.sum(3)).abs() <= dim * torch.finfo(torch.float32).eps * terms.abs().sum(3)).all()


@everywhere
@every_precision
def test_scales_are_as_small_as_can_be(impl: str, device: str, precision: str) -> None:
    q, k, v = offset_qkv(100, 200, 64, torch.bfloat16, device)
    x = quantize(q, k, v, precision, impl=impl)
    assert x.dtype == torch.bfloat16 and x.q.dtype == x.k.dtype == torch.int8
    assert x.q_scale.shape == x.offset.shape == (2, 3, 100) and x.k_scale.shape == (2, 3, 4)
    assert (x.q.int().abs().amax(3) == 127).all() and x.q.is_contiguous()
    groups = torch.nn.functional.pad(x.k, (0, 0, 0, 0, 0, 56)).unflatten(1, (4, KEY_GROUP))
    assert (groups.int().abs().amax((2, 4)) == 127).all() and x.k.is_contiguous()
    if precision == "int8_fp8":
        assert x.v.dtype == torch.float8_e4m3fn and x.v.stride(1) == 1
        assert (x.v.float().abs().amax(1) == 448).all()


@pytest.mark.parametrize(("impl", "device"), [case for case in SIMPLE if "portable" in str(case.id)])
@every_precision
def test_all_implementations_have_the_same_codes(impl: str, device: str, precision: str) -> None:
    """But for the last bit of a sum, which turns a code that stands between two."""
    q, k, v = offset_qkv(100, 200, 96, torch.float16, device)
    valid = torch.tensor([64, 20, 0, 8], dtype=torch.int32, device=device)
    mean = k.float().mean(1)
    found, expected = (
        quantize(q, k, v, precision, block=64, valid=valid, k_mean=mean, impl=i) for i in (impl, "reference")
    )
    for field in fields(Quantized):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if not isinstance(a, Tensor):
            assert a == b
        elif a.dtype == torch.int8:
            assert ((a.int() - b.int()).abs() <= 1).all() and (a != b).float().mean() < 1e-3
        elif a.dtype == torch.float8_e4m3fn:
            assert ((a.float() - b.float()).abs() <= b.float().abs() / 8).all() and (
                a.float() != b.float()
            ).float().mean() < 1e-3
        else:
            torch.testing.assert_close(a, b)


@everywhere
@every_precision
def test_what_does_not_exist_weighs_nothing(impl: str, device: str, precision: str) -> None:
    q, k, v = offset_qkv(50, 200, 64, torch.bfloat16, device)
    valid = torch.tensor([64, 20, 0, 5], dtype=torch.int32, device=device)
    token = torch.arange(200, device=device)
    missing = (token % 64 >= valid[token // 64])[:, None, None]
    clean = quantize(q, *(x.masked_fill(missing, 9.0) for x in (k, v)), precision, block=64, valid=valid, impl=impl)
    holes = (x.masked_fill(missing, torch.nan) for x in (k, v))
    found = quantize(q, *holes, precision, block=64, valid=valid, impl=impl)
    for name in ("q", "k", "q_scale", "k_scale", "k_mean", "offset", "v_scale"):
        if getattr(clean, name) is not None:
            torch.testing.assert_close(getattr(found, name), getattr(clean, name), rtol=0, atol=0)
            assert getattr(found, name).float().isfinite().all()
    assert (found.k.masked_fill(~missing, 0) == 0).all()
    exists = (token % 64 < valid[token // 64])[:, None, None]
    torch.testing.assert_close(found.k_mean, (k.float() * exists).sum(1) / valid.sum())
    if precision == "int8_fp8":
        assert (found.v.float().masked_fill(~missing, 0) == 0).all()


@everywhere
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in Triton's interpreter
def test_what_is_not_a_number_is_not_hidden(impl: str, device: str, bad: float) -> None:
    q, k, v = qkv(1, 100, 200, 2, 64, torch.float16, device)
    q[0, 3, 0, 5] = k[0, 70, 1, 5] = v[0, 9, 1, 7] = bad
    x = quantize(q, k, v, "int8_fp8", k_mean=torch.zeros(1, 2, 64, device=device), impl=impl)
    assert x.v_scale is not None
    for scale, where in ((x.q_scale, (0, 0, 3)), (x.k_scale, (0, 1, 1)), (x.v_scale, (0, 1, 7))):
        expected = torch.zeros_like(scale, dtype=torch.bool)
        expected[where] = True
        assert torch.equal(scale.isnan(), expected) and scale[~expected].isfinite().all()
    assert quantize(q, k, v, "int8", impl=impl).k_scale.isnan()[0, 1].all()  # through the mean


@everywhere
def test_nothing_is_as_good_as_something(impl: str, device: str) -> None:
    """Zeros, and keys that are all the same, have codes of 0 and finite scales, whose inverses are finite."""
    q, k, v = (torch.zeros(1, 70, 1, 64, dtype=torch.float16, device=device) for _ in range(3))
    x = quantize(q, k + 2, v, "int8_fp8", impl=impl)
    for scale in (x.q_scale, x.k_scale, x.v_scale):
        assert scale is not None and (scale > 0).all() and (1 / scale).isfinite().all()
    assert not x.q.any() and not x.k.any() and not x.v.float().any() and (x.k_mean == 2).all()


@everywhere
@every_precision
def test_any_strides(impl: str, device: str, precision: str) -> None:
    q, k, v = offset_qkv(70, 70, 64, torch.bfloat16, device)
    strided = torch.stack([q, k, v], 2).transpose(1, 3).contiguous().transpose(1, 3).unbind(2)
    assert not strided[0].is_contiguous()
    found, expected = (quantize(*x, precision, impl=impl) for x in (strided, (q, k, v)))
    for a, b in zip(found.dequantize(), expected.dequantize()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@everywhere
def test_the_mean_may_come_from_elsewhere(impl: str, device: str) -> None:
    q, k, v = offset_qkv(70, 70, 64, torch.float32, device)
    other = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0)).to(device)
    x = quantize(q, k, v, "int8", k_mean=other, impl=impl)
    assert torch.equal(x.k_mean, other)
    assert ((x.dequantize()[1] - (k - other[:, None])).abs() <= HALF * k_scales(x)).all()


def test_smoothing_makes_scales_smaller() -> None:
    q, k, v = offset_qkv(100, 200, 64, torch.float32, "cpu")
    smooth, plain = (quantize(q, k, v, "int8", k_mean=mean) for mean in (None, torch.zeros(2, 3, 64)))
    assert (smooth.k_scale < 0.75 * plain.k_scale).all()


def diagonal_map(kind: str, width: int, noise: float, seed: int) -> Tensor:
    """Softmax `[512, 512]` around one wide diagonal, or around several that lie 64 apart, with Gaussian noise on the scores."""
    place = torch.arange(512, dtype=torch.float32)
    distance = (place[:, None] - place).abs()
    scores = -distance / width
    if kind == "several":
        offset = distance % 64
        scores = -torch.minimum(offset, 64 - offset) / max(width / 8, 1) - distance / 256
    return (scores + noise * torch.randn(512, 512, generator=torch.Generator().manual_seed(seed))).softmax(-1)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("kind", "width", "noise", "wins"),
    [
        ("one", 80, 0.0, True),
        ("one", 80, 0.3, True),
        ("several", 24, 0.0, True),
        ("one", 12, 0.3, False),  # one row's diagonal is in its tile in any case, with the largest of 64 rows
        ("one", 80, 1.0, False),  # the largest of a tile of noise is larger than the largest of a row
        ("several", 24, 1.0, False),
    ],
)
def test_tile_groups_beat_row_groups_on_smooth_maps_alone(
    kind: str, width: int, noise: float, wins: bool, seed: int
) -> None:
    """PAROAttention's groups of P, in INT8: better where a tile holds similar values, which its orders are to bring about.

    On a noisy or a narrow map a scale for each row is better. No kernel here has groups of P: INT8 weights would.
    """
    p = diagonal_map(kind, width, noise, seed)

    def error(groups: Tensor, dims: tuple[int, ...]) -> float:
        scale = scale_of(groups, dims, 127.0)
        return float((int8(groups, scale) * scale - groups).norm())

    tiles, rows = error(p.unflatten(1, (8, 64)).unflatten(0, (8, 64)), (1, 3)), error(p, (1,))
    assert tiles < 0.9 * rows if wins else tiles > 1.1 * rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "int4"}, "precision must be one of int8, int8_fp8, found 'int4'"),
        ({"q": torch.zeros(70, 2, 8)}, r"q must be \[B, S, H, D\].*found \[70, 2, 8\]"),
        ({"k": torch.zeros(1, 70, 3, 8)}, r"k must have .* divides the 2 of q.*found 3 in \[1, 70, 3, 8\]"),
        ({"v": torch.zeros(1, 71, 2, 8)}, r"v must be .*found \[1, 71, 2, 8\]"),
        ({"v": torch.zeros(1, 70, 2, 8).half()}, "v must be torch.float32 on cpu.*float16"),
        ({"block": 0}, "block must be a positive number of tokens, found 0"),
        (
            {"valid": torch.ones(2)},
            r"valid must be int32 \[1\] on cpu \(70 keys in blocks of 128\), found torch.float32",
        ),
        ({"k_mean": torch.zeros(1, 8)}, r"k_mean must be float32 \[1, 2, 8\] on cpu, found torch.float32 \[1, 8\]"),
        ({"impl": "cpu"}, "one of portable, reference, found 'cpu'"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = dict.fromkeys("qkv", torch.zeros(1, 70, 2, 8)) | {"precision": "int8"}
    quantize(**good)
    with pytest.raises(ValueError, match=message):
        quantize(**good | change)


def test_fp8_needs_a_device_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs Triton, which has no wheel for this platform")
    from diffusers_accel.kernels import hardware
    from diffusers_accel.kernels.quantize import portable

    device = torch.device("cuda")
    monkeypatch.setattr(hardware, "capability", lambda device: 86)
    assert portable.refuses(device, torch.float16, "int8") is None
    assert "compute capability 8.9 or newer, found 8.6" in str(portable.refuses(device, torch.float16, "int8_fp8"))
    monkeypatch.setattr(hardware, "capability", lambda device: 89)
    assert portable.refuses(device, torch.float16, "int8_fp8") is None
    assert "takes float16" in str(portable.refuses(device, torch.float64, "int8"))
