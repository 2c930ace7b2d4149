"""A disk that is full at each write: one line, nothing half, and with room the same bytes as without the fault."""

import os

import numpy as np
import pytest
import torch

from modan_fast.encoders import Encoder, save_encoder
from modan_fast.folder import write_text
from modan_fast.metrics import JsonlLogger
from modan_fast.report.figures import contact_sheet
from modan_fast.run import save_checkpoint


def full(line, path):
    """Assert that a message names a file, or what holds it, and why it could not be written."""
    assert "No space left on device" in line, line
    assert str(path) in line, line


def halves(folder):
    return [str(each) for each in folder.rglob("*.part")]


@pytest.mark.parametrize(
    ("kind", "faults"),
    [
        ("shards", {"4k": ".shards.building/spool-", "24k": "shard-000000.tar", "116k": ".shards.building/"}),
        (
            "results",
            {"4k": "results/folds/task", "64k": "results/", "68k": "results/", "72k": "results/"},
        ),
        ("report", {"4k": "report/tables/", "90k": "report/figures/", "400k": "report/report.html"}),
    ],
)
def test_a_full_disk_is_named_in_one_line_and_with_room_the_same_command_goes_on(
    made, disk, fail, succeed, same, kind, faults
):
    small = disk(next(iter(faults)))
    for size, name in faults.items():
        small.resize(size)
        full(fail(*made.command(kind, small.folder / kind)), name)
        assert not halves(small.folder)
    small.resize("10m")
    succeed(*made.command(kind, small.folder / kind))
    same(kind, small.folder / kind)
    assert os.listdir(small.folder) == [kind]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["shards", "results", "report"])
def test_a_disk_that_grows_bit_by_bit_ends_each_command_in_one_line_until_it_goes_on(
    made, disk, start, same, kind
):
    small, size, ended = disk("4k"), 4, 2
    while ended:
        command = start(*made.command(kind, small.folder / kind))
        if ended := command.end()[0]:
            full(command.fails(), "")
            assert not halves(small.folder)
        size += 4 if kind == "results" else 12  # KiB
        small.resize(f"{size}k")
    same(kind, small.folder / kind)


def test_a_full_disk_ends_a_training_in_one_line_and_with_room_it_is_resumed(made, disk, fail, succeed, same):
    small = disk("4k")
    run = small.folder / "run"
    command = made.command("run", run)
    full(fail(*command), "run/")
    small.resize("60m")
    full(fail(*command, "--overwrite"), "run/checkpoint.pt")
    assert not halves(small.folder)
    small.resize("120m")
    full(fail(*command, "--overwrite"), "run/encoder.safetensors")
    assert not halves(small.folder)
    small.resize("400m")
    succeed(*command, "--resume")
    same("run", run)


def test_a_full_disk_keeps_the_last_checkpoint_readable(made, disk, fail, succeed, same):
    small = disk("200m")  # room for a checkpoint and an encoder, but not for a second checkpoint beside
    run = small.folder / "run"
    line = fail(*made.command("run", run), "--checkpoint-every", "1")
    full(line, "run/checkpoint.pt")
    assert "keeps the last checkpoint" in line
    assert not halves(small.folder)
    full(fail(*made.command("run", run), "--resume"), "run/checkpoint.pt")
    small.resize("400m")
    succeed(*made.command("run", run), "--resume", "--checkpoint-every", str(1000))
    same("run", run)


def test_a_full_disk_ends_the_making_of_an_archive_in_one_line_and_leaves_nothing(disk, fail, succeed):
    small = disk("200k")
    command = ("phantom", small.folder / "archive", "--per-class", "1", "--size", "32", "--workers", "1")
    full(fail(*command), "archive")
    assert not os.listdir(small.folder)
    small.resize("10m")
    succeed(*command)
    assert os.listdir(small.folder) == ["archive"]


@pytest.mark.slow
def test_a_demo_goes_on_after_a_full_disk_at_each_of_its_steps(disk, start):
    small, out = disk("1m"), None
    sizes = ("1m", "3m", "8m", "60m", "120m", "1g")
    for size in sizes:
        small.resize(size)
        out = small.folder / "demo"
        command = start("demo", "--out", out)
        if size == sizes[-1]:
            command.succeeds()
        else:
            full(command.fails(), "")
            assert not halves(small.folder)
    assert {each.name for each in out.iterdir()} == {
        *("archive", "lesion", "shards", "run", "results", "views.png", "embedding.png")
    }


def log_line(path):
    JsonlLogger(path).log({"loss": 1.0}, step=1)


def figure(path):
    contact_sheet(path, [("a", [np.zeros((9, 9), np.uint8)])], ["image"])


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (log_line, "log.jsonl"),
        (figure, "a.png"),
        (lambda path: write_text(path, "text"), "report.html"),
        (lambda path: save_checkpoint(path.parent, {"a": torch.zeros(3)}), "checkpoint.pt"),
        (lambda path: save_encoder(path, Encoder("7x7"), {}), "encoder.safetensors"),
    ],
)
def test_the_file_is_named_for_which_a_disk_has_no_room(disk, write, name):
    small = disk("8k")
    (small.folder / "config.json").write_text("x" * 8192)
    with pytest.raises(OSError, match="No space left") as error:
        write(small.folder / name)
    assert error.value.filename == str(small.folder / name)
    assert set(os.listdir(small.folder)) <= {
        "config.json",
        "log.jsonl",
    }  # a log is appended to: it may be there, empty
    assert [each.name for each in small.folder.iterdir() if each.stat().st_size] == ["config.json"]
