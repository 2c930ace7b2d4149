"""The lock of an output folder: never held twice, never a trap, whatever is found at its place."""

import errno
import os
import subprocess
import sys

import pytest

from modan_fast.folder import LOCK, is_new, locked
from shard_builder.output import building
from shard_builder.settings import InputError

pytestmark = pytest.mark.filterwarnings("ignore:flock not supported")

# Takes the lock again and again. Whoever holds it makes the file `inside`, which must not exist yet, and counts.
TAKER = """
import os, sys, time
from pathlib import Path
from modan_fast.folder import locked
from shard_builder.settings import InputError
folder, taken = Path(sys.argv[1]), 0
while taken < int(sys.argv[2]):
    try:
        with locked(folder / "run", "trial"):
            os.close(os.open(folder / "inside", os.O_CREAT | os.O_EXCL))
            count = int((folder / "counter").read_text())
            time.sleep(0)
            (folder / "counter").write_text(str(count + 1))
            (folder / "inside").unlink()
            taken += 1
    except InputError:
        time.sleep(0.0001)
"""


def take_and_count(folder, takers, times):
    """Let processes take the lock of a folder at once, that many times each, and return what they counted."""
    (folder / "counter").write_text("0")
    command = [sys.executable, "-c", TAKER, str(folder), str(times)]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(takers)]
    for process in processes:
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 0, errors
    return int((folder / "counter").read_text())


def test_no_two_processes_ever_hold_the_lock(tmp_path):
    assert take_and_count(tmp_path, 4, 100) == 400
    assert is_new(tmp_path / "run")


@pytest.mark.slow
def test_no_two_processes_ever_hold_the_lock_in_twenty_thousand_times(tmp_path):
    assert take_and_count(tmp_path, 4, 5000) == 20000


@pytest.mark.parametrize("left", [b"", b"4711\nanother-machine\n", b"\0\xff" * 5000])
def test_a_lock_file_left_by_a_dead_machine_stops_nobody(tmp_path, left):
    (tmp_path / LOCK).write_bytes(left)
    with locked(tmp_path, "training"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["kept", "missing"])
def test_a_link_in_the_place_of_the_lock_is_refused_and_what_it_names_stays(tmp_path, target):
    (tmp_path / "kept").write_text("as it was")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).symlink_to(tmp_path / target)
    with pytest.raises(InputError, match="is no lock: move it away"), locked(tmp_path / "run", "training"):
        raise AssertionError
    assert (tmp_path / "kept").read_text() == "as it was"
    assert {each.name for each in tmp_path.iterdir()} == {"kept", "run"}


def test_a_folder_in_the_place_of_the_lock_is_refused(tmp_path):
    (tmp_path / LOCK).mkdir()
    with pytest.raises(InputError, match="is no lock: move it away"), locked(tmp_path, "training"):
        raise AssertionError


def test_a_pipe_in_the_place_of_the_lock_is_refused(tmp_path):
    os.mkfifo(tmp_path / LOCK)
    with pytest.raises(InputError, match="is no lock: move it away"), locked(tmp_path, "training"):
        raise AssertionError


def test_a_second_link_to_a_file_in_the_place_of_the_lock_leaves_the_file_as_it_was(tmp_path):
    (tmp_path / "kept").write_text("as it was")
    (tmp_path / "run").mkdir()
    os.link(tmp_path / "kept", tmp_path / "run" / LOCK)
    with locked(tmp_path / "run", "training"):
        pass
    assert (tmp_path / "kept").read_text() == "as it was"


def test_a_folder_moved_away_while_it_is_locked_is_released(tmp_path):
    with locked(tmp_path / "run", "training"):
        (tmp_path / "run").rename(tmp_path / "moved")
    with locked(tmp_path / "moved", "training"):
        pass


def without_flock(monkeypatch, number):
    """Make the system refuse all locks, as a file system does that has none."""

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)


def test_without_locks_in_the_file_system_one_writer_at_a_time_holds_too(tmp_path, monkeypatch):
    without_flock(monkeypatch, errno.ENOSYS)
    with locked(tmp_path, "training"):
        with pytest.raises(InputError) as refused, locked(tmp_path, "training"):
            raise AssertionError
        assert "another training is writing to" in str(refused.value)
        assert f"if none runs on any machine, remove {tmp_path / LOCK}" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_without_locks_in_the_file_system_a_killed_run_on_this_machine_stops_nobody(tmp_path):
    script = (
        "import errno, fcntl, os, signal, sys, pathlib\n"
        "def refuse(*_): raise OSError(errno.ENOSYS, 'no')\n"
        "fcntl.flock = refuse\n"
        "from modan_fast.folder import locked\n"
        "with locked(pathlib.Path(sys.argv[1]), 'training'):\n"
        "    if sys.argv[2] == 'die': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)]
    assert subprocess.run([*command, "die"], check=False).returncode == -9
    assert (tmp_path / LOCK).exists()
    done = subprocess.run([*command, "live"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


def test_without_locks_in_the_file_system_a_run_killed_on_another_machine_is_a_matter_of_one_file(
    tmp_path, monkeypatch
):
    without_flock(monkeypatch, errno.ENOSYS)
    (tmp_path / LOCK).write_text("4711\nanother-machine\n")
    with pytest.raises(InputError, match="if none runs on any machine, remove"), locked(tmp_path, "training"):
        raise AssertionError
    (tmp_path / LOCK).unlink()
    with locked(tmp_path, "training"):
        pass


def test_a_file_system_whose_locks_fail_is_named_in_one_line(tmp_path, monkeypatch):
    without_flock(monkeypatch, errno.ENOLCK)
    with (
        pytest.raises(InputError, match=r"\.lock cannot be locked \(No locks available\): choose another folder"),
        locked(tmp_path, "training"),
    ):
        raise AssertionError


def build_in(folder):
    """What a build does before its first look at the output."""
    with building(folder / "shards", folder / "shards"):
        pass


@pytest.mark.parametrize("left", [b"", b"4711\nanother-machine\n", b"\0\xff" * 5000])
def test_a_lock_file_left_by_a_build_on_a_dead_machine_stops_nobody(tmp_path, left):
    (tmp_path / ".shards.building").mkdir()
    (tmp_path / ".shards.building/lock").write_bytes(left)
    build_in(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["kept", "missing"])
def test_a_link_in_the_place_of_a_build_s_lock_is_refused_and_what_it_names_stays(tmp_path, target):
    (tmp_path / "kept").write_text("as it was")
    (tmp_path / ".shards.building").mkdir()
    (tmp_path / ".shards.building/lock").symlink_to(tmp_path / target)
    with pytest.raises((InputError, OSError)):
        build_in(tmp_path)
    assert (tmp_path / "kept").read_text() == "as it was"
    assert not (tmp_path / "missing").exists()


def test_a_folder_in_the_place_of_a_build_s_lock_is_refused(tmp_path):
    (tmp_path / ".shards.building/lock").mkdir(parents=True)
    with pytest.raises((InputError, OSError), match="lock"):
        build_in(tmp_path)
