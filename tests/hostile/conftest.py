"""`survives` judges the hostile corpora: what it demands is what users may expect of any file from a stranger."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from shard_builder.settings import InputError

SECONDS, GIB = 10, 2**30


@contextlib.contextmanager
def at_most(seconds: int):
    """Raise TimeoutError in the test if its body takes longer."""
    if not hasattr(signal, "setitimer"):
        yield
        return

    def late(*_: object) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def memory(key: str) -> int:
    """A line of /proc/self/status in bytes: VmRSS now, VmHWM the peak; 0 where there is no such file."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def reset_peak() -> None:
    """Make VmHWM start from the memory that is in use now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def contents(folder: Path) -> dict[str, Any]:
    """Every file, folder and link below `folder`, with what it holds."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def survives(tmp_path, monkeypatch):
    """A function that feeds each hostile case to `use` and returns how many were accepted and how many refused.

    `write(case, folder)` makes the input in the folder `given`, which is emptied by nobody: it overwrites what the case
    before wrote. `use(folder)` reads it. It may return, or raise `InputError` with a message of one line. It may raise
    nothing else, take over 10 s, take over 1 GiB, or touch anything outside `given`.
    """

    def survives(
        cases: Iterable[Any], write: Callable[[Any, Path], None], use: Callable[[Path], Any]
    ) -> tuple[int, int]:
        given, bystander = tmp_path / "given", tmp_path / "bystander"
        given.mkdir(exist_ok=True)
        bystander.mkdir()
        (bystander / "kept").write_text("as it was")
        monkeypatch.chdir(bystander)
        monkeypatch.setenv("HOME", str(bystander))
        accepted = refused = 0
        reset_peak()
        before = memory("VmRSS")
        for case in cases:
            write(case, given)
            message = "accepted"
            try:
                with at_most(SECONDS):
                    use(given)
                accepted += 1
            except InputError as error:
                refused += 1
                message = str(error)
            except BaseException as error:
                print(f"the case was {case!r}"[:2000], file=sys.stderr)
                raise AssertionError(f"{type(error).__name__}: {error}") from error
            assert len(message.splitlines()) == 1, (case, message)
            assert memory("VmHWM") - before < GIB, case
            assert contents(bystander) == {"kept": b"as it was"}, case
            outside = {path.name for path in tmp_path.iterdir()} - {"given", "bystander"}
            assert not outside, (case, outside)
        return accepted, refused

    return survives
