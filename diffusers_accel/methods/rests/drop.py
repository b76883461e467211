"""Unread keys count for nothing: the softmax goes over those that are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusers_accel.methods.rest import CacheEntry, Partial, Read, Reader, RefreshDecision, Rest


@dataclass(frozen=True)
class Drop(Rest):
    """Nothing is done about the unread keys, whose attention goes to the others."""

    kind: ClassVar[str] = "drop"
    changes_nothing: ClassVar[bool] = True

    def unread(self, read: Read, decision: RefreshDecision, reader: Reader) -> tuple[Partial | None, CacheEntry]:
        same = decision.held is not None and read.pattern is decision.held.pattern
        selected = decision.held.selected if decision.held is not None and same else decision.step
        return None, CacheEntry(read.pattern, selected, [])
