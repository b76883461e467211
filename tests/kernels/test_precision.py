"""Attention of quantized operands: every implementation held to its meaning, and its meaning to exact attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffusers_accel.evals.kernel_bench import inputs as bench_inputs
from diffusers_accel.kernels.attention import PRECISIONS, attention, choices, cpu, quantized_attention
from diffusers_accel.kernels.merge import merge
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.quantize import KEY_GROUP, Quantized, quantize
from diffusers_accel.kernels.quantize.quantized import P_MAX
from tests.kernels.oracle import ATTENTION, assert_close, eager, qkv, random_pattern

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
everywhere = pytest.mark.parametrize(("impl", "device"), ATTENTION)
quantized = pytest.mark.parametrize("precision", PRECISIONS[1:])
# Of the log-sum-exp of the same codes: fp32 sums of scores of some tens.
LSE_ERROR = 5e-5


def inputs(
    batch: int, queries: int, keys: int, heads: int, dim: int, dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose keys have a mean that is not 0."""
    q, k, v = qkv(batch, queries, keys, heads, dim, F32, device, seed)
    return q.to(dtype), (k + 3 * (torch.arange(dim, device=device) % 5 == 0)).to(dtype), v.to(dtype)


def assert_meaning(
    found: tuple[Tensor, Tensor], x: Quantized, mask: Tensor | None = None, scale: float | None = None
) -> None:
    """Holds (out, lse) to fp64 attention of the dequantized operands over a token mask `[B, H, S_q, S_k]`.

    The output may err as much as twice what attention in `x.dtype` does, or with weights in FP8 where they are.
    """
    out, lse = found
    batch, queries, heads, dim = x.q.shape
    scale = dim**-0.5 if scale is None else scale
    mask = torch.ones(1, 1, 1, x.k.shape[1], dtype=torch.bool, device=out.device) if mask is None else mask
    mask = mask.expand(batch, heads, queries, x.k.shape[1])
    q, k, v = x.dequantize()
    exact, exact_lse = eager(q.double(), k.double(), v.double(), mask, scale)
    if x.precision == "int8":
        rough, _ = eager(q.to(x.dtype), k.to(x.dtype), v.to(x.dtype), mask, scale)
    else:
        p = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(scale).masked_fill(~mask, -torch.inf)
        p = (p - p.amax(-1, keepdim=True)).exp().nan_to_num()
        p8 = (P_MAX * p).to(torch.float8_e4m3fn).float() / P_MAX
        read = mask.any(2)[..., None].transpose(1, 2)
        rough = torch.einsum("bhqk,bkhd->bqhd", p8, v.masked_fill(~read, 0))
        rough = (rough / p.sum(-1).clamp(min=1).transpose(1, 2)[..., None]).to(x.dtype)
    empty = exact_lse == -torch.inf
    assert out.dtype == x.dtype and out.is_contiguous() and lse.dtype == F32 and lse.is_contiguous()
    assert torch.equal(lse == -torch.inf, empty)
    assert torch.equal((out == 0).all(-1).transpose(1, 2), empty)
    assert_close(out, exact, rough)
    true_lse = exact_lse + scale * x.offset
    assert (lse - true_lse).masked_fill(empty, 0).abs().max() <= LSE_ERROR


@everywhere
@quantized
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "blocks", "density"),
    [
        (63, 63, 128, (128, 128), None),
        (300, 300, 128, (128, 128), 0.4),
        (300, 300, 96, (128, 64), 0.3),
        (100, 500, 64, (64, 128), 0.5),
        (257, 63, 72, (128, 64), 0.7),
        (200, 330, 64, (32, 32), 0.2),
        (130, 260, 16, (48, 96), 0.5),
        (200, 330, 160, (128, 64), 0.4),
        (100, 257, 256, (64, 128), 0.6),
    ],
)
def test_patterns_mean_what_the_reference_says(
    impl: str,
    device: str,
    precision: str,
    dtype: torch.dtype,
    queries: int,
    keys: int,
    dim: int,
    blocks: tuple[int, int],
    density: float | None,
) -> None:
    x = quantize(*inputs(1, queries, keys, 2, dim, dtype, device, seed=queries), precision, impl="reference")
    pattern = None if density is None else random_pattern(1, 2, queries, keys, blocks, density, device, seed=dim)
    mask = None if pattern is None else pattern.token_mask()
    assert_meaning(quantized_attention(x, pattern, impl=impl), x, mask)


