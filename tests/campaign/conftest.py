"""The campaign's option: how long it runs. Its seed, and the table of what it counted."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaign.forks import Forks
from tests.campaign.tally import Campaign

_running = pytest.StashKey[Campaign]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("campaign", "the campaign of tests/campaign")
    group.addoption("--long", action="store_true", help="as many mutants, kills and compositions as take an hour")
    group.addoption("--campaign-seed", type=int, default=0, help="of everything that is drawn (default: 0)")


@pytest.fixture(scope="session")
def campaign(pytestconfig: pytest.Config) -> Campaign:
    """How much is tried, what is drawn, and where it is counted."""
    # A run of all tests meets this file after the options were read.
    made = Campaign(pytestconfig.getoption("campaign_seed", 0), pytestconfig.getoption("long", False))
    pytestconfig.stash[_running] = made
    return made


@pytest.fixture(scope="session")
def warm() -> Iterator[Forks]:
    """A process that has imported everything, and works in forks."""
    if sys.platform != "linux":
        pytest.skip("forks, and finds out in /proc which files are open")
    forks = Forks()
    try:
        yield forks
    finally:
        forks.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """The folder of a test, in which it also runs: what a command writes beside itself is seen."""
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        yield tmp_path
    finally:
        os.chdir(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    campaign = config.stash.get(_running, None)
    if campaign is not None:
        terminalreporter.section("campaign")
        terminalreporter.write_line(campaign.table())
