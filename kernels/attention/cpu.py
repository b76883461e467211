"""Block-sparse attention on a CPU that skips the unread blocks, by PyTorch's fused attention or, in bf16, its products.

Query rows whose keys are one run of tokens (bands, dense heads) are handed over as strided views: many rows in one call,
nothing copied. All others gather their key blocks, a few rows at a time so that the copies stay in cache.

Quantized operands are simulated: dequantized to fp32, which shows what their rounding does to the result and is slower
than not to quantize at all.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from diffusers_accel.kernels.attention import products
from diffusers_accel.kernels.attention.epilogue import Epilogue
from diffusers_accel.kernels.cpu_workers import run_all
from diffusers_accel.kernels.grouped import each_query_head
from diffusers_accel.kernels.pattern import BlockPattern
from diffusers_accel.kernels.quantize.quantized import P_MAX, Quantized

# q, k, v [N, H, S, D] and a keyword `scale` -> (out, lse): attention of every query to every key.
Attend: TypeAlias = Callable[..., Any]

# Kills the process on zero keys and returns 0 for a fully masked row: it is only ever given keys that exist, unmasked.
fused_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default

# Keys and values gathered for one call of the fused attention, or a row more: much more falls out of a thread's cache, less
# pays for more calls.
GATHER_BYTES = 3 << 19
# Scores that the simulation of FP8 holds at once.
SCORE_BYTES = 32 << 20


def refuses(
    device: torch.device, dtype: torch.dtype, head_dim: int, blocks: tuple[int, int], precision: str
) -> str | None:
    """Why this implementation cannot run there, or None."""
    if device.type != "cpu":
        return f"runs on cpu tensors, found {device.type}"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"takes float16, bfloat16 and float32, found {dtype}"
    return None


@dataclass(frozen=True)
class Sweep:
    """`count` groups of query rows, each reading one run of keys; the next group is a fixed step further in both."""

    query: int
    query_tokens: int
    key: int
    key_tokens: int
    query_step: int = 0
    key_step: int = 0
    count: int = 1

    def then(self, other: Sweep) -> Sweep | None:
        """This sweep with `other` as its next group, or None where the sizes or the steps do not fit."""
        steps = (other.query - self.query) // self.count, (other.key - self.key) // self.count
        if (
            (other.query_tokens, other.key_tokens) != (self.query_tokens, self.key_tokens)
            or (steps[0] * self.count, steps[1] * self.count) != (other.query - self.query, other.key - self.key)
            or steps[1] < 0  # a view cannot step backwards
            or (self.count > 1 and steps != (self.query_step, self.key_step))
        ):
            return None
        return Sweep(self.query, self.query_tokens, self.key, self.key_tokens, *steps, self.count + 1)

    def pieces(self) -> Iterator[Sweep]:
        """The same groups in sweeps of as many as are computed at once."""
        most = products.at_once(self.query_tokens, self.key_tokens)
        for first in range(0, self.count, most):
            query, key = self.query + first * self.query_step, self.key + first * self.key_step
            yield replace(self, query=query, key=key, count=min(most, self.count - first))


@dataclass(frozen=True)
class Gather:
    """Query rows of one head, each as many queries and keys as the others.

    first: the first query of each row; blocks: int64 `[rows, n]`, key-block ids; lengths: int64 `[rows, n]`, how many
    tokens of each exist, or None where all blocks are whole.
    """

    batch: int
    head: int
    query_tokens: int
    key_tokens: int
    first: list[int]
    blocks: Tensor
    lengths: Tensor | None


@dataclass(frozen=True)
class CallSchedule:
    """The calls that compute a pattern: sweeps as (batch row, first head, heads, sweep), and gathers."""

    sweeps: list[tuple[int, int, int, Sweep]]
    gathers: list[Gather]
    covered: bool  # every query row reads something


def schedule(pattern: BlockPattern) -> CallSchedule:
    """Sorts the query rows of a pattern into calls. It walks the lists in Python, so it is kept with the pattern."""
    blocks, counts, lengths = pattern.blocks.tolist(), pattern.counts.tolist(), pattern.key_lengths().tolist()
    sweeps: dict[tuple[int, Sweep], list[int]] = defaultdict(list)
    gathers: dict[tuple[int, int, int, int, int], list[tuple[int, list[int]]]] = defaultdict(list)
    covered = True
    for b, h in product(range(len(blocks)), range(pattern.heads)):
        lists = [[j for j in row[:n] if lengths[j]] for row, n in zip(blocks[b][h], counts[b][h])]
        last: Sweep | None = None
        for first, rows, ids in merged_rows(lists):
            if not ids:
                covered = False
                continue
            query = first * pattern.block_q
            sizes = min(rows * pattern.block_q, pattern.queries - query), sum(lengths[j] for j in ids)
            if ids[-1] - ids[0] >= len(ids) or any(lengths[j] < pattern.block_k for j in ids[:-1]):
                gathers[b, h, *sizes, len(ids)].append((query, ids))
                continue
            sweep = Sweep(query, sizes[0], ids[0] * pattern.block_k, sizes[1])
            longer = last.then(sweep) if last else None
            if last and not longer:
                sweeps[b, last].append(h)
            last = longer or sweep
        if last:
            sweeps[b, last].append(h)
    calls = [(b, first, count, sweep) for (b, sweep), heads in sweeps.items() for first, count in runs(heads)]
    existing = torch.tensor(lengths)
    return CallSchedule(calls, [gather(pattern.block_k, existing, *item) for item in gathers.items()], covered)


def merged_rows(lists: list[list[int]]) -> Iterator[tuple[int, int, list[int]]]:
    """Consecutive query blocks with the same list as (first, count, list): one longer query is faster."""
    first = 0
    for i in range(1, len(lists) + 1):
        if i == len(lists) or lists[i] != lists[first]:
            yield first, i - first, lists[first]
            first = i


def runs(heads: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending head numbers as (first, count) of consecutive ones."""
    first = 0
    for i in range(1, len(heads) + 1):
        if i == len(heads) or heads[i] != heads[i - 1] + 1:
            yield heads[first], i - first
            first = i


