"""The Gluon kernel: its own source run on a CPU with late copies and random turns, and its machine code for Hopper.

What only a GPU can tell is said in `docs/kernels.md`.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="needs Triton, which has no wheel for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton interprets no Gluon: these tests do it, without that variable", allow_module_level=True)
if not triton.__version__.startswith("3.6."):
    pytest.skip(f"the kernel is written for Triton 3.6, found {triton.__version__}", allow_module_level=True)

from triton._C.libtriton import native_specialize_impl  # noqa: E402
from triton.backends.compiler import BaseBackend, GPUTarget  # noqa: E402
from triton.backends.nvidia.driver import make_tensordesc_arg  # noqa: E402
from triton.experimental.gluon._runtime import GluonASTSource  # noqa: E402

from diffusers_accel.kernels import hardware  # noqa: E402
from diffusers_accel.kernels.attention import attention as attention_by_name  # noqa: E402
from diffusers_accel.kernels.attention import choices, gluon, gluon_kernel  # noqa: E402
from diffusers_accel.kernels.checks import score_scale  # noqa: E402
from diffusers_accel.kernels.pattern import BlockPattern  # noqa: E402
from tests.kernels.gluon_interpreter import Block, Interpreted  # noqa: E402
from tests.kernels.oracle import assert_attention, qkv, random_pattern  # noqa: E402
from tests.kernels.test_compile import SHARED, disassembled  # noqa: E402

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
KERNEL = gluon_kernel.attention_kernel
SEEDS = range(4)  # of the turns that warp groups and copies take
Attend = Callable[..., tuple[Tensor, Tensor]]
everywhere = pytest.mark.parametrize(
    "device", [pytest.param("cpu", id="interpreted"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)]
)


@pytest.fixture
def attend(device: str, monkeypatch: pytest.MonkeyPatch) -> Attend:
    """`attention` by this kernel: on a GPU as users call it, else its source."""
    if device == "cuda":
        if torch.cuda.is_available() and (found := hardware.capability(torch.device("cuda"))) != 90:
            pytest.skip(f"needs compute capability 9.0, found {found / 10}")
        return lambda q, k, v, pattern=None, scale=None, seed=0: attention_by_name(
            q, k, v, pattern, scale=scale, impl="gluon"
        )

    def interpreted(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern | None = None, scale: float | None = None, seed: int = 0
    ) -> tuple[Tensor, Tensor]:
        monkeypatch.setattr(gluon_kernel, "attention_kernel", Interpreted(KERNEL, seed))
        return gluon.attention(q, k, v, pattern, score_scale(scale, q.shape[3]))

    return interpreted


@everywhere
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "dim", "blocks", "density"),
    [
        (300, 300, 128, (128, 128), 0.5),
        (256, 256, 64, (128, 128), 0.7),
        (130, 900, 128, (128, 64), 0.5),  # rings of four
        (257, 192, 64, (256, 128), 1.0),
        (40, 700, 64, (128, 192), 0.8),  # three tiles a block
        (200, 300, 128, (128, 256), 1.0),  # the last block is one tile, of 44 keys
        (128, 900, 128, (128, 128), 1.0),  # eight tiles, the last of 4 keys
    ],
)
def test_random_patterns_are_masked_attention(
    device: str,
    attend: Attend,
    dtype: torch.dtype,
    queries: int,
    keys: int,
    dim: int,
    blocks: tuple[int, int],
    density: float,
) -> None:
    q, k, v = qkv(1, queries, keys, 2, dim, dtype, device, seed=queries)
    pattern = random_pattern(1, 2, queries, keys, blocks, density, device, seed=dim)
    assert_attention(attend(q, k, v, pattern), q, k, v, pattern.token_mask())


@everywhere
def test_rows_of_every_length_whatever_the_turns(device: str, attend: Attend) -> None:
    """None, one, two and more tiles, in rings of two and three."""
    mask = torch.arange(7) < torch.tensor([[0], [1], [2], [3], [7]])
    mask[1] = mask[1].flip(0)  # only the ragged block
    for dim in (64, 128):
        q, k, v = qkv(1, 600, 800, 1, dim, BF16, device, seed=dim)
        pattern = BlockPattern.from_mask(mask[None, None].to(device), 600, 800)
        for seed in SEEDS:
            out, lse = attend(q, k, v, pattern, seed=seed)
            assert_attention((out, lse), q, k, v, pattern.token_mask())
            assert (out[0, :128] == 0).all() and (lse[0, 0, :128] == -torch.inf).all()


@everywhere
def test_batch_rows_read_everything_or_their_own_lists(device: str, attend: Attend) -> None:
    q, k, v = qkv(2, 200, 270, 2, 64, BF16, device)
    assert_attention(attend(q, k, v, scale=0.3), q, k, v, scale=0.3)
    pattern = random_pattern(2, 2, 200, 270, (128, 64), 0.5, device, seed=4)
    assert_attention(attend(q, k, v, pattern), q, k, v, pattern.token_mask())


@everywhere
@pytest.mark.parametrize("key_heads", [1, 2])
def test_grouped_queries_read_the_heads_that_they_share(device: str, attend: Attend, key_heads: int) -> None:
    q, _, _ = qkv(2, 130, 200, 4, 64, BF16, device)
    _, k, v = qkv(2, 130, 200, key_heads, 64, BF16, device, seed=1)
    repeated = [x.repeat_interleave(4 // key_heads, 2) for x in (k, v)]
    pattern = random_pattern(2, 4, 130, 200, (128, 64), 0.6, device)
    found = attend(q, k, v, pattern)
    torch.testing.assert_close(found, attend(q, *repeated, pattern))
    assert_attention(found, q, *repeated, pattern.token_mask())


@everywhere
def test_padding_holes_and_unread_blocks_are_never_weighed(device: str, attend: Attend) -> None:
    queries, keys, heads = 130, 300, 2
    store = torch.full((2, 1, keys + 90, heads, 64), torch.nan, device=device, dtype=BF16)
    q, *kv = qkv(1, queries, keys, heads, 64, BF16, device)
    valid = torch.tensor([64, 20, 64, 0, 17], dtype=torch.int32)
    exists = torch.cat([torch.arange(64) < n for n in valid])[:keys].to(device)
    hidden = ~exists | (torch.arange(keys, device=device) // 64 == 2)
    for i in range(2):
        store[i, :, :keys] = kv[i].masked_fill(hidden[:, None, None], torch.nan)
    mask = torch.ones(1, heads, 2, 5, dtype=torch.bool)
    mask[..., 2] = False
    mask[0, 1, :, 4] = False  # the first tile that this head reads has no token
    pattern = BlockPattern.from_mask(mask.to(device), queries, keys, 128, 64, valid.to(device))
    found = attend(q, *store[:, :, :keys], pattern)
    expected = attention_by_name(q, *store[:, :, :keys], pattern, impl="reference")
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.isfinite().all()
        assert (ours - theirs).abs().max() <= 2e-2 * theirs.abs().max()


@everywhere
def test_strides_that_tma_cannot_read_are_copied(device: str, attend: Attend) -> None:
    q, k, v = qkv(1, 130, 130, 2, 64, F16, device)
    odd = torch.stack([q, k, v], 4)[..., :3].unbind(4)
    fused = torch.stack([q, k, v], 2).unbind(2)
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    expected = attend(q, k, v)
    for inputs in (odd, fused, turned):
        for ours, theirs in zip(attend(*inputs), expected, strict=True):
            assert torch.equal(ours, theirs)
    shared = [x[:, :, :1].expand(-1, -1, 2, -1) for x in (k, v)]
    for ours, theirs in zip(attend(q, *shared), attend(q, *(x.contiguous() for x in shared)), strict=True):
        assert torch.equal(ours, theirs)
    assert gluon_kernel.rows(fused[0], 64).base is fused[0]
    assert 0 not in gluon_kernel.rows(shared[0], 64).strides


def test_the_two_consumers_multiply_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each issues the scores of a tile and the weighted values of the one before, then the other does."""
    issued: list[int] = []
    multiply = Block.multiply

    def noted(self: Block, a: Any, b: Any, acc: Any, **options: Any) -> Any:
        product = multiply(self, a, b, acc, **options)
        issued.append(self.partition())
        return product

    monkeypatch.setattr(Block, "multiply", noted)
    q, k, v = qkv(1, 128, 512, 1, 64, BF16, "cpu")
    for seed in SEEDS:
        issued.clear()
        monkeypatch.setattr(gluon_kernel, "attention_kernel", Interpreted(KERNEL, seed))
        gluon.attention(q, k, v, None, 0.125)
        for consumer in (0, 1):  # the last values have no scores beside them, and no turn
            del issued[len(issued) - 1 - issued[::-1].index(consumer)]
        assert issued == [0, 1, *[0, 0, 1, 1] * 3]


