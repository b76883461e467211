"""Every Triton kernel compiles for every architecture without a GPU, and the machine code is what was meant.

What is checked is what cannot be seen under the interpreter: that a tile fits into shared memory, that nothing spills to
the stack, and that the products run on the matrix units. That it is right or fast, only a GPU can tell.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="needs Triton, which has no wheel for this platform")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreted kernel cannot be compiled in the same process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from diffusers_accel.kernels.attention import hopper  # noqa: E402
from diffusers_accel.kernels.attention import portable as attention  # noqa: E402
from diffusers_accel.kernels.merge import portable as merge  # noqa: E402
from diffusers_accel.kernels.pool import portable as pool  # noqa: E402
from diffusers_accel.kernels.pooled import portable as pooled  # noqa: E402
from diffusers_accel.kernels.prep import portable as prep  # noqa: E402
from diffusers_accel.kernels.quantize import KEY_GROUP  # noqa: E402
from diffusers_accel.kernels.quantize import portable as quantize  # noqa: E402
from diffusers_accel.kernels.quantize.quantized import SMALLEST  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
# Bytes of shared memory that one program may have, by compute capability.
SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
# The instruction of the matrix units for 2-byte inputs; fp32 is computed as such, by fused multiply-add.
MATRIX = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
# Those for INT8, of which Triton has none on the newest, and for FP8.
INT8 = {80: "IMMA", 89: "IMMA", 90: "IGMMA", 100: "IMMA", 120: "IMMA"}
FP8 = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

READ_16 = re.compile(r"\b(?:LDG|LDGSTS)\.E\S*\.128\b")  # reads of 16 bytes

every_arch = pytest.mark.parametrize("arch", SHARED)
# Of variants that stand beside others: one architecture for each, in turn, and all with --every-arch.
in_turn = pytest.mark.arch_in_turn


def wide(*values: Any) -> Any:
    """A case of head dims above 128, which compile for long."""
    return pytest.param(*values, marks=in_turn)


def compiled(kernel: Any, arch: int, types: dict[str, Any], constants: dict[str, Any], **options: int) -> str:
    """The machine code of the kernel, compiled as the launcher would; fails where a gate does."""
    return disassembled(binary_of(kernel, arch, types, constants, **options).asm["cubin"])


def binary_of(kernel: Any, arch: int, types: dict[str, Any], constants: dict[str, Any], **options: int) -> Any:
    """All that the compiler made of the kernel; fails where its shared memory does not fit."""
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if name not in constants and divisible_by_16(name, constants)]
    attributes: dict[tuple[int, ...], Any] = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    for name, kind in signature.items():
        if isinstance(kind, tuple):
            attributes |= {(names.index(name), i): [["tt.divisibility", 16]] for i in range(len(kind))}
    source = ASTSource(
        kernel, signature, {(names.index(name),): value for name, value in constants.items()}, attributes
    )
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    assert binary.metadata.shared <= SHARED[arch]
    return binary


def divisible_by_16(name: str, constants: dict[str, Any]) -> bool:
    """Whether the launcher would tell the compiler so of an argument: of contiguous tensors, whose other sizes may be odd."""
    if name in ("codes_stride_d", "v_out_stride_d") or (
        name.startswith("v_stride_") and constants.get("v_stride_s") == 1
    ):
        return True  # FP8 values, whose tokens are filled up to 16
    return name.endswith("_ptr") or ("stride_" in name and constants.get("DIM", 0) % 16 == 0)


def disassembled(cubin: bytes) -> str:
    """The machine code; fails where the kernel has a stack or spills to it."""
    if not (TOOLS / "nvdisasm").is_file():
        pytest.skip(f"this Triton brings no nvdisasm in {TOOLS}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([TOOLS / tool, *flags, path], capture_output=True, text=True, check=True).stdout
            for tool, *flags in (
                ("cuobjdump", "-res-usage"),
                ("nvdisasm", "-c", "-ndf"),
            )  # without analysis of data flow
        )
    assert re.findall(r"STACK:(\d+)", usage) == ["0"], usage
    assert not re.findall(r"\b(?:STL|LDL)\b", code), "registers are spilled"
    return code


def attention_variant(arch: int, dim: int, dtype: torch.dtype, *args: Any, **kwargs: Any) -> str:
    return disassembled(attention_binary(arch, dim, dtype, *args, **kwargs).asm["cubin"])


def attention_binary(
    arch: int,
    dim: int,
    dtype: torch.dtype,
    blocks: tuple[int, int] = (128, 128),
    absent: tuple[str, ...] = ("valid_ptr",),
    precision: str = "input",
    group: int = 1,
    ones: tuple[str, ...] = (),
    end: bool = False,
) -> Any:
    """`ones`: integer arguments that are 1, which the launcher makes constants."""
    tile = attention.config(arch, dim, dtype, blocks, precision)
    types, constants = attention_arguments(dim, dtype, blocks, absent, precision, group, end)
    constants |= {"PADDED_DIM": attention.padded_dim(dim, precision), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    constants |= dict.fromkeys(ones, 1)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    return binary_of(attention.attention_kernel, arch, types, constants, **options)


def attention_arguments(
    dim: int,
    dtype: torch.dtype,
    blocks: tuple[int, int],
    absent: tuple[str, ...],
    precision: str,
    group: int = 1,
    end: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Types and constants that both attention kernels share. `end`: a part is merged, and rows have places of their own."""
    names, scales = ("q_ptr", "k_ptr", "v_ptr", "out_ptr"), ("q_scale_ptr", "k_scale_ptr", "v_scale_ptr", "offset_ptr")
    types = dict.fromkeys(names, "*" + NAMES[dtype]) | {"lse_ptr": "*fp32", "qk_scale": "fp32"}
    types |= dict.fromkeys(("blocks_ptr", "counts_ptr", "valid_ptr", "order_ptr"), "*i32")
    types |= {"part_out_ptr": types["out_ptr"], "part_lse_ptr": "*fp32", "rows_ptr": "*i32"}
    constants: dict[str, Any] = dict.fromkeys(absent) | {"v_stride_d": 1}
    if not end:
        constants |= dict.fromkeys(("part_out_ptr", "part_lse_ptr", "rows_ptr"))
    if "blocks_ptr" in absent:
        constants["order_ptr"] = None
    if precision == "input":
        constants |= dict.fromkeys(scales)
    else:
        types |= dict.fromkeys(names[:2], "*i8") | dict.fromkeys(scales, "*fp32")
        constants |= {"v_scale_ptr": None}
    if precision == "int8_fp8":
        types["v_ptr"] = "*fp8e4nv"
        del constants["v_scale_ptr"], constants["v_stride_d"]
        constants["v_stride_s"] = 1
    constants |= {"DIM": dim, "BLOCK_Q": blocks[0], "BLOCK_K": blocks[1]}
    return types, constants | {"KEY_GROUP": KEY_GROUP, "P_LOG2": attention.P_LOG2[precision], "HEAD_GROUP": group}


