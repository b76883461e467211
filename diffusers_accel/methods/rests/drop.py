"""Unread keys count for nothing: the softmax goes over those that are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffusers_accel.methods.rest import CacheEntry, Part, Read, Reader, Rest, Turn


@dataclass(frozen=True)
class Drop(Rest):
    """Nothing is done about the unread keys, whose attention goes to the others."""

    kind: ClassVar[str] = "drop"

    def complete(self, read: Read, turn: Turn, reader: Reader) -> tuple[Part, CacheEntry]:
        same = turn.held is not None and read.pattern is turn.held.pattern
        selected = turn.held.selected if turn.held is not None and same else turn.step
        return read.part, CacheEntry(read.pattern, selected, [])
