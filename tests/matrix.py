"""Writes docs/matrix.md from the list of families and the results of their tests, never by hand.

python -m pytest tests/families --junitxml=build/families.xml
python -m tests.matrix build/families.xml
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import diffusers
import torch

from diffusers_accel.families import FAMILIES, find
from diffusers_accel.forwards.named import NAMED_FORWARDS
from diffusers_accel.methods.named import FOR_EVERY_MODEL
from tests.families import TINY

PAGE = Path(__file__).resolve().parent.parent / "docs" / "matrix.md"
# Test -> title of its column; of tests with a second parameter a column for each value.
COLUMNS = {
    "test_each_layer_knows_step_branch_and_tokens": "steps, branches, tokens",
    "test_sparse_attention_changes_rows_of_the_video_only": "other rows exact",
    "test_dense_gives_the_frames_of_the_stock_pipeline_and_unpatch_restores_it": "dense is stock",
    **{
        f"test_each_method_is_dense_at_density_1_and_another_below-{name}": name
        for name in FOR_EVERY_MODEL
        if name != "dense"
    },
    "test_the_history_is_kept_within_a_chunk_as_the_paper_says": "history",
    **{f"test_each_step_cache_skips_forwards-{name}": name for name in NAMED_FORWARDS},
    "test_calls_of_other_kinds_follow_each_other": "other sizes, steps, batches",
    "test_compiling_keeps_the_graphs_of_the_stock_model-fullgraph": "one graph",
    "test_compiling_keeps_the_graphs_of_the_stock_model-repeated blocks": "repeated blocks",
}
MARKS = {"passed": "yes", "skipped": "no", "failed": "**fails**", "": ""}


def results(*paths: Path) -> dict[str, dict[str, str]]:
    """Kind of pipeline -> column -> passed, skipped or failed, from pytest's files of results; later files count."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for case in (case for path in paths for case in ElementTree.parse(path).iter("testcase")):
        parts = re.fullmatch(r"(\w+)\[(.*)\]", case.get("name", ""))
        if parts is None:
            continue
        test, given = parts[1], parts[2]
        fits = [(key, rest) for key in TINY for rest in _beside(given, key)]
        if not fits:
            continue
        key, rest = max(fits, key=lambda fit: len(fit[0]))
        column = "-".join(filter(None, (test, rest)))
        outcome = "skipped" if case.find("skipped") is not None else "passed"
        failed = case.find("failure") is not None or case.find("error") is not None
        found[key][column] = "failed" if failed else outcome
    return found


def _beside(given: str, key: str) -> Iterator[str]:
    """What the name of a test's parameters holds beside a kind of pipeline, which stands at either end of it."""
    if given == key:
        yield ""
    if given.startswith(f"{key}-"):
        yield given[len(key) + 1 :]
    if given.endswith(f"-{key}"):
        yield given[: -len(key) - 1]


def pipelines_of(transformer: str) -> Iterator[str]:
    """diffusers' pipelines that are made with a transformer of this class, by name."""
    for name in sorted(dir(diffusers)):
        if name.endswith("Pipeline"):
            try:
                given = inspect.signature(getattr(diffusers, name).__init__).parameters.get("transformer")
            except (ImportError, RuntimeError):  # needs a package that is not here
                continue
            if given is not None and re.search(rf"\b{transformer}\b", str(given.annotation)):
                yield name


def page(found: dict[str, dict[str, str]]) -> str:
    shown = [column for column in COLUMNS if any(column in each for each in found.values())]
    about = f"""Written by `python -m tests.matrix` from the results of `tests/families`, on tiny pipelines of diffusers' own
        classes with random weights: diffusers {diffusers.__version__}, torch {torch.__version__}. Do not edit it. A "no" is a
        test that says why it does not apply, such as a stock forward that cannot be one graph. Of a family's further kinds of
        pipelines only what differs is run. [What to know of each family](families.md)."""
    lines = [
        "# Models and what was tried on each",
        "",
        _filled(about),
        "",
        f"| family | kind | pipeline | {' | '.join(COLUMNS[column] for column in shown)} |",
        f"|---|---|---|{'---|' * len(shown)}",
    ]
    ran: dict[str, set[str]] = defaultdict(set)
    for key, tiny in TINY.items():
        family, _, kind = key.partition(", ")
        pipe = tiny.pipe()
        name = type(pipe).__name__
        ran[next(iter(find(pipe).values()))[1].name].add(name)
        marks = " | ".join(MARKS[found.get(key, {}).get(column, "")] for column in shown)
        lines.append(f"| `{family}` | {kind} | `{name}` | {marks} |")
    lines += [
        "",
        "## Pipelines by transformer",
        "",
        _filled(
            """All of diffusers' pipelines that are made with a supported transformer. Those that were not run call the same
            model: what its forward is given decides whether they work, and a layout that does not fit is refused before
            anything is computed."""
        ),
        "",
        "| family | transformer | run in the tests | also made with it |",
        "|---|---|---|---|",
    ]
    for family in FAMILIES.values():
        transformer = family.transformer.rpartition(".")[2]
        others = [name for name in pipelines_of(transformer) if name not in ran[family.name]]
        cells = (", ".join(f"`{name}`" for name in names) for names in (sorted(ran[family.name]), others))
        lines.append(f"| `{family.name}` | `{transformer}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 138, break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    PAGE.write_text(page(results(*map(Path, sys.argv[1:]))), encoding="utf-8")
    print(f"wrote {PAGE}")