def product_loops(code: str) -> list[int]:
    """The instructions of the two shortest loops that multiply matrices: one for each warp group that computes."""
    label, instruction = re.compile(r"^(\.L_\w+):", re.M), re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", re.M)
    body = instruction.findall(code)
    starts = {found[1]: len(instruction.findall(code, 0, found.start())) for found in label.finditer(code)}
    jumps = ((re.search(r"\bBRA\b.*`\((\.L_\w+)\)", x), at + 1) for at, x in enumerate(body))
    loops = (body[starts[found[1]] : end] for found, end in jumps if found)  # empty where it jumps ahead
    return sorted(len(loop) for loop in loops if any("GMMA" in x for x in loop))[:2]


# Instructions of a loop over tiles without a mask, by precision, channels and keys of a tile; a mask adds one for each key.
LOOP = {
    ("input", 64, 128): 435,
    ("input", 128, 128): 470,
    ("input", 64, 64): 275,
    ("input", 128, 64): 320,
    ("int8", 64, 64): 315,
    ("int8", 128, 64): 350,
    ("int8_fp8", 64, 64): 345,
    ("int8_fp8", 128, 64): 385,
}

LISTS, ALL, HOLES = ("valid_ptr",), ("blocks_ptr", "counts_ptr", "valid_ptr"), ()


