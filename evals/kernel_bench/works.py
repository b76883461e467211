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

from diffusers_accel.evals.kernel_bench.inputs import BLOCK, SHAPES, Shape, pattern, qkv
from diffusers_accel.evals.kernel_bench.peers import PEERS, Missing
from diffusers_accel.evals.kernel_bench.points import DTYPES, Point, Row
from diffusers_accel.evals.kernel_bench.tiles import calling
from diffusers_accel.evals.kernel_bench.timing import error_row, relative
from diffusers_accel.kernels import hardware
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
        traced: as of `Peer`.
    """

    call: Call
    errors: Callable[[Any], Row]
    limits: Mapping[str, float]
    flops: float = 0.0
    bytes: float = 0.0
    fields: Row = field(default_factory=dict)
    parts: Mapping[str, Call] = field(default_factory=dict)
    traced: bool = False


class Case:
    """q, k, v of one shape, and exact attention of them, which is kept from one point to the next."""

    def __init__(self, shape: str, inputs: str, dtype: str, seed: int, device: torch.device) -> None:
        self.shape: Shape = SHAPES[shape]
        self.seed = seed
        self.device = device
        self.dtype = DTYPES[dtype]
        self.qkv = self.q, self.k, self.v = qkv(inputs, self.shape, self.dtype, device, seed)
        self._exact: tuple[object, tuple[Tensor, Tensor]] | None = None

    def exact(self, name: object, blocks: BlockPattern | None) -> tuple[Tensor, Tensor]:
        """Attention in fp32 over these blocks (None: all), which `name` tells apart."""
        if self._exact is None or self._exact[0] != name:
            self._exact = None  # before the next one is made: each takes as much memory as q, k and v
            q, k, v = (x.float() for x in self.qkv)
            self._exact = (name, attention(q, k, v, blocks, impl="reference"))
        return self._exact[1]


def work(point: Point, case: Case) -> Work:
    """What this point does.

    Raises:
        Missing: it cannot run here; the message is the reason.
    """
    return _WORKS[point.operator](point, case)


def _attend(point: Point, case: Case) -> Work:
    """Sparse or dense attention, ours or a peer's."""
    peer = PEERS.get(point.operator, {}).get(point.impl)
    q, k, v = case.qkv
    blocks: BlockPattern | None = None
    parts: dict[str, Call] = {}
    if peer is None:
        _check(point, case, case.shape.dim, *([(BLOCK, BLOCK), point.precision] if point.pattern else []))
    if point.pattern is None or point.density is None:
        call = partial(dense, q, k, v, impl=point.impl) if peer is None else peer.make(q, k, v)
    else:
        blocks = pattern(point.pattern, case.shape, point.density, case.seed).to(case.device)
        ours = partial(attention, q, k, v, blocks, precision=point.precision, impl=point.impl)
        call = ours if peer is None else peer.make(q, k, v, blocks)
    if peer is None and point.precision != "input":
        coded = quantize(q, k, v, point.precision)
        parts["t_prep_ms"] = partial(quantize, q, k, v, point.precision)
        parts["t_kernel_ms"] = partial(quantized_attention, coded, blocks, impl=point.impl)
    if point.tile is not None:
        call = calling(point.impl, point.tile, call)
        parts |= {name: calling(point.impl, point.tile, part) for name, part in parts.items()}
    some, name = (None, None) if point.density in (None, 1) else (blocks, (point.pattern, point.density))
    return Work(
        call,
        lambda found: error_row(*_pair(found), case.exact(name, some)),
        _limits(point, has_lse=peer is None),
        *_cost(case, 1.0 if blocks is None else blocks.density),
        _pattern_fields(blocks) | _implementation(point, case),
        parts,
        peer is not None and peer.traced,
    )


