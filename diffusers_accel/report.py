"""What a patch has done: methods, kernels, realised density and notes, per layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from diffusers_accel.attach.site import Site
from diffusers_accel.forwards.report import ForwardsReport
from diffusers_accel.methods import BLOCK
from diffusers_accel.run.engine import PlanEngine
from diffusers_accel.support.ranges import ranges

EXCEEDED = 1.2  # times the density that was asked for, from which on the report says why


@dataclass(frozen=True)
class PatchReport:
    """Rows per (transformer, layer), each with: transformer, layer, calls, methods {label: heads x calls}, kernels {name:
    calls}, density (computed share of block pairs, mean over calls and heads, or None before the first call), reused (heads x
    calls that merged a kept part), cache_bytes (most that was kept at once, on all branches), notes {reason: calls}. `str()`
    gives a table in which layers that did the same share a line, then `notes`: what is to be said of the patch as a whole.
    Rows count forwards that ran; `forwards` says which did not, None where the patch predicts none.
    """

    rows: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)
    forwards: ForwardsReport | None = None

    @staticmethod
    def of(
        engines: Sequence[PlanEngine], remarks: Sequence[str] = (), forwards: ForwardsReport | None = None
    ) -> PatchReport:
        rows = []
        for engine in engines:
            tally = engine.tally
            rows.append(
                {
                    "transformer": engine.site.transformer,
                    "layer": engine.site.layer,
                    "calls": tally.calls,
                    "methods": dict(tally.heads),
                    "kernels": dict(tally.kernels),
                    "density": float(tally.density) / tally.calls if tally.calls else None,
                    "reused": tally.reused,
                    "cache_bytes": tally.cache_bytes,
                    "notes": dict(tally.notes),
                }
            )
        return PatchReport(rows, list(dict.fromkeys([*remarks, *_exceeded(engines), *_starved(engines)])), forwards)

    @property
    def density(self) -> float | None:
        """Of the whole run, dense steps and layers included, and predicted forwards as zeros; None before the first call."""
        if self.forwards and not self.rows:  # attention as it was
            return self.forwards.computed_share
        computed = sum(row["density"] * row["calls"] for row in self.rows if row["calls"])
        calls = sum(row["calls"] / self._share(row["transformer"]) for row in self.rows if row["calls"])
        return computed / calls if calls else None

    def _share(self, transformer: str) -> float:
        return self.forwards.share(transformer) if self.forwards else 1.0

    @property
    def cache_bytes(self) -> int:
        """Most that was kept at once, over all layers: of several transformers, which run one after another, the largest."""
        kept: Counter[str] = Counter()
        for row in self.rows:
            kept[row["transformer"]] += row["cache_bytes"]
        return max(kept.values(), default=0)

    def __str__(self) -> str:
        table = Table("layers", "calls", "density", "heads", "kernels", "notes")
        alike: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            shown = {key: value for key, value in row.items() if key != "layer"}
            alike.setdefault(repr(shown), []).append(row)
        for rows in alike.values():
            row = rows[0]
            density = "-" if row["density"] is None else f"{row['density']:.3f}"
            notes = "; ".join(f"{reason} (x{calls})" for reason, calls in row["notes"].items())
            layers = f"{row['transformer']} {ranges([one['layer'] for one in rows])}"
            if row["reused"]:
                kept = f"{row['cache_bytes'] / 2**20:,.0f} MiB"
                notes = "; ".join(
                    part for part in (f"reused {row['reused']:,} heads x calls, cache {kept}", notes) if part
                )
            table.add_row(layers, str(row["calls"]), density, _shares(row["methods"]), _shares(row["kernels"]), notes)
        console = Console(width=120)
        with console.capture() as capture:
            console.print(table)
        whole = "nothing has run yet" if self.density is None else f"density of the whole run {self.density:.3f}"
        if self.cache_bytes:
            whole += f", cache {self.cache_bytes / 2**20:,.0f} MiB"
        forwards = [str(self.forwards)] if self.forwards else []
        return "\n".join([f"{capture.get()}{whole}", *forwards, *(f"note: {note}" for note in self.notes)])


def strangers(sites: Sequence[Site]) -> list[str]:
    """What to say of modules whose processor the user has replaced since patching."""
    left: dict[tuple[str, str], list[int]] = {}
    for site in sites:
        if site.stranger:
            left.setdefault((site.transformer, site.stranger), []).append(site.layer)
    return [
        f"{transformer} layers {ranges(layers)}: their processors were replaced since patching, by {name}, and stay; these "
        "layers no longer run what the patch says. To have both, unpatch, set the processors, and patch then"
        for (transformer, name), layers in left.items()
    ]


def _exceeded(engines: Sequence[PlanEngine]) -> list[str]:
    """Methods that read clearly more than was asked for, and why."""
    asked: dict[str, float] = {}
    reads: dict[str, list[float]] = {}
    tokens: dict[str, int] = {}
    for tally in (engine.tally for engine in engines):
        for method, read in tally.reads.items():
            density = method.select.expected_density(method.order, tally.layout)
            if density is not None and not method.select.reads_all:
                asked[method.label], tokens[method.label] = density, tally.layout.tokens if tally.layout else 0
                total = reads.setdefault(method.label, [0.0, 0.0])
                total[0], total[1] = total[0] + read.heads, total[1] + float(read.density)
    found = {label: summed / heads for label, (heads, summed) in reads.items()}
    return [
        f"{label}: density {density:.3g} was asked for, {found[label]:.2f} was read: of the {-(-tokens[label] // BLOCK):,} "
        f"blocks of {BLOCK} tokens in {tokens[label]:,}, its own, the first frame's and those with text are always read"
        for label, density in asked.items()
        if found[label] > EXCEEDED * density
    ]


def _starved(engines: Sequence[PlanEngine]) -> list[str]:
    """Methods that leave rows of the video without any block of it."""
    totals: dict[str, list[float]] = {}
    for method, read in (entry for engine in engines for entry in engine.tally.reads.items()):
        total = totals.setdefault(method.label, [0.0, 0.0])
        total[0], total[1] = total[0] + read.heads, total[1] + float(read.starved)
    return [
        f"{label}: {starved / heads:.1%} of the video's query blocks read no block of the video; min_blocks=1 gives each its "
        "best one"
        for label, (heads, starved) in totals.items()
        if starved > 0
    ]


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{name} {count / total:.0%}" for name, count in Counter(counts).most_common())