@pytest.mark.parametrize("precision", ["input", "int8", "int8_fp8"])
@pytest.mark.parametrize(
    ("dim", "dtype", "blocks", "absent", "masked", "group", "end"),
    [
        (128, BF16, (128, 128), LISTS, False, 1, False),
        (128, BF16, (128, 128), LISTS, True, 1, True),  # the common case
        (128, BF16, (128, 128), LISTS, True, 5, False),
        (128, BF16, (128, 128), HOLES, True, 1, True),
        (128, BF16, (128, 128), ALL, False, 1, False),
        (128, F16, (128, 128), LISTS, True, 1, False),
        (64, BF16, (128, 128), LISTS, True, 1, True),
        (64, BF16, (128, 128), LISTS, True, 4, False),
        (64, BF16, (128, 128), HOLES, True, 1, False),
        (64, BF16, (128, 64), LISTS, False, 1, False),
        (96, BF16, (128, 64), LISTS, True, 1, True),
    ],
)
def test_hopper_specialises_its_warps(
    dim: int,
    dtype: torch.dtype,
    blocks: tuple[int, int],
    absent: tuple[str, ...],
    masked: bool,
    group: int,
    end: bool,
    precision: str,
) -> None:
    """`end`: with the merge of a part and places for the rows, which only add to the code behind the loops."""
    types, constants = attention_arguments(dim, dtype, blocks, absent, precision, group, end)
    tile, padded = hopper.config(dim, blocks[1], precision), hopper.padded_dim(dim)
    constants |= {"PADDED_DIM": padded, "BLOCK_M": hopper.QUERIES, "BLOCK_N": tile.block_n}
    constants |= {"MASKED": masked, "STAGES": tile.stages}
    box = f"[1,1,{padded},{tile.block_n}]" if precision == "int8_fp8" else f"[1,{tile.block_n},1,{padded}]"
    types |= {"k_rows": f"tensordesc<{types['k_ptr'][1:]}[1,{tile.block_n},1,{padded}]>"}
    types |= {"v_rows": f"tensordesc<{types['v_ptr'][1:]}{box}>"}
    code = compiled(hopper.attention_kernel, 90, types, constants, num_warps=4, num_stages=tile.stages)
    # One warp group gives registers away to two that compute; it loads q, k and v by TMA.
    assert len(re.findall(r"\bUSETMAXREG\b", code)) >= 3
    assert len(re.findall(r"\bUTMALDG\.2D\b", code)) == 2 and len(re.findall(r"\bUTMALDG\.4D\b", code)) == 2
    # Each program makes a tensor map of its queries, and of their scales where they have some; no others.
    assert len(re.findall(r"\bUTMACCTL\.IV\b", code)) == (1 if precision == "input" else 2)
    loops = product_loops(code)
    assert max(loops) <= LOOP[precision, padded, tile.block_n] + (tile.block_n if masked else 0), loops
    expected = {"input": ("HGMMA",), "int8": ("IGMMA", "HGMMA"), "int8_fp8": ("IGMMA", "QGMMA")}[precision]
    assert tuple(x for x in ("IGMMA", "HGMMA", "QGMMA") if re.search(rf"\b{x}\b", code)) == expected
    assert len(re.findall(r"\bWARPGROUP\.DEPBAR\b", code)) <= 8
    if precision == "int8_fp8":  # two groups of 64 rows: one for each accumulator, as sums are added outside
        accumulators = 2 * 64 * padded // 128
        scores = 2 * 64 * tile.block_n // 128
        assert len(re.findall(r"\bFFMA\b", code)) >= accumulators + scores


@every_arch
@pytest.mark.parametrize(
    ("dim", "dtype"), [(64, BF16), (96, BF16), (128, BF16), (128, F16), wide(160, F16), wide(256, BF16)]
)
def test_attention_runs_on_the_matrix_units(arch: int, dim: int, dtype: torch.dtype) -> None:
    code = attention_variant(arch, dim, dtype)
    products = len(re.findall(rf"\b{MATRIX[arch]}\b", code))
    assert products > 0
    # A wait after every product would mean that they were serialised for want of registers.
    assert len(re.findall(r"\bWARPGROUP\.DEPBAR\b", code)) <= 8


