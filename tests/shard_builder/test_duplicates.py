"""Equal and empty images: found by their pixels across classes, and left out by the chosen policy."""

import json
import shutil
from collections import Counter

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shard_builder.build import build
from shard_builder.duplicates import duplicate_reasons, find_duplicates
from shard_builder.entries import Entry
from shard_builder.options import BuildOptions
from shard_builder.pack import ROW, digest
from shard_builder.pseudonym import pseudonym

SMALL = {"size": 24, "workers": 1, "samples_per_shard": 20}


@pytest.fixture
def doubled(tree):
    """`tree` with copies of three images, and two empty ones.

    MR/shoulder/…/MR 1.png again in its class, as another file with the same pixels; CT/abd/normal/CT 3.png again in
    CT/lung/Nodule, byte for byte; US/liver/US 5.png again in its class and twice in US/thyroid_nodule.
    """
    tendon = tree / "MR/shoulder/ca++_tendinosis"
    grey = Image.open(tendon / "MR 1.png")
    Image.merge("RGB", [grey] * 3).save(tendon / "again.png", compress_level=9)
    shutil.copy(tree / "CT/abd/normal/CT 3.png", tree / "CT/lung/Nodule/taken.png")
    shutil.copy(tree / "US/liver/US 5.png", tree / "US/liver/again.png")
    for name in ("a.png", "b.png"):
        shutil.copy(tree / "US/liver/US 5.png", tree / "US/thyroid_nodule" / name)
    Image.new("L", (30, 30), 0).save(tree / "CT/lung/Nodule/black.png")
    Image.new("RGB", (9, 300), (7, 7, 7)).save(tree / "US/liver/grey.png")
    return tree


EMPTY = {
    "CT/lung/Nodule/black.png": "empty: every pixel is 0",
    "US/liver/grey.png": "empty: every pixel is 7",
}


def reasons(manifest):
    return {each.source: each.reason for each in manifest.rejected}


def packed(folder):
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    return {json.loads(sample["json"])["source"] for sample in webdataset.WebDataset(urls, shardshuffle=False)}


def test_of_equal_images_the_first_stays_and_the_others_name_it(doubled, tmp_path):
    manifest = build(doubled, tmp_path / "set", BuildOptions(**SMALL)).manifest
    assert reasons(manifest) == {
        **EMPTY,
        "MR/shoulder/ca++_tendinosis/again.png": "duplicate: the same pixels as "
        "MR/shoulder/ca++_tendinosis/MR 1.png",
        "CT/lung/Nodule/taken.png": "label conflict: the same pixels as CT/abd/normal/CT 3.png",
        "US/liver/again.png": "duplicate: the same pixels as US/liver/US 5.png",
        "US/thyroid_nodule/a.png": "label conflict: the same pixels as US/liver/US 5.png",
        "US/thyroid_nodule/b.png": "label conflict: the same pixels as US/liver/US 5.png",
    }
    assert packed(tmp_path / "set") == {
        path.relative_to(doubled).as_posix() for path in doubled.rglob("*") if path.suffix in {".png", ".JPG"}
    } - set(reasons(manifest))


def test_drop_leaves_no_copy_and_names_one_of_other_labels_where_there_is_one(doubled, tmp_path):
    manifest = build(doubled, tmp_path / "set", BuildOptions(duplicates="drop", **SMALL)).manifest
    tendon = "MR/shoulder/ca++_tendinosis"
    assert reasons(manifest) == {
        **EMPTY,
        f"{tendon}/MR 1.png": f"duplicate: the same pixels as {tendon}/again.png",
        f"{tendon}/again.png": f"duplicate: the same pixels as {tendon}/MR 1.png",
        "CT/lung/Nodule/taken.png": "label conflict: the same pixels as CT/abd/normal/CT 3.png",
        "CT/abd/normal/CT 3.png": "label conflict: the same pixels as CT/lung/Nodule/taken.png",
        "US/liver/US 5.png": "label conflict: the same pixels as US/thyroid_nodule/a.png",
        "US/liver/again.png": "label conflict: the same pixels as US/thyroid_nodule/a.png",
        "US/thyroid_nodule/a.png": "label conflict: the same pixels as US/liver/US 5.png",
        "US/thyroid_nodule/b.png": "label conflict: the same pixels as US/liver/US 5.png",
    }
    assert manifest.samples == 47


def test_keep_leaves_only_empty_images_out(doubled, tmp_path):
    manifest = build(doubled, tmp_path / "set", BuildOptions(duplicates="keep", **SMALL)).manifest
    assert reasons(manifest) == EMPTY
    assert manifest.options["duplicates"] == "keep"
    assert manifest.samples == 55


def test_duplicates_are_looked_for_after_each_class_was_sampled(doubled, tmp_path):
    options = BuildOptions(per_class=4, **SMALL)
    whole = build(doubled, tmp_path / "kept", BuildOptions(per_class=4, duplicates="keep", **SMALL)).manifest
    found = build(doubled, tmp_path / "set", options).manifest
    chosen = packed(tmp_path / "kept")
    assert packed(tmp_path / "set") <= chosen
    assert found.samples + len(found.rejected) == whole.samples + len(whole.rejected) == 20


numbers = st.lists(st.integers(0, 5), max_size=12)


labels = st.lists(st.sampled_from(["a", "b"]), min_size=12, max_size=12)


@given(numbers, labels, st.permutations(range(12)), st.sampled_from([None, b"one key", b"another key"]))
def test_the_choice_equals_that_of_a_loop_over_all_pairs_in_any_order_and_under_any_key(
    pixels, classes, order, key
):
    paths = [f"{number:02}" for number in range(12)]
    names = [path if key is None else pseudonym(key, path) for path in paths]
    entries = [
        Entry(name, {"modality": value}, value, path)
        for name, value, path in zip(names, classes, paths, strict=True)
    ]
    order = [number for number in order if number < len(pixels)]
    chosen, rows = [entries[number] for number in order], np.zeros(len(order), ROW)
    for row, number in zip(rows, order, strict=True):
        # Pixels 0 stand for a rejected image, which equals no other.
        row["bytes"] = pixels[number]
        row["digest"] = digest(np.full((2, 2), pixels[number], np.uint8))
    groups = find_duplicates(rows, chosen)
    for policy in ("keep", "first", "drop"):
        expected = {}
        for number, value in enumerate(pixels):
            equal = [each for each, other in enumerate(pixels) if other == value > 0]
            others = [each for each in equal if each != number]
            if policy == "first" and equal and equal[0] != number:
                named = equal[0]
            elif policy == "drop" and others:
                named = next((each for each in others if classes[each] != classes[number]), others[0])
            else:
                continue
            kind = "duplicate" if classes[named] == classes[number] else "label conflict"
            expected[names[number]] = f"{kind}: the same pixels as {names[named]}"
        found = duplicate_reasons(groups, chosen, policy)
        assert {chosen[row].source: reason for row, reason in found.items()} == expected
    assert Counter(len(group) for group in groups) == Counter(
        count for value, count in Counter(pixels).items() if value and count > 1
    )


def test_the_digests_of_other_shapes_and_single_pixels_differ():
    pixels = np.arange(24, dtype=np.uint8)
    other = pixels.copy()
    other[7] ^= 1
    shapes = [pixels.reshape(4, 6), pixels.reshape(6, 4), pixels.reshape(2, 12), other.reshape(4, 6)]
    assert len({digest(each) for each in shapes}) == 4
    assert digest(np.asfortranarray(shapes[0])) == digest(shapes[0])
