"""The images of a tree, their labels from folder names, and the choice of each class."""

import os
from collections import Counter

import pytest

from shard_builder.entries import Entry, as_text, choose
from shard_builder.labels import RADIMAGENET_US, bit_names, vocabularies
from shard_builder.options import BuildOptions
from shard_builder.scan import scan_tree
from shard_builder.settings import InputError


def touch(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    return root


def test_every_radimagenet_folder_gets_its_modality_its_anatomy_and_its_name_as_it_is(tmp_path, radimagenet):
    expected = {folder: (modality, anatomy) for folder, modality, anatomy in radimagenet}
    assert len(expected) == 165
    found = scan_tree(touch(tmp_path, *(f"{folder}/a.png" for folder in expected)))
    assert not found.rejected
    entries = {entry.source: entry for entry in found.entries}
    assert {source.removesuffix("/a.png") for source in entries} == set(expected)
    for folder, (modality, anatomy) in expected.items():
        entry = entries[f"{folder}/a.png"]
        assert entry.fields == {"modality": modality, "anatomy": anatomy}
        assert entry.category == f"{modality}/{anatomy}/{folder.rpartition('/')[2]}"
    fields = vocabularies(found.fields, (entry.fields for entry in found.entries))
    assert bit_names(fields) == [f"modality={name}" for name in ("CT", "MR", "US")] + [
        f"anatomy={name}"
        for name in ["abd", "af", "brain", "hip", "knee", "lung", "shoulder", "spine", "thyroid"]
    ]
    assert len({entry.category for entry in found.entries}) == 165


def test_a_rearranged_tree_has_the_same_classes_and_gives_the_same_choice(tmp_path):
    shipped, arranged = tmp_path / "shipped", tmp_path / "arranged"
    for name, anatomy in RADIMAGENET_US.items():
        touch(shipped, *(f"US/{name}/{image}.png" for image in range(20)))
        touch(arranged, *(f"US/{anatomy}/{name}/{image}.png" for image in range(20)))

    def chosen(root):
        picked = choose(scan_tree(root).entries, per_class=5, seed=3)
        return [(entry.category, os.path.basename(entry.source)) for entry in picked]

    assert chosen(shipped) == chosen(arranged)


def test_both_forms_may_be_mixed_in_one_tree(tmp_path):
    touch(tmp_path, "US/liver/a.png", "US/abd/liver/b.png", "US/thyroid/c.png", "US/thyroid/thyroid/d.png")
    found = {entry.source: entry.category for entry in scan_tree(tmp_path).entries}
    assert found == {
        "US/liver/a.png": "US/abd/liver",
        "US/abd/liver/b.png": "US/abd/liver",
        "US/thyroid/c.png": "US/thyroid/thyroid",
        "US/thyroid/thyroid/d.png": "US/thyroid/thyroid",
    }


def test_a_folder_without_anatomy_is_named_with_both_ways_out(tmp_path):
    touch(tmp_path, "CT/lung/Nodule/a.png", *(f"US/spleen2/{image}.png" for image in range(3)))
    with pytest.raises(InputError) as caught:
        scan_tree(tmp_path)
    assert str(caught.value) == (
        "US/spleen2 names no anatomy and is no RadImageNet class: name it with `anatomy=US/spleen2=abd`, or "
        "pass `skip_unknown=True` (1 of 2 folders, 3 images)"
    )
    given = scan_tree(tmp_path, anatomy=BuildOptions(anatomy=("US/spleen2=abd",)).anatomies)
    assert Counter(entry.category for entry in given.entries) == {"CT/lung/Nodule": 1, "US/abd/spleen2": 3}
    skipped = scan_tree(tmp_path, skip_unknown=True)
    assert [entry.source for entry in skipped.entries] == ["CT/lung/Nodule/a.png"]
    assert [each.source for each in skipped.rejected] == [f"US/spleen2/{image}.png" for image in range(3)]


def test_an_anatomy_for_a_folder_that_is_not_there_is_an_error(tmp_path):
    touch(tmp_path, "US/liver/a.png")
    with pytest.raises(InputError, match="`anatomy=US/livr=abd`: there are no images directly in"):
        scan_tree(tmp_path, anatomy={"US/livr": "abd"})


def test_a_named_anatomy_wins_over_the_table(tmp_path):
    found = scan_tree(touch(tmp_path, "US/liver/a.png"), anatomy={"US/liver": "hepatic"})
    assert found.entries[0].category == "US/hepatic/liver"


def test_extensions_count_in_any_case_and_other_files_are_ignored(tmp_path):
    touch(
        tmp_path, *(f"CT/lung/x/{name}" for name in ("a.PNG", "b.jpg", "c.JpEg", "Thumbs.db", "d.csv", "._a.png"))
    )
    touch(tmp_path, "CT/lung/.cache/a.png", "list.csv")
    found = scan_tree(tmp_path)
    assert [entry.source for entry in found.entries] == [
        f"CT/lung/x/{name}" for name in ("a.PNG", "b.jpg", "c.JpEg")
    ]
    assert not found.rejected


def test_images_at_other_depths_are_listed(tmp_path):
    fitting = [f"CT/lung/x/{image}.png" for image in range(5)]
    found = scan_tree(touch(tmp_path, *fitting, "top.png", "CT/high.png", "CT/lung/x/deep/low.png"))
    assert [entry.source for entry in found.entries] == fitting
    assert [each.source for each in found.rejected] == ["CT/high.png", "CT/lung/x/deep/low.png", "top.png"]
    assert {each.reason for each in found.rejected} == {"not at MODALITY/anatomy/class"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ((), "no images in .*, but 0 other files: expected MODALITY/anatomy/class"),
        (("CT/lung/x/a.dcm", "b.csv"), "no images in .*, but 2 other files: expected"),
        (("rin/CT/lung/x/a.png", "rin/US/liver/a.png"), "1 of 2 images .* such as rin/CT/lung/x/a.png: expected"),
    ],
)
def test_a_folder_that_is_no_such_tree_is_an_error_that_describes_the_layout(tmp_path, files, message):
    with pytest.raises(InputError, match=message) as caught:
        scan_tree(touch(tmp_path, *files))
    assert "\n" not in str(caught.value)


