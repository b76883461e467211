"""What the kernel benchmark measures and in which order: the most telling first, so that a run cut short is of use."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import torch

from diffusers_accel.evals.kernel_bench.inputs import BLOCK, FORMER_SHAPES, INPUTS, PATTERNS, SHAPES
from diffusers_accel.evals.kernel_bench.peers import PEERS, process_of
from diffusers_accel.files import quoted
from diffusers_accel.kernels import dense
from diffusers_accel.kernels.attention import IMPLEMENTATIONS, PRECISIONS
from diffusers_accel.support.device import parse_device
from diffusers_accel.support.former import warn_former
from diffusers_accel.support.suggest import did_you_mean

Row: TypeAlias = dict[str, Any]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# `selected` is a whole call of a method: prep, select, attention and the way back into the model's order. `sweep` is
# attention with other tiles than its own.
OPERATORS = ("sweep", "attention", "dense", "selected", "pool", "select", "prep", "quantize", "merge", "block_stats")
BESIDE = OPERATORS[4:]
# Densities that are measured before all others, if they are asked for at all.
HEADLINE = (0.1, 0.3, 1.0)
MOST_MS, MOST_THREADS = 3_600_000, 4096
# What is asked of a device first: (implementation, tiles), each as the fields of the implementation's `Config`. The first of
# each is the table's own for Hopper, as a time to compare with.
TILES = {
    "portable": (
        "128x64x8x3", "128x64x8x2", "128x64x8x4", "128x128x8x2", "128x128x8x3", "128x32x8x3", "128x32x8x4", "64x64x4x3",
        "64x128x4x2",
    ),
    "hopper": ("128x2", "128x3", "64x3", "64x4", "64x2", "64x5"),
}  # fmt: skip
SWEEP_DENSITY = 0.2
SWEPT_SHAPES = 2  # of those asked for: the first ones have one head dim each
LONG = 120.0  # seconds of a peer's first call above which it comes after what takes less
REST = 8  # the first tier that is left out unless it is asked for
# What two rows of one measurement have in common.
KEY = ("operator", "impl", "precision", "dtype", "shape", "input_kind", "seed", "pattern", "density_requested", "tile")


def _option(
    text: str, cuda: Any = None, cpu: Any = None, names: Collection[str] = (), kind: Any = str, many: bool = False
) -> Any:
    """A field of `BenchSettings`: its help, what it is by device when not given, its allowed names, its type, one or a list."""
    return field(metadata={"text": text, "cuda": cuda, "cpu": cpu, "names": names, "kind": kind, "many": many})


@dataclass(frozen=True)
class BenchSettings:
    """What was asked for; `settings` makes one. Every combination of the lists that means something is measured.

    Only plain values, so that another process can be told. The command line has an option for each field.
    """

    device: str = _option("cuda, cuda:1 or cpu; a GPU if there is one")
    shapes: tuple[str, ...] = _option(
        "self-attention of models", ("W13", "C2", "HY", "W14", "C15"), ("toy", "S8"), SHAPES, many=True
    )  # both head dims first
    densities: tuple[float, ...] = _option(
        "shares of block pairs, 0..1", (0.1, 0.3, 1.0, 0.2, 0.5, 0.05), (0.1, 0.25, 1.0), kind=float, many=True
    )
    patterns: tuple[str, ...] = _option("which blocks are read", PATTERNS, PATTERNS, PATTERNS, many=True)
    inputs: tuple[str, ...] = _option("tokens", INPUTS, INPUTS[:1], INPUTS, many=True)
    precisions: tuple[str, ...] = _option("of products", PRECISIONS, PRECISIONS[:1], PRECISIONS, many=True)
    operators: tuple[str, ...] = _option("what is measured", OPERATORS, OPERATORS, OPERATORS, many=True)
    impls: tuple[str, ...] | None = _option(
        "who computes sparse attention; all, if not given. Dense attention is always measured by everyone who can",
        names=(*IMPLEMENTATIONS, *PEERS["attention"]),
        many=True,
    )
    dtype: str = _option("of q, k, v", "bf16", "bf16", DTYPES)
    seed: int = _option("of inputs and patterns", 0, 0, kind=int)
    rep_ms: float = _option("of repetitions of a call: 300 on a GPU, 1500 on a CPU", 300.0, 1500.0, kind=float)
    threads: int | None = _option("CPU threads of PyTorch", kind=int)
    # Also where one of the three lists is given.
    every: bool = _option("also all patterns, and peers and all inputs at every density", kind=bool)


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
    tile: str | None = None  # of a sweep

    @property
    def row(self) -> Row:
        """The fields of a row that say what was to be measured."""
        shape = SHAPES[self.shape]
        return {
            "operator": self.operator, "impl": self.impl, "precision": self.precision, "dtype": self.dtype,
            "shape": self.shape, "B": 1, "H": shape.heads, "N": shape.tokens, "D": shape.dim,
            "input_kind": self.inputs, "seed": self.seed, "pattern": self.pattern,
            "density_requested": self.density, "block_m": BLOCK, "block_n": BLOCK,
        } | ({} if self.tile is None else {"tile": self.tile})  # fmt: skip


def key(row: Row) -> str:
    """What identifies the measurement of a row."""
    return "|".join(str(row.get(name)) for name in KEY)


def status_word(row: Row) -> str:
    """What stands before the reason in a row's status: ok, drift, wrong, missing, hung and others."""
    return str(row["status"]).partition(":")[0]