@everywhere
@quantized
def test_attention_is_quantize_and_quantized_attention(impl: str, device: str, precision: str) -> None:
    q, k, v = inputs(2, 150, 200, 2, 64, F16, device)
    pattern = random_pattern(2, 2, 150, 200, (64, 64), 0.5, device, seed=4)
    by = impl if impl == "reference" else "auto"
    expected = quantized_attention(quantize(q, k, v, precision, block=64, impl=by), pattern, scale=0.2, impl=impl)
    found = attention(q, k, v, pattern, scale=0.2, precision=precision, impl=impl)
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@everywhere
@quantized
def test_queries_that_read_nothing_give_zero_and_minus_infinity(impl: str, device: str, precision: str) -> None:
    q, k, v = inputs(1, 300, 300, 2, 64, BF16, device)
    v[0, 7, 1, 3] = torch.inf  # in the head that nobody reads
    mask = torch.ones(1, 2, 3, 3, dtype=torch.bool)
    mask[0, 0, 1] = mask[0, 1] = False
    pattern = BlockPattern.from_mask(mask.to(device), 300, 300)
    out, lse = attention(q, k, v, pattern, precision=precision, impl=impl)
    assert (out[0, 128:256, 0] == 0).all() and (out[0, :, 1] == 0).all()
    assert (lse[0, 0, 128:256] == -torch.inf).all() and (lse[0, 1] == -torch.inf).all()
    assert lse[0, 0, :128].isfinite().all() and (out[0, 256:, 0] != 0).any()


@everywhere
@quantized
def test_what_does_not_exist_is_never_weighed(impl: str, device: str, precision: str) -> None:
    """Keys past `valid` inside a block hold NaN, and so does the storage behind the last key."""
    queries, keys = 130, 300
    q, *kv = inputs(1, queries, keys, 2, 64, BF16, device)
    valid = torch.tensor([64, 20, 64, 0, 17], dtype=torch.int32)
    exists = torch.cat([torch.arange(64) < n for n in valid])[:keys].to(device)
    store = torch.full((2, 1, keys + 90, 2, 64), torch.nan, dtype=BF16, device=device)
    for i in range(2):
        store[i, :, :keys] = kv[i].masked_fill(~exists[:, None, None], torch.nan)
    pattern = BlockPattern.full(2, queries, keys, 128, 64, valid.to(device), device)
    found = attention(q, *store[:, :, :keys], pattern, precision=precision, impl=impl)
    k, v = (x.masked_fill(~exists[:, None, None], 0) for x in kv)
    x = quantize(q, k, v, precision, block=64, valid=valid.to(device), impl="reference")
    assert_meaning(found, x, pattern.token_mask())


@everywhere
@quantized
def test_keys_without_a_difference_weigh_the_same(impl: str, device: str, precision: str) -> None:
    """Their codes are 0, and so are the products of all scales: a masked score must not become 0 x infinity."""
    q, k, v = inputs(1, 100, 100, 1, 64, F16, device)
    q[:, :50] = 0
    out, lse = attention(q, k[:, :1].expand(-1, 100, -1, -1), v, precision=precision, impl=impl)
    same = v.double().mean(1, keepdim=True).expand_as(out)
    assert (out - same).abs().max() <= 2**-4 * v.abs().max() / 100**0.5
    assert (lse[0, 0, :50] - torch.tensor(100.0).log()).abs().max() <= LSE_ERROR


