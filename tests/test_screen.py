"""What reaches the screen: no name commands it, a stage has one last line, and a stop says what is kept."""

import errno
import io
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import unicodedata
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from modan_fast import cli
from modan_fast.cli import screen

posix = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals and file names")


@pytest.fixture
def run(monkeypatch, capfd):
    """Run a command in this process; returns its exit code, what it printed, and what it said on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["modan-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capfd.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run


def start(*arguments, **settings):
    """Start a command in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "modan_fast", *map(str, arguments)], text=True, **settings)


# Stages where there is no terminal


@pytest.fixture
def lines(monkeypatch, capsys):
    """A function that passes calls of a progress, each after some seconds, and returns the lines printed."""

    def lines(*calls):
        clock = SimpleNamespace(now=100.0)
        monkeypatch.setattr(time, "monotonic", lambda: clock.now)
        with screen.show_progress() as progress:
            for seconds, *call in calls:
                clock.now += seconds
                progress(*call)
        return capsys.readouterr().err.splitlines()

    return lines


def test_a_stage_that_took_no_time_has_no_line(lines):
    assert lines((0, "writing", 0, 1), (0.5, "writing", 1, 1), (0, "reading", 1, 1), (9, "checking", 3, 3)) == []


def test_a_long_stage_has_one_last_line_however_often_its_end_is_reported(lines):
    calls = [(0, "packing", 0, 4), (5, "packing", 2, 4), (1, "packing", 3, 4), (4, "packing", 4, 4, "2 rejected")]
    expected = ["packing 2/4, eta 5 s", "packing 4/4, 10.0 s  2 rejected"]
    assert lines(*calls, (3, "packing", 4, 4, "2 rejected"), (3, "packing", 4, 4)) == expected


def test_a_stage_that_is_begun_anew_is_timed_anew(lines):
    once = [(0, "decoding", 0, 2), (3, "decoding", 2, 2)]
    again = [(60, "decoding", 0, 2), (4, "decoding", 2, 2)]
    assert lines(*once, *again) == ["decoding 2/2, 3.0 s", "decoding 2/2, 4.0 s"]
    assert lines(*once, (60, "decoding", 0, 2), (1, "decoding", 2, 2)) == ["decoding 2/2, 3.0 s"]


def test_the_last_line_of_a_pretraining_is_printed_however_short_it_was(lines):
    calls = [(0, "pretraining", 1, 2, "loss 3"), (0.1, "pretraining", 2, 2, "loss 2"), (0, "pretraining", 2, 2)]
    assert lines(*calls) == ["pretraining 2/2, 0.1 s  loss 2"]


def test_a_line_comes_after_two_seconds_and_then_each_half_minute(lines):
    printed = lines(*((1, "scanning", second, 100) for second in range(70)))
    assert [int(line.split()[1].split("/")[0]) for line in printed] == [2, 32, 62]


# Names from strangers

PIECES = (
    "a",
    "é",
    "—",
    "[red]",
    "[/]",
    "[/red",
    "\\",
    "[link=x]",
    "{0}",
    "{task",
    "%s",
    "%",
    "`overwrite=True`",
    "`",
)
PIECES += (
    "\x1b",
    "\x1b[2J",
    "\x1b]0;owned\x07",
    "\x9b31m",
    "\x00",
    "\x07",
    "\x08",
    "\r",
    "\n",
    "\v",
    "\f",
    "\x1c",
    "\x85",
)
PIECES += ("\u2028", "\u202e", "\u2066", "\u200f", "\ufeff", "\ud800", "\udcff", "\U000e0041", " " * 9, "x" * 300)


def hostile_names():
    """2,000 names: each piece alone, then mixtures."""
    chosen = random.Random(0)
    return [
        *PIECES,
        *("".join(chosen.choices(PIECES, k=chosen.randint(1, 9))) for _ in range(2000 - len(PIECES))),
    ]


