"""Dense attention with its log-sum-exp: every implementation held to one meaning, those of others also to their refusals."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_accel.kernels import dense as package
from diffusers_accel.kernels import hardware
from diffusers_accel.kernels.attention import attention
from diffusers_accel.kernels.dense import IMPLEMENTATIONS, choices, cudnn, dense, flash, gpu, xformers
from diffusers_accel.kernels.merge import merge
from tests.kernels.oracle import assert_attention, qkv

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
CUDA = torch.device("cuda")
CASES = [
    pytest.param("reference", "cpu", id="reference"),
    pytest.param("cpu", "cpu", id="cpu"),
    pytest.param("portable", "cpu", id="portable-interpreted", marks=pytest.mark.interpreter),
    *(
        pytest.param(impl, "cuda", id=f"{impl}-gpu", marks=pytest.mark.gpu)
        for impl in ("cudnn", "flash", "xformers", "portable", "reference")
    ),
]
everywhere = pytest.mark.parametrize(("impl", "device"), CASES)


def skip_refused(impl: str, device: str, dtype: torch.dtype, dim: int) -> None:
    """Not every GPU has every package and every library has every type: the reason is the implementation's own."""
    reason = {option.name: option.reason for option in choices(device, dtype, dim)}[impl]
    if reason is not None and impl in ("cudnn", "flash", "xformers"):
        pytest.skip(f"{impl}: {reason}")


@everywhere
@pytest.mark.parametrize("dtype", [F16, BF16, F32], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "dim"), [(63, 63, 128), (100, 257, 96), (130, 40, 64), (1, 90, 64), (70, 1, 128)]
)
def test_dense_is_plain_attention(
    impl: str, device: str, dtype: torch.dtype, queries: int, keys: int, dim: int
) -> None:
    skip_refused(impl, device, dtype, dim)
    q, k, v = qkv(2, queries, keys, 3, dim, dtype, device, seed=queries)
    assert_attention(dense(q, k, v, impl=impl), q, k, v)


