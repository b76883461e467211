"""FlashAttention-4 as an implementation: its lists, its refusals, and how the package is called. It runs on GPUs only.

What computes here is a stand-in that reads the lists as the package documents and shows them in its source.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from diffusers_accel.kernels import hardware
from diffusers_accel.kernels.attention import attention, chosen, fa4, reference
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.ranking import IMPLEMENTATIONS, UNMEASURED
from tests.kernels.oracle import assert_attention, qkv, random_pattern

CUDA, BF16, F16, F32 = torch.device("cuda"), torch.bfloat16, torch.float16, torch.float32
try:
    INSTALLED = metadata.version(fa4.PACKAGE)
except metadata.PackageNotFoundError:
    INSTALLED = ""
needs_package = pytest.mark.skipif(not INSTALLED, reason=f"needs {fa4.PACKAGE}: pip install '.[fa4]'")


class Lists(NamedTuple):
    """The fields of the package's tuple that are used; a test compares them with its own."""

    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor
    full_block_idx: Tensor
    block_size: tuple[int, int]


def stand_in(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Reads the blocks of both lists, and of the first only the tokens that its mask lets through; the others weigh 0, which
    does not hide a NaN."""
    scale, sparse = options["softmax_scale"], options.get("block_sparse_tensors")
    if sparse is None:
        return reference.attention(q, k, v, None, scale)
    block_q, block_k = sparse.block_size
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    mask = torch.zeros(batch, heads, queries, keys, dtype=torch.bool)
    beside = torch.zeros_like(q)
    exists = options["aux_tensors"][0].bool() if "mask_mod" in options else torch.ones(keys, dtype=torch.bool)
    for counts, ids, seen in ((*sparse[:2], exists), (*sparse[2:4], torch.ones(keys, dtype=torch.bool))):
        assert counts.dtype == ids.dtype == torch.int32 and counts.is_contiguous() and ids.is_contiguous()
        assert ids.shape[3] <= -(-keys // block_k), "more than there are blocks is refused"
        for b, h, i in torch.cartesian_prod(*(torch.arange(n) for n in (batch, heads, counts.shape[2]))).tolist():
            row = (b % counts.shape[0], h, i)
            listed = ids[row][: counts[row]].tolist()
            assert listed == sorted(set(listed)), "the ragged block is looked for at the end of a list"
            for j in listed:
                part = slice(j * block_k, (j + 1) * block_k)
                rows = slice(i * block_q, (i + 1) * block_q)
                mask[b, h, rows, part] = seen[part]
                beside[b, rows, h] += 0 * v[b, part, h * k.shape[2] // heads].sum(0)
    out, lse = reference.attention(q, k, v, BlockPattern.from_mask(mask, queries, keys, 1, 1), scale)
    return out + beside, lse


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The stand-in in the place of the package."""
    cute, sparsity = ModuleType("flash_attn.cute"), ModuleType("flash_attn.cute.block_sparsity")
    cute.flash_attn_func, sparsity.BlockSparseTensorsTorch = stand_in, Lists  # type: ignore[attr-defined]
    for name, module in (
        ("flash_attn", ModuleType("flash_attn")),
        (cute.__name__, cute),
        (sparsity.__name__, sparsity),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(fa4, "existing_only", lambda: "existing only")
    yield cute


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU of compute capability 9.0, unless another is set, with the package installed and right."""
    machine = SimpleNamespace(capability=90)
    monkeypatch.setattr(hardware, "capability", lambda device: machine.capability)
    monkeypatch.setattr(fa4, "unfit", lambda: None)
    monkeypatch.setattr(fa4, "fails", lambda *arguments: None)
    return machine


@pytest.mark.parametrize("valid", [False, True], ids=["whole blocks", "holes"])
@pytest.mark.parametrize(("queries", "keys"), [(256, 384), (300, 400), (100, 90)])
@pytest.mark.parametrize(("rows", "key_heads"), [(1, 2), (2, 1)])
def test_it_computes_the_pattern(
    package: ModuleType, queries: int, keys: int, rows: int, key_heads: int, valid: bool
) -> None:
    q, k, v = qkv(2, queries, keys, 2, 16, F32, "cpu")
    k, v = k[:, :, :key_heads], v[:, :, :key_heads].clone()
    pattern = random_pattern(rows, 2, queries, keys, (128, 128), 0.5, "cpu", seed=queries)
    if valid:
        lengths = torch.tensor([70, 128, 0, 16], dtype=torch.int32)[: pattern.key_blocks]
        pattern = BlockPattern.from_mask(pattern.mask(), queries, keys, valid=lengths)
        v[:, 70:90] = torch.nan
    found = fa4.attention(q, k, v, pattern, 0.3)
    expected = reference.attention(q, k, v, pattern, 0.3)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact)
    assert (expected[1] == -torch.inf).any() or keys == 90 or not valid


def test_without_a_pattern_every_key_is_read(package: ModuleType) -> None:
    q, k, v = qkv(1, 60, 100, 2, 16, F32, "cpu")
    assert_attention(fa4.attention(q, k, v, None, 0.25), q, k, v)


def test_only_blocks_with_holes_are_masked() -> None:
    """The ragged last block is read whole: the package masks what lies behind the keys, in either list."""
    mask = torch.tensor([[[[True, True, False, True], [False, True, True, True]]]])
    lengths = torch.tensor([128, 100, 128, 16], dtype=torch.int32)
    pattern = BlockPattern.from_mask(mask, 256, 400, valid=lengths)
    found = fa4.lists(pattern)
    counts = {name: found[f"{name}_block_cnt"].flatten().tolist() for name in ("mask", "full")}
    assert counts == {"mask": [1, 1], "full": [2, 2]}
    assert found["mask_block_idx"][0, 0, :, 0].tolist() == [1, 1]
    assert found["full_block_idx"][0, 0, :, :2].tolist() == [[0, 3], [2, 3]]
    assert fa4.existing(pattern)[128:256].tolist() == [1] * 100 + [0] * 28
    whole = BlockPattern.from_mask(mask, 256, 400)
    found = fa4.lists(whole)
    assert not found["mask_block_cnt"].any() and found["full_block_idx"] is whole.blocks
    assert "mask_mod" not in fa4_options(whole)


def fa4_options(pattern: BlockPattern) -> dict[str, Any]:
    sparsity = ModuleType("flash_attn.cute.block_sparsity")
    sparsity.BlockSparseTensorsTorch = Lists  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "flash_attn.cute.block_sparsity", sparsity)
        patched.setattr(fa4, "existing_only", lambda: "existing only")
        return fa4.options(pattern, 0.5)


def test_the_call_has_no_other_names_than_are_asked_for() -> None:
    pattern = BlockPattern.full(2, 200, 300, valid=torch.tensor([128, 100, 44], dtype=torch.int32))
    called = fa4_options(pattern)
    assert set(called) == set(fa4.ARGUMENTS)
    assert (called["softmax_scale"], called["pack_gqa"], called["return_lse"]) == (0.5, False, True)
    assert called["block_sparse_tensors"].block_size == (128, 128)
    again = fa4_options(pattern)
    assert again["aux_tensors"][0] is called["aux_tensors"][0], "made once for a pattern"


def test_what_it_takes(gpu: SimpleNamespace) -> None:
    blocks = (128, 128)
    assert fa4.refuses(CUDA, BF16, 128, blocks, "input") is None and fa4.refuses(CUDA, F16, 8, blocks, "input") is None
    refusals = {
        "found precision int8": (CUDA, BF16, 128, blocks, "int8"),
        "runs on CUDA devices, found cpu": (torch.device("cpu"), BF16, 128, blocks, "input"),
        "takes float16 and bfloat16, found torch.float32": (CUDA, F32, 128, blocks, "input"),
        "from 8 to 128 in multiples of 8, found 256": (CUDA, BF16, 256, blocks, "input"),
        "in multiples of 8, found 20": (CUDA, BF16, 20, blocks, "input"),
        "128 queries x 128 keys on compute capability 9.0, found 128 queries x 64": (
            CUDA,
            BF16,
            64,
            (128, 64),
            "input",
        ),
    }
    for message, inputs in refusals.items():
        assert message in str(fa4.refuses(*inputs))
    gpu.capability = 100
    assert fa4.refuses(CUDA, BF16, 128, (256, 128), "input") is None
    assert "256 queries x 128 keys on compute capability 10.0" in str(fa4.refuses(CUDA, BF16, 128, blocks, "input"))
    for gpu.capability in (80, 89, 120):
        assert "needs compute capability 9.x or 10.x, found" in str(fa4.refuses(CUDA, BF16, 128, blocks, "input"))


def test_a_package_that_is_absent_or_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", absent)
    assert fa4.unfit() == "needs flash-attn-4: pip install '.[fa4]' in a checkout of diffusers_accel"
    monkeypatch.setattr(metadata, "version", lambda name: "4.0.0b1")
    monkeypatch.setitem(sys.modules, "flash_attn.cute", None)
    assert "flash-attn-4 4.0.0b1 cannot be imported: " in str(fa4.unfit())
    old = ModuleType("flash_attn.cute")
    old.flash_attn_func = lambda q, k, v, softmax_scale, pack_gqa, mask_mod, full_block_cnt: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn.cute", old)
    assert "4.0.0b1 takes no aux_tensors, block_sparse_tensors, return_lse: pip install -U" in str(fa4.unfit())


def wrong_base(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = stand_in(q, k, v, **options)
    return out, lse / 0.6931


def empty_rows_unwritten(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = stand_in(q, k, v, **options)
    return out.where((lse > -torch.inf).transpose(1, 2)[..., None], torch.nan), lse


def lists_ignored(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return stand_in(q, k, v, softmax_scale=options["softmax_scale"])


def mask_ignored(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    options.pop("mask_mod", None)
    return stand_in(q, k, v, **options)


def broken(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no kernel image")


def transposed(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    out, lse = stand_in(q, k, v, **options)
    return out, lse.transpose(1, 2)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (stand_in, None),
        (wrong_base, "in the log-sum-exp of a trial"),
        (empty_rows_unwritten, "erred by nan in the output"),
        (lists_ignored, "in the output of a trial"),
        (mask_ignored, "in the output of a trial"),
        (broken, "failed on 216 queries and 344 keys: no kernel image"),
        (transposed, "returned [1, 216, 2] in torch.float32 as log-sum-exp"),
    ],
)
def test_the_trial_finds_what_errs(package: Any, function: Any, reason: str | None) -> None:
    package.flash_attn_func = function
    found = fa4.fails(torch.device("cpu"), BF16, 64, (128, 128))
    assert (found is None) if reason is None else (found is not None and reason in found), found


def test_it_has_to_be_asked_for(gpu: SimpleNamespace) -> None:
    assert IMPLEMENTATIONS["attention"]["fa4"] == UNMEASURED
    q, k, v = qkv(1, 32, 32, 1, 8, F32, "cpu")
    assert chosen("cpu", F32, 8) == "cpu"
    with pytest.raises(ValueError, match="fa4: runs on CUDA devices, found cpu"):
        attention(q, k, v, impl="fa4")


@needs_package
def test_the_installed_package_takes_the_call() -> None:
    cute = importlib.import_module("flash_attn.cute")
    sparsity = importlib.import_module("flash_attn.cute.block_sparsity")
    assert fa4.unfit() is None
    pattern = BlockPattern.full(2, 200, 300, valid=torch.tensor([128, 100, 44], dtype=torch.int32))
    called = fa4.options(pattern, 0.5)
    inspect.signature(cute.flash_attn_func).bind(None, None, None, **called)
    checked = sparsity.infer_block_sparse_expected_shapes(
        called["block_sparse_tensors"], batch_size=1, num_head=2, seqlen_q=200, seqlen_k=300, m_block_size=128,
        n_block_size=128, q_stage=1, context="", sparse_block_size_q=128, sparse_block_size_kv=128,
    )  # fmt: skip
    assert checked == ((1, 2, 2), (1, 2, 2, 3), 1)


COMPILE = """
import types

import cutlass.utils
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from flash_attn.cute import flash_attn_func
from diffusers_accel.kernels.attention import fa4
from diffusers_accel.kernels.pattern import BlockPattern

# Asks the driver, and there is none: how many programs there are is not how they are compiled.
cutlass.utils.HardwareInfo = lambda *_: types.SimpleNamespace(get_device_multiprocessor_count=lambda: 148)
valid = torch.tensor([128, 100, 128, 128, 128, 60], dtype=torch.int32)
called = fa4.options(BlockPattern.full(4, 600, 700, {block_q}, 128, valid if {holes} else None), 0.1)
with FakeTensorMode(), torch.no_grad():
    def fake(x):
        return torch.empty(x.shape, dtype=x.dtype, device="cuda") if torch.is_tensor(x) else x

    called["block_sparse_tensors"] = called["block_sparse_tensors"]._make(map(fake, called["block_sparse_tensors"]))
    called |= {{"aux_tensors": [fake(x) for x in called["aux_tensors"]]}} if {holes} else {{}}
    q, k, v = (torch.empty(1, n, h, 128, dtype=torch.bfloat16, device="cuda") for n, h in ((600, 4), (700, 2), (700, 2)))
    out, lse = flash_attn_func(q, k, v, **called)
    assert out.shape == q.shape and lse.shape == (1, 4, 600) and lse.dtype == torch.float32
"""


@needs_package
@pytest.mark.parametrize("holes", [False, True], ids=["whole blocks", "holes"])
@pytest.mark.parametrize(("arch", "block_q"), [(90, 128), (100, 256)])
def test_the_installed_package_compiles_it(arch: int, block_q: int, holes: bool) -> None:
    """Without a GPU: a minute or two each."""
    program = COMPILE.format(block_q=block_q, holes=holes)
    target = {"FLASH_ATTENTION_ARCH": f"sm_{arch}", "CUTE_DSL_ARCH": f"sm_{arch}a", "FLASH_ATTENTION_NUM_SMS": "132"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | target, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@needs_package
@pytest.mark.parametrize("valid", [False, True], ids=["whole blocks", "holes"])
def test_it_is_right_on_a_gpu(valid: bool) -> None:
    block_q = fa4.BLOCKS.get(hardware.capability(CUDA) // 10, (0, 0))[0]
    if not block_q:
        pytest.skip(str(fa4.refuses(CUDA, BF16, 128, (128, 128), "input")))
    lengths = torch.tensor([128, 100, 0, 128, 16], dtype=torch.int32, device="cuda") if valid else None
    q, k, v = qkv(1, 1000, 600, 4, 128, BF16, "cuda")
    mask = random_pattern(1, 4, 1000, 600, (block_q, 128), 0.5, "cuda").mask()
    pattern = BlockPattern.from_mask(mask, 1000, 600, block_q, 128, lengths)
    assert_attention(attention(q, k, v, pattern, impl="fa4"), q, k, v, pattern.token_mask())