@everywhere
@quantized
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, in Triton's interpreter
def test_what_is_not_a_number_shows(impl: str, device: str, precision: str) -> None:
    q, k, v = inputs(1, 100, 100, 3, 64, F16, device)
    q[0, 7, 0, 3] = k[0, 7, 1, 3] = v[0, 7, 2, 3] = torch.nan
    out, lse = attention(q, k, v, precision=precision, impl=impl)
    assert out[0, 7, 0].isnan().all() and lse[0, 0, 7].isnan()
    assert out[0, torch.arange(100) != 7, 0].isfinite().all()
    assert out[0, :, 1].isnan().all() and lse[0, 1].isnan().all()
    assert out[0, :, 2, 3].isnan().all() and lse[0, 2].isfinite().all()


@everywhere
@quantized
def test_merged_parts_of_the_keys_are_the_whole(impl: str, device: str, precision: str) -> None:
    q, k, v = inputs(1, 200, 300, 2, 64, F16, device)
    whole = random_pattern(1, 2, 200, 300, (64, 64), 0.7, device, seed=2).mask()
    first = torch.rand(whole.shape, generator=torch.Generator().manual_seed(3)).to(device) < 0.5
    patterns = [BlockPattern.from_mask(mask, 200, 300, 64, 64) for mask in (whole & first, whole & ~first, whole)]
    *parts, _ = (attention(q, k, v, pattern, precision=precision, impl=impl) for pattern in patterns)
    assert_meaning(merge(parts), quantize(q, k, v, precision, impl="reference"), patterns[-1].token_mask())


@everywhere
@pytest.mark.parametrize("shift", [0, 900])
def test_whole_numbers_lose_nothing(impl: str, device: str, shift: int) -> None:
    """Codes and their mean are exact here, so that smoothing must leave the softmax alone, and its offset the LSE."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randint(-127, 128, (1, 128, 2, 64), generator=generator) for _ in range(2))
    q[..., 0], k[..., 1] = 127, 127
    k[:, 64:] = -k[:, :64]  # whose mean is 0
    v = torch.randn(1, 128, 2, 64, generator=generator)
    q, k, v = (x.to(device, F16) for x in (q, k + shift, v))
    scale = 2e-4
    x = quantize(q, k, v, "int8", impl="reference")
    assert (
        (x.k_mean == shift).all()
        and torch.equal(x.q, q.to(torch.int8))
        and torch.equal(x.k, (k - shift).to(torch.int8))
    )
    out, lse = attention(q, k, v, scale=scale, precision="int8", impl=impl)
    mask = torch.ones(1, 2, 128, 128, dtype=torch.bool, device=device)
    exact, exact_lse = eager(q.double(), k.double(), v.double(), mask, scale)
    # The weights, of keys that are all alike but for their shift, in fp32 and rounded to fp16.
    rough, _ = eager(q.float(), k.float(), v.float(), mask, scale)
    assert_close(out, exact, rough.half())
    torch.testing.assert_close(lse.double(), exact_lse, rtol=2e-6, atol=LSE_ERROR)


@everywhere
@quantized
@pytest.mark.parametrize("kind", bench_inputs.INPUTS)
@pytest.mark.parametrize("dim", [64, 128])
def test_the_bar(impl: str, device: str, precision: str, kind: str, dim: int) -> None:
    """Every head's output has a cosine of at least 0.999 to that of fp32 attention."""
    shape = bench_inputs.Shape((3, 8, 12), 5, dim)
    q, k, v = bench_inputs.qkv(kind, shape, F32, torch.device(device), seed=0)
    exact, _ = attention(q, k, v, impl="reference")
    out, _ = attention(q.to(BF16), k.to(BF16), v.to(BF16), precision=precision, impl=impl)
    heads = (x.float().transpose(1, 2).flatten(2) for x in (out, exact))
    assert torch.nn.functional.cosine_similarity(*heads, dim=2).min() >= 0.999


