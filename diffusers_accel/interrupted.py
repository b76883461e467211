"""Ctrl-C in work that keeps what it has done."""

from __future__ import annotations


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in work that can be taken up again. `kept` says in one sentence what is kept and where."""

    def __init__(self, kept: str) -> None:
        super().__init__(kept)
        self.kept = kept
