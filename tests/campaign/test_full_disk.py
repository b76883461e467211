"""A full disk: the message names the path, what was there stays, and nothing half-written is left."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaign.forks import Forks
from tests.campaign.tally import Campaign
from tests.campaign.works import NAMES

LIMIT = 6000  # bytes of a file; each of the files is longer
REPORT_LIMIT = 30_000  # the page alone is longer


def check(folder: Path, limited: bool, warm: Forks, campaign: Campaign, part: str) -> None:
    wrong = []
    for writer, name in NAMES.items():
        place = folder / writer
        place.mkdir()
        limit = (REPORT_LIMIT if writer == "report" else LIMIT) if limited else None
        ending = warm.run("fill", place, writer=writer, limit=limit)
        assert ending.code == ending.signal == 0, ending.output
        found = json.loads(next(note for note in ending.notes if note.startswith("{")))
        if not found["refused"] or str(place) not in found["refused"]:
            wrong.append(f"{name}: expected a refusal that names the path, found {found['refused'] or found['raw']}")
        if found["changed"]:
            wrong.append(f"{name}: changed {found['changed']}")
        campaign.count(part, "tried")
        campaign.count(part, "refused" if found["refused"] else "raw exceptions")
        campaign.count(part, "losses", bool(found["changed"]))
    assert not wrong, "\n".join(wrong)


def test_files_that_may_not_grow(tmp_path: Path, warm: Forks, campaign: Campaign) -> None:
    check(tmp_path, True, warm, campaign, "full disk: limit of a file")


@contextlib.contextmanager
def small_disk(folder: Path, kibibytes: int) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    command = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full(tmp_path: Path, warm: Forks, campaign: Campaign) -> None:
    with small_disk(tmp_path, 2048):
        check(tmp_path, False, warm, campaign, "full disk: no space")