def family(row: Row, within: str) -> str:
    """The points that cannot run for one reason: of one implementation and `within` one head dim (D) or one shape."""
    return "|".join(str(row.get(name)) for name in ("operator", "impl", "precision", "dtype", within))


def given_up(row: Row) -> set[str]:
    """The families of which no more is tried after this row; none after most rows.

    Who hung or crashed would cost as much on another shape of that head dim, and so would the whole call that attends by it;
    who failed, or refused, may take another shape. A tile that fails says nothing of the others.
    """
    within = {"hung": "D", "crashed": "D", "failed": "shape", "missing": "shape"}.get(status_word(row))
    if within is None or (row["operator"], status_word(row)) == ("sweep", "failed"):
        return set()
    also = {family(row | {"operator": "selected"}, "D")} if row["operator"] == "attention" and within == "D" else set()
    return {family(row, within)} | also


def settings(device: torch.device | str, **asked: Any) -> BenchSettings:
    """The settings asked for, with the device's defaults for all that is not given or None.

    Raises:
        ValueError: an unknown name, a number out of range, or a device that is neither a GPU nor a CPU.
        TypeError: there is no such setting.
    """
    kind = parse_device(device).type
    if kind not in ("cuda", "cpu"):
        raise ValueError(f"the benchmark runs on cuda and cpu, found {kind}")
    if asked.get("every") is None:
        asked["every"] = any(asked.get(name) for name in ("densities", "patterns", "inputs"))
    found = {"device": str(device)} | asked
    for entry in fields(BenchSettings):
        option = entry.metadata
        value = found.get(entry.name)
        if value is None:
            value = option[kind]
        if option["many"] and value is not None:
            value = tuple(option["kind"](x) for x in value)
        if entry.name == "shapes":
            value = tuple(_present_shape(x) for x in value)
        given: Sequence[Any] = value if isinstance(value, tuple) else [value]
        if value is not None and option["names"] and (unknown := [x for x in given if x not in option["names"]]):
            words = f"found {quoted(unknown[0])}{did_you_mean(unknown[0], option['names'])}"
            raise ValueError(f"{entry.name} must be among {', '.join(option['names'])}, {words}")
        found[entry.name] = value
    if wrong := [x for x in found["densities"] if not 0 < x <= 1]:
        raise ValueError(f"densities must lie in 0..1, above 0, found {wrong}")
    if not 0 <= found["rep_ms"] <= MOST_MS:
        raise ValueError(f"rep_ms must be milliseconds, 0 to {MOST_MS:,}, found {found['rep_ms']}")
    if not 0 <= found["seed"] < 2**63:
        raise ValueError(f"seed must be 0 or more and below 2^63, found {quoted(found['seed'])}")
    if found["threads"] is not None and not 1 <= found["threads"] <= MOST_THREADS:
        raise ValueError(f"threads must be 1 to {MOST_THREADS:,}, found {quoted(found['threads'])}")
    return BenchSettings(**found)


def _present_shape(name: str) -> str:
    """The name that a shape has now."""
    if (present := FORMER_SHAPES.get(name)) is None:
        return name
    warn_former(name, present, "shapes")
    return present


def left(asked: BenchSettings, process: str, done: Collection[str], avoid: Iterable[str]) -> Iterator[Point]:
    """The points of one process (`peers.process_of`) that are not done, in the order of the plan.

    Args:
        done: keys of rows.
        avoid: families of which nothing is tried; a set that grows meanwhile counts.
    """
    lost = avoid if isinstance(avoid, set) else set(avoid)
    for point in plan(asked):
        families = (family(point.row, within) for within in ("D", "shape"))
        here = process_of(point.operator, point.impl) == process and key(point.row) not in done
        if here and lost.isdisjoint(families):
            yield point


