"""Unread keys take part as the means of their blocks, in the same softmax."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusers_accel.methods.rest import CacheEntry, Partial, Read, Reader, RefreshDecision
from diffusers_accel.methods.rests.drop import Drop
from diffusers_accel.methods.select import Select


@dataclass(frozen=True)
class Pooled(Drop):
    """For every query, each unread key block counts as one key: its mean k and v, with log n added to its logit, n being its
    tokens (the proxies of Sol-Attn; pooled levels as in PSA). No attention is lost, and nothing is corrected afterwards: where
    the keys and values of a block are equal, the result is dense attention. Text is always read, never pooled.
    """

    kind: ClassVar[str] = "pooled"
    reads: ClassVar[bool] = True
    changes_nothing: ClassVar[bool] = False

    @property
    def label(self) -> str:
        return "pooled"

    def refuses(self, select: Select) -> str | None:
        if select.reads_all or select.reads_nothing:
            return f'"{select.kind}" leaves no blocks beside others that are read: leave the rest out'
        return None

    def unread(self, read: Read, decision: RefreshDecision, reader: Reader) -> tuple[Partial | None, CacheEntry]:
        _, held = super().unread(read, decision, reader)
        return reader.pooled(read.pattern), held
