"""A bare environment: no home, no room for caches, no terminal, no UTF-8; each command does its work all the same."""

import os
import subprocess
import sys

import pytest

NOWHERE = "/nonexistent/folder"
POOR = {  # all at once; one by one in the slow tests
    "HOME": NOWHERE,
    "TMPDIR": NOWHERE,
    "LC_ALL": "C",
    "LANG": "C",
    "PYTHONIOENCODING": "ascii",
    "PYTHONUTF8": "0",
    "TERM": "dumb",
    "COLUMNS": "1",
    "NO_COLOR": "1",
    "MPLCONFIGDIR": NOWHERE,
    "NUMBA_CACHE_DIR": NOWHERE,
    "XDG_CACHE_HOME": NOWHERE,
}
ONE_BY_ONE = [
    *({name: value} for name, value in POOR.items()),
    {"HOME": None, "TMPDIR": None, "LANG": None},
    {"HOME": "/proc", "TMPDIR": "/proc", "MPLCONFIGDIR": "/proc", "NUMBA_CACHE_DIR": "/proc"},
    {"COLUMNS": "0"},
    {"COLUMNS": "wide"},
]


def run(words, environment, closed=False):
    """Run a command in a process of its own, with closed streams where `closed`, and return what it printed."""
    given = {name: value for name, value in os.environ.items() if environment.get(name, value) is not None}
    given |= {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, "-m", "modan_fast", *map(str, words)]
    if closed:
        command = ["sh", "-c", 'exec "$@" <&-', "sh", *command]
    done = subprocess.run(
        command,
        env=given,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    said = done.stdout.decode(errors="replace")
    assert done.returncode == 0, said
    assert "Traceback" not in said
    assert "UnicodeEncodeError" not in said
    return said


@pytest.mark.slow
def test_the_whole_path_needs_no_home_no_temporary_folder_no_stdin_and_no_utf_8(made, same, tmp_path):
    archive = tmp_path / "Röntgen"
    (made.archive).rename(archive)
    try:
        words = ["shard", archive, *made.command("shards", tmp_path / "shards")[2:]]
        run(words, POOR, closed=True)
    finally:
        archive.rename(made.archive)
    same("shards", tmp_path / "shards")
    run(made.command("run", tmp_path / "run-ö"), POOR, closed=True)
    same("run", tmp_path / "run-ö")
    run(made.command("results", tmp_path / "results"), POOR, closed=True)
    same("results", tmp_path / "results")
    run(made.command("report", tmp_path / "report"), POOR, closed=True)
    same("report", tmp_path / "report")


def report_with_images(made, out):
    """With images of the shard set a report needs umap, and so numba, which compiles for a minute without a cache."""
    return [word if word != "0" else "16" for word in made.command("report", out)]


@pytest.mark.slow
def test_a_report_with_images_needs_no_home_no_caches_and_no_utf_8(made, tmp_path):
    run(report_with_images(made, tmp_path / "report"), POOR, closed=True)
    assert (tmp_path / "report/figures/umap.png").exists() or list((tmp_path / "report/figures").glob("umap*"))


@pytest.mark.slow
@pytest.mark.parametrize("environment", ONE_BY_ONE, ids=str)
def test_nothing_in_the_environment_is_needed(made, same, tmp_path, environment):
    run(made.command("shards", tmp_path / "ö"), environment)
    same("shards", tmp_path / "ö")
    run(made.command("results", tmp_path / "results"), environment)
    same("results", tmp_path / "results")
    run(report_with_images(made, tmp_path / "report"), environment)
