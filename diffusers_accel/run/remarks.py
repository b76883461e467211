"""What a patch has to say about itself as a whole: said once in the log, and kept for its report."""

from __future__ import annotations

import logging

from diffusers_accel.support.log import LOG


class Remarks:
    """The remarks of one patch, in the order in which they came up."""

    def __init__(self) -> None:
        self._logged: set[str] = set()
        self._said: dict[str, None] = {}

    def say(self, text: str, level: int = logging.WARNING) -> None:
        """Keeps the remark for the report; the first time it is logged too, at this level."""
        self._said[text] = None
        if text not in self._logged:
            self._logged.add(text)
            LOG.log(level, "%s", text)

    def clear(self) -> None:
        """What still holds at the next call is said again, but not logged again."""
        self._said.clear()

    @property
    def said(self) -> list[str]:
        return list(self._said)
