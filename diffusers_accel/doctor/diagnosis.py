"""The findings of the doctor, as data and as tables."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.table import Table

from diffusers_accel.families import list_families
from diffusers_accel.kernels.attention import Choice
from diffusers_accel.layout import TokenLayout
from diffusers_accel.shape import ModelShape

ASSUMED_EFFICIENCY = 0.8
EXCEEDED = 1.2  # times the asked density, from which on a table marks what is read


@dataclass(frozen=True)
class Expectation:
    """What a density can win.

    Args:
        density: that of the sparse calls, as a band of the asked one realises it in this layout.
        efficiency: dense time x density / sparse time of one layer's attention on this device; None where not measured.
        best: speed-up of a step if sparse attention took exactly `density` of the dense time, with nothing kept dense.
        expected: speed-up of the denoising loop with that efficiency and the default share of dense steps.
        asked: the density that was asked for.
        reads: named method -> the share of block pairs that it reads of this layout when asked for that.
    """

    density: float
    efficiency: float | None
    best: float
    expected: float
    asked: float
    reads: dict[str, float]


@dataclass(frozen=True)
class CacheOutlook:
    """What a step cache can win.

    Args:
        name: of the rule, with its settings.
        least: how many steps it computes at least of those of the call.
        best: speed-up of the denoising loop if it computes no more, and predicting takes no time.
        expected: the same where the rule is fixed ahead; None where it depends on the clip.
        idle: why it can predict nothing of this schedule, or None.
    """

    name: str
    least: int
    best: float
    expected: float | None
    idle: str | None


@dataclass(frozen=True)
class CallDiagnosis:
    """One call of one pipeline.

    Args:
        family: model family.
        models: transformer name -> layers, heads, head dim.
        layout: how the tokens of a self-attention call lie, the largest of a step.
        steps: of the schedule that the call asks for, of all stages.
        step_ms: one denoising step, all its branches, measured dense.
        attention_ms: self-attention's part of that.
        forward_ms: that of the transformer's forwards.
        forwards: how many of these a step has.
        dense_steps: share of the steps that `expected` leaves dense.
        expectations: of the heads, one for each density; empty where no sparse kernel can run.
        caches: of the forwards.
        preset: what `patch(pipe)` takes for this call, and what that could win.
        remarks: what else is to be said.
    """

    family: str
    models: dict[str, ModelShape]
    layout: TokenLayout
    steps: int
    step_ms: float
    attention_ms: float
    forward_ms: float
    forwards: int
    dense_steps: float
    expectations: tuple[Expectation, ...]
    caches: tuple[CacheOutlook, ...] = ()
    preset: str = ""
    remarks: tuple[str, ...] = field(default=())

    @property
    def share(self) -> float:
        """Self-attention's share of a step, 0..1."""
        return min(self.attention_ms / self.step_ms, 1.0)


