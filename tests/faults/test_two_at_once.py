"""Two of every command on one output at once: one wins, or both end with the same result; never a mixture."""

import os
import re

import pytest


def settled(*commands) -> list[int]:
    """The exit codes of commands that run at once; each that fails must fail well."""
    codes = [command.end()[0] for command in commands]
    for command in commands:
        command.succeeds() if command.end()[0] == 0 else command.fails()
    assert 0 in codes, [command.said() for command in commands]
    return sorted(codes)


@pytest.mark.parametrize("kind", ["shards", "run", "results", "report"])
def test_two_commands_on_one_output_give_what_one_gives(made, start, succeed, same, tmp_path, kind):
    command = made.command(kind, tmp_path / "at-once" / kind)
    settled(start(*command), start(*command))
    same(kind, tmp_path / "at-once" / kind)
    assert os.listdir(tmp_path / "at-once") == [kind]
    if kind != "report":
        succeed(*command)
        same(kind, tmp_path / "at-once" / kind)


def test_one_of_two_that_resume_a_run_wins(made, start, succeed, same, tmp_path):
    stopped = start(*made.command("run", tmp_path / "run"), "--checkpoint-every", "1")
    stopped.until((tmp_path / "run/checkpoint.pt").exists)
    stopped.signal(9)
    assert stopped.end()[0] == -9
    command = (*made.command("run", tmp_path / "run"), "--resume")
    settled(start(*command), start(*command))
    succeed(*command)
    same("run", tmp_path / "run")


def test_one_of_two_that_make_an_archive_wins(start, tmp_path):
    out = tmp_path / "at-once/archive"
    command = ("phantom", out, "--per-class", "1", "--size", "32", "--workers", "1")
    first, second = start(*command), start(*command)
    assert settled(first, second) == [0, 2]
    loser = first if first.end()[0] else second
    assert re.search("was filled by another process|is not an empty folder", loser.fails())
    assert os.listdir(tmp_path / "at-once") == ["archive"]
    assert sum(each.is_file() for each in out.rglob("*")) == 165


def test_one_of_two_demos_in_a_folder_is_refused_at_once(start, tmp_path):
    first = start("demo", "--out", tmp_path / "demo")
    first.until((tmp_path / "demo/.lock").exists)
    line = start("demo", "--out", tmp_path / "demo").fails()
    assert line.startswith(f"modan-fast: another demo is writing to {tmp_path / 'demo'}: wait for it")
    assert not first.ended()