@every_arch
@pytest.mark.parametrize("dim", [64, 96, 128, wide(256)])
def test_fp32_attention_stays_fp32(arch: int, dim: int) -> None:
    code = attention_variant(arch, dim, F32)
    assert not re.search(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", code)
    assert len(re.findall(r"\bFFMA2?\b", code)) > dim


@in_turn
@every_arch
@pytest.mark.parametrize(
    ("dim", "blocks", "absent"),
    [
        (128, (128, 128), ALL),  # takes the most registers
        *(wide(dim, (128, 128), ALL) for dim in (160, 256)),
        (128, (128, 128), HOLES),
        (128, (128, 64), LISTS),
    ],
    ids=["dense", "dense, 160 channels", "dense, 256 channels", "cut blocks", "64 keys a block"],
)
def test_attention_variants(arch: int, dim: int, blocks: tuple[int, int], absent: tuple[str, ...]) -> None:
    assert re.search(rf"\b{MATRIX[arch]}\b", attention_variant(arch, dim, BF16, blocks, absent))


@every_arch
@pytest.mark.parametrize("dim", [64, 96, 128, wide(256)])
def test_int8_scores_run_on_the_matrix_units(arch: int, dim: int) -> None:
    code = attention_variant(arch, dim, BF16, precision="int8")
    assert re.search(rf"\b{INT8[arch]}\b", code) and re.search(rf"\b{MATRIX[arch]}\b", code)
    assert len(re.findall(r"\bWARPGROUP\.DEPBAR\b", code)) <= 8


@pytest.mark.parametrize("arch", FP8)
@pytest.mark.parametrize("dim", [64, 96, 128, wide(256)])
def test_fp8_values_run_on_the_matrix_units_and_are_summed_outside(arch: int, dim: int) -> None:
    code = attention_variant(arch, dim, BF16, precision="int8_fp8")
    assert re.search(rf"\b{INT8[arch]}\b", code) and re.search(rf"\b{FP8[arch]}\b", code)
    assert not re.search(rf"\b{MATRIX[arch]}\b", code)
    assert len(re.findall(r"\bWARPGROUP\.DEPBAR\b", code)) <= 8
    # In both loops one for each accumulator, in the first also one for each score; FFMA2 does two.
    tile = attention.config(arch, dim, BF16, (128, 128), "int8_fp8")
    sums, scores = (
        tile.block_m * n // (32 * tile.warps) for n in (attention.padded_dim(dim, "int8_fp8"), tile.block_n)
    )
    added = len(re.findall(r"\bFFMA\b", code)) + 2 * len(re.findall(r"\bFFMA2\b", code))
    assert added >= 2 * sums + scores


@in_turn
@every_arch
@pytest.mark.parametrize("precision", ["int8", "int8_fp8"])
@pytest.mark.parametrize(
    ("dim", "blocks", "absent"),
    [
        (128, (128, 128), ALL),
        *(wide(dim, (128, 128), ALL) for dim in (160, 256)),
        (128, (128, 128), HOLES),
        (128, (64, 32), LISTS),
    ],
    ids=["dense", "dense, 160 channels", "dense, 256 channels", "cut blocks", "small blocks"],
)
def test_quantized_attention_variants(
    arch: int, precision: str, dim: int, blocks: tuple[int, int], absent: tuple[str, ...]
) -> None:
    if precision == "int8_fp8" and arch not in FP8:
        with pytest.raises(Exception, match="fp8e4nv not supported"):
            attention_variant(arch, dim, BF16, blocks, absent, precision)
        return
    assert re.search(rf"\b{INT8[arch]}\b", attention_variant(arch, dim, BF16, blocks, absent, precision))


@in_turn
@every_arch
@pytest.mark.parametrize("dim", [64, 96, 128])
@pytest.mark.parametrize(
    ("precision", "dtype", "group"), [("input", BF16, 4), ("input", F32, 4), ("int8", BF16, 5), ("int8_fp8", BF16, 4)]
)
def test_attention_of_grouped_queries(arch: int, dim: int, precision: str, dtype: torch.dtype, group: int) -> None:
    if precision == "int8_fp8" and arch not in FP8:
        pytest.skip(f"compute capability {arch / 10} has no FP8")
    code = attention_variant(arch, dim, dtype, precision=precision, group=group)
    products = {"int8": INT8, "int8_fp8": FP8}.get(precision, MATRIX)[arch]
    assert bool(re.search(rf"\b{products}\b", code)) == (dtype != F32)
    assert len(re.findall(r"\bWARPGROUP\.DEPBAR\b", code)) <= 8


@in_turn
@every_arch
@pytest.mark.parametrize("dim", [64, 72, 128])
@pytest.mark.parametrize(("precision", "dtype"), [("input", BF16), ("input", F32), ("int8", BF16), ("int8_fp8", BF16)])
def test_attention_that_merges_a_part_and_moves_its_rows(
    arch: int, dim: int, precision: str, dtype: torch.dtype
) -> None:
    """Nothing spills; the part is read and the output is written 16 bytes at a time where the channels allow it."""
    if precision == "int8_fp8" and arch not in FP8:
        pytest.skip(f"compute capability {arch / 10} has no FP8")
    plain, code = (attention_variant(arch, dim, dtype, precision=precision, end=end) for end in (False, True))
    assert len(READ_16.findall(code)) > len(READ_16.findall(plain))


def waits_in_loops(binary: Any) -> list[list[int]]:
    """For each loop, how many of the copies under way each of its waits leaves under way."""
    loops: list[tuple[str, list[int]]] = []  # its indentation, its waits
    done: list[list[int]] = []
    for line in binary.asm["ttgir"].splitlines():
        indent = line[: len(line) - len(line.lstrip())]
        if "scf.for" in line:
            loops.append((indent, []))
        elif loops and line.startswith(loops[-1][0] + "}"):
            done.append(loops.pop()[1])
        elif loops and (wait := re.search(r"\bttg\.async_wait\b.*\bnum = (\d+)", line)):
            loops[-1][1].append(int(wait[1]))
    assert not loops
    return done


# Each row of the table on each architecture that takes it, with and without padded channels.
SHIPPED = sorted(
    {
        (arch, dim, precision if precision != "input" else str(dtype))
        for arch, dim, (precision, dtype) in itertools.product(
            SHARED,
            (40, 64, 72, 96, 128, 160, 256),
            (("input", BF16), ("input", F32), ("int8", BF16), ("int8_fp8", BF16)),
        )
        if precision != "int8_fp8" or arch in FP8
    }
)


@in_turn
# Of the two head dims of a row above 128, the padded one is left out with holes: it has one loop less, and registers to spare.
@pytest.mark.parametrize(
    ("arch", "dim", "kind", "absent"),
    [
        pytest.param(*case, absent, id="-".join((*map(str, case), name)))
        for case, (absent, name) in itertools.product(SHIPPED, ((LISTS, "whole blocks"), (HOLES, "cut blocks")))
        if (case[1], absent) != (160, HOLES)
    ],
)
def test_tiles_are_loaded_while_others_are_computed(arch: int, dim: int, kind: str, absent: tuple[str, ...]) -> None:
    precision, dtype = (kind, BF16) if kind in ("int8", "int8_fp8") else ("input", F32 if kind == str(F32) else BF16)
    binary = attention_binary(arch, dim, dtype, absent=absent, precision=precision)
    waits = waits_in_loops(binary)
    # One loop for whole blocks, where there are any, and one for those with an end. A wait for all copies overlaps nothing.
    assert len(waits) == 2 - (absent == HOLES) and all(waits)
    assert min(min(of) for of in waits) >= 2, waits
    disassembled(binary.asm["cubin"])


def test_every_row_of_the_table_is_compiled() -> None:
    taken = set()
    for arch, dim, kind in SHIPPED:
        precision, dtype = (
            (kind, BF16) if kind in ("int8", "int8_fp8") else ("input", F32 if kind == str(F32) else BF16)
        )
        taken.add(attention.row(arch, dim, dtype, precision))
    assert taken == set(attention.CONFIGS)


@in_turn
@every_arch
@pytest.mark.parametrize("dim", [40, 72])
@pytest.mark.parametrize(("dtype", "precision"), [(BF16, "input"), (F32, "input"), (BF16, "int8"), (BF16, "int8_fp8")])
def test_head_dims_that_16_does_not_divide_are_read_16_bytes_at_a_time(
    arch: int, dim: int, dtype: torch.dtype, precision: str
) -> None:
    if precision == "int8_fp8" and arch not in FP8:
        pytest.skip(f"compute capability {arch / 10} has no FP8")
    code = attention_variant(arch, dim, dtype, precision=precision)
    narrow = re.findall(r"\bLDGSTS\.E(?!\S*\.(?:128|64))\S*", code)
    if precision == "input":  # codes come by 8, and one scale for each tile
        assert len(READ_16.findall(code)) >= 12 and not narrow and not re.search(r"\bLDGSTS\.E\S*\.64\b", code)
    else:
        assert len(re.findall(r"\bLDGSTS\.E\S*\.(?:64|128)\b", code)) >= 12 and len(narrow) <= 6


@in_turn
@every_arch
@pytest.mark.parametrize("precision", ["input", "int8", "int8_fp8"])
@pytest.mark.parametrize(
    ("absent", "ones"),
    [
        (LISTS, ("heads",)),
        (LISTS, ("list_rows",)),
        (LISTS, ("capacity",)),
        (LISTS, ("heads", "list_rows", "capacity", "queries")),
        (HOLES, ("heads", "list_rows", "capacity", "keys")),
        (ALL, ("heads", "list_rows", "queries", "keys")),
    ],
)
def test_arguments_that_are_1_are_constants(
    arch: int, absent: tuple[str, ...], ones: tuple[str, ...], precision: str
) -> None:
    if precision == "int8_fp8" and arch not in FP8:
        pytest.skip(f"compute capability {arch / 10} has no FP8")
    products = {"int8": INT8, "int8_fp8": FP8}.get(precision, MATRIX)[arch]
    code = attention_variant(arch, 128, BF16, absent=absent, precision=precision, ones=ones)
    assert re.search(rf"\b{products}\b", code)


def assert_wide(code: str) -> None:
    """Rows of 2 bytes an element are read 16 bytes at a time, none of them an element at a time."""
    assert READ_16.search(code) and not re.search(r"\bLDG\.E\S*\.U16\b", code)


QUANTIZE = {
    "queries": (quantize.quantize_queries_kernel, {"q_ptr": "*bf16", "codes_ptr": "*i8"}),
    "keys": (quantize.quantize_keys_kernel, {"k_ptr": "*bf16", "codes_ptr": "*i8"}),
    "largest values": (quantize.largest_values_kernel, {"v_ptr": "*bf16", "largest_ptr": "*fp32"}),
    "values": (quantize.quantize_values_kernel, {"v_ptr": "*bf16", "codes_ptr": "*fp8e4nv"}),
}


def quantize_variant(name: str, arch: int, dim: int, group: int = 1, ones: tuple[str, ...] = ()) -> str:
    kernel, types = QUANTIZE[name]
    constants: dict[str, Any] = {"DIM": dim, "PADDED_DIM": triton.next_power_of_2(dim), "TOKENS": KEY_GROUP}
    constants |= {"INT8_MAX": 127.0, "SMALLEST": SMALLEST, "HEAD_GROUP": group, "EIGHTS": True}
    constants |= dict.fromkeys(("stride_d", *ones), 1)
    types = {"mean_ptr": "*fp32", "scale_ptr": "*fp32", "offset_ptr": "*fp32", "valid_ptr": "*i32"} | types
    return compiled(kernel, arch, types, constants, num_warps=4)


@in_turn
@every_arch
@pytest.mark.parametrize("dim", [40, 64, 72, 96, 128, 256])
def test_quantize(arch: int, dim: int) -> None:
    for name in QUANTIZE if arch in FP8 else ("queries", "keys"):
        code = quantize_variant(name, arch, dim)
        assert_wide(code)
        if name == "queries":  # the only one that knows of groups
            assert_wide(quantize_variant(name, arch, dim, 4))
        if name == "values":
            assert re.search(r"\bSTG\.E\S*\.128\b", code) and not re.search(r"\bSTG\.E\S*\.U8\b", code)


@pytest.mark.parametrize("name", QUANTIZE)
@pytest.mark.parametrize("ones", [("heads", "stride_h"), ("queries", "keys", "stride_s"), ("block", "stride_b")])
def test_arguments_of_quantize_that_are_1_are_constants(name: str, ones: tuple[str, ...]) -> None:
    assert_wide(quantize_variant(name, 90, 72, ones=ones))


PREP_SCALES = ("mean_ptr", "q_scale_ptr", "k_scale_ptr", "offset_ptr", "v_scale_ptr")


def prep_variant(
    arch: int,
    precision: str,
    dim: int,
    pooled: bool = True,
    group: int = 1,
    key_rows: bool = False,
    ones: tuple[str, ...] = (),
) -> tuple[str, str]:
    """The code of what measures, and of what prepares."""
    outs = {"q_out_ptr": "*i8", "k_out_ptr": "*i8", "v_out_ptr": "*fp8e4nv" if precision == "int8_fp8" else "*bf16"}
    types = outs if precision != "input" else dict.fromkeys(outs, "*bf16")
    types = types | dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), "*bf16") | {"rows_ptr": "*i64", "key_rows_ptr": "*i64"}
    types |= dict.fromkeys((*PREP_SCALES, "q_means_ptr", "k_means_ptr", "largest_ptr"), "*fp32")
    constants: dict[str, Any] = {"DIM": dim, "PADDED_DIM": triton.next_power_of_2(dim), "BLOCK": 128}
    constants |= {"TOKENS": KEY_GROUP, "HEAD_GROUP": group, "EIGHTS": True}
    constants |= dict.fromkeys(("q_stride_d", "k_stride_d", "v_stride_d", *ones), 1)
    if precision != "int8_fp8":
        constants["v_out_stride_d"] = 1
    measure = compiled(prep.measure_kernel, arch, types, constants, num_warps=8)
    absent = {"input": PREP_SCALES, "int8": ("v_scale_ptr", "k_means_ptr"), "int8_fp8": ("k_means_ptr",)}[precision]
    if not pooled:
        absent = (*absent, "q_means_ptr", "k_means_ptr")
    if not key_rows:
        absent = (*absent, "key_rows_ptr")
    constants |= dict.fromkeys(absent) | {"INT8_MAX": 127.0, "SMALLEST": SMALLEST}
    return measure, compiled(prep.prep_kernel, arch, types, constants, num_warps=8)