def processes(asked: BenchSettings) -> list[str]:
    """Whose processes the points have to be measured in, everybody's first."""
    found = dict.fromkeys(process_of(point.operator, point.impl) for point in plan(asked))
    return ["", *(name for name in found if name)]


def plan(asked: BenchSettings) -> list[Point]:
    """Every point, the most telling first. It follows from the settings alone, so that a second run can go on with it."""
    points = [point for shape, kind in product(asked.shapes, asked.inputs) for point in _points(asked, shape, kind)]
    tier = partial(_tier, asked)
    return sorted((x for x in points if asked.every or tier(x) < REST), key=tier)  # stable: shape by shape in a tier


def _points(asked: BenchSettings, shape: str, kind: str) -> Iterator[Point]:
    """The points of one shape with one kind of inputs, dense attention first."""
    at = partial(Point, shape=shape, inputs=kind, dtype=asked.dtype, seed=asked.seed)
    skipped = ("reference",) if torch.device(asked.device).type == "cpu" else ("reference", "cpu")
    impls = asked.impls or [*(x for x in IMPLEMENTATIONS if x not in skipped), *PEERS["attention"]]
    ours = [name for name in IMPLEMENTATIONS if name in impls]
    peers = [name for name in PEERS["attention"] if name in impls]
    if "sweep" in asked.operators and shape in asked.shapes[:SWEPT_SHAPES] and kind == asked.inputs[0]:
        usual = at("sweep", "", precision=asked.precisions[0], pattern=asked.patterns[0], density=SWEEP_DENSITY)
        yield from (replace(usual, impl=name, tile=tile) for name in TILES if name in ours for tile in TILES[name])
    if {"dense", "attention", "selected"} & set(asked.operators):
        yield from (at("dense", name, precision=peer.precision) for name, peer in PEERS["dense"].items())
        yield from (at("dense", name) for name in dense.IMPLEMENTATIONS if name not in skipped)
    for density, which in product(asked.densities, asked.patterns):
        if density == 1 and which != asked.patterns[0]:
            continue  # all the same
        if "attention" in asked.operators:
            for precision, name in product(asked.precisions, ours):
                yield at("attention", name, precision=precision, pattern=which, density=density)
            yield from (at("attention", name, pattern=which, density=density) for name in peers)
        if "selected" in asked.operators and density < 1 and which == asked.patterns[0]:
            for precision, name in product(asked.precisions, ours):
                yield at("selected", name, precision=precision, density=density)
    if kind == asked.inputs[0]:
        yield from _beside(asked, at, "reference" if "cpu" not in skipped else "portable")


def _beside(asked: BenchSettings, at: partial[Point], usual: str) -> Iterator[Point]:
    """The operators beside attention. None has a fast implementation for a CPU, where the reference is what runs."""
    names = [usual] if asked.impls is None else [name for name in ("portable", "reference") if name in asked.impls]
    for operator, name in product(BESIDE, names):
        if operator not in asked.operators:
            continue
        if operator in ("prep", "quantize"):
            precisions = [x for x in asked.precisions if (operator, x) != ("quantize", "input")]
            yield from (at(operator, name, precision=precision) for precision in precisions)
        else:
            yield at(operator, name, density=min(asked.densities) if operator == "select" else None)


def _tier(asked: BenchSettings, point: Point) -> int:
    """Tiles first; then what a reader asks first: the dense kernels, and ours at three densities. The last is left out first."""
    if point.operator == "sweep":
        return -1
    headline = [x for x in HEADLINE if x in asked.densities] or list(asked.densities)
    usual = point.pattern in (None, asked.patterns[0])
    first = usual and (point.density is None or point.density in headline)
    sparse_peer = point.operator == "attention" and point.impl in PEERS["attention"]
    exact = point.precision == "input"
    if point.inputs != asked.inputs[0]:
        return 7 if first and not sparse_peer else REST + 1
    if point.operator in BESIDE:
        return 4
    if sparse_peer or (point.operator == "dense" and not exact):
        if sparse_peer and PEERS["attention"][point.impl].seconds > LONG:
            return 5 if first else REST
        return 3 if first else REST
    if not first:
        return 6 if usual else REST
    if not exact:
        return 2
    return 1 if point.operator == "selected" else 0
