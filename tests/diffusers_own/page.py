"""The comparisons as text: a line each while they run, and the page of the docs."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from importlib.metadata import version

from diffusers_accel.families import FAMILIES
from tests.diffusers_own.runs import FOLDERS, KINDS, Comparison, ended_with

HEAD = """# diffusers' own tests under a patch

Written by `python -m tests.diffusers_own CHECKOUT --page docs/diffusers-tests.md`, never by hand. diffusers' own tests of each
family run twice on a CPU: as they are, and with every pipeline, or every transformer that is made for none, patched with `dense`.
So whatever they do to a model is done to a patched one: saving and loading, LoRA, offloading, casting, caches, callbacks.
A patch is for inference: tests that train fail under it by design, with an error that says so. So do those that give a model
what no layout describes, such as AnyFlow-FAR without its cache, or a sequence of MiniMax-H3 whose rows lie in no frames.

A test that fails without a patch too does not count: most of those compare with numbers of weights on the hub, where small
stand-ins of other weights are used here, or load what there is no stand-in for. Tests that are skipped are left out, such as
those that ask for a GPU. Without torchvision, torch resizes the mask of padding that Cosmos takes.
"""
COLUMNS = (
    "family",
    "tests of",
    "tests",
    "passed",
    "failed unpatched",
    "failed only when patched",
    "calls of attention when patched",
)
TABLE = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"


def line(done: Comparison) -> str:
    if not done.files:
        return f"{done.family} {done.kind}: no tests of diffusers name its transformer"
    return (
        f"{done.family} {done.kind}: {done.tests} tests, {done.passed} passed, {done.failed_unpatched} failed unpatched, "
        f"{len(done.failed_patched)} failed only when patched, {done.attention} calls of attention"
        f"{'' if done.finished else ', not finished'}"
    )


def written(found: Sequence[Comparison], checkout: str) -> str:
    """The page.

    Args:
        found: all of it, in any order.
        checkout: the version of diffusers that the tests are of.
    """
    ran = sorted((each for each in found if each.files), key=lambda each: (each.family, KINDS.index(each.kind)))
    packages = ", ".join(
        f"{name} {version(name)}" for name in ("diffusers", "torch", "transformers", "accelerate", "peft")
    )
    versions = f"Installed: {packages}. Tests of diffusers {checkout}.\n"
    table = TABLE + "".join(map(_row, ran))
    parts = [HEAD, versions, table, *_without_tests(found), *_patched(ran), *_unpatched(ran)]
    if not all(each.finished for each in ran):
        parts.append("\\* stopped when its time was over: what had run in both runs by then.\n")
    return "\n".join(parts)


def _row(done: Comparison) -> str:
    cells = [done.tests, done.passed, done.failed_unpatched, len(done.failed_patched), f"{done.attention:,}"]
    kind = done.kind if done.finished else f"{done.kind} \\*"
    return f"| {done.family} | {kind} | {' | '.join(map(str, cells))} |\n"


def _without_tests(found: Sequence[Comparison]) -> Iterator[str]:
    """Of each kind the families that diffusers has no tests of, and those that were left out."""
    yield "## Without tests\n"
    yield "Families whose transformer no test file of diffusers in that folder names:\n"
    lines = ""
    for kind in KINDS:
        have = {each.family: bool(each.files) for each in found if each.kind == kind}
        none = [f"`{name}`" for name in sorted(have) if not have[name]]
        lines += _item(f"{kind} (`{FOLDERS[kind]}`): {', '.join(none) or 'none'}")
        if left := sorted({family.name for family in FAMILIES.values()} - {*have}):
            lines += _item(f"not run, {kind}: {', '.join(left)}")
    yield lines
    yield (
        "Tests of modular pipelines (`tests/modular_pipelines`, and LoRA of MiniMax-H3) load whole pipelines from the hub, for\n"
        "which there is no stand-in: they are not run.\n"
    )


def _item(text: str) -> str:
    return (
        textwrap.fill(f"- {text}", 130, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False) + "\n"
    )


def _patched(ran: Sequence[Comparison]) -> Iterator[str]:
    """What failed only when patched, by its reason."""
    by_reason: dict[str, list[str]] = {}
    for done in ran:
        for test, why in done.failed_patched.items():
            by_reason.setdefault(ended_with(why), []).append(f"{done.family}: `{_named(test)}`")
    yield "## Failed only when patched\n"
    if not by_reason:
        yield "None.\n"
    for reason, tests in sorted(by_reason.items(), key=lambda entry: -len(entry[1])):
        yield f"- {len(tests)} x `{reason}`\n" + "".join(f"  - {test}\n" for test in sorted(tests))


def _unpatched(ran: Sequence[Comparison]) -> Iterator[str]:
    """The most frequent reasons of what failed without a patch."""
    counted: dict[str, int] = {}
    for done in ran:
        for reason, times in done.unpatched_reasons.items():
            counted[reason] = counted.get(reason, 0) + times
    yield "## Failed unpatched\n"
    most = sorted(counted.items(), key=lambda entry: -entry[1])
    yield "".join(f"- {times} x `{reason}`\n" for reason, times in most[:12]) or "None.\n"
    if rest := sum(times for _, times in most[12:]):
        yield f"- {rest} x other reasons\n"


def _named(test: str) -> str:
    """Its class and name, without the file."""
    return test.partition("::")[2]