@in_turn
@every_arch
@pytest.mark.parametrize("precision", ["input", "int8", "int8_fp8"])
@pytest.mark.parametrize(
    ("dim", "pooled", "group", "key_rows"),
    [
        *itertools.product((64, 96, 128), (True, False), (1,), (False,)),
        *((dim, True, 1, False) for dim in (40, 72, 256)),
        (128, True, 5, False),
        (128, True, 1, True),
    ],
)
def test_prep(arch: int, precision: str, dim: int, pooled: bool, group: int, key_rows: bool) -> None:
    if precision == "int8_fp8" and arch not in FP8:
        pytest.skip(f"compute capability {arch / 10} has no FP8")
    measure, code = prep_variant(arch, precision, dim, pooled, group, key_rows)
    assert_wide(measure)
    assert_wide(code)
    assert len(READ_16.findall(code)) >= 3 and not re.search(r"\bSTG\.E\S*\.U(?:8|16)\b", code)
    if dim % 16 == 0 or precision != "int8_fp8":  # codes of other head dims are stored 8 at a time
        assert re.search(r"\bSTG\.E\S*\.128\b", code)


@pytest.mark.parametrize("precision", ["input", "int8", "int8_fp8"])
@pytest.mark.parametrize(
    "ones",
    [
        ("heads", "model_heads", "key_heads", "q_stride_h", "k_stride_h", "v_stride_h"),
        ("queries", "q_stride_s", "q_stride_b"),
        ("queries", "keys", "k_stride_s", "v_stride_s", "k_stride_b", "v_stride_b"),
    ],
    ids=["one head", "one query", "one token"],
)
def test_arguments_of_prep_that_are_1_are_constants(precision: str, ones: tuple[str, ...]) -> None:
    for key_rows in (False, True):
        for code in prep_variant(90, precision, 72, key_rows=key_rows, ones=ones):
            assert_wide(code)