WAIT = "            acc, p = warpgroup_mma_wait(0, deps=[acc, p])  # with p, whose registers are read until here\n"
RELEASE = "            gl.thread_barrier()\n            mbarrier.arrive(v_empty.index(v_stage))\n"
# What a change of a line or two in the kernel does to it: the interpreter has to see it.
BROKEN = [
    ("phase ^ 1)", "phase)", "deadlock"),
    ("    mbarrier.wait(empty.index(stage), phase ^ 1)", "    phase", "is being read|2 arrivals"),
    ("            mbarrier.wait(v_full.index(v_stage), v_phase)\n", "", "has not landed"),
    ("            mbarrier.wait(k_full.index(next_stage), next_phase, pred=tile + 1 < tiles)\n", "", "has not landed"),
    (", pred=tile + 1 < tiles", "", "deadlock"),
    (", pred=tiles > 1", "", "deadlock"),
    ("    mbarrier.wait(q_full.index(CONSUMER), 0)", "    pass", "a copy lands in|has not landed|^$"),
    ("        gl.thread_barrier()  # one thread", "        # one thread", "an arrival before a barrier"),
    ("    gl.thread_barrier()  # all four", "    # all four", "no barrier after the wait"),
    ("            mbarrier.arrive(others)\n", "", "deadlock"),
    ("            mbarrier.arrive(k_empty.index(stage))\n", "", "deadlock"),
    ("            mbarrier.arrive(v_empty.index(v_stage))\n", "", "deadlock"),
    ("barriers(CONSUMERS, STAGES)", "barriers(1, STAGES)", "2 arrivals|is being read|has not landed|deadlock"),
    ("(tile + 1 - CONSUMER) % 2", "(tile + CONSUMER) % 2", "deadlock"),
    ("warpgroup_mma_wait(1, deps=[scores])", "warpgroup_mma_wait(2, deps=[scores])", "is not waited for"),
    ("warpgroup_mma_wait(1, deps=[scores])", "warpgroup_mma_wait(0, deps=[scores])", "let go"),
    (
        "            acc, p = warpgroup_mma_wait(0, deps=[acc, p])  #",
        "            acc = warpgroup_mma_wait(0, deps=[acc])  #",
        "registers",
    ),
    (WAIT + RELEASE, RELEASE + WAIT + "            gl.thread_barrier()\n", "is being read"),
    ("    fence_async_shared()\n    gl.thread_barrier()", "    gl.thread_barrier()", "unfenced"),
    ("    tma.store_wait(0)\n", "", "ends before"),
    ("        load_tile(v_rows, v_ring, tiles - 1, batch, key, key_head, STAGES)\n", "", "deadlock"),
    ("blocks_ptr + block)\n    return", "blocks_ptr + block + 1)\n    return", "pointer|error"),
    ("place = tiles - 1 - tile", "place = tile", "error"),
    ("            acc = acc * gl.convert", "            acc = acc + 0 * gl.convert", "error"),
    ("            p = next_p\n", "", "error"),
    ("last + 1) * BLOCK_K - keys, 0)", "last + 1) * BLOCK_K - keys, 0) * 0", "error|equal"),
]


