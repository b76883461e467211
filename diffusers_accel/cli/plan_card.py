"""`diffusers-accel plan card`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan_card(
    file: Annotated[Path, typer.Argument(help="A plan file.")],
    out: Annotated[Path | None, typer.Option("--out", help="The page to write, .md. (otherwise it is printed)")] = None,
) -> None:
    """Describe a plan on a page in Markdown: what it is for, its speed and quality as told, methods, use, limits."""
    from diffusers_accel.cli.output import show
    from diffusers_accel.cli.plans import read_plan
    from diffusers_accel.files import prepare_file, quoted, write_whole
    from diffusers_accel.plan.card import card

    if out is not None and out.suffix != ".md":
        raise ValueError(f'--out: expected a file name that ends in ".md", found {quoted(str(out))}')
    page = card(read_plan(file), file.name)
    if out is None:
        print(page, end="")
        return
    prepare_file(out)
    write_whole(out, page.encode())
    show(f"{out}: the card of {file}")
