"""Anybody's text inside a page in Markdown."""

from __future__ import annotations

import re

from diffusers_accel.files import printable


def as_markdown_text(text: object) -> str:
    """Anybody's text as Markdown that shows it as it is, in one line: in a heading, a table, a list or a paragraph."""
    line = printable(text).strip().replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    line = re.sub(
        r"[\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", line
    )  # "_" is plain between letters or digits only
    line = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", line)  # at its start: an ordered list,
    return re.sub(r"^[-+=#]", r"\\\g<0>", line)  # another list, a rule or a heading
