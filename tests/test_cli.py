"""The command line: every wrong use ends in one line and exit code 2, and the main path prints what it made."""

import errno
import json
import re
import shutil
import sys
from pathlib import Path

import pydicom
import pytest
import safetensors.torch
import torch
import torchvision

from modan_fast import cli
from modan_fast.pretrained import load_encoder
from shard_builder import image
from shard_builder.settings import InputError


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command; returns its exit code, what it printed, and what it said on stderr."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["modan-fast", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run


@pytest.fixture
def refused(run):
    """Run a command that must be refused; returns the one line it says."""

    def refused(*arguments):
        code, printed, said = run(*arguments)
        said = "".join(line for line in said.splitlines(keepends=True) if line.startswith("modan-fast: "))
        assert code == 2, said
        assert printed == ""
        assert said.count("\n") == 1
        return said

    return refused


SMALL = (
    "--epochs",
    1,
    "--batch-size",
    12,
    "--image-size",
    32,
    "--stem",
    "7x7",
    "--threads",
    1,
    "--device",
    "cpu",
)


def test_the_path_from_an_archive_to_an_encoder(run, archive, tmp_path):
    code, printed, _ = run("shard", archive, "--out", tmp_path / "shards", "--size", 48, "--workers", 1)
    assert code == 0
    assert "48 images of 4 classes in 1 shards; labels: 3 of modality, 3 of anatomy" in printed
    code, printed, said = run("pretrain", "--shards", tmp_path / "shards", "--out", tmp_path / "run", *SMALL)
    assert code == 0
    assert "encoder.safetensors: epoch 1" in printed
    assert re.search(r"pretraining 4/4, .* epoch 1/1  loss \d\.\d+  \d+ views/s  waiting \d+%", said)
    assert run("pretrain", "--resume", "--out", tmp_path / "run")[0] == 0


