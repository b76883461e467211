"""Runs diffusers' own tests of the supported families, as they are and patched with "dense", and writes what differs as a page.

    python -m tests.diffusers_own PATH_TO_A_CHECKOUT_OF_DIFFUSERS [family ...] [--minutes 10] [--page docs/diffusers-tests.md]

Only the folder `tests` of the checkout is used; the diffusers that runs is the installed one. Take the tag of that version, or
the nearest: a test that fails without a patch, because it is of another version, compares with numbers of the hub's own weights
or asks for what is not here, does not count. Nothing is downloaded: `stand_ins.py` makes what the tests ask the hub for.
Packages that the tests import have to be there: `pip install parameterized requests-mock ftfy`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.diffusers_own import page, runs
from tests.diffusers_own.stand_ins import make_cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("families", nargs="*", help="names of list_families(); all without any")
    parser.add_argument("--kinds", nargs="+", choices=runs.KINDS, default=list(runs.KINDS), metavar="kind")
    parser.add_argument(
        "--minutes",
        type=float,
        default=10,
        help="at most for each run of a family and kind, of which there are two; its test files share it",
    )
    parser.add_argument("--results", type=Path, help="folder that keeps the results; what is in it is not run again")
    parser.add_argument("--page", type=Path, help="write the page there, of all that the folder of results holds")
    given = parser.parse_intermixed_args()
    if not (given.checkout / "tests" / "pipelines").is_dir():
        parser.error(f"expected a checkout of diffusers with tests/pipelines in it, found {given.checkout}")
    families = runs.chosen(given.families)
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "hub"
        make_cache(cache)
        results = given.results or Path(folder) / "results"
        for kind in given.kinds:
            for family in families:
                done = runs.compared(given.checkout.resolve(), results, cache, family, kind, given.minutes * 60)
                print(page.line(done), flush=True)
        if given.page:
            given.page.write_text(page.written(runs.kept(results), runs.version_of(given.checkout)), encoding="utf-8")
            print(f"wrote {given.page}")


if __name__ == "__main__":
    main()
