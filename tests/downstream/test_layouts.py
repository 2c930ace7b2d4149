"""Each layout of a task against a truth that is written out by hand; and what wrong tasks are told."""

from __future__ import annotations

import csv
import io
import os
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modan_fast.downstream.leaks import Leak, find_leaks
from modan_fast.downstream.tasks import Task, decode, read_task, task_name, write_folds
from shard_builder.settings import InputError

WriteCsv = Callable[..., Path]


def write_image(path: Path, shade: int, channels: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((6, 5, 3), (shade, 255 - shade, 7), np.uint8)
    Image.fromarray(pixels if channels == 3 else pixels[..., 0]).save(path)


def write_rows(path: Path, text: str) -> Path:
    """A CSV file of a multi-line string, and the images in its first column that looks like a path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [line.strip() for line in text.strip().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    root = path.parent.parent if path.parent.name == "dataframe" else path.parent
    for number, line in enumerate(lines[1:]):
        for cell in line.split(","):
            if cell.endswith((".png", ".jpg")) and not (root / cell).exists():
                write_image(root / cell, number % 256)
    return path


@pytest.fixture
def write_csv(tmp_path: Path) -> WriteCsv:
    """Writes a table of `count` images, each column given as a function of the image's number."""

    def write(count: int = 40, **columns: Callable[[int], object]) -> Path:
        rows = [[f"images/{index:03}.png", *(of(index) for of in columns.values())] for index in range(count)]
        for index, (image, *_) in enumerate(rows):
            write_image(tmp_path / str(image), index)
        with (tmp_path / "lesions.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["path", *columns], *rows])
        return tmp_path / "lesions.csv"

    return write


def named(task: Task, fold: int) -> dict[str, list[str]]:
    return {
        split: [task.images[row] for row in getattr(task.folds[fold - 1], split)]
        for split in ("train", "val", "test")
    }


def write_folds_of(
    folder: Path, prefix: str, header: str, line: Callable[[str, int], str], names: list[str]
) -> None:
    """Five fold files of the images `names`, of which fold f tests every fifth and validates on the next fifth."""
    for index, name in enumerate(names):
        write_image(folder / name, index)
    for fold in range(5):
        parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
        for index, name in enumerate(names):
            place = (index // 2 - fold) % 5
            parts["test" if place == 0 else "val" if place == 1 else "train"].append(line(name, index))
        for split, lines in parts.items():
            path = folder / "dataframe" / f"{prefix}{split}_fold{fold + 1}.csv"
            path.parent.mkdir(exist_ok=True)
            path.write_text("\n".join([header, *lines]) + "\n")


def test_the_published_acl_is_read_unchanged_and_an_exam_is_the_first_four_digits(tmp_path: Path) -> None:
    names = [f"images/{1054 + index // 2:04}_sagittal_{10 + index}.000000.png" for index in range(40)]
    folder = tmp_path / "acl"
    write_folds_of(
        folder, "", "filename,acl_label", lambda name, index: f"{name},{('no', 'yes')[index % 2]}", names
    )
    task = read_task(folder, group=r"images/(\d{4})_")
    assert (task.name, task.kind, task.classes, task.positive) == ("acl", "binary", ("no", "yes"), "yes")
    assert task.images == tuple(sorted(names))
    assert task.labels.tolist() == [names.index(image) % 2 for image in task.images]
    assert task.patients == tuple(image[7:11] for image in task.images)
    assert find_leaks(task) == []


def test_the_published_meniscus_has_the_words_p_and_n(tmp_path: Path) -> None:
    names = [f"images/{index:04}_sagittal_13.000000.png" for index in range(40)]
    folder = tmp_path / "meniscus"
    write_folds_of(folder, "meniscus_", "img_dir,label", lambda name, index: f"{name},{'np'[index % 2]}", names)
    task = read_task(folder)
    assert (task.kind, task.classes, task.positive, len(task.folds)) == ("binary", ("n", "p"), "p", 5)
    assert task.labels.tolist() == [index % 2 for index in range(40)]


@pytest.mark.parametrize(
    ("prefix", "header", "line", "words", "group"),
    [
        ("covid19_", ",filename,label", "{n},{image},{word}", ("negative", "positive"), None),
        ("", ",filename,Target,label", "{n},{image},{n},{word}", ("no", "yes"), None),
        (
            "sarscovid2_",
            ",imgpath,pid,label,filename",
            "{n},x/{n}.png,P_{n},{word},{image}",
            ("CP", "NCP"),
            "pid",
        ),
        ("hemorrhage_", "pid,label,dir", "ID_{n},{word},{image}", ("no", "yes"), "pid"),
        ("pneumonia_", ",filename,label", "{n},{image},{word}", ("negative", "NCP"), None),
    ],
)
def test_the_published_tasks_of_one_split_are_one_fold(
    tmp_path: Path, prefix: str, header: str, line: str, words: tuple[str, str], group: str | None
) -> None:
    folder = tmp_path / "task"
    counts = {"train": 12, "val": 6, "test": 4}
    expected = {}
    for split, count in counts.items():
        lines = [header]
        for n in range(count):
            image = f"images/{split}{n:02}.png"
            expected[image] = n % 2
            write_image(folder / image, n)
            lines.append(line.format(n=n, image=image, word=words[n % 2]))
        (folder / "dataframe").mkdir(exist_ok=True)
        (folder / "dataframe" / f"{prefix}{split}.csv").write_text("\n".join(lines))
    task = read_task(folder, group=group)
    assert (task.kind, task.classes) == ("binary", (words[0].lower(), words[1].lower()))
    assert dict(zip(task.images, task.labels.tolist(), strict=True)) == expected
    assert {split: len(images) for split, images in named(task, 1).items()} == counts
    assert all(
        image.startswith(f"images/{split}") for split, images in named(task, 1).items() for image in images
    )
    assert bool(task.patients) == (group is not None)
    assert not task.new_folds


def test_a_missing_validation_part_is_a_stratified_fifth_of_whole_patients_and_is_kept(tmp_path: Path) -> None:
    rows = {"train": 80, "test": 20}
    for split, count in rows.items():
        text = "\n".join(f"{split}/{n:03}.png,{'abc'[n % 4 % 3]},p{n // 4}" for n in range(count))
        write_rows(tmp_path / "task" / "dataframe" / f"{split}.csv", f"filename,label,patient\n{text}")
    task = read_task(tmp_path / "task", group="patient")
    assert (task.kind, task.classes, task.labels.ndim) == ("multiclass", ("a", "b", "c"), 1)
    parts = named(task, 1)
    assert len(parts["val"]) == 16
    assert sorted(parts["train"] + parts["val"]) == [f"train/{n:03}.png" for n in range(80)]
    of_patients = Counter(int(image[6:9]) // 4 for image in parts["val"])
    assert set(of_patients.values()) == {4}, "patients are whole"
    assert Counter(task.labels[task.folds[0].val].tolist()) == {0: 8, 1: 4, 2: 4}
    assert task.new_folds
    write_folds(task, tmp_path / "folds")
    again = read_task(tmp_path / "task", group="patient", folds=tmp_path / "folds", seed=5)
    assert (again.sha256, again.new_folds) == (task.sha256, False)
    assert read_task(tmp_path / "task", group="patient", seed=5).sha256 != task.sha256
    table = tmp_path / "task" / "dataframe" / "test.csv"
    table.write_text("\n".join(table.read_text().splitlines()[:-1]))
    with pytest.raises(InputError, match="has the folds of other images or classes than"):
        read_task(tmp_path / "task", group="patient", folds=tmp_path / "folds")


def test_folders_of_one_split_have_class_folders_inside(tmp_path: Path) -> None:
    for split, count in (("Train", 6), ("valid", 2), ("test", 3)):
        for name in ("cyst", "normal", "stone", "tumor"):
            for index in range(count):
                write_image(tmp_path / "kidney" / split / name / "deep" / f"{index}.png", index)
    task = read_task(tmp_path / "kidney")
    assert (task.kind, task.classes, len(task.images)) == ("multiclass", ("cyst", "normal", "stone", "tumor"), 44)
    for image, label in zip(task.images, task.labels, strict=True):
        assert image.split("/")[1] == task.classes[label]
    parts = named(task, 1)
    assert {split: {image.split("/")[0] for image in images} for split, images in parts.items()} == {
        "train": {"Train"},
        "val": {"valid"},
        "test": {"test"},
    }
    assert not task.new_folds


def test_class_folders_that_decide_nothing_are_classes_and_busi_is_asked_for_three(tmp_path: Path) -> None:
    for name in ("benign", "malignant", "normal"):
        for index in range(5):
            write_image(tmp_path / "busi" / name / f"{name} ({index}).png", index)
    binary = read_task(tmp_path / "busi")
    assert (binary.kind, binary.classes, binary.outputs) == ("binary", ("benign or normal", "malignant"), 2)
    three = read_task(tmp_path / "busi", words="normal,benign,malignant")
    assert (three.kind, three.classes, three.outputs) == ("multiclass", ("normal", "benign", "malignant"), 3)
    for image, label in zip(three.images, three.labels, strict=True):
        assert image.split("/")[0] == three.classes[label]
    for fold in three.folds:
        assert Counter(three.labels[fold.test].tolist()) == {0: 1, 1: 1, 2: 1}
    two = read_task(tmp_path / "busi", words="positive=malignant|benign,negative=normal")
    assert (two.kind, two.classes, int(two.labels.sum())) == ("binary", ("negative", "positive"), 10)
    (tmp_path / "busi" / "benign").rename(tmp_path / "busi" / "cyst")
    assert read_task(tmp_path / "busi").classes == ("cyst", "malignant", "normal")


def test_classes_that_are_numbers_are_in_the_order_of_numbers(write_csv: WriteCsv) -> None:
    task = read_task(write_csv(60, label=lambda index: (10, 2, 0)[index % 3]))
    assert (task.kind, task.classes) == ("multiclass", ("0", "2", "10"))
    assert task.labels.tolist() == [(2, 1, 0)[index % 3] for index in range(60)]


def test_a_table_with_a_column_a_label_is_a_task_of_many_labels(write_csv: WriteCsv) -> None:
    path = write_csv(
        60,
        edema=lambda index: index % 2,
        mass=lambda index: int(index % 7 == 0),
        age=lambda index: index + 20,
        patient=lambda index: f"p{index // 2}",
    )
    task = read_task(path, group="patient")
    assert (task.name, task.kind, task.classes, task.outputs) == ("lesions", "multilabel", ("edema", "mass"), 2)
    assert task.labels.tolist() == [[index % 2, int(index % 7 == 0)] for index in range(60)]
    assert task.labels.dtype == np.int64
    assert sorted(np.concatenate([fold.test for fold in task.folds])) == list(range(60))
    assert find_leaks(task) == []
    for number, fold in enumerate(task.folds):
        assert fold.val.tolist() == task.folds[(number + 1) % 5].test.tolist()
        assert sorted([*fold.train, *fold.val, *fold.test]) == list(range(60))
        # 30 images have the first label and 9 the second; an even division differs by a patient at most.
        assert np.all(np.abs(task.labels[fold.test].sum(0) - [6, 1.8]) <= [1, 1])
        assert abs(len(fold.test) - 12) <= 2
    write_folds(task, path.parent / "folds")
    again = read_task(path, group="patient", folds=path.parent / "folds", seed=3)
    assert (again.sha256, again.new_folds) == (task.sha256, False)


def test_columns_choose_labels_and_one_alone_is_binary(write_csv: WriteCsv) -> None:
    path = write_csv(
        30, edema=lambda index: index % 2, mass=lambda index: index % 3 // 2, site=lambda index: index % 2
    )
    assert read_task(path, columns=["mass", "edema"]).classes == ("mass", "edema")
    assert read_task(path, columns=["mass", "edema"]).labels[2].tolist() == [1, 0]
    one = read_task(path, columns=["mass"])
    assert (one.kind, one.classes, one.labels[:3].tolist()) == ("binary", ("0", "1"), [0, 0, 1])
    assert read_task(path, subgroup=["site"]).classes == ("edema", "mass"), "a subgroup is no label"
    words = write_csv(
        30, finding=lambda index: ("clear", "dense", "fatty")[index % 3], mass=lambda index: index % 2
    )
    assert read_task(words, columns=["finding"]).classes == ("clear", "dense", "fatty")
    other = write_csv(30, finding=lambda index: ("clear", "dense")[index % 2])
    assert read_task(other, columns=["finding"], positive="Dense").classes == ("clear", "dense")
    assert read_task(other, columns=["finding"], positive="clear").classes == ("dense", "clear")


def test_a_column_of_a_table_gives_its_split_or_its_folds(write_csv: WriteCsv) -> None:
    label = lambda index: ("no", "yes")[index % 2]  # noqa: E731
    split = read_task(
        write_csv(20, label=label, split=lambda index: ("train", "Train", "valid", "test")[index // 5])
    )
    assert [len(rows) for rows in (split.folds[0].train, split.folds[0].val, split.folds[0].test)] == [10, 5, 5]
    folds = read_task(write_csv(24, label=label, fold=lambda index: index // 2 % 3 + 1))
    assert len(folds.folds) == 3
    for number, fold in enumerate(folds.folds):
        assert {row // 2 % 3 for row in fold.test} == {number}
        assert {row // 2 % 3 for row in fold.val} == {(number + 1) % 3}
        assert {row // 2 % 3 for row in fold.train} == {(number + 2) % 3}
    halves = read_task(write_csv(40, label=label, fold=lambda index: index // 2 % 2))
    assert [len(fold.val) for fold in halves.folds] == [4, 4], (
        "with two folds a fifth of the train fold validates"
    )
    assert halves.new_folds


def test_leave_out_tests_on_one_value_and_subgroups_are_kept(write_csv: WriteCsv) -> None:
    path = write_csv(
        80,
        label=lambda index: index % 2,
        institution=lambda index: ("Oslo", "Bern", "Kyoto")[index // 2 % 3],
        sex=lambda index: ("f", "m", "")[index % 3],
        patient=lambda index: f"p{index // 6}-{index // 2 % 3}",
    )
    task = read_task(path, subgroup=["sex"], leave_out="institution", group="patient")
    assert task.subgroups["sex"] == tuple(("f", "m", "")[index % 3] for index in range(80))
    assert [{task.subgroups["institution"][row] for row in fold.test} for fold in task.folds] == [
        {"Bern"},
        {"Kyoto"},
        {"Oslo"},
    ]
    for fold in task.folds:
        assert sorted([*fold.train, *fold.val, *fold.test]) == list(range(80))
        assert abs(len(fold.val) - (len(fold.val) + len(fold.train)) / 5) <= 2
        assert abs(task.labels[fold.val].mean() - 0.5) < 0.1
        assert not {task.patients[row] for row in fold.val} & {task.patients[row] for row in fold.train}
    write_folds(task, path.parent / "folds")
    again = read_task(path, leave_out="institution", group="patient", folds=path.parent / "folds", seed=7)
    assert again.sha256 == task.sha256
    with pytest.raises(InputError, match="folds has other folds than those of"):
        read_task(path, group="patient", folds=path.parent / "folds")
    with pytest.raises(InputError, match="folds has other folds than those of"):
        read_task(path, leave_out="patient", folds=path.parent / "folds")


def test_five_folds_of_institutions_are_not_taken_for_five_made_folds(write_csv: WriteCsv) -> None:
    path = write_csv(60, label=lambda index: index % 2, site=lambda index: index // 2 % 5)
    write_folds(read_task(path, leave_out="site"), path.parent / "folds")
    with pytest.raises(InputError, match="folds has other folds than those of"):
        read_task(path, folds=path.parent / "folds")


def test_leave_out_also_divides_published_folds(make_task: Callable[..., Path]) -> None:
    folder = make_task()
    for path in (folder / "dataframe").iterdir():
        head, *rows = path.read_text().splitlines()
        rows = [f"{row},{('Bern', 'Oslo')[int(row[7:10]) // 2 % 2]}" for row in rows]
        path.write_text("\n".join([f"{head},site", *rows]) + "\n")
    task = read_task(folder, leave_out="site")
    assert [{row // 2 % 2 for row in fold.test.tolist()} for fold in task.folds] == [{0}, {1}]
    assert [len(fold.test) for fold in task.folds] == [22, 21]


def save_medmnist(path: Path, shape: tuple[int, ...], labels: Callable[[int], object], **arrays: object) -> Path:
    """A file as MedMNIST's: uint8 images and labels (N, L) of each split, compressed by numpy."""
    chance = np.random.default_rng(0)
    content: dict[str, object] = {}
    for split, count in (("train", 30), ("val", 10), ("test", 12)):
        content[f"{split}_images"] = chance.integers(0, 256, (count, *shape), dtype=np.uint8)
        content[f"{split}_labels"] = np.array([labels(index) for index in range(count)], np.uint8)
    np.savez_compressed(path, **{**content, **arrays})  # type: ignore[arg-type]
    return path


def test_a_medmnist_file_is_a_task_with_its_own_split(tmp_path: Path) -> None:
    path = save_medmnist(tmp_path / "pathmnist.npz", (28, 28, 3), lambda index: [index % 3])
    task = read_task(path)
    assert (task.name, task.kind, task.classes) == ("pathmnist", "multiclass", ("0", "1", "2"))
    assert named(task, 1)["val"] == [f"val/{row:06}" for row in range(10)]
    assert [task.images[row] for row in range(3)] == ["test/000000", "test/000001", "test/000002"]
    assert task.labels[task.folds[0].train].tolist() == [row % 3 for row in range(30)]
    content = np.load(path)
    pixels = decode(task, 28, channels=3)
    for split, rows in (("train", task.folds[0].train), ("val", task.folds[0].val), ("test", task.folds[0].test)):
        np.testing.assert_array_equal(pixels[rows], content[f"{split}_images"].transpose(0, 3, 1, 2))
    grey = np.asarray(
        Image.fromarray(content["val_images"][3]).convert("L").resize((40, 40), Image.Resampling.BILINEAR)
    )
    np.testing.assert_array_equal(decode(task, 40)[task.folds[0].val[3], 0], grey)


def test_medmnist_labels_are_binary_or_many_and_words_name_them(tmp_path: Path) -> None:
    path = save_medmnist(tmp_path / "breastmnist.npz", (28, 28), lambda index: [index % 2])
    assert (read_task(path).kind, read_task(path).classes) == ("binary", ("0", "1"))
    assert read_task(path, positive="0").positive == "0"
    assert read_task(path, words="normal=1,malignant=0").classes == ("normal", "malignant")
    many = save_medmnist(tmp_path / "chestmnist.npz", (28, 28), lambda index: [index % 2, index % 3 // 2])
    task = read_task(many, columns=["edema", "mass"])
    assert (task.kind, task.classes) == ("multilabel", ("edema", "mass"))
    assert task.labels[task.folds[0].train].tolist() == [[row % 2, row % 3 // 2] for row in range(30)]
    assert decode(task, 28).shape == (52, 1, 28, 28)


def test_a_row_of_a_medmnist_file_in_train_and_test_is_a_leak(tmp_path: Path) -> None:
    images = np.random.default_rng(1).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    path = tmp_path / "breastmnist.npz"
    save_medmnist(path, (28, 28), lambda index: [index % 2], test_images=images)
    assert find_leaks(read_task(path)) == []
    images[4] = np.load(path)["train_images"][9]
    save_medmnist(path, (28, 28), lambda index: [index % 2], test_images=images)
    assert find_leaks(read_task(path)) == [Leak(1, "bytes", "test/000004", "train/000009")]


def test_a_medmnist_file_without_validation_rows_has_some_taken_from_train(tmp_path: Path) -> None:
    path = save_medmnist(tmp_path / "whole.npz", (28, 28), lambda index: [index % 2])
    content = {name: array for name, array in np.load(path).items() if not name.startswith("val")}
    np.savez(path, **content)
    task = read_task(path)
    assert [len(rows) for rows in (task.folds[0].train, task.folds[0].val, task.folds[0].test)] == [24, 6, 12]
    assert task.labels[task.folds[0].val].sum() == 3


def test_dicom_files_named_in_a_table_are_read_as_shard_reads_them(tmp_path: Path) -> None:
    from pydicom.data import get_testdata_file

    from shard_builder.dicom_pixels import decode as decode_dicom

    lines = ["path,label"]
    for name, source in (("scan.dcm", "CT_small.dcm"), ("scan", "MR_small.dcm")):
        for index in range(5):
            # A file without an ending, too; each with other bytes, which are no pixels.
            content = Path(str(get_testdata_file(source))).read_bytes()
            path = tmp_path / f"{index}-{name}"
            path.write_bytes(bytes([index]) + content[1:])
            lines.append(f"{path.name},{('no', 'yes')[source.startswith('MR')]}")
    (tmp_path / "scans.csv").write_text("\n".join(lines))
    task = read_task(tmp_path / "scans.csv")
    pixels = decode(task, 64, channels=3)
    for row, image in enumerate(task.images):
        expected = Image.fromarray(decode_dicom(tmp_path / image, 0)).resize((64, 64), Image.Resampling.BILINEAR)
        for channel in range(3):
            np.testing.assert_array_equal(pixels[row, channel], np.asarray(expected))
    assert find_leaks(task) == [], "files differ, though their pixels do not"


def test_a_message_of_a_dicom_file_says_nothing_of_its_header(tmp_path: Path) -> None:
    import pydicom
    from pydicom.data import get_testdata_file

    elements = pydicom.dcmread(str(get_testdata_file("CT_small.dcm")))
    elements.PatientName = "SECRET^MARKER"
    elements.PixelData = elements.PixelData[:100]
    lines = ["path,label"]
    for index in range(10):
        elements.InstanceNumber = index
        elements.save_as(tmp_path / f"{index}.dcm")
        lines.append(f"{index}.dcm,{index % 2}")
    (tmp_path / "scans.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"scans\.csv, line \d+: \d\.dcm does not decode \(") as caught:
        decode(read_task(tmp_path / "scans.csv"), 32)
    assert "SECRET" not in str(caught.value)


def test_three_channels_are_red_green_and_blue(write_csv: WriteCsv) -> None:
    path = write_csv(20, label=lambda index: index % 2)
    write_image(path.parent / "images" / "003.png", 200, channels=3)
    task = read_task(path)
    assert decode(task, 16, channels=3)[3, :, 0, 0].tolist() == [200, 55, 7]
    assert decode(task, 16, channels=3)[4, :, 0, 0].tolist() == [4, 4, 4]
    assert decode(task, 16)[3, :, 0, 0].tolist() == [round(0.299 * 200 + 0.587 * 55 + 0.114 * 7)]


def test_a_task_is_named_after_its_folder_or_its_file(tmp_path: Path, write_csv: WriteCsv) -> None:
    assert task_name(write_csv(10, label=lambda index: index % 2)) == "lesions"
    assert task_name(tmp_path / "some.folder") == "some.folder"


def csv_of(header: str, *lines: str) -> Callable[[Path], Path]:
    return lambda root: write_rows(root / "task.csv", "\n".join([header, *lines]))


def lines_of(words: str, count: int = 12, more: str = "") -> list[str]:
    return [f"{index:02}.png,{words.split('|')[index % len(words.split('|'))]}{more}" for index in range(count)]


def missing_test(root: Path) -> Path:
    for name in ("a", "b"):
        write_image(root / "task" / "train" / name / "0.png", 1)
    return root / "task"


def no_class_folders(root: Path) -> Path:
    csv_of("path,label", *lines_of("no|yes"))(root)
    return root


def volumes(root: Path) -> Path:
    return save_medmnist(root / "organmnist3d.npz", (8, 8, 8), lambda index: [index % 3])


def flat_test(root: Path) -> Path:
    """A multi-label table whose training part has a label everywhere."""
    lines = [f"{index:02}.png,1,{index % 2},{('train', 'val', 'test')[index // 8]}" for index in range(24)]
    return write_rows(root / "task.csv", "\n".join(["path,edema,mass,split", *lines]))


def lacking_class(root: Path) -> Path:
    lines = [
        f"{index:02}.png,{'abc'[index // 8]},{('train', 'val', 'test')[index % 8 % 3]}" for index in range(24)
    ]
    lines = [line.replace(",c,train", ",c,test") for line in lines]
    return write_rows(root / "task.csv", "\n".join(["path,label,split", *lines]))


WRONG = {
    "two unknown words": (
        csv_of("path,label", *lines_of("cyst|tumor")),
        {},
        r"task\.csv has the labels cyst and tumor: say which is positive with `words=positive=tumor,negative=cyst`",
    ),
    "a misspelt word": (
        csv_of("path,label", *lines_of("benign|malignant|malignent")),
        {},
        r"task\.csv, line 4: label 'malignent' is none of benign, .*: correct it, or name the classes with "
        r"`words=benign,malignant,malignent`",
    ),
    "a word outside of words": (
        csv_of("path,label", *lines_of("a|b|c")),
        {"words": "positive=a,negative=b"},
        r"task\.csv, line 4: label 'c' is in no class of `words=positive=a,negative=b`: add it there",
    ),
    "no labels": (
        csv_of("path,age", *lines_of("31|42|53")),
        {},
        r"task\.csv, line 1: needs a column label or acl_label or class, or columns that hold only 0 and 1, has path",
    ),
    "no such column": (
        csv_of("path,label", *lines_of("no|yes")),
        {"columns": ["edema"]},
        r"task\.csv, line 1: there is no column edema, but path, label",
    ),
    "neither 0 nor 1": (
        csv_of("path,edema,mass", *lines_of("0|1", more=",1"), "99.png,-1,0"),
        {"columns": ["edema", "mass"]},
        r"task\.csv, line 14: the column edema is '-1', not 0 or 1: correct it, or say what its words mean",
    ),
    "an unknown split": (
        csv_of("path,label,split", *lines_of("no|yes", more=",train"), "99.png,no,dev"),
        {},
        r"task\.csv, line 14: the column split is 'dev', not train, val or test",
    ),
    "folds with a gap": (
        csv_of("path,label,fold", *lines_of("no|yes", more=",1"), *(f"9{n}.png,no,3" for n in range(3))),
        {},
        r"task\.csv: the column fold has 1, 3: number the folds from 1, at least two",
    ),
    "an image twice": (
        csv_of("path,label", *lines_of("no|yes"), "03.png,yes"),
        {},
        r"task\.csv, line 14: 03\.png is listed twice: remove a line",
    ),
    "one institution": (
        csv_of("path,label,site", *lines_of("no|yes", more=",Oslo")),
        {"leave_out": "site"},
        r"the column site has one value only \(Oslo\): `leave_out` needs two",
    ),
    "an institution of one class": (
        csv_of("path,label,site", *lines_of("no|yes", 30, ",Oslo"), *(f"9{n}.png,no,Bern" for n in range(5))),
        {"leave_out": "site"},
        r"test of fold 1, which leaves out Bern, has one class only: both classes are needed",
    ),
    "a subgroup of folders": (
        lambda root: missing_test(root) / "train",
        {"subgroup": ["site"]},
        r"train, which has class folders, has no columns, such as site: write the task as a CSV file with this column",
    ),
    "no test folder": (missing_test, {}, r"task has the folders train: a task of one split has train, test and"),
    "the folder of a table": (no_class_folders, {}, r"and has none; name .*task\.csv itself, if it is the task"),
    "volumes": (volumes, {}, r"train_images is uint8, \(30, 8, 8, 8\): .*; volumes are not read"),
    "a label without negatives": (
        flat_test,
        {},
        r"train of fold 1 has no image with, or none without, label edema: each is needed to train",
    ),
    "a class that is never trained": (
        lacking_class,
        {},
        r"train of fold 1 has no image of class c: each is needed",
    ),
    "another file": (
        lambda root: write_rows(root / "task.txt", "path,label"),
        {},
        r"task\.txt is no task: name a folder, a CSV file or a \.npz file of MedMNIST",
    ),
    "words that repeat": (
        csv_of("path,label", *lines_of("a|b")),
        {"words": "x=a,y=a"},
        r"`words=x=a,y=a` must name two classes or more, and no word twice",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_task_is_told_in_a_line_what_was_found_and_what_to_do(tmp_path: Path, name: str) -> None:
    write, choices, message = WRONG[name]
    with pytest.raises(InputError, match=message) as caught:
        read_task(write(tmp_path), **choices)  # type: ignore[arg-type]
    assert len(str(caught.value).splitlines()) == 1


def test_an_array_that_is_not_what_its_header_says_is_refused_unread(tmp_path: Path) -> None:
    path = save_medmnist(tmp_path / "bomb.npz", (28, 28), lambda index: [index % 2])
    header = io.BytesIO()
    shape = (10**6, 8000, 8000)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(path) as archive:
        members = {each: archive.read(each) for each in archive.namelist()}
    members["train_images.npy"] = header.getvalue() + bytes(1000)
    with zipfile.ZipFile(path, "w") as archive:
        for each, content in members.items():
            archive.writestr(each, content)
    with pytest.raises(InputError, match="train_images has not the bytes of its shape"):
        read_task(path)


def test_a_medmnist_file_of_pickled_objects_is_refused(tmp_path: Path) -> None:
    labels = np.array([[{}]] * 30, object)
    path = save_medmnist(tmp_path / "objects.npz", (28, 28), lambda index: [index % 2], train_labels=labels)
    with pytest.raises(InputError, match=r"train_labels is no array of (MedMNIST|numpy)"):
        read_task(path)


@pytest.mark.parametrize(("folder", "classes"), [("CT/kidney", 4), ("MR/brain", 4)])
def test_real_class_folders_are_tasks_of_four_classes(real_data: Path, folder: str, classes: int) -> None:
    path = real_data / "radiology" / folder
    task = read_task(path)
    assert (task.kind, len(task.classes)) == ("multiclass", classes)
    counts = {name: len(os.listdir(path / name)) for name in task.classes}
    assert {name: int((task.labels == label).sum()) for label, name in enumerate(task.classes)} == counts
    for fold in task.folds:
        for label, name in enumerate(task.classes):
            assert abs((task.labels[fold.test] == label).sum() - counts[name] / 5) < 1