def test_smoothing_is_worth_its_pass() -> None:
    """Where keys have a mean, as the video-like ones do. Gaussian keys have none and gain nothing."""
    shape = bench_inputs.Shape((3, 12, 20), 5, 64)
    q, k, v = bench_inputs.qkv("video", shape, F32, torch.device("cpu"), seed=0)
    exact, exact_lse = attention(q, k, v)
    errors = []
    for mean in (None, torch.zeros(1, 5, 64)):
        out, lse = quantized_attention(quantize(q, k, v, "int8", k_mean=mean))
        errors.append(((out - exact).norm(), (lse - exact_lse).abs().mean()))
    (smooth, smooth_lse), (plain, plain_lse) = errors
    assert smooth < 0.85 * plain and smooth_lse < 0.75 * plain_lse


def test_on_a_cpu_quantized_rows_skip_as_others_do(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = []

    def counting(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        pairs.append(q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2])
        return fp8_attention(q, k, v, scale=scale)

    fp8_attention = cpu.fp8_attention
    monkeypatch.setattr(cpu, "fp8_attention", counting)
    q, k, v = inputs(1, 300, 333, 2, 16, F32, "cpu")
    pattern = random_pattern(1, 2, 300, 333, (64, 32), 0.4, "cpu", seed=1)
    attention(q, k, v, pattern, precision="int8_fp8", impl="cpu")
    assert sum(pairs) == int(pattern.token_mask().sum())


def test_the_simulation_of_fp8_is_the_same_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = inputs(1, 100, 80, 2, 16, F32, "cpu")
    whole = attention(q, k, v, precision="int8_fp8", impl="cpu")
    monkeypatch.setattr(cpu, "SCORE_BYTES", 7 * 80 * 2 * 4)
    for a, b in zip(attention(q, k, v, precision="int8_fp8", impl="cpu"), whole):
        torch.testing.assert_close(a, b)


def test_a_precision_is_obeyed_or_refused() -> None:
    q, k, v = inputs(1, 64, 64, 1, 16, F32, "cpu")
    with pytest.raises(ValueError, match="precision must be one of input, int8, int8_fp8, found 'fp8'"):
        attention(q, k, v, precision="fp8")
    with pytest.raises(ValueError, match="precision must be one of"):
        choices("cpu", F32, 64, precision="int4")
    assert choices("cpu", F32, 64, (128, 128), "int8")[0].reason is None
    with pytest.raises(ValueError, match="pattern describes 1 batch rows and 2 heads"):
        quantized_attention(quantize(q, k, v, "int8"), BlockPattern.full(2, 64, 64))
    with pytest.raises(ValueError, match="scale must be positive"):
        quantized_attention(quantize(q, k, v, "int8"), scale=0.0)


def test_what_the_portable_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="needs Triton, which has no wheel for this platform")
    from diffusers_accel.kernels import hardware
    from diffusers_accel.kernels.attention import portable

    device = torch.device("cuda")
    monkeypatch.setattr(hardware, "capability", lambda device: 86)
    assert portable.refuses(device, BF16, 128, (128, 128), "int8") is None
    assert "8.9 or newer, found 8.6" in str(portable.refuses(device, BF16, 128, (128, 128), "int8_fp8"))
    monkeypatch.setattr(hardware, "capability", lambda device: 90)
    assert portable.refuses(device, BF16, 128, (128, 128), "int8_fp8") is None
    assert "takes float16 and bfloat16" in str(portable.refuses(device, F32, 128, (128, 128), "int8"))
    assert "multiples of 32, found 48" in str(portable.refuses(device, BF16, 128, (128, 48), "int8_fp8"))
    assert portable.refuses(device, BF16, 128, (128, 48), "int8") is None
    assert portable.refuses(device, BF16, 256, (128, 128), "int8") is None
    assert "head dims up to 256" in str(portable.refuses(device, BF16, 264, (128, 128), "int8"))


def test_every_tile_has_one_scale_of_its_keys() -> None:
    pytest.importorskip("triton", reason="needs Triton, which has no wheel for this platform")
    from diffusers_accel.kernels.attention import portable

    for _, dim, kind in portable.CONFIGS:
        if not isinstance(kind, str):
            continue
        for arch in (80, 89, 90, 100, 120):
            tile = portable.config(arch, dim, BF16, (128, 128), kind)
            assert KEY_GROUP % tile.block_n == 0 and tile.block_n >= 32