def test_a_missing_source_and_a_file_are_errors(tmp_path):
    with pytest.raises(InputError, match="none does not exist: expected MODALITY"):
        scan_tree(tmp_path / "none")
    with pytest.raises(InputError, match=r"a\.png is no folder: expected MODALITY"):
        scan_tree(touch(tmp_path, "a.png") / "a.png")


def test_links_are_followed_but_never_in_a_circle(tmp_path):
    root = touch(tmp_path / "tree", "CT/lung/x/a.png", "CT/lung/x/b.png")
    touch(tmp_path / "elsewhere", "c.png")
    (root / "CT/lung/y").symlink_to(tmp_path / "elsewhere")
    (root / "CT/loop").symlink_to(root)
    (root / "CT/lung/x/loop").symlink_to(root)
    (root / "CT/lung/x/self.png").symlink_to("self.png")
    (root / "CT/lung/x/gone.png").symlink_to("nowhere.png")
    found = scan_tree(root)
    assert [entry.source for entry in found.entries] == ["CT/lung/x/a.png", "CT/lung/x/b.png", "CT/lung/y/c.png"]
    assert {each.source: each.reason for each in found.rejected} == {
        "CT/loop": "a link back to a folder that it lies in",
        "CT/lung/x/gone.png": "not a file",
        "CT/lung/x/loop": "a link below MODALITY/anatomy/class",
        "CT/lung/x/self.png": "not a file",
    }


def test_names_of_any_bytes_become_printable_text(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xc3\xa9\n\x1b.png")
    touch(tmp_path, f"CT/lung/x/{name}")
    (entry,) = scan_tree(tmp_path).entries
    assert (tmp_path / entry.source).exists()
    assert as_text(entry.source) == "CT/lung/x/caf\\xe9 é\\n\\x1b.png"


def entries(**counts):
    return [Entry(f"{name}/{image}.png", {}, name) for name, count in counts.items() for image in range(count)]


def test_at_most_per_class_images_of_each_class_are_chosen_and_0_takes_all():
    found = entries(a=30, b=7)
    assert Counter(entry.category for entry in choose(found, per_class=10, seed=0)) == {"a": 10, "b": 7}
    assert sorted(entry.source for entry in choose(found, per_class=0, seed=0)) == sorted(
        entry.source for entry in found
    )


def test_the_choice_depends_on_the_seed_and_not_on_the_listing_or_on_other_classes():
    first = choose(entries(a=200, b=200), per_class=20, seed=0)
    assert first == choose(entries(a=200, b=200)[::-1], per_class=20, seed=0)
    assert first != choose(entries(a=200, b=200), per_class=20, seed=1)
    alone = choose(entries(a=200), per_class=20, seed=0)
    assert alone == [entry for entry in first if entry.category == "a"]


def test_the_choice_of_a_seed_never_changes():
    chosen = choose(entries(a=100, b=100), per_class=3, seed=0)
    assert [entry.source for entry in chosen] == [
        "a/9.png",
        "b/56.png",
        "a/95.png",
        "b/97.png",
        "a/62.png",
        "b/93.png",
    ]


def test_equal_file_names_are_sampled_and_stored_as_evenly_as_others():
    found = [
        Entry(f"patient{patient:02}/{view}.png", {}, "chest")
        for patient in range(60)
        for view in ("front", "side")
    ]
    samples = [[entry.source for entry in choose(found, per_class=40, seed=seed)] for seed in range(20)]
    assert len({frozenset(sample) for sample in samples}) == 20
    assert all(sample != sorted(sample) for sample in samples)
    fronts = [sum(source.endswith("front.png") for source in sample) for sample in samples]
    assert 10 < min(fronts) <= max(fronts) < 30  # 40 at random of 60 and 60
    patients = Counter(source.partition("/")[0] for sample in samples for source in sample)
    assert len(patients) == 60


def test_images_of_other_types_are_listed_in_a_tree_and_other_files_ignored(tmp_path):
    names = ("a.png", "b.BMP", "c.tif", "d.txt", "Thumbs.db")
    found = scan_tree(touch(tmp_path, *(f"CT/lung/Nodule/{name}" for name in names)))
    assert [entry.source for entry in found.entries] == ["CT/lung/Nodule/a.png"]
    assert [(each.source, each.reason) for each in found.rejected] == [
        (f"CT/lung/Nodule/{name}", "not a PNG or JPEG image: convert it") for name in ("b.BMP", "c.tif")
    ]


def test_classes_are_mixed_all_over_the_storage_order():
    # A large class and small ones: having more images to choose from must not move a class to the front.
    order = [entry.category for entry in choose(entries(a=5000, b=100, c=100), per_class=100, seed=0)]
    for start in range(0, 300, 100):
        counts = Counter(order[start : start + 100])
        assert min(counts[name] for name in "abc") > 15
