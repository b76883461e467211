"""Ctrl-C in work that keeps what it has done."""

from __future__ import annotations


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in work that can be taken up again; the pipeline is as it was.

    Args:
        kept: what of the work is kept, and where, in one sentence.
        go_on: how to go on in Python; the command line names its own command instead.
    """

    def __init__(self, kept: str, go_on: str = "") -> None:
        super().__init__(f"interrupted: {kept} {go_on}".rstrip())
        self.kept = kept