def _selected(point: Point, case: Case) -> Work:
    """A call of a method that selects: bring the tokens into an order, pool, choose the blocks, attend to them, and back."""
    _check(point, case, case.shape.dim, (BLOCK, BLOCK), point.precision)
    tokens, rows = case.shape.tokens, _order(case)
    prepare = partial(prep, *case.qkv, rows, case.shape.heads, precision=point.precision)

    def choose(prepared: Prepared) -> BlockPattern:
        assert prepared.means is not None
        return select(*prepared.means, queries=tokens, keys=tokens, density=point.density)

    def attend(
        prepared: Prepared, blocks: BlockPattern, out: Tensor | None = None, to: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if isinstance(prepared.operands, Quantized):
            return quantized_attention(prepared.operands, blocks, impl=point.impl, out=out, rows=to)
        return attention(*prepared.operands, blocks, impl=point.impl, out=out, rows=to)

    def attend_back(prepared: Prepared, blocks: BlockPattern) -> tuple[Tensor, Tensor]:
        """As a layer has it, with the output in the model's order."""
        return attend(prepared, blocks, torch.empty_like(case.q), rows)

    def call() -> tuple[Tensor, Tensor]:
        prepared = prepare()
        return attend_back(prepared, choose(prepared))

    prepared = prepare()
    blocks = choose(prepared)

    def exact() -> tuple[Tensor, Tensor]:
        order = rows.view(tokens, -1)[:, 0] // case.shape.heads
        q, k, v = (x[:, order].float() for x in case.qkv)
        out, lse = attention(q, k, v, blocks, impl="reference")
        return out[:, order.argsort()], lse

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
            "t_back_ms": partial(attend_back, prepared, blocks),
        },
    )


def _beside(
    point: Point,
    operate: Callable[..., Any],
    read: Any,
    errors: Callable[[Any, Any], Row],
    limits: Mapping[str, float],
    flops: float = 0.0,
) -> Work:
    """An operator against its own reference; `read` is what it has to read."""
    exact = operate(impl="reference")
    fields = _pattern_fields(exact) if isinstance(exact, BlockPattern) else {}
    moved = _nbytes(read) + _nbytes(exact)
    return Work(partial(operate, impl=point.impl), lambda x: errors(x, exact), limits, flops, moved, fields)


def _pool(point: Point, case: Case) -> Work:
    _check(point, case)

    def errors(found: Tensor, exact: Tensor) -> Row:
        return {"rel_err": relative(found, exact)}

    return _beside(point, partial(pool, case.k), case.k, errors, {"rel_err": MEAN_LIMIT})


def _select(point: Point, case: Case) -> Work:
    means, tokens = (pool(case.q), pool(case.k)), case.shape.tokens
    _check(point, case, means[1].shape[1])

    def errors(found: BlockPattern, exact: BlockPattern) -> Row:
        return {"pair_err": int((found.mask() != exact.mask()).sum()) / exact.computed_blocks}

    operate = partial(select, *means, queries=tokens, keys=tokens, density=point.density)
    flops = 2.0 * means[0].shape[1] ** 2 * case.shape.dim * case.shape.heads
    return _beside(point, operate, means, errors, {"pair_err": PAIR_LIMIT}, flops)


def _prep(point: Point, case: Case) -> Work:
    _check(point, case, point.precision)

    def errors(found: Prepared, exact: Prepared) -> Row:
        assert found.means is not None and exact.means is not None
        means = max(relative(a, b) for a, b in zip(found.means, exact.means))
        return {"rel_err": _code_error(found.operands, exact.operands), "mean_err": means}

    operate = partial(prep, *case.qkv, _order(case), case.shape.heads, precision=point.precision)
    limits = {"rel_err": 0.0 if point.precision == "input" else CODE_LIMIT, "mean_err": MEAN_LIMIT}
    return _beside(point, operate, case.qkv, errors, limits)


def _quantize(point: Point, case: Case) -> Work:
    _check(point, case, point.precision)

    def errors(found: Quantized, exact: Quantized) -> Row:
        return {"rel_err": _code_error(found, exact)}

    operate = partial(quantize, *case.qkv, point.precision)
    return _beside(point, operate, case.qkv, errors, {"rel_err": CODE_LIMIT})


def _merge(point: Point, case: Case) -> Work:
    """Two parts, as a method has that computes some blocks now and keeps the rest from an earlier step."""
    _check(point, case)
    half = case.shape.tokens // 2
    parts = [dense(case.q, case.k[:, s], case.v[:, s]) for s in (slice(None, half), slice(half, None))]
    exact = merge([(out.float(), lse) for out, lse in parts], impl="reference")
    limits = {"rel_err": LIMITS[point.dtype], "lse_err": LSE_LIMIT}
    call = partial(merge, parts, impl=point.impl)
    return Work(call, lambda found: error_row(found[0], found[1], exact), limits, 0.0, 3 * _nbytes(parts[0]))


def _block_stats(point: Point, case: Case) -> Work:
    _check(point, case, case.shape.dim, (64, 64))
    pairs = float(case.shape.heads * case.shape.tokens**2)

    def errors(found: BlockStats, exact: BlockStats) -> Row:
        small = float((found.small - exact.small).abs().sum()) / pairs
        largest = relative(found.largest, exact.largest)
        return {"rel_err": relative(found.total, exact.total), "largest_err": largest, "small_err": small}

    given = case.q, case.k, dense(*case.qkv)[1]
    limits = {"rel_err": LIMITS[point.dtype], "largest_err": LIMITS[point.dtype], "small_err": PAIR_LIMIT}
    return _beside(point, partial(block_stats, *given), given, errors, limits, 2.0 * pairs * case.shape.dim)


