"""Signals for the commands that save as they go: one line, no traceback, no worker left, the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SIGNALS = [
    (signal.SIGTERM,),
    *(
        pytest.param(each, marks=pytest.mark.slow)
        for each in ((signal.SIGINT,), (signal.SIGHUP,), (signal.SIGTERM, signal.SIGTERM))
    ),
]


def group(pid: int) -> list[str]:
    """The processes of a session that still run."""
    found = []
    for each in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = each.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) == pid and state != "Z":
            found.append(each.parent.name)
    return found


def stopped_well(command, whole_group: bool, *numbers: int) -> None:
    """Assert that signals end a command with one line, or at once, and that no process of it is left."""
    for number in numbers:
        os.killpg(command.pid, number) if whole_group else os.kill(command.pid, number)
        time.sleep(0.01)
    code, said = command.end()
    assert code in (130, 143, *(-number for number in numbers)), (code, said)
    assert "Traceback" not in said
    assert "Error" not in said
    if code > 0:
        assert [line for line in said.splitlines() if line.startswith("modan-fast: stopped")], said
    last = time.monotonic() + 10
    while group(command.pid):
        assert time.monotonic() < last, "a worker is left"
        time.sleep(0.01)


@pytest.mark.parametrize("numbers", SIGNALS)
def test_a_stopped_evaluation_goes_on(made, working, succeed, numbers, tmp_path):
    command = working("results")
    stopped_well(command, False, *numbers)
    done = (tmp_path / "out/results/predictions.csv").read_bytes()
    again = (*made.command("results", tmp_path / "out/results"), "--repeats", "1")
    succeed(*again)
    assert (tmp_path / "out/results/predictions.csv").read_bytes().startswith(done[: done.rfind(b"\n") // 2])


@pytest.mark.parametrize("numbers", SIGNALS)
def test_a_stopped_build_leaves_no_worker_and_goes_on(working, succeed, numbers, tmp_path):
    command = working("shards", "--workers", "2")
    stopped_well(command, numbers == (signal.SIGINT,), *numbers)
    assert not (tmp_path / "out/shards").exists()
    again = working("shards", "--workers", "2")
    again.succeeds()
    succeed("verify", tmp_path / "out/shards")


@pytest.mark.parametrize("numbers", SIGNALS)
def test_a_stopped_report_leaves_the_page_before_it(made, start, succeed, numbers, tmp_path):
    command = made.command("report", tmp_path / "report")
    succeed(*command)
    page = (tmp_path / "report/report.html").read_bytes()
    running = start(*command)
    (tmp_path / "report/tables/inits.csv").unlink()
    running.until((tmp_path / "report/tables/inits.csv").exists)
    stopped_well(running, False, *numbers)
    assert (tmp_path / "report/report.html").read_bytes() == page
    assert not list(tmp_path.rglob("*.part"))
    succeed(*command)


def test_a_reader_that_has_read_enough_stops_no_command_and_gets_no_traceback(made, tmp_path):
    words = list(map(str, made.command("shards", tmp_path / "shards")))
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "modan_fast", *words], stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
    assert (tmp_path / "shards/manifest.json").exists()