def test_a_missing_or_empty_source_is_named(refused, tmp_path):
    assert "does not exist" in refused("shard", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    said = refused("shard", tmp_path / "empty", "--out", tmp_path / "shards")
    assert "empty" in said
    assert "MODALITY/anatomy/class" in said
    assert not (tmp_path / "shards").exists()


def test_a_set_is_verified_by_its_exit_code_and_inspected(run, refused, shards, tmp_path):
    code, printed, _ = run("verify", shards, "--workers", 1)
    assert (code, printed.count("\n")) == (0, 1)
    assert "whole: 48 images in 3 shards" in printed
    code, printed, _ = run("inspect", shards, "--sheet", tmp_path / "sheet.png")
    assert code == 0
    assert re.search(r"modality \(3\)\n  CT +24\n", printed)
    assert (tmp_path / "sheet.png").stat().st_size > 10_000
    damaged = shutil.copytree(shards, tmp_path / "damaged")
    content = bytearray((damaged / "shard-000001.tar").read_bytes())
    content[600] ^= 1
    (damaged / "shard-000001.tar").write_bytes(content)
    code, printed, _ = run("verify", damaged, "--workers", 1)
    assert (code, printed.count("\n")) == (1, 1)
    assert "shard-000001.tar: 00000020.png: damaged: the checksum of its IDAT chunk is wrong" in printed
    assert "no shard set at" in refused("verify", tmp_path / "nowhere")
    assert "no shard set at" in refused("inspect", tmp_path / "nowhere")


def test_images_that_the_workers_died_of_are_told_by_the_exit_code(run, monkeypatch, archive, tmp_path):
    def deadly(path, read=image.read):
        if path.name == "007.png":
            raise MemoryError
        return read(path)

    monkeypatch.setattr(image, "read", deadly)
    code, printed, _ = run("shard", archive, "--out", tmp_path / "shards", "--workers", 1)
    assert code == 1
    assert "44 images of 4 classes" in printed
    assert "left out: CT/abd/mass/007.png: the worker died three times while packing it" in printed
    assert "4 of them because the workers died: try again with --overwrite" in printed


def test_a_table_with_more_fields_goes_all_the_way_to_an_encoder(run, archive, tmp_path):
    table, rows = tmp_path / "images.csv", ["path,modality,anatomy,view,patient"]
    for number, path in enumerate(sorted(archive.rglob("*.png"))):
        parts = path.relative_to(archive).parts
        rows.append(f"{'/'.join(parts)},{parts[0]},{parts[1] if number % 5 else ''},{'AL'[number % 2]},Jane Doe")
    table.write_text("\n".join(rows))
    here = ("shard", archive, "--out", tmp_path / "shards", "--size", 48, "--workers", 1, "--table", table)
    code, printed, _ = run(*here, "--fields", "modality,anatomy,view")
    assert code == 0
    assert "labels: 3 of modality, 4 of anatomy, 2 of view" in printed
    assert "no value of anatomy: 10 of 48 images" in printed
    code, _, said = run("pretrain", "--shards", tmp_path / "shards", "--out", tmp_path / "run", *SMALL)
    assert code == 0, said


def test_what_is_not_known_of_dicom_files_is_counted_and_their_key_is_named(run, tmp_path):
    folder = Path(pydicom.data.get_testdata_file("MR_small.dcm")).parent
    (tmp_path / "in").mkdir()
    header = pydicom.dcmread(folder / "MR_small.dcm")
    for name, part in (("a", "BRAIN"), ("b", "SOFT PARTS"), ("c", "")):
        header.BodyPartExamined = part
        header.save_as(tmp_path / "in" / name)
    code, printed, _ = run(
        "shard", tmp_path / "in", "--out", tmp_path / "shards", "--workers", 1, "--duplicates", "keep"
    )
    assert code == 0
    assert "3 images of 2 classes in 1 shards; labels: 1 of modality, 1 of anatomy" in printed
    assert "no value of anatomy: 2 of 3 images" in printed
    assert "unknown value of anatomy: 1 DICOM files; name it with --map" in printed
    assert f"names are hashed with {tmp_path / 'shards.key'}: keep it apart from the set" in printed


def test_sources_and_tables_that_cannot_be_used_are_one_line(run, refused, archive, tmp_path):
    out = ("--out", tmp_path / "shards")
    table = tmp_path / "t.csv"
    table.write_text("path,modality\nCT/lung/Nodule/000.png,CT\nnowhere.png,CT\n")
    assert "t.csv, row 3: its image, nowhere.png, is not in" in refused("shard", archive, "--table", table, *out)
    assert "t.csv, row 2: its image" in refused("shard", table, *out)
    assert "has no such field" in refused("shard", archive, "--table", table, "--fields", "view", *out)
    assert "none.csv cannot be read" in refused("shard", archive, "--table", tmp_path / "none.csv", *out)
    assert "none.csv does not exist" in refused("shard", tmp_path / "none.csv", *out)
    assert "is no folder: name the one that holds the images" in refused(
        "shard", "nowhere", "--table", table, *out
    )
    assert "t.csv, row 1: its columns must be field,from,to" in refused("shard", archive, "--map", table, *out)
    assert "--require view: it is none of" in refused("shard", archive, "--require", "view", *out)
    assert "--fields view: " in refused("shard", archive, "--fields", "view", *out)
    assert "--frames must be at least 1" in refused("shard", archive, "--frames", 0, *out)
    image = archive / "CT/lung/Nodule/000.png"
    assert "000.png is no folder: expected" in refused("shard", image, *out)
    code, printed, _ = run("shard", archive, "--table", table, "--skip-missing", "--size", 8, *out)
    assert code == 0
    assert "left out: nowhere.png: not in the folder of the images" in printed


def test_missing_damaged_and_foreign_shards_are_told_apart(refused, shards, tmp_path):
    assert "modan-fast shard SOURCE" in refused("pretrain", "--shards", tmp_path / "nowhere")
    newer = shutil.copytree(shards, tmp_path / "newer")
    manifest = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps({**manifest, "format": 2}))
    assert "written by format 2, this version reads 1" in refused("pretrain", "--shards", newer)
    assert "written by format 2, this version reads 1" in refused("verify", newer)
    damaged = shutil.copytree(shards, tmp_path / "damaged")
    content = (damaged / "shard-000001.tar").read_bytes()
    (damaged / "shard-000001.tar").write_bytes(content[:-512])
    assert "shard-000001.tar has" in refused("pretrain", "--shards", damaged)
    (damaged / "shard-000001.tar").write_bytes(content[:3000] + b"x" + content[3001:])
    said = refused("pretrain", "--shards", damaged, "--out", tmp_path / "run", *SMALL)
    assert "shard-000001.tar has another SHA-256" in said
    assert not (tmp_path / "run").exists()


