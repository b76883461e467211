"""The report: every number with its provenance, the plans, and a few clips to look at."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from diffusers_accel.evals.measurement import write_rows
from diffusers_accel.evals.report import words
from diffusers_accel.evals.report.findings import Findings
from diffusers_accel.files import prepare_whole_folder, printable, whole_folder, write_whole

NAMES = ("report.html", "report.json", "report.md")


class Removable(Protocol):
    def remove(self) -> None: ...


@dataclass(frozen=True)
class Report(Findings):
    """What `compare` found. `str()` is the table; `save` writes report.json, report.md and report.html.

    Args:
        kept: what has been kept clip by clip, which goes once the report is saved.
    """

    kept: Removable | None = field(default=None, repr=False)

    @property
    def headline(self) -> str:
        """What was found, a line per subject; names are made printable, so that a line stays one."""
        return "\n".join(printable(words.sentence(self, subject.name)) for subject in self.subjects)

    def table(self) -> Table:
        """For the terminal: a column per subject, so that it fits into 80 characters."""
        columns = [words.cells(self, name) for name in ("dense", *self.names)]
        headings = [Column(Text(printable(column[0]))) for column in columns]  # as texts, in which nothing is markup
        table = Table("", *headings, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
        table.caption = words.intervals(self)
        for heading, *cells in list(zip(words.headings(self), *columns, strict=True))[1:]:
            table.add_row(heading, *cells)
        return table

    def __str__(self) -> str:
        console = Console(width=100)
        with console.capture() as capture:
            console.print(self.table())
        return f"{capture.get()}{self.headline}"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.json, report.md and report.html into a folder of their own, which replaces an older report as a whole.

        What `compare` kept clip by clip (`keep`) is removed then: it is in the report.

        Returns:
            The page's path.

        Raises:
            WriteError: the folder cannot be written, or holds other files than a report's; it is as it was.
        """
        from diffusers_accel.evals.report.render import html, markdown

        folder = Path(folder)
        page, text = html(self).encode(), markdown(self).encode()  # before anything is written
        with whole_folder(folder, NAMES) as new:
            write_rows(new / "report.json", self.rows, headline=self.headline)
            write_whole(new / "report.md", text)
            write_whole(new / "report.html", page)
        if self.kept is not None:
            self.kept.remove()
        return folder / "report.html"


def check_report_folder(folder: str | os.PathLike[str]) -> None:
    """Makes sure, before anything is measured, that `Report.save` can write into `folder`; makes the folder around it.

    Raises:
        WriteError: it cannot, or the folder holds other files than a report's; the message says what to do.
    """
    prepare_whole_folder(Path(folder), NAMES)
