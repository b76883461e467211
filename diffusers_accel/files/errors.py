"""What goes wrong with files, in the project's words: what was expected, what was found, what to do."""

from __future__ import annotations

import os
import unicodedata

JOINERS = "\u200c\u200d"  # format characters that words and emoji need
LONGEST = 200  # characters of a value that a message quotes


class FileError(ValueError):
    """A file, or data meant for one, is not what it should be: the message says what was expected and what was found."""


class NewerFileError(FileError):
    """A file of a later release, which this one does not know: it is not damaged, and nothing is to be deleted."""


class WriteError(OSError):
    """A file or folder cannot be written: the message names it, the reason, and what became of what was there before."""

    def __init__(self, path: str | os.PathLike[str], reason: OSError | str, advice: str) -> None:
        why = reason if isinstance(reason, str) else reason.strerror or str(reason)
        super().__init__(f"{printable(path)}: cannot be written: {why}; {advice}")
        self.errno = None if isinstance(reason, str) else reason.errno


class FlushError(WriteError):
    """What was written has its name, whole, and takes the place of the old one; but the disk did not take the name."""

    def __init__(self, path: str | os.PathLike[str], reason: OSError) -> None:
        super().__init__(path, reason, "")
        self.args = (
            f"{printable(path)}: was written, but the folder cannot be flushed to the disk: {reason.strerror or reason}; the "
            "new one is in its place, whole, and a power cut may bring the old one back. Check the disk, and write it again",
        )


def printable(text: object) -> str:
    """`str(text)` in one line without control characters, so that nobody's text steers a terminal or splits a table.

    Line breaks, escape sequences, lone surrogates and marks that turn the direction of writing become backslash escapes.
    What joins letters and emoji (zero-width joiners, no-break spaces) stays.
    """
    return "".join(each.encode("unicode_escape").decode() if _steers(each) else each for each in str(text))


def _steers(character: str) -> bool:
    """Whether a character is none that is shown, but tells whoever shows it what to do, or means nothing yet."""
    if character.isprintable() or character in JOINERS:
        return False
    return unicodedata.category(character) != "Zs"


def quoted(value: object) -> str:
    """A value as a message quotes it: its `repr`, printable, and cut after 200 characters, of a text or of what escapes make
    of it."""
    if not isinstance(value, str):
        text = printable(repr(value))
        return text if len(text) <= LONGEST else f"{text[:LONGEST]} ... ({len(text):,} characters)"
    text = printable(repr(value[:LONGEST]))  # a text of megabytes is not escaped whole
    if len(text) > LONGEST + len("''"):
        return f"{text[:LONGEST]} ... ({len(value):,} characters)"
    rest = len(value) - LONGEST
    return text if rest <= 0 else f"{text} and {rest:,} characters more"
