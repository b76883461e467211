"""Ctrl-C during hours of work, with what is left of them."""

from __future__ import annotations


class Interrupted(KeyboardInterrupt):
    """The user stopped the work.

    Args:
        kept: what was finished before and where it is kept, and how to go on; a sentence for the user.
    """

    def __init__(self, kept: str) -> None:
        super().__init__(kept)
        self.kept = kept
