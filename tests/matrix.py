"""Writes docs/matrix.md from the list of families and the results of their tests, never by hand.

python -m pytest tests/families tests/test_context_parallel.py --junitxml=build/families.xml
python -m tests.matrix build/families.xml

Without results it only brings the column of diffusers' own tests up to date with their page.
"""

from __future__ import annotations

import inspect
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import diffusers
import torch

from diffusers_accel.attach.parallel import unfit
from diffusers_accel.families import FAMILIES, Family, find
from diffusers_accel.forwards.named import NAMED_FORWARDS
from diffusers_accel.methods.named import FOR_EVERY_MODEL
from diffusers_accel.starter.checkpoints import CHECKPOINTS
from tests.families import TINY

PAGE = Path(__file__).resolve().parent.parent / "docs" / "matrix.md"
OWN_TESTS = PAGE.with_name("diffusers-tests.md")
SHOWS = "shows"  # a property of a test that is for several kinds of pipelines: "kind-column"
# Test -> title of its column; of tests with a second parameter a column for each value. Of each kind of pipeline:
COLUMNS = {
    "test_each_layer_knows_step_branch_and_tokens": "steps, branches, tokens",
    "test_sparse_attention_changes_rows_of_the_video_only": "other rows exact",
    "test_dense_gives_the_frames_of_the_stock_pipeline_and_unpatch_restores_it": "dense is stock",
    **{
        f"test_each_method_is_dense_at_density_1_and_another_below-{name}": name
        for name in FOR_EVERY_MODEL
        if name != "dense"
    },
}
# And of each family:
FEATURES = {
    "test_a_search_finds_a_plan_that_keeps_its_word": "search",
    "test_the_doctor_measures_a_step": "doctor",
    "test_the_preset_knows_when_to_stay_dense": "preset",
    "test_an_adapter_is_part_of_what_runs": "LoRA",
    "test_offloaded_by_groups_it_is_the_same": "group offload",
    "ulysses": "Ulysses",
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
        outcome = "skipped" if case.find("skipped") is not None else "passed"
        failed = case.find("failure") is not None or case.find("error") is not None
        for key, column in _shown(case):
            found[key][column] = "failed" if failed else outcome
    return found


def _shown(case: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """The kinds of pipelines and columns that a test is for: those it names itself, or that its parameters do."""
    for each in case.iter("property"):
        if each.get("name") == SHOWS:
            key, _, column = each.get("value", "").rpartition("-")
            yield key, column
    parts = re.fullmatch(r"(\w+)\[(.*)\]", case.get("name", ""))
    fits = [(key, rest) for key in TINY for rest in _beside(parts[2], key)] if parts else []
    if parts and fits:
        key, rest = max(fits, key=lambda fit: len(fit[0]))
        yield key, "-".join(filter(None, (parts[1], rest)))


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


def own_tests() -> dict[str, str]:
    """Family -> of diffusers' own tests of each kind, how many of those that pass without a patch pass with one."""
    found: dict[str, list[str]] = defaultdict(list)
    row = r"\| (\w+) \| (\w+)(?: \\\*)? \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|"
    for family, kind, tests, passed, unpatched, _ in re.findall(row, OWN_TESTS.read_text(encoding="utf-8")):
        found[family].append(f"{kind} {passed} of {int(tests) - int(unpatched)}")
    return {family: ", ".join(kinds) for family, kinds in found.items()}


def features(found: dict[str, dict[str, str]]) -> Iterator[str]:
    """The table of what goes with each family: a line each."""
    shown = [column for column in FEATURES if any(column in each for each in found.values())]
    titles = [*(FEATURES[column] for column in shown), "starter plan", "diffusers' own tests"]
    yield f"| family | {' | '.join(titles)} |"
    yield f"|---|{'---|' * len(titles)}"
    own, measured = own_tests(), {checkpoint.family for checkpoint in CHECKPOINTS}
    for family in FAMILIES.values():
        key = next(key for key in TINY if key.partition(",")[0] == family.name)
        outcomes = {"ulysses": _without_plan(TINY[key].pipe().transformer, family), **found.get(key, {})}
        marks = [MARKS[outcomes.get(column, "")] for column in shown]
        more = ["yes" if family.name in measured else "", own.get(family.name, "")]
        yield f"| `{family.name}` | {' | '.join([*marks, *more])} |"


def _without_plan(transformer: Any, family: Family) -> str:
    """ "skipped" where a model cannot run under Ulysses, without a patch either."""
    stock = getattr(type(transformer), "_cp_plan", None)
    return "skipped" if stock is None or unfit(family, transformer) else ""


def page(found: dict[str, dict[str, str]]) -> str:
    shown = [column for column in COLUMNS if any(column in each for each in found.values())]
    about = f"""Written by `python -m tests.matrix` from the results of `tests/families` and `tests/test_context_parallel.py`, on
        tiny pipelines of diffusers' own classes with random weights: diffusers {diffusers.__version__}, torch
        {torch.__version__}. Do not edit it. A "no" is a test that says why it does not apply, such as a stock forward that cannot
        be one graph; an empty cell was not run. Of a family's further kinds of pipelines only what differs is run.
        [What to know of each family](families.md)."""
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
        "## Features by family",
        "",
        _filled(
            """On the first pipeline of each family above. Under "Ulysses" a "no" also stands where diffusers has no
            context-parallel plan for the model or its own forward goes wrong ([several devices](parallel.md)). The preset is run
            at a size at which it has to stay dense; its densities are tested on Wan, HunyuanVideo and CogVideoX. "Starter plan":
            checkpoints whose heads are known ([starter plans](starter.md)). "diffusers' own tests": how many of those that pass
            without a patch pass with one; the others train, or run what is refused ([the page](diffusers-tests.md))."""
        ),
        "",
        *features(found),
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


def with_own_tests(text: str) -> str:
    """The page as it is, but for the column of diffusers' own tests, the last of the features."""
    before, title, rest = text.partition("## Features by family\n")
    table, after, others = rest.partition("## Pipelines by transformer\n")
    own = own_tests()
    row = re.compile(r"^(\| `(\w+)` \|.*\|)[^|\n]*\|$", re.M)
    return before + title + row.sub(lambda found: f"{found[1]} {own.get(found[2], '')} |", table) + after + others


def _filled(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), 138, break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    given = [Path(path) for path in sys.argv[1:]]
    text = page(results(*given)) if given else with_own_tests(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(text, encoding="utf-8")
    print(f"wrote {PAGE}")