def merge_variant(arch: int, dim: int, ones: tuple[str, ...] = ()) -> str:
    types = {"part_outs": ("*bf16",) * 3, "part_lses": ("*fp32",) * 3, "out_ptr": "*bf16", "lse_ptr": "*fp32"}
    constants = {"DIM": dim, "PADDED_DIM": triton.next_power_of_2(dim), "BLOCK": 32} | dict.fromkeys(ones, 1)
    return compiled(merge.merge_kernel, arch, types, constants, num_warps=4)


@in_turn
@every_arch
@pytest.mark.parametrize("dim", [40, 72, 128, 256])
def test_merge(arch: int, dim: int) -> None:
    code = merge_variant(arch, dim)
    assert_wide(code)
    assert len(re.findall(r"\bLDG\.E\.128\b", code)) >= 3  # every part is read in 16-byte pieces


@pytest.mark.parametrize("ones", [("tokens",), ("heads",), ("tokens", "heads")])
def test_arguments_of_merge_that_are_1_are_constants(ones: tuple[str, ...]) -> None:
    assert_wide(merge_variant(90, 72, ones))


def pool_variant(arch: int, dim: int, holes: bool = True, ones: tuple[str, ...] = ()) -> str:
    types = {"x_ptr": "*bf16", "means_ptr": "*fp32", "valid_ptr": "*i32"}
    constants: dict[str, Any] = {"DIM": dim, "PADDED_DIM": triton.next_power_of_2(dim), "BLOCK": 32, "EIGHTS": True}
    constants |= dict.fromkeys(("stride_d", *ones), 1) | ({} if holes else {"valid_ptr": None})
    return compiled(pool.pool_kernel, arch, types, constants, num_warps=4)


