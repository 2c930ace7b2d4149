from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modan_fast.downstream.leaks import find_leaks
from modan_fast.downstream.tasks import FoldRun, decode, read_task, write_folds
from shard_builder.settings import InputError

MakeTask = Callable[..., Path]


@pytest.mark.parametrize("columns", ["filename,label", "img_dir,label", "filename,acl_label"])
@pytest.mark.parametrize("words", [("benign", "malignant"), ("no", "yes"), ("0", "1"), ("normal", "Malignant")])
def test_every_published_spelling_reads_as_the_same_task(
    make_task: MakeTask, columns: str, words: tuple[str, str]
) -> None:
    task = read_task(make_task(columns=columns, words=words, prefix="any-thing_"))
    assert task.name == "nodule"
    assert task.images == tuple(f"images/{index:03}.png" for index in range(43))
    assert task.labels.tolist() == [index % 2 for index in range(43)]
    assert task.folds[0].test.tolist() == [0, 1, 10, 11, 20, 21, 30, 31, 40, 41]
    for fold in task.folds:
        assert sorted(np.concatenate([fold.train, fold.val, fold.test])) == list(range(43))


def test_pixels_are_pillows_grey_stretched_to_the_size(make_task: MakeTask) -> None:
    folder = make_task()
    color = np.random.default_rng(1).integers(0, 256, (50, 90, 3), dtype=np.uint8)
    Image.fromarray(color).save(folder / "images" / "002.png")
    pixels = decode(read_task(folder), 32)
    assert pixels.shape == (43, 1, 32, 32)
    assert pixels.dtype == np.uint8
    # ITU-R 601 luma and a triangle filter of the width of the reduction, written out.
    grey = np.round(color @ np.array([0.299, 0.587, 0.114]))
    expected = triangle(32, 50) @ grey @ triangle(32, 90).T
    np.testing.assert_allclose(pixels[2, 0], expected, atol=1.01)


