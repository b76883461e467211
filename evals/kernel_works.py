"""What each operator does in the benchmark: the call, how its result is checked, and what the device cannot avoid doing.

Every result is compared with the reference in fp32, or with that of the operator, before anything is timed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from diffusers_accel.evals.kernel_inputs import BLOCK, SHAPES, Shape, pattern, qkv
from diffusers_accel.evals.kernel_peers import PEERS, Missing
from diffusers_accel.evals.kernel_points import DTYPES, Point, Row
from diffusers_accel.evals.kernel_timing import error_row, relative
from diffusers_accel.kernels import launch
from diffusers_accel.kernels.attention import attention, quantized_attention
from diffusers_accel.kernels.block_stats import BlockStats, block_stats
from diffusers_accel.kernels.dense import dense
from diffusers_accel.kernels.merge import merge
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.pool import pool
from diffusers_accel.kernels.prep import Prepared, prep
from diffusers_accel.kernels.quantize import Quantized, quantize
from diffusers_accel.kernels.select import select

Call = Callable[[], Any]

# Relative error against fp32 attention on the same inputs; rounding the output alone costs a good part of the first two.
LIMITS = {"bf16": 3e-3, "fp16": 7e-4, "fp32": 1e-5}
LSE_LIMIT = 1e-3
# Of quantized attention, in any dtype. On Gaussian inputs, which average nothing out, it errs by 1.1e-2 and 3.8e-2; the
# largest error of an LSE is on video-like inputs, whose keys are larger.
QUANTIZED_LIMITS = {"int8": 2e-2, "int8_fp8": 6e-2}
QUANTIZED_LSE_LIMIT = 0.2
MEAN_LIMIT = 1e-4  # of means in fp32, which may be summed in another order
CODE_LIMIT = 1e-2  # between two ways to the same codes: values next to a half may be rounded either way
PAIR_LIMIT = 1e-3  # share of selected pairs that differ: weights next to the threshold may fall on either side


@dataclass(frozen=True)
class Work:
    """One operator on one set of inputs.

    Args:
        call: what is timed, and whose result is checked.
        errors: of that result, by the name of the row's field.
        limits: the largest of these errors that a right kernel may have.
        flops, bytes: what has to be computed, and read and written, at least.
        fields: more of the row.
        parts: calls that are timed apart, by the name of the row's field.
    """

    call: Call
    errors: Callable[[Any], Row]
    limits: Mapping[str, float]
    flops: float = 0.0
    bytes: float = 0.0
    fields: Row = field(default_factory=dict)
    parts: Mapping[str, Call] = field(default_factory=dict)


class Case:
    """q, k, v of one shape, and exact attention of them, which is kept from one point to the next."""

    def __init__(self, shape: str, inputs: str, dtype: str, seed: int, device: torch.device) -> None:
        self.shape: Shape = SHAPES[shape]
        self.seed = seed
        self.device = device
        self.dtype = DTYPES[dtype]
        self.q, self.k, self.v = qkv(inputs, self.shape, self.dtype, device, seed)
        self._exact: tuple[object, tuple[Tensor, Tensor]] | None = None

    def pattern(self, which: str, density: float) -> BlockPattern:
        """The pattern of that kind and density, on the device."""
        return pattern(which, self.shape, density, self.seed).to(self.device)

    def exact(self, name: object, blocks: BlockPattern | None) -> tuple[Tensor, Tensor]:
        """Attention in fp32 over these blocks (None: all), which `name` tells apart."""
        if self._exact is None or self._exact[0] != name:
            self._exact = None  # before the next one is made: each takes as much memory as q, k and v
            out = attention(self.q.float(), self.k.float(), self.v.float(), blocks, impl="reference")
            self._exact = (name, out)
        return self._exact[1]


def work(point: Point, case: Case) -> Work:
    """What this point does.

    Raises:
        Missing: it cannot run here; the message is the reason.
    """
    return _WORKS[point.operator](point, case)


def _attention(point: Point, case: Case) -> Work:
    q, k, v = case.q, case.k, case.v
    assert point.pattern is not None and point.density is not None
    dim, precision = case.shape.dim, point.precision
    peer = PEERS["attention"].get(point.impl)
    if peer is None:
        _check(point, case, dim, (BLOCK, BLOCK), precision)
    blocks = case.pattern(point.pattern, point.density)
    parts: dict[str, Call] = {}
    if peer is not None:
        call = peer.make(q, k, v, blocks)
    else:
        call = partial(attention, q, k, v, blocks, precision=precision, impl=point.impl)
    if precision != "input":
        operands = quantize(q, k, v, precision)
        parts = {
            "t_prep_ms": partial(quantize, q, k, v, precision),
            "t_kernel_ms": partial(quantized_attention, operands, blocks, impl=point.impl),
        }
    everything = point.density == 1
    name = "all" if everything else (point.pattern, point.density)
    return Work(
        call,
        lambda found: error_row(*_pair(found), case.exact(name, None if everything else blocks)),
        _limits(point, has_lse=peer is None),
        *_cost(case, blocks.density),
        _pattern_fields(blocks) | _implementation(point, case),
        parts,
    )


def _dense(point: Point, case: Case) -> Work:
    peer = PEERS["dense"].get(point.impl)
    if peer is not None:
        call = peer.make(case.q, case.k, case.v)
    else:
        _check(point, case, case.shape.dim)
        call = partial(dense, case.q, case.k, case.v, impl=point.impl)
    return Work(
        call,
        lambda found: error_row(*_pair(found), case.exact("all", None)),
        _limits(point, has_lse=peer is None),
        *_cost(case, 1.0),
        {"density_computed": 1.0} | _implementation(point, case),
    )


def _selected(point: Point, case: Case) -> Work:
    """A call of a method that selects: bring the tokens into an order, pool, choose the blocks, attend to them."""
    _check(point, case, case.shape.dim, (BLOCK, BLOCK), point.precision, operator="attention")
    tokens, rows = case.shape.tokens, _order(case)
    prepare = partial(prep, case.q, case.k, case.v, rows, case.shape.heads, precision=point.precision)

    def choose(prepared: Prepared) -> BlockPattern:
        assert prepared.means is not None
        return select(*prepared.means, queries=tokens, keys=tokens, density=point.density)

    def attend(prepared: Prepared, blocks: BlockPattern) -> tuple[Tensor, Tensor]:
        if isinstance(prepared.operands, Quantized):
            return quantized_attention(prepared.operands, blocks, impl=point.impl)
        return attention(*prepared.operands, blocks, impl=point.impl)

    def call() -> tuple[Tensor, Tensor]:
        prepared = prepare()
        return attend(prepared, choose(prepared))

    prepared = prepare()
    blocks = choose(prepared)

    def exact() -> tuple[Tensor, Tensor]:
        order = rows.view(tokens, -1)[:, 0] // case.shape.heads
        q, k, v = (x[:, order].float() for x in (case.q, case.k, case.v))
        return attention(q, k, v, blocks, impl="reference")

    return Work(
        call,
        lambda found: error_row(found[0], found[1], exact()),
        _limits(point, has_lse=True),
        *_cost(case, blocks.density),
        _pattern_fields(blocks) | _implementation(point, case),
        {
            "t_prep_ms": prepare,
            "t_select_ms": partial(choose, prepared),
            "t_kernel_ms": partial(attend, prepared, blocks),
        },
    )


def _pool(point: Point, case: Case) -> Work:
    _check(point, case)
    exact = pool(case.k, impl="reference")
    return Work(
        partial(pool, case.k, impl=point.impl),
        lambda found: {"rel_err": relative(found, exact)},
        {"rel_err": MEAN_LIMIT},
        bytes=case.k.nbytes + exact.nbytes,
    )


def _select(point: Point, case: Case) -> Work:
    means = pool(case.q), pool(case.k)
    _check(point, case, means[1].shape[1], dtype=False)
    choose = partial(select, *means, queries=case.shape.tokens, keys=case.shape.tokens, density=point.density)
    exact = choose(impl="reference")
    return Work(
        partial(choose, impl=point.impl),
        lambda found: {"pair_err": int((found.mask() != exact.mask()).sum()) / exact.computed_blocks},
        {"pair_err": PAIR_LIMIT},
        flops=2.0 * means[0].shape[1] ** 2 * case.shape.dim * case.shape.heads,
        bytes=2 * means[0].nbytes + exact.blocks.nbytes,
        fields=_pattern_fields(exact),
    )


def _prep(point: Point, case: Case) -> Work:
    _check(point, case, point.precision)
    given = (case.q, case.k, case.v, _order(case), case.shape.heads)
    exact = prep(*given, precision=point.precision, impl="reference")

    def errors(found: Prepared) -> Row:
        assert found.means is not None and exact.means is not None
        means = max(relative(a, b) for a, b in zip(found.means, exact.means))
        return {"rel_err": _code_error(found.operands, exact.operands), "mean_err": means}

    return Work(
        partial(prep, *given, precision=point.precision, impl=point.impl),
        errors,
        {"rel_err": 0.0 if point.precision == "input" else CODE_LIMIT, "mean_err": MEAN_LIMIT},
        bytes=3 * case.q.nbytes + _nbytes(exact.operands),
    )


def _quantize(point: Point, case: Case) -> Work:
    _check(point, case, point.precision)
    exact = quantize(case.q, case.k, case.v, point.precision, impl="reference")
    return Work(
        partial(quantize, case.q, case.k, case.v, point.precision, impl=point.impl),
        lambda found: {"rel_err": _code_error(found, exact)},
        {"rel_err": CODE_LIMIT},
        bytes=3 * case.q.nbytes + _nbytes(exact),
    )


def _merge(point: Point, case: Case) -> Work:
    """Two parts, as a method has that computes some blocks now and keeps the rest from an earlier step."""
    _check(point, case)
    half = case.shape.tokens // 2
    parts = [dense(case.q, case.k[:, s], case.v[:, s]) for s in (slice(None, half), slice(half, None))]
    exact = merge([(out.float(), lse) for out, lse in parts], impl="reference")
    return Work(
        partial(merge, parts, impl=point.impl),
        lambda found: error_row(found[0], found[1], exact),
        {"rel_err": LIMITS[point.dtype], "lse_err": LSE_LIMIT},
        bytes=3 * sum(x.nbytes for x in parts[0]),
    )


def _block_stats(point: Point, case: Case) -> Work:
    _check(point, case, case.shape.dim, (64, 64))
    lse = dense(case.q, case.k, case.v)[1]
    exact = block_stats(case.q, case.k, lse, impl="reference")

    def errors(found: BlockStats) -> Row:
        small = (found.small - exact.small).abs().sum() / (case.shape.heads * case.shape.tokens**2)
        return {
            "rel_err": relative(found.total, exact.total),
            "largest_err": relative(found.largest, exact.largest),
            "small_err": float(small),
        }

    return Work(
        partial(block_stats, case.q, case.k, lse, impl=point.impl),
        errors,
        {"rel_err": LIMITS[point.dtype], "largest_err": LIMITS[point.dtype], "small_err": PAIR_LIMIT},
        flops=2.0 * case.shape.tokens**2 * case.shape.dim * case.shape.heads,
        bytes=case.q.nbytes + case.k.nbytes + lse.nbytes + sum(x.nbytes for x in exact),
    )


_WORKS: dict[str, Callable[[Point, Case], Work]] = {
    "attention": _attention, "dense": _dense, "selected": _selected, "pool": _pool, "select": _select, "prep": _prep,
    "quantize": _quantize, "merge": _merge, "block_stats": _block_stats,
}  # fmt: skip


def _check(point: Point, case: Case, *inputs: object, operator: str | None = None, dtype: bool = True) -> None:
    """Raises Missing where the implementation refuses; `inputs` are those of its `refuses`, after device and dtype."""
    name = f"diffusers_accel.kernels.{operator or point.operator}.{point.impl}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("triton", "diffusers_accel"):
            raise
        raise Missing("needs Triton" if error.name.startswith("triton") else f"there is no {name}") from None
    first = (case.device, case.dtype) if dtype else (case.device,)
    if reason := module.refuses(*first, *inputs):
        raise Missing(reason)


def _limits(point: Point, has_lse: bool) -> dict[str, float]:
    """How far out (relative) and lse (absolute) may be from fp32 attention."""
    exact = point.precision == "input"
    limits = {"rel_err": LIMITS[point.dtype] if exact else QUANTIZED_LIMITS[point.precision]}
    return limits | ({"lse_err": LSE_LIMIT if exact else QUANTIZED_LSE_LIMIT} if has_lse else {})


def _cost(case: Case, density: float) -> tuple[float, float]:
    """Operations of the products of the computed pairs, and bytes of q, k, v and the output."""
    return 4.0 * case.shape.tokens**2 * case.shape.dim * case.shape.heads * density, 4.0 * case.q.nbytes


def _pattern_fields(blocks: BlockPattern) -> Row:
    return {
        "density_computed": blocks.density,
        "rows_min_blocks": int(blocks.counts.min()),
        "rows_max_blocks": int(blocks.counts.max()),
    }


def _implementation(point: Point, case: Case) -> Row:
    """The version of a peer, or the tile that our kernel takes here."""
    for peers in PEERS.values():
        if point.impl in peers:
            return {"impl_version": peers[point.impl].version}
    if point.impl != "portable":
        return {}
    from diffusers_accel.kernels.attention import portable

    capability = launch.capability(case.device)
    tile = portable.config(capability, case.shape.dim, case.dtype, (BLOCK, BLOCK), point.precision)
    return {"config": dict(tile._asdict())}


def _order(case: Case) -> Tensor:
    """`prep`'s rows for all heads with the video's tokens column by column, the text last: nothing stays where it was."""
    video = torch.arange(case.shape.tokens - case.shape.text).view(case.shape.grid).permute(2, 1, 0).flatten()
    order = torch.cat([video, torch.arange(len(video), case.shape.tokens)])
    heads = case.shape.heads
    return (order[:, None] * heads + torch.arange(heads)).flatten().to(case.device)


def _pair(found: Any) -> tuple[Tensor, Tensor | None]:
    return found if isinstance(found, tuple) else (found, None)


Operands = Quantized | tuple[Tensor, Tensor, Tensor]


def _values(operands: Operands) -> tuple[Tensor, ...]:
    return operands.dequantize() if isinstance(operands, Quantized) else operands


def _code_error(found: Operands, exact: Operands) -> float:
    """The largest relative difference of q, k and v."""
    return max(relative(a, b) for a, b in zip(_values(found), _values(exact)))


def _nbytes(operands: Operands) -> int:
    tensors = vars(operands).values() if isinstance(operands, Quantized) else operands
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor))