@in_turn
@every_arch
@pytest.mark.parametrize("dim", [40, 72, 128, 256])
def test_pool(arch: int, dim: int) -> None:
    assert_wide(pool_variant(arch, dim))


@pytest.mark.parametrize("holes", [True, False])
@pytest.mark.parametrize(
    "ones", [("tokens", "stride_s"), ("heads", "stride_h"), ("block", "stride_b"), ("tokens", "heads", "block")]
)
def test_arguments_of_pool_that_are_1_are_constants(ones: tuple[str, ...], holes: bool) -> None:
    assert_wide(pool_variant(90, 72, holes, ones))


def pooled_binary(
    arch: int, dim: int, dtype: torch.dtype, block_q: int, group: int = 1, ones: tuple[str, ...] = ()
) -> Any:
    tile = pooled.config(arch, dim, dtype, block_q)
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*" + NAMES[dtype])
    types |= {"read_ptr": "*u8", "lengths_ptr": "*i32", "lse_ptr": "*fp32", "qk_scale": "fp32"}
    constants = {"DIM": dim, "PADDED_DIM": pooled.padded_dim(dim), "BLOCK_Q": block_q, "HEAD_GROUP": group}
    constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n} | dict.fromkeys(ones, 1)
    return binary_of(pooled.pooled_kernel, arch, types, constants, num_warps=tile.warps, num_stages=tile.stages)