def triangle(target: int, source: int) -> np.ndarray:
    scale = source / target
    centers = (np.arange(target)[:, None] + 0.5) * scale
    weights = np.clip(1 - np.abs(np.arange(source) + 0.5 - centers) / scale, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


def replace_line(path: Path, number: int, line: str) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = line
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("images/none.png,benign", "line 3: there is no image images/none.png"),
        ("images/001.png,maybe", "line 3: label 'maybe' is none of"),
        ("images/001.png", "line 3: label '' is none"),
        (",benign", "line 3: names no image"),
        ("../other/001.png,benign", "line 3: ../other/001.png lies outside the task folder"),
        ("/etc/passwd,benign", "line 3: /etc/passwd lies outside the task folder"),
        ("images/003.png,benign", "line 3: images/003.png has another label than at"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(make_task: MakeTask, line: str, message: str) -> None:
    folder = make_task()
    replace_line(folder / "dataframe" / "nodule_test_fold2.csv", 3, line)
    with pytest.raises(InputError) as caught:
        read_task(folder)
    assert message in str(caught.value)
    assert "nodule_test_fold2.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_columns_are_named(make_task: MakeTask) -> None:
    folder = make_task()
    replace_line(folder / "dataframe" / "nodule_val_fold1.csv", 1, "file,label")
    with pytest.raises(InputError, match=r"nodule_val_fold1\.csv, line 1: needs a column filename or img_dir"):
        read_task(folder)


def test_a_missing_fold_file_is_named(make_task: MakeTask, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="or two class folders, and has none"):
        read_task(tmp_path)
    folder = make_task()
    (folder / "dataframe" / "nodule_val_fold4.csv").unlink()
    with pytest.raises(InputError, match=r"must have one file \*val_fold4\.csv, found none"):
        read_task(folder)


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_fold_of_one_class_is_refused(make_task: MakeTask, split: str) -> None:
    folder = make_task()
    path = folder / "dataframe" / f"nodule_{split}_fold5.csv"
    path.write_text("".join(line for line in path.open() if "malignant" not in line))
    with pytest.raises(InputError, match=rf"nodule_{split}_fold5\.csv has one class only"):
        read_task(folder)


def test_an_image_that_does_not_decode_is_named_with_its_row(make_task: MakeTask) -> None:
    folder = make_task()
    image = folder / "images" / "005.png"
    image.write_bytes(image.read_bytes()[:200])
    with pytest.raises(InputError, match=r"csv, line \d+: images/005\.png does not decode"):
        decode(read_task(folder), 32)


def write_classes(folder: Path, names: tuple[str, ...], count: int = 30, patients: int = 15) -> Path:
    """`count` images a class folder, image i of patient i % `patients` of the class."""
    pixels = np.random.default_rng(0).integers(0, 256, (len(names), count, 40, 36), dtype=np.uint8)
    for name, images in zip(names, pixels, strict=True):
        (folder / name / "deep").mkdir(parents=True)
        for index, image in enumerate(images):
            Image.fromarray(image).save(folder / name / "deep" / f"{name}{index % patients:02}_{index:03}.png")
    return folder


@pytest.mark.parametrize("group", [None, r"/([a-z]+\d+)_"])
def test_folds_of_class_folders_are_stratified_and_keep_patients_together(
    tmp_path: Path, group: str | None
) -> None:
    folder = write_classes(tmp_path / "task", ("benign", "malignant"))
    task = read_task(folder, group=group)
    assert task.new_folds
    assert sorted(np.concatenate([fold.test for fold in task.folds])) == list(range(60))
    for number, fold in enumerate(task.folds):
        assert fold.val.tolist() == task.folds[(number + 1) % 5].test.tolist()
        assert sorted(np.concatenate([fold.train, fold.val, fold.test])) == list(range(60))
        for part in (fold.train, fold.val, fold.test):
            assert task.labels[part].mean() == 0.5
    assert find_leaks(task) == []
    by_patient = find_leaks(read_task(folder, group=r"/([a-z]+\d+)_"))
    assert by_patient == []
    assert bool(find_leaks(replace(task, patients=tuple(image[-10:-8] for image in task.images))))
    assert [fold.test.tolist() for fold in read_task(folder, group=group).folds] == [
        fold.test.tolist() for fold in task.folds
    ]
    other = read_task(folder, group=group, seed=1)
    assert [fold.test.tolist() for fold in other.folds] != [fold.test.tolist() for fold in task.folds]


def test_folds_written_once_are_read_back_as_they_are(tmp_path: Path) -> None:
    folder = write_classes(tmp_path / "task", ("benign", "malignant"))
    task = read_task(folder)
    write_folds(task, tmp_path / "folds")
    again = read_task(folder, folds=tmp_path / "folds", seed=9)
    assert again.sha256 == task.sha256
    assert (task.new_folds, again.new_folds) == (True, False)


@pytest.mark.parametrize(
    ("names", "given", "positive"),
    [
        (("benign", "malignant"), None, "malignant"),
        (("abnormal", "normal"), None, "abnormal"),
        (("No", "yes"), None, "yes"),
        (("cyst", "tumor"), None, "tumor"),
        (("cyst", "tumor"), "cyst", "cyst"),
    ],
)
def test_the_positive_class_is_known_by_name_or_named(
    tmp_path: Path, names: tuple[str, str], given: str | None, positive: str
) -> None:
    task = read_task(write_classes(tmp_path / "task", names, 5), positive=given)
    assert task.positive == positive
    assert {image.split("/")[0] for image, label in zip(task.images, task.labels, strict=True) if label} == {
        positive
    }


def test_busi_as_it_is_shipped_is_a_task_and_its_masks_are_no_images(tmp_path: Path) -> None:
    for name in ("benign", "malignant", "normal"):
        (tmp_path / "busi" / name).mkdir(parents=True)
        for number in range(6):
            for suffix in ("", "_mask", "_mask_1"):
                Image.new("L", (4, 4), number).save(tmp_path / "busi" / name / f"{name} ({number}){suffix}.png")
    task = read_task(tmp_path / "busi")
    assert len(task.images) == 18
    positive = [image for image, label in zip(task.images, task.labels, strict=True) if label]
    assert [image.partition("/")[0] for image in positive] == ["malignant"] * 6
    other = read_task(tmp_path / "busi", positive="normal")
    assert other.labels.sum() == 6
    with pytest.raises(InputError, match="`positive=odd` is no class folder"):
        read_task(tmp_path / "busi", positive="odd")


def test_class_folders_that_cannot_be_divided_are_named(tmp_path: Path) -> None:
    one = write_classes(tmp_path / "one", ("a",), 5)
    with pytest.raises(InputError, match=r"two class folders, and has 1 folders \(a\)"):
        read_task(one)
    few = write_classes(tmp_path / "few", ("a", "b"), 4)
    with pytest.raises(InputError, match="few/a has 4 images: each of the 5 folds needs one"):
        read_task(few)
    patients = write_classes(tmp_path / "patients", ("a", "b"), 12, patients=3)
    with pytest.raises(InputError, match="patients/a has 3 patients"):
        read_task(patients, group=r"([ab]\d+)_")
    with pytest.raises(
        InputError, match=r"`group=x\(1\)` is no column, and finds nothing in a/deep/a00_000\.png"
    ):
        read_task(patients, group="x(1)")
    with pytest.raises(InputError, match="`positive=d` is no class folder of .*: name a or b"):
        read_task(patients, positive="d")
    with pytest.raises(InputError, match="no task at"):
        read_task(tmp_path / "nowhere")


def test_the_digest_changes_with_an_image_a_label_or_a_fold(make_task: MakeTask) -> None:
    digests = [
        read_task(make_task("a")).sha256,
        read_task(make_task("b", separable=False)).sha256,
        read_task(make_task("c", words=("malignant", "benign"))).sha256,
    ]
    folder = make_task("d")
    replace_line(folder / "dataframe" / "nodule_train_fold1.csv", 2, "images/000.png,benign")
    digests.append(read_task(folder).sha256)
    assert len(set(digests)) == 4
    assert read_task(make_task("e")).sha256 == digests[0]


def test_a_fold_runs_seeds_differ_by_seed_repeat_fold_and_purpose() -> None:
    seeds = {
        FoldRun(repeat, fold).seed(seed, purpose)
        for repeat in range(1, 11)
        for fold in range(1, 6)
        for seed in range(3)
        for purpose in ("encoder", "head", "order")
    }
    assert len(seeds) == 10 * 5 * 3 * 3


def test_the_published_thyroid_folds_partition_its_349_images() -> None:
    if "MODAN_TEST_DATA" not in os.environ:
        pytest.skip("MODAN_TEST_DATA names no folder with real test data")
    folder = Path(os.environ["MODAN_TEST_DATA"]) / "downstream" / "thyroid"
    task = read_task(folder)
    assert len(task.images) == 349
    assert sorted(np.concatenate([fold.test for fold in task.folds])) == list(range(349))
    for number, fold in enumerate(task.folds, start=1):
        for split in ("train", "val", "test"):
            rows = getattr(fold, split)
            lines = (folder / "dataframe" / f"thyroid_{split}_fold{number}.csv").read_text().split("\n")[1:]
            lines = [line for line in lines if line.strip()]
            assert len(rows) == len(lines)
            assert task.labels[rows].sum() == sum(line.endswith(",malignant") for line in lines)
            assert [task.images[row] for row in rows] == [line.split(",")[0] for line in lines]
        assert len(set(fold.train) | set(fold.val) | set(fold.test)) == 349
