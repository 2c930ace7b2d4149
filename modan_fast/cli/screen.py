"""What a command shows: progress bars or lines, messages, warnings and tables."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from shard_builder.settings import Progress

screen = Console(stderr=True)
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("eta"),
    TimeRemainingColumn(),
    TextColumn("{task.fields[note]}"),
)
FIRST_LINE, NEXT_LINE = 2, 30  # seconds after which a stage prints a line where there is no terminal


@contextmanager
def stopped(message: str) -> Iterator[None]:
    """On Ctrl-C, print what becomes of the work that is done."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"modan-fast: stopped; {message}", file=sys.stderr)
        raise


@contextmanager
def show_progress() -> Iterator[Progress]:
    """A `Progress` that shows a bar for each stage on a terminal, and else prints a line now and then."""
    if not screen.is_terminal:
        yield _lines()
        return
    tasks: dict[str, Any] = {}
    with Bars(*COLUMNS, console=screen) as bars:

        def show(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                # Work done before a run was resumed says nothing about its speed.
                tasks[stage] = bars.add_task(stage, total=total, completed=done, note=note)
            bars.update(tasks[stage], total=total, completed=done, note=note)

        yield show


def _lines() -> Progress:
    """A `Progress` that prints lines."""
    begun: dict[str, tuple[float, int]] = {}
    printed: dict[str, float] = {}

    def show(stage: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        since, first_done = begun.setdefault(stage, (now, done))
        wait = NEXT_LINE if stage in printed else FIRST_LINE
        if now - printed.get(stage, since) < wait and done < total:
            return
        printed[stage] = now
        left = (now - since) / max(done - first_done, 1) * (total - done)
        ending = f"eta {left:.0f} s" if done < total else f"{now - since:.1f} s"
        print(f"{stage} {done}/{total}, {ending}  {note}".rstrip(), file=sys.stderr, flush=True)

    return show


class _Formatter(logging.Formatter):
    """Passes each message through `rewrite`."""

    def __init__(self, rewrite: Callable[[str], str]) -> None:
        super().__init__("%(message)s")
        self.rewrite = rewrite

    def format(self, record: logging.LogRecord) -> str:
        return self.rewrite(super().format(record))


def show_messages(rewrite: Callable[[str], str]) -> None:
    """Show the package's own log, and warnings of others, on the screen; `rewrite` changes each message."""
    handler = RichHandler(console=screen, show_time=False, show_path=False, show_level=screen.is_terminal)
    handler.setFormatter(_Formatter(rewrite))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("modan_fast").setLevel(logging.INFO)


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal, and 120 columns wide into a file."""
    console = Console()
    Console(width=None if console.is_terminal else 120).print(table)


def print_aucs(results: Path, rows: Iterable[Any]) -> None:
    """Print the AUC table of a results folder, with a dash for what cannot be computed."""
    table = Table("task", "recipe", "protocol", "init", "repeats", "AUC", "95 % CI", title=escape(str(results)))
    for row in rows:
        interval = "–" if row.interval is None else f"{row.interval[0]:.3f} to {row.interval[1]:.3f}"
        numbers = ("–" if row.mean is None else f"{row.mean:.3f}", interval)
        table.add_row(escape(row.task), row.recipe, row.protocol, escape(row.init), str(row.repeats), *numbers)
    print_table(table)