def gather(
    block_k: int, lengths: Tensor, key: tuple[int, int, int, int, int], rows: list[tuple[int, list[int]]]
) -> Gather:
    """The gathered rows of one head and size; lengths: how many tokens of each key block exist."""
    blocks = torch.tensor([ids for _, ids in rows])
    existing = lengths[blocks]
    whole = bool((existing == block_k).all())
    return Gather(*key[:4], [query for query, _ in rows], blocks, None if whole else existing)


def attention(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern | None, scale: float, end: Epilogue | None = None
) -> tuple[Tensor, Tensor]:
    """Attention over the blocks of the pattern; the arguments have been checked by the caller."""
    return attend_pattern(q, k, v, pattern, scale, exact_attention, end)


def quantized_attention(
    x: Quantized, pattern: BlockPattern | None, scale: float, end: Epilogue | None = None
) -> tuple[Tensor, Tensor]:
    """A simulation in fp32 that skips as `attention` does: for its numbers, not for its speed."""
    attend = exact_attention if x.precision == "int8" else fp8_attention
    out, lse = attend_pattern(*x.dequantize(), pattern, scale, attend)
    out, lse = out.to(x.dtype), lse + scale * x.offset
    return (out, lse) if end is None else end.apply(out, lse)


def exact_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Every query to every key of its group, by the faster of two ways."""
    attend = products.attention if products.faster(q.shape[2], q.dtype) else fused_attention
    return attend(q, k, v, scale=scale)


def attend_pattern(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern | None,
    scale: float,
    attend: Attend,
    end: Epilogue | None = None,
) -> tuple[Tensor, Tensor]:
    """Calls `attend` for the rows of the pattern, with the keys that they read."""
    batch, queries, heads, dim = q.shape
    k, v = (each_query_head(x, heads) for x in (k, v))
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    if pattern is None:
        plan, period = CallSchedule([(0, 0, heads, Sweep(0, queries, 0, k.shape[1]))], [], covered=True), 1
    else:
        plan, period = pattern.derived(schedule), pattern.blocks.shape[0]
    results = Results.of(q, end)
    if not plan.covered:
        results.read_nothing()
    for repeat in range(0, batch, period):
        calls: list[Callable[[], None]] = []
        for row, head, count, sweep in plan.sweeps:
            part = slice(head, head + count)
            inputs = q[repeat + row, :, part], k[repeat + row, :, part], v[repeat + row, :, part]
            to = results.take(repeat + row, part)
            if not products.faster(sweep.query_tokens, q.dtype):
                run_sweep(inputs, to, sweep, scale, attend)  # on all threads
                continue
            for one, piece in product(range(count), sweep.pieces()):
                of_head = tuple(x[:, one, None] for x in inputs)
                its = results.take(repeat + row, slice(head + one, head + one + 1))
                calls.append(functools.partial(run_sweep, of_head, its, piece, scale, attend))

        def head_of(rows: Gather, place: Any) -> Head:
            block_k = 0 if pattern is None else pattern.block_k
            to = results.take(place[0], slice(rows.head, rows.head + 1))
            # Copies, in which the tokens of a block lie beside each other and not a model's width apart.
            return Head(q[place], k[place].contiguous(), v[place].contiguous(), to, block_k)

        run_all(itertools.chain(calls, all_gather_calls(head_of, repeat, plan.gathers, scale, attend)))
    out = results.out if end is None or end.out is None else end.out
    return out, results.lse[..., 0].transpose(1, 2).contiguous()


class Results(NamedTuple):
    """Where results go, of all batch rows, or of some heads of one, without the first dimension.

    out: `[B, S, H, D]`, or with `rows` the `[B, S * heads, D]` rows that these number, int64 `[S, H, 1]`; lse: `[B, S, H, 1]`.
    part_out, part_lse: laid out as these without `rows`, a part over other keys that results are merged with, or None.
    """

    out: Tensor
    lse: Tensor
    rows: Tensor | None
    part_out: Tensor | None
    part_lse: Tensor | None

    @classmethod
    def of(cls, q: Tensor, end: Epilogue | None) -> Results:
        part, out, rows = end or Epilogue(None, None, None)
        return cls(
            q.new_empty(q.shape) if out is None else out.flatten(1, 2),
            q.new_empty(*q.shape[:3], 1, dtype=torch.float32),
            None if rows is None else rows.long().view(*q.shape[1:3], 1),
            None if part is None else part[0],
            None if part is None else part[1].transpose(1, 2)[..., None],
        )

    def take(self, row: int, heads: slice) -> Results:
        """Those of some heads of a batch row."""
        lse, part_out, part_lse = (
            None if x is None else x[row, :, heads] for x in (self.lse, self.part_out, self.part_lse)
        )
        assert lse is not None
        if self.rows is None:
            return Results(self.out[row, :, heads], lse, None, part_out, part_lse)
        return Results(self.out[row], lse, self.rows[:, heads], part_out, part_lse)

    def put(self, out: Tensor, lse: Tensor, queries: Callable[[Tensor], Tensor]) -> None:
        """Writes out `[..., D]` and lse `[..., 1]` of some queries, of whom `queries` gives a view of one of these tensors."""
        if self.part_out is not None and self.part_lse is not None:
            out, lse = joined(out, lse, queries(self.part_out), queries(self.part_lse))
        queries(self.lse).copy_(lse)
        if self.rows is None:
            queries(self.out).copy_(out)
        else:
            self.out.index_copy_(0, queries(self.rows).flatten(), out.flatten(0, -2))

    def read_nothing(self) -> None:
        """Writes what queries have that read no key: the part alone, or 0 and -inf."""
        out = self.out.new_zeros(()) if self.part_out is None else self.part_out
        self.lse.copy_(self.lse.new_tensor(-torch.inf) if self.part_lse is None else self.part_lse)
        if self.rows is None:
            self.out.copy_(out)
        else:
            rows = self.rows.flatten()
            self.out.index_copy_(
                1, rows, out.expand(len(self.out), *self.rows.shape[:2], self.out.shape[2]).flatten(1, 2)
            )


def joined(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """As `merge` of two parts, `[..., D]` and `[..., 1]`, of which the first has read something."""
    weight = torch.sigmoid(other_lse - lse)
    return torch.lerp(out.float(), other.float(), weight).to(out.dtype), torch.logaddexp(lse, other_lse)


def run_sweep(inputs: tuple[Tensor, ...], results: Results, sweep: Sweep, scale: float, attend: Attend) -> None:
    """One call for all groups and heads of a sweep; the views of the keys overlap.

    inputs: q, k, v, all `[S, H, D]`.
    """
    q, k, v = inputs

    def groups(x: Tensor, token: int, tokens: int, step: int) -> Tensor:
        s, h, d = x.stride()
        return x[token:].as_strided((sweep.count, x.shape[1], tokens, x.shape[2]), (step * s, h, s, d))

    queries = (sweep.query, sweep.query_tokens, sweep.query_step)
    keys = (sweep.key, sweep.key_tokens, sweep.key_step)
    part, part_lse = attend(groups(q, *queries), groups(k, *keys), groups(v, *keys), scale=scale)
    results.put(part, part_lse[..., None], lambda x: groups(x, *queries))


class Head(NamedTuple):
    """One head's q, k, v `[S, D]`, its results, and the tokens of a key block; k and v contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor
    results: Results
    block_k: int