@everywhere
@pytest.mark.parametrize("layout", ["heads first", "fused projection", "slice of a buffer", "last dimension not 1"])
def test_any_strides(impl: str, device: str, layout: str) -> None:
    dtype = F32 if device == "cpu" else BF16
    skip_refused(impl, device, dtype, 64)
    q, k, v = qkv(2, 100, 100, 2, 64, dtype, device)
    strided: tuple[Tensor, ...]
    if layout == "heads first":
        strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "fused projection":
        strided = torch.stack([q, k, v], 2).unbind(2)
    elif layout == "slice of a buffer":
        strided = tuple(torch.cat([x, torch.full_like(x, torch.nan)], 1)[:, :100] for x in (q, k, v))
    else:
        strided = tuple(x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
    assert not strided[1].is_contiguous()
    assert_attention(dense(*strided, impl=impl), q, k, v)


@everywhere
def test_scale(impl: str, device: str) -> None:
    dtype = F32 if device == "cpu" else BF16
    skip_refused(impl, device, dtype, 64)
    q, k, v = qkv(1, 63, 100, 1, 64, dtype, device)
    assert_attention(dense(q, k, v, scale=0.3, impl=impl), q, k, v, scale=0.3)


@everywhere
@pytest.mark.parametrize("border", [1, 64, 77, 130])
def test_parts_merge_into_the_whole_at_any_border(impl: str, device: str, border: int) -> None:
    dtype = F32 if device == "cpu" else BF16
    skip_refused(impl, device, dtype, 64)
    q, k, v = qkv(1, 50, 131, 2, 64, dtype, device)
    parts = [dense(q, k[:, part], v[:, part], impl=impl) for part in (slice(0, border), slice(border, None))]
    assert_attention(merge(parts), q, k, v)


def test_dense_on_a_cpu_is_attention_without_a_pattern() -> None:
    q, k, v = qkv(2, 60, 90, 3, 16, F32, "cpu")
    for found, expected in zip(dense(q, k, v), attention(q, k, v)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dim", [1, 40, 160])
def test_cpu_takes_any_head_dim(dim: int) -> None:
    q, k, v = qkv(1, 30, 50, 2, dim, F32, "cpu")
    assert_attention(dense(q, k, v, impl="cpu"), q, k, v)


def test_auto_takes_the_first_that_can() -> None:
    assert [option.name for option in choices("cpu", F32, 64) if option.reason is None][0] == "cpu"
    assert [option.name for option in choices("cpu", torch.float64, 64) if option.reason is None] == ["reference"]
    assert {option.name for option in choices("cpu", F32, 64)} == set(IMPLEMENTATIONS)
    q, k, v = qkv(1, 20, 30, 2, 8, torch.float64, "cpu")
    torch.testing.assert_close(dense(q, k, v)[0], dense(q, k, v, impl="reference")[0], rtol=0, atol=0)


def test_an_explicit_implementation_is_obeyed_or_refused() -> None:
    q, k, v = qkv(1, 20, 30, 1, 8, F32, "cpu")
    for impl in ("cudnn", "flash", "xformers"):
        with pytest.raises(ValueError, match=rf"(?s)impl='{impl}'.*{impl}: runs on CUDA and ROCm.*cpu: usable"):
            dense(q, k, v, impl=impl)
    with pytest.raises(ValueError, match="one of cudnn, flash, xformers, cpu, portable, reference, found 'fast'"):
        dense(q, k, v, impl="fast")


def test_arguments_that_do_not_fit_are_named() -> None:
    q, k, v = qkv(2, 10, 13, 2, 16, F32, "cpu")
    cases = [
        ((q[0], k, v), r"q must be \[B, S, H, D\].*\[10, 2, 16\]"),
        ((q, k[0], v), r"k must be \[2, 'S_k', 2, 16\].*found \[13, 2, 16\]"),
        ((q, k[:, :0], v), r"k must be .*found \[2, 0, 2, 16\]"),
        ((q, k, v[:, 1:]), r"v must be \[2, 13, 2, 16\].*found \[2, 12, 2, 16\]"),
        ((q, k.half(), v), r"k must be torch.float32 on cpu.*float16"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            dense(*arguments)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="scale must be positive"):
            dense(q, k, v, scale=scale)


def test_the_output_carries_no_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(1, 20, 30, 1, 8, F32, "cpu"))
    assert not any(x.requires_grad for x in dense(q, k, v))


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A machine as torch would describe it; nothing can be run on it."""
    machine = SimpleNamespace(capability=90, cudnn=91701, flash=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(hardware, "capability", lambda device: machine.capability)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: machine.cudnn)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: machine.flash)
    monkeypatch.setattr(gpu, "fails", lambda *arguments: None)
    yield machine


def test_a_machine_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (cudnn, flash, xformers):
        assert module.refuses(CUDA, BF16, 64) == "runs on CUDA and ROCm devices, torch sees none"


def test_what_others_do_not_take_is_refused(a_gpu: SimpleNamespace) -> None:
    assert cudnn.refuses(CUDA, BF16, 128) is None and flash.refuses(CUDA, F16, 256) is None
    for module in (cudnn, flash, xformers):
        assert module.refuses(CUDA, F32, 64) == "takes float16 and bfloat16, found torch.float32"
    assert cudnn.refuses(CUDA, BF16, 136) == "takes head dims up to 128 in multiples of 8, found 136"
    assert flash.refuses(CUDA, BF16, 100) == "takes head dims up to 256 in multiples of 8, found 100"
    a_gpu.capability = 75
    for module in (cudnn, flash, xformers):
        assert module.refuses(CUDA, F16, 64) == "needs compute capability 8.0 or newer, found 7.5"


def test_old_and_absent_libraries_are_refused(a_gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    a_gpu.cudnn, a_gpu.flash = 91500, False
    assert cudnn.refuses(CUDA, BF16, 64) == "needs cuDNN 9.15.1 or newer, found 91500"
    assert flash.refuses(CUDA, BF16, 64) == "this build of PyTorch has no flash attention"
    a_gpu.cudnn = None
    assert cudnn.refuses(CUDA, BF16, 64) == "this build of PyTorch has no cuDNN"
    monkeypatch.setattr(xformers.importlib.util, "find_spec", lambda name: None)
    assert (
        xformers.refuses(CUDA, BF16, 64) == "needs xformers: pip install '.[xformers]' in a checkout of diffusers_accel"
    )


@pytest.mark.parametrize(
    ("capability", "first"), [(80, "flash"), (89, "flash"), (90, "cudnn"), (100, "cudnn"), (120, "flash")]
)
def test_the_order_is_that_of_the_device(a_gpu: SimpleNamespace, capability: int, first: str) -> None:
    a_gpu.capability = capability
    names = package._operator.tried(CUDA, BF16, 64)
    assert names[0] == first and set(names) == set(IMPLEMENTATIONS)


def right(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return attention(q, k, v, scale=scale)


def base_two(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = right(q, k, v, scale)
    return out, lse / math.log(2)


def padding_weighed(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 128 - x.shape[1])) for x in (k, v))
    return right(q, k, v, scale)


def heads_and_tokens_mixed(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = right(q, k, v, scale)
    return out.transpose(1, 2).reshape(out.shape), lse


def scale_ignored(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return right(q, k, v, q.shape[3] ** -0.5)


def queries_padded(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = right(q, k, v, scale)
    return out, torch.nn.functional.pad(lse, (0, 24))


def unbuilt(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    raise NotImplementedError("no operator:\n  was not built")


def not_a_number(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = right(q, k, v, scale)
    return out * torch.nan, lse


@pytest.mark.parametrize(
    ("implementation", "reason"),
    [
        (base_two, "erred by 2.34 in the log-sum-exp"),
        (padding_weighed, "in the log-sum-exp"),
        (heads_and_tokens_mixed, "and 1 in the output"),
        (scale_ignored, "erred by 7 in the log-sum-exp"),
        (queries_padded, r"returned \[1, 40, 2, 64\] and \[1, 2, 64\] in torch.float32 for 40 queries"),
        (unbuilt, "failed on 40 queries and 72 keys: no operator: was not built"),
        (not_a_number, "and nan in the output"),
    ],
)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_the_trial_finds_what_is_wrong(implementation: Any, reason: str, dtype: torch.dtype) -> None:
    assert gpu.fails(right, torch.device("cpu"), dtype, 64) is None
    found = gpu.fails(implementation, torch.device("cpu"), dtype, 64)
    assert found is not None and re.search(reason, found), found


def test_being_out_of_memory_is_no_reason() -> None:
    def full(*inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        gpu.fails(full, torch.device("cpu"), BF16, 64)


def heads_first(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    out, lse = right(*(x.transpose(1, 2) for x in (q, k, v)), scale)
    return out.transpose(1, 2), lse


def test_cudnn_is_given_its_layout_and_a_single_key_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with the operator's layout, its trailing dimension and its refusal of a single key."""

    def operator(q: Tensor, k: Tensor, v: Tensor, bias: None, with_lse: bool, *, scale: float) -> tuple[Any, ...]:
        assert with_lse and all(x.transpose(1, 2).is_contiguous() for x in (q, k, v)) and k.shape[2] > 1
        out, lse = heads_first(q, k, v, scale)
        return out, lse[..., None], None, None, 0, 0

    monkeypatch.setattr(cudnn, "fused_attention", operator)
    for keys in (1, 2, 90):
        q, k, v = qkv(2, 50, keys, 3, 64, BF16, "cpu")
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
        assert_attention(cudnn.dense(q, k, v, 0.125), q, k, v)


def test_flash_is_given_its_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def operator(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Any, ...]:
        assert q.shape[1] == 3 and all(x.stride(3) == 1 for x in (q, k, v))
        return *heads_first(q, k, v, scale), None, None, 0, 0

    monkeypatch.setattr(flash, "fused_attention", operator)
    q, k, v = qkv(2, 50, 90, 3, 64, BF16, "cpu")
    strided = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
    assert_attention(flash.dense(*strided, 0.125), q, k, v)


@pytest.mark.parametrize("module", [cudnn, flash], ids=["cudnn", "flash"])
def test_pytorchs_operators_take_these_arguments(module: Any) -> None:
    """On tensors without data, which need no GPU: the schema is the installed PyTorch's."""
    q, k, v = (x.to("meta") for x in qkv(2, 50, 90, 3, 64, BF16, "cpu"))
    out, lse = module.dense(q, k, v, 0.125)
    assert (out.shape, out.dtype) == (q.shape, BF16) and out.is_contiguous()
    assert (lse.shape, lse.dtype) == ((2, 3, 50), F32) and lse.is_contiguous()


def test_xformers_may_pad_and_widen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package: tokens first, fp32 out, a log-sum-exp padded to 32 queries."""

    def partial(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = right(q, k, v, scale)
        return out.float(), torch.nn.functional.pad(lse, (0, -q.shape[1] % 32), value=torch.inf)

    package = ModuleType("xformers.ops.fmha")
    package.memory_efficient_attention_partial = partial  # type: ignore[attr-defined]
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", package)
    q, k, v = qkv(2, 50, 90, 3, 64, BF16, "cpu")
    assert_attention(xformers.dense(q, k, v, 0.125), q, k, v)
    assert gpu.fails(xformers.dense, torch.device("cpu"), BF16, 64) is None


@pytest.mark.gpu
def test_a_gpu_has_a_fast_implementation() -> None:
    usable = [option.name for option in choices("cuda", BF16, 128) if option.reason is None]
    assert usable[0] in ("cudnn", "flash", "xformers", "portable") and "reference" in usable
    q, k, v = qkv(1, 300, 1000, 4, 128, BF16, "cuda")
    torch.testing.assert_close(dense(q, k, v)[0], dense(q, k, v, impl=usable[0])[0], rtol=0, atol=0)
