"""A folder that vanishes, or can no longer be written to, in mid-run: one line, and nothing half comes back."""

import contextlib
import os
import shutil
import subprocess

import pytest

from modan_fast.downstream.results import Results
from shard_builder.settings import InputError


@contextlib.contextmanager
def read_only(folder):
    """Let nobody write to a folder any more, root included, as on a file system with errors."""
    for arguments in (("--bind", folder, folder), ("-o", "remount,bind,ro", folder)):
        done = subprocess.run(["mount", *arguments], check=False, capture_output=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("kind", ["run", "results"])
def test_a_folder_that_vanishes_ends_the_command_in_one_line_and_does_not_come_back(working, tmp_path, kind):
    command = working(kind)
    if kind == "results":
        command.until(lambda: '"cells"' in (tmp_path / "out/results/runs.json").read_text())
    shutil.rmtree(tmp_path / "out")
    line = command.fails()
    assert str(tmp_path / "out" / kind) in line
    assert not (tmp_path / "out").exists()


def test_a_results_folder_that_vanishes_between_two_files_does_not_come_back(tmp_path):
    (tmp_path / "results").mkdir()
    results = Results.open(tmp_path / "results")
    (tmp_path / "results").rmdir()
    with pytest.raises((InputError, OSError)):
        results.save()
    assert not list(tmp_path.iterdir())


def test_a_training_told_to_stop_makes_no_run_folder_again_that_has_vanished(working, tmp_path):
    command = working("run", "--checkpoint-every", "4000")
    shutil.rmtree(tmp_path / "out")
    command.signal(15)
    code, said = command.end()
    assert code in (2, 130), said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_a_build_whose_folder_vanishes_ends_in_one_line_or_in_a_whole_set(working, succeed, tmp_path):
    command = working("shards")
    shutil.rmtree(tmp_path / "out")
    if command.end()[0]:
        command.fails()
        assert not (tmp_path / "out/shards").exists()
    else:
        succeed("verify", tmp_path / "out/shards")


def test_a_shard_set_that_vanishes_while_it_is_streamed_ends_in_one_line_and_the_run_goes_on_with_it(
    made, start, succeed, same, tmp_path
):
    shutil.copytree(made.folder / "shards", tmp_path / "shards")
    command = (*made.command("run", tmp_path / "run"), "--shards", tmp_path / "shards", "--store", "stream")
    running = start(*command, "--epochs", "4000")
    running.until((tmp_path / "run/log.jsonl").exists)
    running.until((tmp_path / "run/log.jsonl").read_text)
    (tmp_path / "shards").rename(tmp_path / "elsewhere")
    assert "shard" in running.fails()
    (tmp_path / "elsewhere").rename(tmp_path / "shards")
    epochs = len((tmp_path / "run/log.jsonl").read_text().splitlines()) + 1
    succeed(*command, "--epochs", str(epochs), "--resume")


@pytest.mark.parametrize("kind", ["run", "results", "shards"])
def test_a_folder_that_becomes_read_only_ends_the_command_in_one_line(working, tmp_path, kind):
    command = working(kind)
    with read_only(tmp_path / "out"):
        line = command.fails()
        assert "Read-only file system" in line
        assert str(tmp_path / "out") in line
    assert not list((tmp_path / "out").rglob("config.json.*"))


def test_a_command_refuses_a_read_only_folder_before_any_work(made, fail, tmp_path):
    (tmp_path / "out").mkdir()
    with read_only(tmp_path / "out"):
        for kind in ("shards", "run", "results", "report"):
            line = fail(*made.command(kind, tmp_path / "out" / kind))
            assert "read-only" in line.lower() or "nothing can be written to" in line
        fail("phantom", tmp_path / "out/archive", "--per-class", "1", "--size", "32")
        fail("demo", "--out", tmp_path / "out/demo")
    assert not os.listdir(tmp_path / "out")