@in_turn
# The products of Hopper and later want 64 rows, smaller tiles take the older instruction: head dims that are cut into other
# tiles have one case of each.
@every_arch
@pytest.mark.parametrize(
    ("dim", "dtype", "block_q", "group"),
    [
        *((dim, BF16, block_q, 1) for dim in (64, 96, 128) for block_q in (16, 32, 64, 128)),
        *((dim, dtype, 128, group) for dim in (64, 96, 128) for dtype, group in ((BF16, 4), (F32, 1), (F32, 4))),
        *((dim, dtype, 128, 1) for dim in (40, 72) for dtype in (BF16, F32)),
        *((dim, dtype, 128, group) for dim in (160, 256) for dtype, group in ((BF16, 1), (BF16, 4), (F32, 1))),
        (256, BF16, 16, 1),
    ],
)
def test_pooled(arch: int, dim: int, dtype: torch.dtype, block_q: int, group: int) -> None:
    binary = pooled_binary(arch, dim, dtype, block_q, group)
    code = disassembled(binary.asm["cubin"])
    assert_wide(code)
    if dtype != F32:  # a wait for all copies overlaps nothing
        waits = waits_in_loops(binary)
        assert waits and all(min(of) >= 1 for of in waits), waits
    if dtype == F32:
        assert not re.search(r"\b(?:HMMA|HGMMA|UTCHMMA)\b", code)
        assert len(re.findall(r"\bFFMA2?\b", code)) > dim
    else:
        assert re.search(rf"\b{MATRIX[arch] if block_q >= 64 else 'HMMA'}\b", code)
    assert len(re.findall(r"\bWARPGROUP\.DEPBAR\b", code)) <= 8


@pytest.mark.parametrize(
    "ones",
    [
        ("heads", "mask_rows", "q_stride_h"),
        ("queries", "q_stride_s"),
        ("key_blocks", "q_stride_b"),
        ("heads", "queries", "key_blocks", "mask_rows"),
    ],
)
def test_arguments_of_pooled_that_are_1_are_constants(ones: tuple[str, ...]) -> None:
    code = disassembled(pooled_binary(90, 72, BF16, 128, ones=ones).asm["cubin"])
    assert re.search(rf"\b{MATRIX[90]}\b", code)