def all_gather_calls(
    head_of: Callable[[Gather, Any], Head], repeat: int, gathers: list[Gather], scale: float, attend: Attend
) -> Iterator[Callable[[], None]]:
    """The calls of all gathers, whose heads are copied when their turn comes and dropped after it."""
    for (batch, head), of_head in itertools.groupby(gathers, lambda rows: (rows.batch, rows.head)):
        one: Head | None = None
        for rows in of_head:
            one = one or head_of(rows, (repeat + batch, slice(None), head))
            yield from gather_calls(one, rows, scale, attend)


def gather_calls(head: Head, rows: Gather, scale: float, attend: Attend) -> Iterator[Callable[[], None]]:
    """Calls that compute a few rows each."""
    at_once = math.ceil(GATHER_BYTES / (2 * rows.key_tokens * head.k.shape[1] * head.k.element_size()))
    if products.faster(rows.query_tokens, head.q.dtype):
        at_once = products.at_once(rows.query_tokens, rows.key_tokens)
    for start in range(0, len(rows.first), at_once):
        yield functools.partial(run_gather, head, rows, slice(start, start + at_once), scale, attend)


def run_gather(head: Head, rows: Gather, part: slice, scale: float, attend: Attend) -> None:
    """Copies the keys of a few rows beside each other and attends."""
    blocks, queries = rows.blocks[part], groups_of(rows.first[part], rows.query_tokens)
    dim = head.q.shape[1]
    if rows.lengths is None:
        ids, unit = blocks.flatten(), head.block_k
    else:
        in_block = torch.arange(head.block_k)
        ids, unit = (blocks[..., None] * head.block_k + in_block)[in_block < rows.lengths[part, :, None]], 1
    shape = blocks.shape[0], 1, rows.key_tokens, dim
    k, v = gathered("keys", head.k, ids, unit).view(shape), gathered("values", head.v, ids, unit).view(shape)
    q = [head.q[tokens].view(count, 1, -1, dim) for tokens, count in queries]
    out, lse = attend(q[0] if len(q) == 1 else torch.cat(q), k, v, scale=scale)
    out, lse, done = out.view(-1, dim), lse.view(-1), 0
    for tokens, count in queries:
        some = slice(done, done + count * rows.query_tokens)
        head.results.put(out[some], lse[some, None], functools.partial(of_queries, tokens))
        done = some.stop