def test_another_shards_index_is_named_before_dali_meets_it(refused, shards, tmp_path):
    mixed = shutil.copytree(shards, tmp_path / "mixed")
    shutil.copy(mixed / "shard-000002.idx", mixed / "shard-000000.idx")
    assert "shard-000000.idx" in refused("pretrain", "--shards", mixed)


def test_settings_that_make_no_sense_are_named(refused, shards, tmp_path):
    here = ("pretrain", "--shards", shards, "--out", tmp_path / "run")
    assert "--batch-size 64 is more than the 48 images" in refused(*here, "--batch-size", 64)
    assert "--batch-size must be at least 2" in refused(*here, "--batch-size", 1)
    for option, value, rule in [
        ("--temperature", 0, "above 0"),
        ("--temperature", "inf", "above 0"),
        ("--lr", "nan", "above 0"),
        ("--lr", -1, "above 0"),
        ("--momentum", 1, "at least 0 and below 1"),
        ("--weight-decay", "nan", "at least 0"),
        ("--weight-decay", "inf", "at least 0"),
        ("--seed", -1, f"at least 0 and at most {2**63 - 1}"),
        ("--image-size", 1_000_000, "at least 32 and at most 4096"),
        ("--threads", 1_000_000, "at least 1 and at most 1024"),
        ("--temperature", 0, "above 0"),
        ("--threshold", 1.5, "at least 0 and at most 1"),
        ("--augmentation.flip", 2, "at least 0 and at most 1"),
    ]:
        assert f"{option} must be {rule}" in refused(*here, option, value)
    assert "--seed" in refused(*here, "--seed", 2**63)
    assert "'mocov2' is not one of 'mulsupcon', 'simclr'" in refused(*here, "--method", "mocov2")
    assert "--bach-size" in refused(*here, "--bach-size", 8)
    assert "No such command" in refused("pretrian")
    assert not (tmp_path / "run").exists()


def test_a_file_gives_settings_and_options_win(run, refused, shards, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "batch_size: 12\naugmentation:\n  scale: [0.5, 1]\nepochs: 3\nmilestones: [0.5]\n"
    )
    small = ("--image-size", 32, "--stem", "7x7", "--threads", 1, "--device", "cpu", "--epochs", 2)
    here = ("pretrain", "--shards", shards, "--out", tmp_path / "run", *small, "--augmentation.flip", 1)
    assert run(*here, "--config", tmp_path / "run.yaml")[0] == 0
    written = json.loads((tmp_path / "run" / "config.json").read_text())["settings"]
    assert (written["epochs"], written["batch_size"], written["milestones"]) == (2, 12, [1])
    assert (written["augmentation"]["scale"], written["augmentation"]["flip"]) == ([0.5, 1], 1.0)
    # The run's own record gives the same run, which is finished.
    record = ("pretrain", "--config", tmp_path / "run" / "config.json")
    assert "which is done only if you name it yourself: repeat --out " in refused(*record)
    code, printed, _ = run(*record, "--out", tmp_path / "run")
    assert (code, printed.strip()) == (0, f"{tmp_path / 'run' / 'encoder.safetensors'}: epoch 2")
    (tmp_path / "run.yaml").write_text("batch_size: 12\nbach_size: 8\n")
    said = refused("pretrain", "--config", tmp_path / "run.yaml")
    assert f"{tmp_path / 'run.yaml'}, line 2: unknown setting `bach_size`: did you mean --batch-size?" in said


def test_lists_of_numbers_have_commas_between(run, refused, shards, tmp_path):
    here = ("pretrain", "--shards", shards, "--out", tmp_path / "run", *SMALL, "--keep")
    assert "--keep must be numbers with commas between, got 'x'" in refused(*here, "x")
    assert run(*here, "1", "--milestones", "")[0] == 0
    assert (tmp_path / "run" / "encoder-0001.safetensors").exists()


