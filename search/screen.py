"""What the user of a search sees, on stderr: what it is about to do, how far it is, and how long it will still take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from diffusers_accel.support.log import LOG
from diffusers_accel.support.progress import ProgressLines


class Screen:
    """Prints nothing when `shown` is False."""

    def __init__(self, shown: bool) -> None:
        self._console = Console(stderr=True, quiet=not shown)

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def warn(self, text: str) -> None:
        """Says what nobody should miss: in the log where the screen shows nothing."""
        if self._console.quiet:
            LOG.warning("%s", text)
        else:
            self.say(f"WARNING: {text}")

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Callable[[int], None]]:
        """A progress bar, or lines where there is no terminal; inside the `with`, a function that sets how much of `total` is
        done."""
        if not self._console.quiet and not self._console.is_terminal and not self._console.is_jupyter:
            lines = ProgressLines(total, lambda text: self.say(f"{title}: {text}"))
            lines.tell(0)
            yield lines.tell
            return
        columns = (TextColumn(title), BarColumn(), TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn())
        left = (TextColumn("left"), TimeRemainingColumn())
        with Progress(*columns, *left, console=self._console, disable=self._console.quiet) as progress:
            task = progress.add_task("", total=total)
            yield lambda done: progress.update(task, completed=done)