def commands_no_terminal(text):
    return all(unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for character in text)


@pytest.mark.parametrize("way", ["say", "complain", "lines", "log", "warning", "table"])
def test_whatever_a_name_holds_it_stays_on_its_line_and_commands_no_terminal(way, monkeypatch):
    written = {name: io.TextIOWrapper(io.BytesIO(), "ascii", newline="") for name in ("stdout", "stderr")}
    for name, stream in written.items():
        monkeypatch.setattr(sys, name, stream)
    screen.escape_unencodable()
    root, package = logging.getLogger(), logging.getLogger("modan_fast.hostile")
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    screen.show_messages(lambda message: message)
    names = hostile_names()
    try:
        with screen.show_progress() as progress, warnings.catch_warnings():
            warnings.simplefilter("always")
            for name in names:
                if way == "say":
                    screen.say(f"left out: {name}: no image")
                elif way == "complain":
                    screen.complain(f"{name} does not exist")
                elif way == "lines":
                    progress(f"pretraining {name}", 0, 9, name)
                    screen._print_aside(f"{name} 1/9  {name}")
                elif way == "log":
                    package.info("store: %s", name)
                elif way == "warning":
                    warnings.warn(name, stacklevel=1)
            if way == "table":
                screen.print_table(
                    names[0], ["name"], [[name] for name in names[: len(PIECES)]], total=[names[5]]
                )
    finally:
        logging.captureWarnings(False)
        root.setLevel(level)
    for stream in written.values():
        stream.flush()
    text = "".join(stream.buffer.getvalue().decode("ascii") for stream in written.values())
    printed = text.split("\n")
    assert all(map(commands_no_terminal, printed))
    if way != "table":
        assert len(printed) - 1 == len(names)
    else:
        assert "[red]" in text
        assert "[/]" in text


def test_bars_on_a_terminal_show_names_as_they_are_and_obey_none(monkeypatch):
    drawn = io.StringIO()
    monkeypatch.setattr(screen, "screen", Console(file=drawn, force_terminal=True, width=200))
    with screen.show_progress() as progress:
        for name in PIECES:
            progress(f"stage {name}", 1, 2, name)
        progress("stage [red]", 2, 2, "[/] {task.nothing} \x1b]0;owned\x07")
    assert "\x1b]0;" not in drawn.getvalue()
    assert "\x9b" not in drawn.getvalue()
    assert "\u202e" not in drawn.getvalue()
    for shown in ("stage [red]", "[/] {task.nothing} \\x1b]0;owned\\x07"):
        assert shown in drawn.getvalue()


def test_messages_above_the_bars_obey_no_name(monkeypatch):
    drawn = io.StringIO()
    monkeypatch.setattr(screen, "screen", Console(file=drawn, force_terminal=True, no_color=True, width=200))
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    screen.show_messages(lambda message: message)
    try:
        logging.getLogger("modan_fast.hostile").info("found %s", "[/] [red]x[/red] \x1b]0;owned\x07\nforged")
    finally:
        logging.captureWarnings(False)
    shown = re.sub(r"\x1b\[\d*m", "", drawn.getvalue())  # numbers and brackets are set in bold
    assert "[/] [red]x[/red] \\x1b]0;owned\\x07 forged" in shown


@posix
@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_an_archive_with_hostile_file_names_is_packed_and_listed_in_plain_lines(archive, tmp_path, encoding):
    source = tmp_path / "in\x1b[2J[red]é"
    shutil.copytree(archive / "US", source / "US")
    for number, piece in enumerate(["\x1b]0;owned\x07", "\n left out: forged", "[red]", "\u202e", "\udcff", "é"]):
        (source / "US" / "liver" / f"{number}{piece}.png").write_bytes(b"no image")
    environment = {**os.environ, "LANG": "C", "PYTHONIOENCODING": encoding}
    process = start(
        *("shard", source, "--out", tmp_path / "set", "--size", 32, "--workers", 1),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        errors="strict",
        encoding=encoding,
    )
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert all(map(commands_no_terminal, (printed + said).split("\n")))
    assert printed.count("left out: US/liver/") == 6
    assert "left out in all: 6" in printed