def test_a_profile_is_a_table_of_stages_and_a_sentence(run, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, said, _ = run("pretrain", "--shards", shards, *SMALL, "--profile")
    assert code == 0
    for word in ("render", "backward", "wait", "limits the speed"):
        assert word in said
    assert not list(tmp_path.iterdir())


def test_weights_of_another_architecture_are_named(refused, tmp_path, shards):
    foreign = tmp_path / "resnet34.safetensors"
    network = torchvision.models.resnet34()
    network.conv1 = torch.nn.Conv2d(1, 64, 7, 2, 3, bias=False)
    safetensors.torch.save_file(network.state_dict(), foreign)
    said = refused(
        "pretrain", "--shards", shards, "--out", tmp_path / "run", *SMALL, "--imagenet-weights", foreign
    )
    assert "resnet34.safetensors holds no weights of torchvision's ResNet-18" in said
    assert not (tmp_path / "run").exists()
    (tmp_path / "other").mkdir()
    foreign.rename(tmp_path / "other" / "encoder.safetensors")
    with pytest.raises(InputError, match="is no resnet18: it has an extra layer1"):
        load_encoder(tmp_path / "other")


def test_existing_output_is_refused_unless_told(run, refused, shards, tmp_path):
    here = ("pretrain", "--shards", shards, "--out", tmp_path / "run", *SMALL)
    assert run(*here)[0] == 0
    assert "--resume continues it, --overwrite replaces it" in refused(*here, "--seed", 1)
    weights = (tmp_path / "run" / "encoder.safetensors").stat()
    assert run(*here)[0] == 0
    assert (tmp_path / "run" / "encoder.safetensors").stat() == weights
    assert "pass one of them" in refused("pretrain", "--out", tmp_path / "run", "--resume", "--overwrite")
    assert run(*here, "--seed", 1, "--overwrite")[0] == 0
    assert "keeps its settings" in refused("pretrain", "--resume", "--out", tmp_path / "run", "--lr", 1)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(refused, monkeypatch, shards, tmp_path):
    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / "run" / "checkpoint.pt"))

    monkeypatch.setattr("torch.save", full)
    assert "No space left on device" in refused("pretrain", "--shards", shards, "--out", tmp_path / "run", *SMALL)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        *("config.json", "log.jsonl", "tensorboard", "views.png")
    ]


def test_debug_shows_where_an_error_arose(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["modan-fast", "shard", str(tmp_path / "nowhere"), "--debug"])
    with pytest.raises(ValueError, match="does not exist"):
        cli.main()


@pytest.mark.parametrize(
    "command",
    [
        "shard",
        "verify",
        "inspect",
        "pretrain",
        "evaluate",
        "report",
        "embed",
        "export",
        "demo",
        "phantom",
        "doctor",
    ],
)
def test_the_help_explains_every_option(run, command):
    code, printed, _ = run(command, "--help")
    assert code == 0
    options = re.findall(r"^  -.*(?:\n {6,}.*)*", printed.partition("Options:")[2], re.MULTILINE)
    assert options
    for option in options:
        assert len(re.split(r"\s{2,}", option.strip())) > 1, option


def test_the_doctor_tells_what_will_be_done(run):
    code, printed, _ = run("doctor")
    assert code in (0, 1)
    assert "training runs on" in printed


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (("evaluate", "--init", "scratch"), "modan_fast.downstream.evaluate.evaluate"),
        (("demo",), "modan_fast.demo.demo"),
        (("phantom", "archive"), "modan_fast.phantom.phantom_archive"),
        (("report", "results"), "modan_fast.report.page.write_report"),
        (("shard", "archive"), "shard_builder.build.build"),
    ],
)
def test_ctrl_c_is_answered_with_what_the_same_command_will_do(run, monkeypatch, command, work):
    def interrupted(*arguments, **settings):
        raise KeyboardInterrupt

    monkeypatch.setattr(work, interrupted)
    code, printed, said = run(*command)
    assert (code, printed) == (130, "")
    assert "modan-fast: stopped; the same command" in said


def test_a_file_that_is_no_dicom_is_named_on_the_users_own_screen_and_nowhere_else(run, monkeypatch, tmp_path):
    (tmp_path / "pacs").mkdir()
    shutil.copy(pydicom.data.get_testdata_file("MR_small.dcm"), tmp_path / "pacs" / "IM0001")
    (tmp_path / "pacs" / "a-patients-notes.dcm").write_bytes(b"no DICOM file, though it is named so" * 10)
    options = ("--size", 32, "--workers", 1)
    code, logged, said = run("shard", tmp_path / "pacs", "--out", tmp_path / "logged", *options)
    assert code == 0
    assert "left out: " in logged
    assert "a-patients-notes" not in logged + said
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    _, shown, _ = run("shard", tmp_path / "pacs", "--out", tmp_path / "shown", *options)
    assert "left out: a-patients-notes.dcm: " in shown
    for path in (tmp_path / "shown").iterdir():
        assert b"a-patients-notes" not in path.read_bytes()
