"""Prose in Markdown is wrapped, so that a change shows in a diff as the sentence that changed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST = 140
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"!?\[(?:!\[[^\]]*\]\([^)]*\)|[^\]])*\](?:\([^)]*\)|\[[^\]]*\])|<https?://[^>]*>|https?://\S+")
DEFINITION = re.compile(r"\[[^\]]+\]: ")
NOT_WORDS = re.compile(r"[\s*+|,;.·>-]*")  # between links, and before the first one in a list


def too_long(text: str) -> list[int]:
    """Numbers, from 1, of the lines of prose that are longer than `LONGEST`: tables, code blocks and lines of nothing but
    links are none."""
    found, fence = [], ""
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.match(r"\s*(`{3,}|~{3,})", line)
        if mark and (not fence or (line.strip().startswith(fence) and set(line.strip()) == {fence[0]})):
            fence = "" if fence else mark[1]
        elif not (fence or len(line) <= LONGEST or line.lstrip().startswith("|") or only_links(line)):
            found.append(number)
    return found


def only_links(line: str) -> bool:
    return bool(DEFINITION.match(line) or NOT_WORDS.fullmatch(LINK.sub("", line)))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_is_wrapped(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    lines = too_long(path.read_text(encoding="utf-8"))
    assert not lines, f"{name}: wrap these lines at {LONGEST} characters: {lines}"


def test_what_counts_as_prose() -> None:
    word, link = "word " * 40, f"[text](https://example.org/{'x' * 150})"
    lines = [word, f"| {word} |", "```python", word, "```", word, "~~~~", "```", word, "~~~~"]
    assert too_long("\n".join(lines)) == [1, 6]
    assert too_long(f"{link}\n- {link}, {link}\n[![badge](a)](https://{'x' * 150})\n[one]: https://{'x' * 150}") == []
    assert too_long(f"{word}\n- {word}\n    {word}\n> {word}\nsee {link}") == [1, 2, 3, 4, 5]
    assert too_long("x" * LONGEST) == [] and too_long("x" * (LONGEST + 1)) == [1]
