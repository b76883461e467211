"""Runs works in forks of one warm process, so that a kill costs no imports: reads orders as JSON lines, answers likewise.

A process of its own, because what forks must never have computed: a child would wait for threads that it does not have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ending:
    """How a work ended: killed by a signal, or with this exit code; what it noted; what it printed."""

    signal: int
    code: int
    notes: tuple[str, ...]
    output: str

    @property
    def steps(self) -> list[str]:
        """The changes of files, one after another."""
        return [note.removeprefix("change ") for note in self.notes if note.startswith("change ")]

    def kept(self, what: str) -> int:
        """How many of them were said to be kept."""
        return max((int(note.split()[2]) for note in self.notes if note.startswith(f"kept {what} ")), default=0)


class Forks:
    """The warm process, from outside."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DIFFUSERS_ACCEL_OFFLINE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.campaign.forks"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, work: str, folder: Path, die: int | None = None, **arguments: Any) -> Ending:
        """Does a work of `works.WORKS` in a folder; it dies at its `die`-th change of a file there."""
        return self.together({"work": work, "folder": str(folder), "die": die, "arguments": arguments})[0]

    def together(self, *orders: dict[str, Any]) -> list[Ending]:
        """Does several at the same time."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(orders) + "\n")
        self._process.stdin.flush()
        return [
            Ending(**{**each, "notes": tuple(each["notes"])}) for each in json.loads(self._process.stdout.readline())
        ]

    def close(self) -> None:
        self._process.communicate()


def _child(order: dict[str, Any], notes: int, output: int) -> None:
    from tests.campaign.dying import die_at
    from tests.campaign.works import WORKS

    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 0

    def note(text: str) -> None:
        os.write(notes, f"{text}\n".encode(errors="replace"))

    try:
        folder = Path(order["folder"])
        if "die" in order:
            die_at(order["die"], folder, lambda change: note(f"change {change}"))
        WORKS[order["work"]](folder, note, **order["arguments"])
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class _Running:
    """A child that works."""

    def __init__(self, order: dict[str, Any]) -> None:
        self._output = tempfile.TemporaryFile()  # noqa: SIM115, closed in `ending`
        self._notes, write = os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.close(self._notes)
            _child(order, write, self._output.fileno())
        os.close(write)

    def ending(self) -> dict[str, Any]:
        with os.fdopen(self._notes) as pipe:
            notes = pipe.read().splitlines()
        _, status = os.waitpid(self._pid, 0)
        self._output.seek(0)
        text = self._output.read().decode(errors="replace")
        self._output.close()
        signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        return {
            "signal": signal,
            "code": 0 if signal else os.WEXITSTATUS(status),
            "notes": notes,
            "output": text[-3000:],
        }


def _serve() -> None:
    import torch

    from diffusers_accel.evals.report.render import html
    from tests.campaign.works import pipeline
    from tests.evals import synthetic

    torch.set_num_threads(1)
    for module in ("scipy.stats", "psutil"):
        __import__(module)
    pipeline()
    html(synthetic.report({"plan": [1.2]}))  # loads fonts and templates
    for line in sys.stdin:
        running = [_Running(order) for order in json.loads(line)]
        print(json.dumps([each.ending() for each in running]), flush=True)


if __name__ == "__main__":
    _serve()