@pytest.mark.parametrize(
    ("line", "instead", "seen"), BROKEN, ids=[line.strip()[:40] + f" {i}" for i, (line, *_) in enumerate(BROKEN)]
)
def test_a_broken_kernel_is_seen(
    line: str, instead: str, seen: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(str(gluon_kernel.__file__)).read_text(encoding="utf-8")
    assert line in source
    path = tmp_path / "broken.py"
    path.write_text(source.replace(line, instead), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("broken", path)
    assert spec is not None and spec.loader is not None
    broken = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(broken)
    # Tiles of 128 keys, two a block: rows of none, five and one, and the last block has but one, of 68 keys.
    mask = torch.tensor([[False] * 3, [True] * 3, [False, False, True]])
    q, k, v = qkv(1, 300, 580, 1, 128, F16, "cpu", seed=3)
    pattern = BlockPattern.from_mask(mask[None, None], 300, 580, 128, 256)

    def run() -> None:
        for seed in range(30):
            monkeypatch.setattr(gluon_kernel, "attention_kernel", Interpreted(broken.attention_kernel, seed))
            assert_attention(gluon.attention(q, k, v, pattern, 128**-0.5), q, k, v, pattern.token_mask())

    with pytest.raises(AssertionError, match=seen):
        run()


def compiled(
    dim: int, dtype: torch.dtype, block_k: int, absent: tuple[str, ...], group: int = 1, ones: tuple[str, ...] = ()
) -> Any:
    """The kernel for Hopper as Triton's launcher would compile it; `ones` are numbers of 1, which it makes constants."""
    tile = gluon.config(dim, block_k)
    q, k = (gluon_kernel.rows(torch.empty(1, 1, 1, dim, dtype=dtype), n) for n in (64, tile.block_n))
    types = {"q_rows": described(q), "out_rows": described(q), "k_rows": described(k), "v_rows": described(k)}
    types |= {"lse_ptr": "*fp32", "qk_scale": "fp32", "blocks_ptr": "*i32", "counts_ptr": "*i32", "valid_ptr": "*i32"}
    constants = dict.fromkeys(absent) | dict.fromkeys(ones, 1)
    constants |= {"BLOCK_Q": 128, "BLOCK_K": block_k, "STAGES": tile.stages, "HEAD_GROUP": group}
    names = KERNEL.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = GluonASTSource(KERNEL, signature, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


LISTS, ALL, HOLES = ("valid_ptr",), ("blocks_ptr", "counts_ptr", "valid_ptr"), ()


@pytest.mark.parametrize(
    ("dim", "dtype", "block_k", "absent", "group"),
    [
        (128, BF16, 128, LISTS, 1),
        (128, F16, 128, LISTS, 5),
        (128, BF16, 128, ALL, 1),
        (128, BF16, 256, HOLES, 1),
        (128, BF16, 64, LISTS, 1),
        (128, F16, 192, HOLES, 4),
        (64, BF16, 128, LISTS, 1),
        (64, F16, 128, ALL, 4),
        (64, BF16, 128, HOLES, 1),
        (64, BF16, 64, LISTS, 1),
    ],
)
def test_its_machine_code_overlaps_what_it_is_meant_to(
    dim: int, dtype: torch.dtype, block_k: int, absent: tuple[str, ...], group: int
) -> None:
    tile = gluon.config(dim, block_k)
    binary = compiled(dim, dtype, block_k, absent, group)
    assert binary.metadata.num_warps == 12  # three warp groups
    assert binary.metadata.shared <= SHARED[90]
    # A box is 128 bytes wide, the reach of the swizzle, and as long as a tile has tokens.
    boxes = [(x["block_size"], x["swizzle"], x["elem_size"]) for x in binary.metadata.tensordesc_meta]
    assert boxes == [([1, rows, 1, 64], 3, 2) for rows in (64, tile.block_n, tile.block_n, 64)]

    code = disassembled(binary.asm["cubin"])
    # Each partition begins with its share of the registers.
    parts = re.split(r"(?=\bUSETMAXREG\b)", code)
    consumers = [part for part in parts if re.search(r"\bHGMMA\b", part)]
    producers = [part for part in parts if re.search(r"\bUTMALDG\b", part)]
    assert len(consumers) == 2 and len(producers) == 1 and producers[0] not in consumers
    for part, share in [(part, 240) for part in consumers] + [(producers[0], 24)]:
        assert re.match(rf"USETMAXREG\.\w+\.CTAPOOL (?:\w+, )?{share:#x}\b", part)
        assert max(int(n) for n in re.findall(r"\bR(\d+)\b", part)) < share
    for part in consumers:
        found = [name for line in part.split("\n") for name, sign in EVENTS.items() if re.search(sign, line)]
        multiply_scores, multiply_values = ["product"] * (dim // 16), ["product"] * (tile.block_n // 16)
        softmax = ["exp2"] * (tile.block_n // 2 + 2)  # of a thread: its weights, and its two rows' shrink
        assert [name for name in found if name not in ("barrier", "arrive")] == [
            *multiply_scores, "wait 0", *softmax,
            *multiply_scores, *multiply_values, "wait 1", *softmax, "wait 0",
            *multiply_values, "wait 0", "store",
        ]  # fmt: skip
        # Warps that have waited for products wait for each other before one thread tells others, or what is read is written.
        order = [name for name in found if name not in ("exp2", "product")]
        assert order.count("arrive") == 5
        for after, name in zip(order[1:], order[:-1], strict=True):
            assert after == "barrier" or not name.startswith("wait")


@pytest.mark.parametrize("absent", [LISTS, ALL, HOLES], ids=["lists", "all", "holes"])
def test_numbers_of_one_are_constants(absent: tuple[str, ...]) -> None:
    binary = compiled(64, BF16, 128, absent, ones=("heads", "queries", "keys", "list_rows", "capacity"))
    assert re.search(r"\bUTMASTG\b", disassembled(binary.asm["cubin"]))


EVENTS = {
    "product": r"\bHGMMA\b",
    "wait 0": r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x0\b",
    "wait 1": r"\bWARPGROUP\.DEPBAR\.LE gsb0, 0x1\b",
    "exp2": r"\bMUFU\.EX2\b",
    "barrier": r"\bBAR\.SYNC\S* 0x\w+, 0x80\b",  # of one group's warps
    "arrive": r"\bSYNCS\.ARRIVE\.\S*A1T0\b",
    "store": r"\bUTMASTG\b",
}


def described(x: Any) -> str:
    """The type that Triton's launcher gives a descriptor."""
    return str(native_specialize_impl(BaseBackend, x, False, True, True)[0])


def test_cuda_is_told_how_the_tensor_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Triton's launcher hands on for k of a fused projection: a wrong step or box would only show on a GPU."""
    told: list[tuple[Any, ...]] = []
    utils = SimpleNamespace(fill_tma_descriptor=lambda *arguments: told.append(arguments))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=utils)))
    k = torch.zeros(1, 300, 3, 4, 64, dtype=BF16)[:, :, 1]
    boxes = compiled(64, BF16, 128, LISTS).metadata.tensordesc_meta
    make_tensordesc_arg(gluon_kernel.rows(k, 128), boxes[1])
    swizzle, size, kind, padding = (
        3,
        2,
        9,
        0,
    )  # of 128 bytes; bytes of an element; CU_TENSOR_MAP_DATA_TYPE_BFLOAT16; zeros
    assert told == [
        (k.data_ptr(), swizzle, size, kind, [1, 128, 1, 64], [1, 300, 4, 64], [300 * 768, 768, 64, 1], padding)
    ]


def test_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    device, blocks = torch.device("cuda"), (128, 128)
    assert "runs on CUDA devices, found cpu" in str(gluon.refuses(torch.device("cpu"), BF16, 128, blocks, "input"))
    monkeypatch.setattr(hardware, "capability", lambda device: 100)
    assert "9.0 (Hopper), found 10.0" in str(gluon.refuses(device, BF16, 128, blocks, "input"))
    monkeypatch.setattr(hardware, "capability", lambda device: 90)
    for dim in (64, 128):
        assert gluon.refuses(device, BF16, dim, blocks, "input") is None
        assert gluon.refuses(device, F16, dim, (256, 192), "input") is None
    assert "float16 and bfloat16" in str(gluon.refuses(device, F32, 128, blocks, "input"))
    assert "head dims 64 and 128, found 96" in str(gluon.refuses(device, BF16, 96, blocks, "input"))
    assert "precision input, found int8" in str(gluon.refuses(device, BF16, 128, blocks, "int8"))
    assert "128 queries x 64 keys, found 64 queries" in str(gluon.refuses(device, BF16, 128, (64, 64), "input"))
    assert "x 96 keys" in str(gluon.refuses(device, BF16, 128, (128, 96), "input"))
    monkeypatch.setattr(triton, "__version__", "3.10.1")
    assert "Gluon of Triton 3.6, found Triton 3.10.1" in str(gluon.refuses(device, BF16, 128, blocks, "input"))


def test_nothing_takes_it_unasked() -> None:
    names = [choice.name for choice in choices("cpu", BF16, 128)]
    assert names.index("portable") < names.index("gluon")