def gathered(name: str, x: Tensor, ids: Tensor, unit: int) -> Tensor:
    """The pieces of `unit` tokens of x `[S, D]`, contiguous, that `ids` number, beside each other in a workspace."""
    count, size = x.shape[0] // unit, unit * x.shape[1]
    pieces = x.as_strided((count, size), (size, 1))
    return torch.index_select(pieces, 0, ids, out=products.workspace(name, (ids.shape[0], size), x.dtype))


def of_queries(tokens: slice, x: Tensor) -> Tensor:
    """`[n, D|1]` of `[S, 1, D|1]`, of one head."""
    return x[tokens, 0]


def groups_of(first: list[int], tokens: int) -> list[tuple[slice, int]]:
    """Rows of `tokens` queries that begin at the given ones, as (queries, rows) of those that follow on each other."""
    runs: list[tuple[slice, int]] = []
    for query in first:
        if runs and runs[-1][0].stop == query:
            runs[-1] = slice(runs[-1][0].start, query + tokens), runs[-1][1] + 1
        else:
            runs.append((slice(query, query + tokens), 1))
    return runs


def fp8_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
    """Stands in for `fused_attention` where the weights of v are in FP8: e4m3 of p / max(p) x P_MAX, per row.

    As in the kernels the denominators are summed before the rounding. A kernel knows only the largest p so far, so its
    weights are rounded a little finer than these.
    """
    out, lse = torch.empty(q.shape, dtype=q.dtype), torch.empty(q.shape[:3], dtype=q.dtype)
    rows = max(1, SCORE_BYTES // (4 * q.shape[1] * k.shape[2]))
    for group, first in product(range(q.shape[0]), range(0, q.shape[2], rows)):
        part = group, slice(None), slice(first, first + rows)
        scores = scale * (q[part] @ k[group].transpose(1, 2))
        top = scores.amax(-1, keepdim=True)
        p = (scores - top).exp_().mul_(P_MAX)
        total = p.sum(-1, keepdim=True)
        out[part] = p.to(torch.float8_e4m3fn).float() @ v[group] / total
        lse[part] = (top + (total / P_MAX).log()).squeeze(-1)
    return out, lse
