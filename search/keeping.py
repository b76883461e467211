"""Where a search keeps what it has measured, so that neither an interruption nor another search loses a finished run."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffusers_accel.files import FileError, WriteError, prepare_file, printable, quoted
from diffusers_accel.search.scores import Scores
from diffusers_accel.search.scores_file import KIND

PLAN, SCORES, COST, STEPS = ".json", ".scores.safetensors", ".cost.json", ".steps.json"
Place = str | os.PathLike[str]


def check_places(
    out: Any, scores: Any, names: tuple[str, str] = ("out", "scores_path")
) -> tuple[Path | None, Path | None]:
    """The files of the plan and of the scores, as far as they are named: both, and that of the times, can be written and are
    different ones, whatever links lead to them. Scores stand beside a plan that is named where they are not named themselves.

    Args:
        names: what the user calls the two, for messages.

    Raises:
        TypeError, ValueError: it is no path, has another ending, or two are the same file.
        WriteError: it cannot be written.
    """
    plan_file = None if out is None else _absolute(names[0], out)
    scores_file = None if scores is None else _absolute(names[1], scores)
    if plan_file and scores_file is None:
        scores_file = plan_file.with_suffix(SCORES)
    if plan_file and scores_file:
        beside = (cost_file(scores_file), "the kernel times beside the scores")
        steps = (steps_file(scores_file), "the step caches beside the scores")
        for path, what in ((scores_file, "the scores"), beside, steps):
            if _same(plan_file, path):
                raise ValueError(
                    f"{names[1]}: {what} and the plan would be one file, {quoted(str(plan_file))}; name another one, such as "
                    f"{quoted(str(plan_file.with_suffix(SCORES)))}"
                )
    _check_ending(names[0], plan_file, PLAN)
    _check_ending(names[1], scores_file, ".safetensors")
    if plan_file:
        prepare_file(plan_file)
    if scores_file:
        scores_file = Path(os.path.realpath(scores_file))  # a link stays one, and all its names share one lock
        prepare_scores(scores_file)
    return plan_file, scores_file


def prepare_scores(path: Path) -> None:
    """Makes sure that the scores and what lies beside them can be written. Raises WriteError."""
    prepare_file(path)
    prepare_file(cost_file(path))
    prepare_file(steps_file(path))


def cost_file(scores: Path) -> Path:
    """Where the kernel times of a search are kept."""
    return scores.with_suffix(COST)


def steps_file(scores: Path) -> Path:
    """Where the step caches that a search may choose from are kept."""
    return scores.with_suffix(STEPS)


def cached_scores(identity: Mapping[str, Any]) -> Path:
    """The file in the user's cache of a search that names none: the same for the same `identity`, which is JSON data.

    Raises:
        WriteError: there is no place for it.
    """
    cache = os.environ.get("XDG_CACHE_HOME", "")
    home = Path(cache) if os.path.isabs(cache) else Path(os.path.expanduser("~")) / ".cache"
    whole = {"version": KIND.version, **identity}  # files of another version are left alone, not met
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:20]
    path = Path(os.path.realpath(home / "diffusers_accel" / "searches" / f"{digest}{SCORES}"))
    try:
        prepare_scores(path)
    except WriteError as error:
        reason = OSError(
            error.errno or 0, "the cache folder, where a search keeps what it measured, is no place to write"
        )
        raise WriteError(path, reason, "name the plan file (out=...) or the scores (scores_path=...)") from error
    return path


class Keeper:
    """The scores file of one search. Saving never leaves fewer finished calibration runs in it than it held.

    Args:
        path: of the file.
        check: raises a ValueError for scores that are not of this search.
        prompts, spans: how many there are to measure.
    """

    def __init__(self, path: Path, check: Callable[[Scores], None], prompts: int, spans: int) -> None:
        self.path = path
        self._check = check
        self._all = prompts, spans
        self._done = 0, 0  # prompts and spans that the file holds
        self._mark: tuple[int, ...] | None = None  # of the file as it was last read or written here

    def load(self) -> Scores | None:
        """What the file holds, or None where there is none. Raises a ValueError for anything but scores of this search."""
        mark = _mark(self.path)
        if mark is None:
            return None
        scores = Scores.load(self.path)
        self._check(scores)
        self._note(mark, scores)
        return scores

    def save(self, scores: Scores) -> Scores:
        """Keeps `scores` and returns what the file holds then: somebody else's, where they have measured more of the same."""
        mark = _mark(self.path)
        if mark is not None and mark != self._mark:
            try:
                theirs = self.load()
            except (ValueError, OSError) as error:
                self._keep_aside(scores, error)
            if theirs is not None and _extent(theirs) >= _extent(scores):
                return theirs
        scores.save(self.path)
        self._note(_mark(self.path), scores)
        return scores

    def kept(self) -> str:
        """What is in the file, and where that is."""
        prompts, spans = self._done
        if not prompts:
            return "nothing is kept, as no prompt was finished"
        measured = f" and {spans} of {self._all[1]} spans" if spans else ""
        return f"{prompts} of {self._all[0]} prompts{measured} are kept in {printable(self.path)}"

    def _note(self, mark: tuple[int, ...] | None, scores: Scores) -> None:
        self._mark = mark
        self._done = _extent(scores)

    def _keep_aside(self, scores: Scores, reason: Exception) -> None:
        aside = self.path.with_name(f"{self.path.stem}.{secrets.token_hex(4)}.safetensors")
        scores.save(aside)
        raise FileError(
            f"{printable(self.path)}: somebody put another file there during this search ({reason}). It is left as it is; "
            f"all that this search measured is in {printable(aside)}: go on with that as scores_path"
        ) from reason


def _extent(scores: Scores) -> tuple[int, int]:
    return len(scores.runs), len(scores.impacts)


def _mark(path: Path) -> tuple[int, ...] | None:
    """Tells one version of a file from another: each is a file of its own that was renamed."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _absolute(name: str, value: Any) -> Path:
    """The path as it is now, wherever the working folder is when the search ends."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(f"{name}: expected the path of a file, found {quoted(value)}")
    if not os.fspath(value) or "\0" in os.fspath(value):
        raise ValueError(f"{name}: expected the path of a file, found {quoted(os.fspath(value))}")
    return Path(os.path.abspath(value))


def _check_ending(name: str, path: Path | None, ending: str) -> None:
    if path is not None and path.suffix != ending:
        raise ValueError(f'{name}: expected a file name that ends in "{ending}", found {quoted(str(path))}')


def _same(one: Path, other: Path) -> bool:
    if os.path.normcase(os.path.realpath(one)) == os.path.normcase(os.path.realpath(other)):
        return True
    return os.path.exists(one) and os.path.exists(other) and one.samefile(other)  # also of names that no system takes