def test_a_wrong_option_and_an_error_of_the_system_quote_names_safely(run, tmp_path):
    for arguments in (
        ["shard", "x", "--\x1b[2J\nmodan-fast: forged"],
        ["shard", tmp_path / ("\x1b[2Jé" + "x" * 300)],
    ):
        code, printed, said = run(*arguments)
        assert (code, printed, said.count("\n")) == (2, "", 1)
        assert commands_no_terminal(said.removesuffix("\n"))


# Errors


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (MemoryError(), 2, "too little memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.\nGPU 0 has …"), 2, "too little memory"),
        (RecursionError("maximum recursion depth exceeded"), 1, "RecursionError"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"), 1, "invalid start byte"),
        (EOFError("pickle ended"), 1, "EOFError: pickle ended"),
        (KeyError("\x1b[2J\u202e"), 1, "please report it"),
        (FloatingPointError("the loss is nan: try a smaller `lr`"), 1, "the loss is nan"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_error_is_one_line(run, monkeypatch, error, code, words):
    def failing(*arguments, **settings):
        raise error

    monkeypatch.setattr("modan_fast.phantom.phantom_archive", failing)
    ended, printed, said = run("phantom", "archive")
    said = said.removeprefix("\n")  # typer's, before it ends for an EOFError
    assert (ended, printed, said.count("\n")) == (code, "", 1)
    assert said.startswith("modan-fast: ")
    assert words in said
    assert commands_no_terminal(said.removesuffix("\n"))


def test_a_disk_that_is_full_while_torch_writes_is_named_by_the_systems_error(run, monkeypatch):
    class FullDisk(io.BytesIO):
        def write(self, content):
            if self.tell() > 1000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(content)

    monkeypatch.setattr(
        "modan_fast.phantom.phantom_archive", lambda *_, **__: torch.save(torch.zeros(10_000), FullDisk())
    )
    assert run("phantom", "archive") == (2, "", "modan-fast: [Errno 28] No space left on device\n")


# Pipes that nobody reads


@posix
@pytest.mark.parametrize("arguments", [("inspect",), ("verify", "--workers", "1")], ids=" ".join)
def test_a_closed_pipe_ends_nothing_and_the_exit_code_is_the_works(shards, tmp_path, arguments):
    damaged = shutil.copytree(shards, tmp_path / "damaged")
    content = bytearray((damaged / "shard-000001.tar").read_bytes())
    content[600] ^= 1
    (damaged / "shard-000001.tar").write_bytes(content)
    for folder, code in ((shards, 0), (damaged, 1 if arguments[0] == "verify" else 0)):
        reading, writing = os.pipe()
        os.close(reading)
        process = start(arguments[0], folder, *arguments[1:], stdout=writing, stderr=subprocess.PIPE)
        os.close(writing)
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (code, "")


@posix
def test_a_closed_pipe_on_both_streams_does_not_stop_the_work(archive, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    code = start(
        *("shard", archive, "--out", tmp_path / "set", "--size", 32, "--workers", 1),
        stdout=writing,
        stderr=writing,
    ).wait(60)
    os.close(writing)
    assert code == 0
    assert (tmp_path / "set" / "manifest.json").exists()


@posix
def test_wrong_use_is_told_by_the_exit_code_also_where_nobody_reads():
    reading, writing = os.pipe()
    os.close(reading)
    code = start("frobnicate", stdout=writing, stderr=writing).wait(60)
    os.close(writing)
    assert code == 2


@posix
def test_the_help_into_a_closed_pipe_is_silent():
    reading, writing = os.pipe()
    os.close(reading)
    process = start("pretrain", "--help", stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert process.communicate(timeout=60)[1] == ""


# Signals

WORK = {
    ("evaluate", "--init", "scratch"): "modan_fast.downstream.evaluate.evaluate",
    ("demo",): "modan_fast.demo.demo",
    ("phantom", "archive"): "modan_fast.phantom.phantom_archive",
    ("report", "results"): "modan_fast.report.page.write_report",
    ("shard", "archive"): "shard_builder.build.build",
    ("verify", "shards"): "shard_builder.verify.verify",
    ("inspect", "shards"): "shard_builder.inspect.read_contents",
    ("pretrain",): "modan_fast.trainer.pretrain",
    ("doctor",): "modan_fast.doctor.examine",
}


@posix
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize(
    ("command", "work"), WORK.items(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_signal_ends_any_command_as_ctrl_c_does(run, monkeypatch, tmp_path, command, work, name):
    monkeypatch.chdir(tmp_path)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    monkeypatch.setattr(work, lambda *arguments, **settings: signal.raise_signal(getattr(signal, name)))
    code, printed, said = run(*command)
    assert (code, printed, said.count("\n")) == (130, "", 1)
    assert said.startswith("modan-fast: stopped")
    if command[0] not in ("verify", "inspect", "doctor"):
        assert said.startswith("modan-fast: stopped; ")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


@posix
def test_signals_that_are_repeated_leave_the_cleaning_up_in_peace(run, monkeypatch, tmp_path):
    def stopped_often(*arguments, **settings):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
            (tmp_path / "cleaned").touch()

    monkeypatch.setattr("modan_fast.phantom.phantom_archive", stopped_often)
    assert run("phantom", tmp_path / "archive")[0] == 130
    assert (tmp_path / "cleaned").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@posix
def test_a_command_under_nohup_outlives_the_terminal(run, monkeypatch, tmp_path):
    def hung_up(*arguments, **settings):
        signal.raise_signal(signal.SIGHUP)
        return 7

    monkeypatch.setattr("modan_fast.phantom.phantom_archive", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        code, printed, _ = run("phantom", tmp_path / "archive")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 0
    assert "7 synthetic images" in printed


@posix
def test_a_terminated_phantom_leaves_nothing_and_says_so(tmp_path):
    process = start("phantom", tmp_path / "archive", "--workers", 1, stderr=subprocess.PIPE)
    while not any(tmp_path.glob("archive.*/**/*.png")):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.communicate(timeout=60)[1] == "modan-fast: stopped; the same command starts again\n"
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


@posix
def test_a_terminal_that_is_closed_ends_a_command_as_ctrl_c_does(tmp_path):
    import pty

    process, terminal = pty.fork()
    if process == 0:
        command = [sys.executable, "-m", "modan_fast", "phantom", str(tmp_path / "archive"), "--workers", "1"]
        os.execve(sys.executable, command, {**os.environ, "TERM": "xterm"})
    while b"phantom" not in os.read(terminal, 10_000):  # its bar is drawn
        pass
    os.close(terminal)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert list(tmp_path.iterdir()) == []


@posix
def test_a_build_whose_connection_is_lost_is_continued_by_the_same_command(archive, tmp_path):
    source = tmp_path / "in"
    for number in range(40):
        shutil.copytree(archive / "CT/lung", source / f"CT/part{number}", copy_function=os.link)
    command = (
        "shard",
        source,
        "--out",
        tmp_path / "set",
        "--duplicates",
        "keep",
        "--workers",
        2,
        "--per-class",
        0,
    )
    process = start(*command, stderr=subprocess.PIPE, start_new_session=True)
    while not any(path.name.startswith(".set.") for path in tmp_path.iterdir()):
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGHUP)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (130, "modan-fast: stopped; the same command continues where it was\n")
    assert not (tmp_path / "set").exists()
    assert start(*command, stdout=subprocess.DEVNULL).wait(120) == 0
    assert not [path for path in Path(tmp_path).iterdir() if path.name.startswith(".")]
