"""What the kernel benchmark measures and in which order: the most telling first, so that a run cut short is of use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import torch

from diffusers_accel.evals.kernel_inputs import BLOCK, INPUTS, PATTERNS, SHAPES
from diffusers_accel.evals.kernel_peers import PEERS
from diffusers_accel.kernels import attention, dense

Row: TypeAlias = dict[str, Any]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# `selected` is a whole call of a method: prep, select and attention, one after the other.
OPERATORS = ("attention", "dense", "selected", "pool", "select", "prep", "quantize", "merge", "block_stats")
# Densities that are measured before all others, if they are asked for at all.
HEADLINE = (0.1, 0.3, 1.0)
DEFAULTS: dict[str, dict[str, Any]] = {
    "cuda": {
        "shapes": ("W13", "C2", "HY", "W14", "C15"),  # both head dims first
        "densities": (0.1, 0.3, 1.0, 0.2, 0.5, 0.05),
        "patterns": ("random", "window", "unequal", "diagonals", "tiles", "text"),
        "inputs": ("gaussian", "video"),
        "precisions": ("input", "int8", "int8_fp8"),
        "rep_ms": 300.0,
    },
    "cpu": {
        "shapes": ("shapes", "S8"),
        "densities": (0.1, 0.25, 1.0),
        "patterns": ("random", "window"),
        "inputs": ("gaussian",),
        "precisions": ("input",),
        "rep_ms": 1500.0,
    },
}
# What two rows of one measurement have in common.
KEY = ("operator", "impl", "precision", "dtype", "shape", "input_kind", "seed", "pattern", "density_requested")


@dataclass(frozen=True)
class Settings:
    """What was asked for; `settings` makes one. Only plain values, so that another process can be told.

    Args:
        device: `cpu`, `cuda` or `cuda:1`.
        shapes, densities, patterns, inputs, precisions, operators: every combination that means something is measured;
            the first pattern and the first kind of inputs come first.
        dtype: a name from `DTYPES`.
        impls: implementations and peers of sparse attention, and implementations of the operators beside it; None takes
            all. Dense attention is always measured by everyone who can: it is what the others are compared with.
        seed: fixes inputs and patterns.
        rep_ms: repetitions of one call go on for so long.
        threads: of PyTorch on a CPU; None leaves them.
    """

    device: str
    shapes: tuple[str, ...]
    densities: tuple[float, ...]
    patterns: tuple[str, ...]
    inputs: tuple[str, ...]
    precisions: tuple[str, ...]
    operators: tuple[str, ...]
    dtype: str
    impls: tuple[str, ...] | None
    seed: int
    rep_ms: float
    threads: int | None

    @classmethod
    def load(cls, plain: Mapping[str, Any]) -> Settings:
        """Settings from what `dataclasses.asdict` made of them, also after JSON has made lists of the tuples."""
        fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in plain.items()}
        return cls(**fields)


@dataclass(frozen=True)
class Point:
    """One measurement: an operator, who computes it, and on what."""

    operator: str
    impl: str
    shape: str
    inputs: str
    dtype: str
    seed: int
    precision: str = "input"
    pattern: str | None = None
    density: float | None = None

    @property
    def row(self) -> Row:
        """The fields of a row that say what was to be measured."""
        shape = SHAPES[self.shape]
        return {
            "operator": self.operator, "impl": self.impl, "precision": self.precision, "dtype": self.dtype,
            "shape": self.shape, "B": 1, "H": shape.heads, "N": shape.tokens, "D": shape.dim,
            "input_kind": self.inputs, "seed": self.seed, "pattern": self.pattern,
            "density_requested": self.density, "block_m": BLOCK, "block_n": BLOCK,
        }  # fmt: skip


def key(row: Row) -> str:
    """What identifies the measurement of a row."""
    return "|".join(str(row.get(name)) for name in KEY)


def family(row: Row) -> str:
    """What cannot run for one reason: if one of them hung, the next would hang too."""
    return "|".join(str(row.get(name)) for name in ("operator", "impl", "precision", "dtype", "D"))


def settings(
    device: torch.device | str,
    shapes: Sequence[str] | None = None,
    densities: Sequence[float] | None = None,
    patterns: Sequence[str] | None = None,
    inputs: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    operators: Sequence[str] | None = None,
    dtype: str = "bf16",
    impls: Sequence[str] | None = None,
    seed: int = 0,
    rep_ms: float | None = None,
    threads: int | None = None,
) -> Settings:
    """The settings asked for, with the device's defaults for all that is None.

    Raises:
        ValueError: an unknown name, a density outside 0..1, or a device that is neither a GPU nor a CPU.
    """
    kind = torch.device(device).type
    if kind not in DEFAULTS:
        raise ValueError(f"the benchmark runs on {' and '.join(DEFAULTS)}, found {kind}")
    usual = DEFAULTS[kind]
    found = Settings(
        str(device),
        tuple(shapes or usual["shapes"]),
        tuple(float(x) for x in densities or usual["densities"]),
        tuple(patterns or usual["patterns"]),
        tuple(inputs or usual["inputs"]),
        tuple(precisions or usual["precisions"]),
        tuple(operators or OPERATORS),
        dtype,
        tuple(impls) if impls else None,
        seed,
        usual["rep_ms"] if rep_ms is None else float(rep_ms),
        threads,
    )
    known: dict[str, tuple[Sequence[str], Sequence[str]]] = {
        "shapes": (found.shapes, tuple(SHAPES)),
        "patterns": (found.patterns, PATTERNS),
        "inputs": (found.inputs, INPUTS),
        "precisions": (found.precisions, attention.PRECISIONS),
        "operators": (found.operators, OPERATORS),
        "dtype": ([found.dtype], tuple(DTYPES)),
        "impls": (found.impls or (), (*attention.IMPLEMENTATIONS, *PEERS["attention"])),
    }
    for name, (given, allowed) in known.items():
        if unknown := [x for x in given if x not in allowed]:
            raise ValueError(f"{name} must be among {', '.join(allowed)}, found {', '.join(unknown)}")
    if wrong := [x for x in found.densities if not 0 < x <= 1]:
        raise ValueError(f"densities must lie in 0..1, above 0, found {wrong}")
    return found


def plan(asked: Settings) -> list[Point]:
    """Every point, the most telling first. It follows from the settings alone, so that a second run can go on with it."""
    points = [point for shape, kind in product(asked.shapes, asked.inputs) for point in _points(asked, shape, kind)]
    return sorted(points, key=partial(_tier, asked))  # stable: within a tier, shape by shape


def _points(asked: Settings, shape: str, kind: str) -> Iterator[Point]:
    """The points of one shape with one kind of inputs, dense attention first."""
    at = partial(Point, shape=shape, inputs=kind, dtype=asked.dtype, seed=asked.seed)
    on_cpu = torch.device(asked.device).type == "cpu"
    usual = [name for name in attention.IMPLEMENTATIONS if _ours(name, on_cpu)]
    ours = usual if asked.impls is None else [name for name in attention.IMPLEMENTATIONS if name in asked.impls]
    if {"dense", "attention", "selected"} & set(asked.operators):
        for name, peer in PEERS["dense"].items():
            yield at("dense", name, precision=peer.precision)
        for name in dense.IMPLEMENTATIONS:
            if _ours(name, on_cpu):
                yield at("dense", name)
    peers = [name for name in PEERS["attention"] if name in (asked.impls or (name,))]
    for density, which in product(asked.densities, asked.patterns):
        if density == 1 and which != asked.patterns[0]:
            continue  # all the same
        for operator, names in (("attention", ours), ("selected", ours if which == asked.patterns[0] else [])):
            if operator in asked.operators and not (operator == "selected" and density == 1):
                for precision, name in product(asked.precisions, names):
                    shown = which if operator == "attention" else None
                    yield at(operator, name, precision=precision, pattern=shown, density=density)
        if "attention" in asked.operators:
            for name in peers:
                yield at("attention", name, pattern=which, density=density)
    if kind == asked.inputs[0]:
        yield from _beside(asked, at, "reference" if on_cpu else "portable")


def _beside(asked: Settings, at: partial[Point], usual: str) -> Iterator[Point]:
    """The operators beside attention. None has a fast implementation for a CPU, where the reference is what runs."""
    names = [usual] if asked.impls is None else [name for name in ("portable", "reference") if name in asked.impls]
    for operator, name in product(OPERATORS[3:], names):
        if operator not in asked.operators:
            continue
        if operator in ("prep", "quantize"):
            for precision in asked.precisions:
                if (operator, precision) != ("quantize", "input"):
                    yield at(operator, name, precision=precision)
        else:
            yield at(operator, name, density=min(asked.densities) if operator == "select" else None)


def _ours(name: str, on_cpu: bool) -> bool:
    return name != "reference" and (on_cpu or name != "cpu")


def _tier(asked: Settings, point: Point) -> int:
    """0 is what a reader asks first: the dense kernels, and ours at three densities; the higher, the sooner left out."""
    headline = [x for x in HEADLINE if x in asked.densities] or list(asked.densities)
    first = point.density is None or point.density in headline
    first = first and point.pattern in (None, asked.patterns[0])
    sparse_peer = point.operator == "attention" and point.impl in PEERS["attention"]
    exact = point.precision == "input"
    if point.inputs != asked.inputs[0]:
        return 6 if first and not sparse_peer else 8
    if point.operator in OPERATORS[3:]:
        return 4
    if sparse_peer or (point.operator == "dense" and not exact):
        return 3 if first else 7
    if not first:
        return 5 if point.pattern in (None, asked.patterns[0]) else 7
    if not exact:
        return 2
    return 1 if point.operator == "selected" else 0
