"""What a command shows: results, errors, progress bars or lines, messages, warnings and tables; and what stops it.

Names in files may come from strangers: all text is made `printable` here, and no other module of the package prints.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from shard_builder.settings import Progress, no_progress, printable

screen = Console(stderr=True)
COLUMNS = (
    TextColumn("{task.description}", markup=False),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TextColumn("eta"),
    TimeRemainingColumn(),
    TextColumn("{task.fields[note]}", markup=False),
)
FIRST_LINE, NEXT_LINE = 2, 30  # seconds after which a stage prints a line where there is no terminal
TELLS_A_RESULT = "pretraining"  # the stage whose last line is printed however short it was: it names the loss
STOPPED = 130  # exit code


class Stopped(Exception):  # noqa: N818 - nothing is wrong
    """The user or the system stopped the command; the message says what becomes of the work."""


@contextmanager
def stopped(message: str) -> Iterator[None]:
    """Turn an interruption into `Stopped`, with what becomes of the work that is done."""
    try:
        yield
    except KeyboardInterrupt:
        raise Stopped(f"stopped; {message}") from None


@contextmanager
def signals_like_ctrl_c() -> Iterator[None]:
    """Let SIGTERM (a scheduler) and SIGHUP (a lost connection) interrupt as Ctrl-C does.

    Schedulers send them several times: the first one counts, so that the cleaning up is left in peace. A signal that is
    ignored stays so: that is how `nohup` keeps a command alive.
    """
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    changed = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]

    def interrupt(number: int, frame: object) -> None:
        for each in changed:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in changed:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


def rank() -> int:
    """The number of this process among those that torchrun has started; 0 for one alone. Only rank 0 speaks."""
    return int(os.environ.get("RANK") or 0) if int(os.environ.get("WORLD_SIZE") or 1) > 1 else 0


def escape_unencodable() -> None:
    """Let stdout and stderr write escapes for characters that their encoding lacks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(*lines: str) -> None:
    """Print results, a line each."""
    _print_result("\n".join(map(printable, lines)))


def _print_result(text: str) -> None:
    if rank():
        return
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # `| head -1` has read enough. The work goes on, and its exit code tells how it ended.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(message: str) -> None:
    """Print why a command ended, in one line on stderr."""
    where = f"rank {rank()}: " if rank() else ""
    _print_aside(f"modan-fast: {where}{' '.join(message.split())}")


def _print_aside(text: str) -> None:
    with suppress(OSError):  # a lost terminal or a full log is no reason to stop the work
        print(printable(text), file=sys.stderr, flush=True)


@contextmanager
def show_progress() -> Iterator[Progress]:
    """A `Progress` that shows a bar for each stage on a terminal, and else prints a line now and then."""
    if rank() or not screen.is_terminal:
        yield no_progress if rank() else _lines()
        return
    tasks: dict[str, Any] = {}
    bars = Bars(*COLUMNS, console=screen)
    lost_terminal = suppress(OSError)  # no reason to stop the work

    def show(stage: str, done: int, total: int, note: str = "") -> None:
        note = printable(note)
        with lost_terminal:
            if stage not in tasks:
                # Work done before a run was resumed says nothing about its speed.
                tasks[stage] = bars.add_task(printable(stage), total=total, completed=done, note=note)
            bars.update(tasks[stage], total=total, completed=done, note=note)

    with lost_terminal:
        bars.start()
    try:
        yield show
    finally:
        with lost_terminal:
            bars.stop()


@dataclass
class _Stage:
    """A stage that is shown in lines: when it began, with how much done, and when its next line is due."""

    since: float
    first: int
    due: float
    done: int
    ended: bool = False


def _lines() -> Progress:
    """A `Progress` that prints lines: some while a stage runs, and one at its end. A short stage has none."""
    stages: dict[str, _Stage] = {}

    def show(stage: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if stage not in stages or done < stages[stage].done:  # it begins, perhaps for another time
            stages[stage] = _Stage(now, done, now + FIRST_LINE, done)
        at = stages[stage]
        at.done, ended_before, at.ended = done, at.ended, done >= total
        took = now - at.since
        if at.ended:
            if ended_before or (took < FIRST_LINE and stage != TELLS_A_RESULT):
                return
            ending = f"{took:.1f} s"
        elif now >= at.due:
            at.due = now + NEXT_LINE
            ending = f"eta {took / max(done - at.first, 1) * (total - done):.0f} s"
        else:
            return
        _print_aside(f"{stage} {done}/{total}, {ending}  {note}".rstrip())

    return show


class _Formatter(logging.Formatter):
    """Passes each message through `rewrite`, and makes it one line."""

    def __init__(self, rewrite: Callable[[str], str]) -> None:
        super().__init__("%(message)s")
        self.rewrite = rewrite

    def format(self, record: logging.LogRecord) -> str:
        return printable(self.rewrite(super().format(record)))


def show_messages(rewrite: Callable[[str], str]) -> None:
    """Show the package's own log, and warnings of others, on the screen; `rewrite` changes each message."""
    handler = RichHandler(console=screen, show_time=False, show_path=False)
    # Into a file a message is one line, however long.
    chosen: logging.Handler = handler if screen.is_terminal else logging.StreamHandler()
    chosen.setFormatter(_Formatter(rewrite))
    logging.basicConfig(level=logging.WARNING, handlers=[chosen])
    logging.captureWarnings(True)
    logging.getLogger("modan_fast").setLevel(logging.ERROR if rank() else logging.INFO)
    if rank():
        logging.captureWarnings(False)
        warnings.simplefilter("ignore")


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], total: Sequence[str] = ()
) -> None:
    """Print a table as wide as the terminal, and 120 columns wide into a file; `total` is a last row, set apart."""
    # As `Text` a name with brackets is no markup.
    table = Table(*columns, title=Text(printable(title), "table.title"))
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    if total:
        table.add_section()
        table.add_row(*(Text(printable(cell)) for cell in total))
    console = Console()
    console = Console(width=None if console.is_terminal else 120)
    with console.capture() as captured:
        console.print(table)
    _print_result(captured.get().removesuffix("\n"))


def print_aucs(results: Path, rows: Iterable[Any]) -> None:
    """Print the AUC table of a results folder, then its few-label curves; a dash for what cannot be computed.

    With several classes or labels it is the mean AUC of each against the rest.
    """

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    def span(interval: tuple[float, float] | None) -> str:
        return "–" if interval is None else f"{interval[0]:.3f} to {interval[1]:.3f}"

    rows = list(rows)
    whole = [row for row in rows if row.labels is None]
    units = "patients" if any(row.units == "patients" for row in whole) else "images"
    if whole:
        cells = [
            [
                *(row.task, row.recipe, row.protocol, row.init, str(row.repeats), number(row.mean)),
                *(span(row.interval), span(row.patient_interval)),
            ]
            for row in whole
        ]
        head = ["task", "recipe", "protocol", "init", "repeats", "AUC", "95 % CI, repeats", f"95 % CI, {units}"]
        print_table(str(results), head, cells)
    if few := [row for row in rows if row.labels is not None]:
        cells = [
            [
                *(row.task, row.recipe, row.protocol.partition(":")[0], row.init, str(row.labels)),
                *(str(row.repeats), number(row.mean), number(row.spread)),
            ]
            for row in few
        ]
        head = ["task", "recipe", "protocol", "init", "labels a class", "tries", "AUC", "SD"]
        print_table(f"{results}, few labels", head, cells)