_WORKS: dict[str, Callable[[Point, Case], Work]] = {
    "sweep": _attend, "attention": _attend, "dense": _attend, "selected": _selected, "pool": _pool, "select": _select,
    "prep": _prep, "quantize": _quantize, "merge": _merge, "block_stats": _block_stats,
}  # fmt: skip


def _check(point: Point, case: Case, *inputs: object) -> None:
    """Raises Missing where the operator refuses this implementation; `inputs` of its `refuses` after device and dtype."""
    name = "attention" if point.operator in ("selected", "sweep") else point.operator
    operator = importlib.import_module(f"diffusers_accel.kernels.{name}")._operator
    given = (case.device, *inputs) if name == "select" else (case.device, case.dtype, *inputs)
    try:
        operator.choose(point.impl, *given)  # asks for this one alone: another may hang in its trial
    except ValueError:
        raise Missing(next(x.reason for x in operator.choices(*given) if x.name == point.impl)) from None


def _limits(point: Point, has_lse: bool) -> dict[str, float]:
    """How far out (relative) and lse (absolute) may be from fp32 attention."""
    exact = point.precision == "input"
    limits = {"rel_err": LIMITS[point.dtype] if exact else QUANTIZED_LIMITS[point.precision]}
    return limits | ({"lse_err": LSE_LIMIT if exact else QUANTIZED_LSE_LIMIT} if has_lse else {})


def _cost(case: Case, density: float) -> tuple[float, float]:
    """Operations of the products of the computed pairs, and bytes of q, k, v and the output."""
    return 4.0 * case.shape.tokens**2 * case.shape.dim * case.shape.heads * density, 4.0 * case.q.nbytes


def _pattern_fields(blocks: BlockPattern | None) -> Row:
    if blocks is None:
        return {"density_computed": 1.0}
    fewest, most = (int(end) for end in torch.aminmax(blocks.counts))
    return {"density_computed": blocks.density, "rows_min_blocks": fewest, "rows_max_blocks": most}


def _implementation(point: Point, case: Case) -> Row:
    """The version of a peer, or the tile that our kernel takes here, if it is the kernel's own choice."""
    if point.tile is not None:
        return {}
    if peer := PEERS.get(point.operator, {}).get(point.impl):
        return {"impl_version": peer.version}
    if point.impl == "portable":
        from diffusers_accel.kernels.attention import portable

        capability = hardware.capability(case.device)
        tile = portable.config(capability, case.shape.dim, case.dtype, (BLOCK, BLOCK), point.precision)
        return {"config": dict(tile._asdict())}
    if point.impl == "hopper":
        from diffusers_accel.kernels.attention import hopper

        return {"config": dict(hopper.config(case.shape.dim, BLOCK, point.precision)._asdict())}
    if point.impl == "gluon":
        from diffusers_accel.kernels.attention import gluon

        return {"config": dict(gluon.config(case.shape.dim, BLOCK)._asdict())}
    return {}


def _order(case: Case) -> Tensor:
    """`prep`'s rows for all heads with the video's tokens column by column, the text last: nothing stays where it was."""
    video = torch.arange(case.shape.tokens - case.shape.text).view(case.shape.grid).permute(2, 1, 0).flatten()
    order = torch.cat([video, torch.arange(len(video), case.shape.tokens)])
    heads = case.shape.heads
    return (order[:, None] * heads + torch.arange(heads)).flatten().to(case.device, torch.int32)


def _pair(found: Any) -> tuple[Tensor, Tensor | None]:
    return found if isinstance(found, tuple) else (found, None)


def _code_error(found: Any, exact: Any) -> float:
    """The largest relative difference of q, k and v, which may be codes."""
    values = (x.dequantize() if isinstance(x, Quantized) else x for x in (found, exact))
    return max(relative(a, b) for a, b in zip(*values))


def _nbytes(x: Any) -> int:
    """Of a tensor, or of all tensors in a tuple or in the fields of an object."""
    if isinstance(x, Tensor):
        return x.nbytes
    parts = x if isinstance(x, tuple) else vars(x).values() if hasattr(x, "__dict__") else ()
    return sum(_nbytes(part) for part in parts)