@dataclass(frozen=True)
class Diagnosis:
    """The findings; `str()` and rich print them as tables.

    Args:
        machine: processor, threads and GPU.
        versions: of Python and of the packages that matter.
        kernels: (device, dtype, head dim) -> each attention implementation: why it cannot run, or why it has to be asked for.
        call: what was measured with a pipeline; None without one.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    kernels: dict[tuple[str, str, int], list[Choice]]
    call: CallDiagnosis | None = None

    def __rich__(self) -> RenderableType:
        last = () if self.call else (f"families  {', '.join(list_families())}",)
        return Group(*(_call_lines(self.call) if self.call else ()), *_machine_lines(self), _kernel_table(self), *last)

    def __str__(self) -> str:
        console = Console(width=120)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def _machine_lines(diagnosis: Diagnosis) -> list[RenderableType]:
    found = diagnosis.machine
    gpu = (
        f", {found['gpu']} with {found['gpu_memory_bytes'] / 2**30:.0f} GiB"
        if "gpu" in found
        else ", no GPU that torch sees"
    )
    installed = ", ".join(f"{name} {version}" for name, version in diagnosis.versions.items())
    return [
        f"machine   {found['cpu']}, {found['cores']} cores ({found['torch_threads']} threads of torch){gpu}",
        f"versions  {installed}",
    ]


def _kernel_table(diagnosis: Diagnosis) -> Table:
    """One row per implementation, one column for all inputs that share its verdicts."""
    alike: dict[tuple[str, ...], list[str]] = {}
    names = [option.name for option in next(iter(diagnosis.kernels.values()))]
    for (device, dtype, head_dim), options in diagnosis.kernels.items():
        verdicts = {option.name: option.verdict for option in options}  # ranks may differ
        inputs = f"{device} {dtype}, head dim {head_dim}"
        alike.setdefault(tuple(verdicts[name] for name in names), []).append(inputs)
    table = Table("attention kernel", *("\n".join(inputs) for inputs in alike.values()))
    for row in zip(names, *alike, strict=True):
        table.add_row(*row)
    return table


def _call_lines(call: CallDiagnosis) -> list[RenderableType]:
    sizes = "; ".join(f"{name} {s.layers} layers x {s.heads} heads x {s.head_dim}" for name, s in call.models.items())
    loop = call.step_ms * call.steps / 1e3
    forwards = "1 forward" if call.forwards == 1 else f"{call.forwards} forwards"
    return [
        f"model     {call.family}: {sizes}",
        f"tokens    {tokens_of(call.layout)}",
        f"one step  {call.step_ms:,.0f} ms dense, of which {forwards} {call.forward_ms:,.0f} ms and their self-attention "
        f"{call.attention_ms:,.0f} ms ({call.share:.0%}); {call.steps} steps: {loop:,.1f} s",
        f"preset    {call.preset}",
        *_heads(call, loop),
        *_forwards(call, loop),
        *(f"note: {remark}" for remark in call.remarks),
    ]


def tokens_of(layout: TokenLayout) -> str:
    """How many tokens there are, and of what."""
    beside: dict[tuple[str, bool], tuple[int, int]] = {}
    for segment in layout.segments:
        if segment.exact:
            tokens, valid = beside.get((segment.kind, segment.queries), (0, 0))
            exist = segment.tokens if segment.valid is None else segment.valid
            beside[segment.kind, segment.queries] = tokens + segment.tokens, valid + exist
    parts = [f"{layout.frames} frames x {layout.height} x {layout.width}"]
    for (kind, queries), (tokens, valid) in beside.items():
        what = "video that stays exact" if kind == "video" else kind
        notes = [f"{valid:,} exist"] * (valid < tokens) + ["keys only"] * (not queries)
        parts.append(f"{tokens:,} of {what}" + f" ({', '.join(notes)})" * bool(notes))
    return f"{layout.tokens:,} = {' + '.join(parts)}"


def _heads(call: CallDiagnosis, loop: float) -> list[RenderableType]:
    """What sparse attention could win."""
    if not call.expectations:
        return ["No sparse kernel can run on this device with this model: a patch would stay dense."]
    methods = list(call.expectations[0].reads)
    columns = ("density", *(f"{name} reads" for name in methods), "sparse efficiency")
    table = Table(*columns, "best possible", "expected", "expected loop", title="heads: sparse attention")
    for row in call.expectations:
        efficiency = f"{ASSUMED_EFFICIENCY} (assumed)" if row.efficiency is None else f"{row.efficiency:.2f}"
        table.add_row(
            f"{row.asked:.2f}",
            *(f"{read:.2f}{' (!)' * (read > EXCEEDED * row.asked)}" for read in row.reads.values()),
            efficiency,
            f"{row.best:.2f}x",
            f"{row.expected:.2f}x",
            f"{loop / row.expected:,.1f} s",
        )
    limit = f"{1 / (1 - call.share):.2f}x" if call.share < 1 else "without bound"
    small = any(read > EXCEEDED * row.asked for row in call.expectations for read in row.reads.values())
    lines: list[RenderableType] = [
        table,
        f"Best possible: a kernel that takes exactly the share of the dense time that pattern reads; no density wins more than "
        f"{limit}. Expected: with the efficiency above and the first {call.dense_steps:.0%} of the steps dense.",
    ]
    if small:
        lines.append(
            "(!) a small grid: the blocks that are always read are a large share of it, so more is read than asked for"
        )
    return lines


def _forwards(call: CallDiagnosis, loop: float) -> list[RenderableType]:
    """What step caches could win."""
    table = Table("rule", "computes at least", "best possible", "expected", "best loop", title="forwards: step caches")
    for row in call.caches:
        table.add_row(
            row.name,
            f"{row.least} of {call.steps} steps",
            f"{row.best:.2f}x",
            "the clip decides" if row.expected is None else f"{row.expected:.2f}x",
            f"{loop / row.best:,.1f} s",
        )
    idle = [f"{row.name} predicts none of the {call.steps} steps: {row.idle}" for row in call.caches if row.idle]
    return [
        table,
        "The scopes multiply: sparse attention saves its share in the steps that a step cache computes.",
        *idle,
    ]
