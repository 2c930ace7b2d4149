"""Tables of images: RadImageNet's, with labels in the paths, and others with columns of labels."""

import csv
import io
import json
import re
import shutil
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from shard_builder.build import build
from shard_builder.labels import RADIMAGENET_US
from shard_builder.options import BuildOptions
from shard_builder.scan import scan_tree
from shard_builder.settings import InputError
from shard_builder.table import scan_table

SMALL = {"size": 8, "workers": 1, "duplicates": "keep"}


def save(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) + np.uint8(value)).save(path)


def write(path, *rows):
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def members(folder, ending):
    """The members of a set with this ending, in order."""
    found = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found += [tar.extractfile(each).read() for each in tar if each.name.endswith(ending)]
    return found


@pytest.fixture(scope="module")
def forms(radimagenet, tmp_path_factory):
    """RadImageNet as shipped with its tables, and re-arranged: all 165 classes, three images each."""
    shipped, arranged = tmp_path_factory.mktemp("shipped"), tmp_path_factory.mktemp("arranged")
    rows = []
    for number, (folder, modality, anatomy) in enumerate(radimagenet):
        for image in range(3):
            name = f"{anatomy}{number:03}{image:03}.png"
            save(shipped / "radiology_ai" / folder / name, number + 30 * image)
            rows.append((f"radiology_ai/{folder}/{name}", folder.rpartition("/")[2]))
            moved = arranged / modality / anatomy / folder.rpartition("/")[2] / name
            moved.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(shipped / "radiology_ai" / folder / name, moved)
    for split, name in enumerate(("train", "val", "test")):
        write(shipped / f"RadiologyAI_{name}.csv", ("filename", "label"), *rows[split::3])
    return shipped, arranged


def test_the_three_forms_of_radimagenet_give_the_same_set(forms, radimagenet, tmp_path):
    shipped, arranged = forms
    options = {"per_class": 2, "seed": 5, **SMALL}
    tables = tuple(str(shipped / f"RadiologyAI_{name}.csv") for name in ("train", "val", "test"))
    sets = {
        "shipped": build(shipped / "radiology_ai", tmp_path / "shipped", BuildOptions(**options)),
        "above": build(shipped, tmp_path / "above", BuildOptions(**options)),
        "arranged": build(arranged, tmp_path / "arranged", BuildOptions(**options)),
        "tables": build(shipped, tmp_path / "tables", BuildOptions(table=tables, **options)),
        "first": build(shipped / tables[0], tmp_path / "first", BuildOptions(table=tables[1:], **options)),
    }
    expected = sorted(
        f"{modality}/{anatomy}/{folder.rpartition('/')[2]}" for folder, modality, anatomy in radimagenet
    )
    for name, result in sets.items():
        manifest = result.manifest
        assert (manifest.samples, manifest.classes, manifest.rejected) == (330, expected, []), name
        assert manifest.fields == {
            "modality": ["CT", "MR", "US"],
            "anatomy": ["abd", "af", "brain", "hip", "knee", "lung", "shoulder", "spine", "thyroid"],
        }
        for ending in (".png", ".labels", ".target"):
            assert members(tmp_path / name, ending) == members(tmp_path / "shipped", ending)
        for data, labels in zip(
            members(tmp_path / name, ".json"), members(tmp_path / name, ".labels"), strict=True
        ):
            metadata = json.loads(data)
            modality, anatomy, _ = metadata["class"].split("/")
            assert metadata["fields"] == {"modality": modality, "anatomy": anatomy}
            bits = [bit for bit, set_ in zip(manifest.labels, labels, strict=True) if set_]
            assert bits == [f"modality={modality}", f"anatomy={anatomy}"]


def test_radimagenets_table_is_read_by_its_paths_wherever_the_images_lie(forms, tmp_path):
    shipped, _ = forms
    table = shipped / "RadiologyAI_train.csv"
    elsewhere = shutil.copy(table, tmp_path / "split.csv")
    for root in (shipped, shipped / "radiology_ai"):
        found = scan_table([elsewhere], root, ())
        assert len(found.entries) == 165
        assert all((root / entry.file).exists() for entry in found.entries)
    with pytest.raises(InputError) as caught:
        scan_table([elsewhere], tmp_path, ())
    assert re.fullmatch(
        r".*split\.csv, row 2: its image, CT/.*\.png, is not in .* \(165 of 165 images are missing\): pass their "
        r"folder as `source` and the table as `table=split\.csv`, correct the table, or pass `skip_missing=True`",
        str(caught.value),
    )


def test_a_folder_of_a_table_that_names_no_anatomy_can_be_given_one_as_in_a_tree(tmp_path):
    save(tmp_path / "US/spleen2/a.png")
    save(tmp_path / "US/liver/a.png")
    table = write(tmp_path / "t.csv", ("filename", "label"), ("US/liver/a.png", "x"), ("US/spleen2/a.png", "x"))
    with pytest.raises(InputError, match=r"t\.csv, row 3: US/spleen2 names no .*`anatomy=US/spleen2=abd`"):
        scan_table([table], tmp_path, ())
    given = scan_table([table], tmp_path, (), anatomy={"US/spleen2": "abd"})
    assert given.entries == scan_tree(tmp_path, anatomy={"US/spleen2": "abd"}).entries
    skipped = scan_table([table], tmp_path, (), skip_unknown=True)
    assert [each.source for each in skipped.rejected] == ["US/spleen2/a.png"]
    with pytest.raises(InputError, match="`anatomy=US/livr`: no row"):
        scan_table([table], tmp_path, (), anatomy={"US/livr": "abd", "US/spleen2": "abd"})


@pytest.fixture
def labelled(tmp_path):
    """Six images, and a table of them with more fields than two, a class, and a patient."""
    rows = [
        ("path", "Modality", "anatomy", "view", "laterality", "class", "patient"),
        ("a/0.png", "CR", "chest", "PA", "", "normal", "Grace Hopper"),
        ("a/1.png", "CR", "chest", "LL", "", "", "Grace Hopper"),
        ("b/2.png", "MG", "breast", "MLO", "L", "mass", "Ada Lovelace"),
        ("b/3.png", "MG", "breast", "", "R", "", "Ada Lovelace"),
        ("b/4.png", "CT", "", "", "", "", "Ada Lovelace"),
        ("b/5.png", "", "thorax", "", "", "", "Ada Lovelace"),
    ]
    for number, row in enumerate(rows[1:]):
        save(tmp_path / "images" / row[0], 40 * number)
    return write(tmp_path / "images" / "table.csv", *rows)


def test_columns_become_fields_and_a_missing_value_sets_no_bit(labelled, tmp_path):
    options = BuildOptions(fields="modality,anatomy,view,laterality", **SMALL)
    found = build(labelled, tmp_path / "set", options).manifest
    assert found.fields == {
        "modality": ["CR", "CT", "MG"],
        "anatomy": ["breast", "chest", "thorax"],
        "view": ["LL", "MLO", "PA"],
        "laterality": ["L", "R"],
    }
    assert found.options["source"]["missing"] == {"modality": 1, "anatomy": 1, "view": 3, "laterality": 4}
    rows = {json.loads(data)["source"]: json.loads(data) for data in members(tmp_path / "set", ".json")}
    bits = dict(zip(rows, members(tmp_path / "set", ".labels"), strict=True))
    assert rows["b/4.png"] == {
        "fields": {"modality": "CT"},
        "class": "CT/unknown/unknown/unknown",
        "source": "b/4.png",
    }
    assert list(bits["b/4.png"]) == [0, 1, 0] + [0] * 8
    assert list(bits["b/2.png"]) == [0, 0, 1, 1, 0, 0, 0, 1, 0, 1, 0]
    assert found.classes == [
        *("CR/chest/LL/unknown", "CT/unknown/unknown/unknown", "MG/breast/unknown/R", "mass", "normal"),
        "unknown/thorax/unknown/unknown",
    ]


def test_modality_and_anatomy_are_the_fields_by_default_and_the_patient_is_written_nowhere(labelled, tmp_path):
    found = build(labelled, tmp_path / "set", BuildOptions(**SMALL)).manifest
    assert list(found.fields) == ["modality", "anatomy"]
    written = b"".join(path.read_bytes() for path in (tmp_path / "set").iterdir())
    assert b"Hopper" not in written
    assert b"Ada" not in written
    with pytest.raises(InputError, match="`fields=patient`: it identifies"):
        build(labelled, tmp_path / "other", BuildOptions(fields="patient", **SMALL))


def test_a_value_map_renames_values_and_an_empty_name_removes_them(labelled, tmp_path):
    names = write(
        tmp_path / "names.csv", ("field", "from", "to"), ("anatomy", "thorax", "chest"), ("modality", "CT", "")
    )
    found = build(labelled, tmp_path / "set", BuildOptions(map=names, **SMALL)).manifest
    assert found.fields == {"modality": ["CR", "MG"], "anatomy": ["breast", "chest"]}
    # The same images with other labels are another source.
    with pytest.raises(InputError, match="a shard set of another source"):
        build(labelled, tmp_path / "set", BuildOptions(**SMALL))


def test_a_value_map_applies_to_trees_too(tmp_path):
    save(tmp_path / "tree/CR/lung/normal/a.png")
    names = write(tmp_path / "names.csv", ("field", "from", "to"), ("modality", "CR", "XR"))
    found = build(
        tmp_path / "tree", tmp_path / "set", BuildOptions(map=names, fields="modality", **SMALL)
    ).manifest
    assert (found.fields, found.classes) == ({"modality": ["XR"]}, ["XR/lung/normal"])


def test_images_without_a_required_value_are_listed(labelled, tmp_path):
    found = build(labelled, tmp_path / "set", BuildOptions(require="modality,anatomy", **SMALL)).manifest
    assert {each.source: each.reason for each in found.rejected} == {
        "b/4.png": "no value of anatomy",
        "b/5.png": "no value of modality",
    }
    assert found.samples == 4
    assert "missing" not in found.options["source"]


def test_rows_without_an_image_stop_the_build_unless_they_are_to_be_left_out(labelled, tmp_path):
    (labelled.parent / "b/3.png").unlink()
    with pytest.raises(
        InputError, match=r"table\.csv, row 5: its image, b/3\.png, .*\(1 of 6 images are missing\)"
    ):
        build(labelled, tmp_path / "set", BuildOptions(**SMALL))
    found = build(labelled, tmp_path / "set", BuildOptions(skip_missing=True, **SMALL)).manifest
    assert [(each.source, each.reason) for each in found.rejected] == [
        ("b/3.png", "not in the folder of the images")
    ]


def test_an_image_may_be_named_again_with_the_same_labels_only(labelled):
    again = write(labelled.parent / "again.csv", ("path", "modality", "anatomy"), ("b/4.png", "CT", ""))
    other = write(labelled.parent / "other.csv", ("path", "modality", "anatomy"), ("b/4.png", "MR", ""))
    fields = ("modality", "anatomy")
    assert len(scan_table([labelled, again], labelled.parent, fields).entries) == 6
    with pytest.raises(InputError, match=r"other\.csv, row 2: names the same image as row 6 of .*table\.csv"):
        scan_table([labelled, other], labelled.parent, fields)


def test_paths_with_backslashes_are_those_of_windows(labelled):
    table = write(labelled.parent / "windows.csv", ("path", "modality"), (".\\b\\4.png", "CT"))
    assert [entry.source for entry in scan_table([table], labelled.parent, ("modality",)).entries] == ["b/4.png"]


def test_a_table_without_any_value_in_its_fields_is_an_error(labelled, tmp_path):
    table = write(
        labelled.parent / "bare.csv", ("path", "modality", "view"), ("b/4.png", "", ""), ("b/5.png", "", "")
    )
    with pytest.raises(
        InputError, match="no image in .* has a value of modality: name other fields with `fields`"
    ):
        build(table, tmp_path / "set", BuildOptions(**SMALL))


cells = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zs", "Zl", "Zp", "Cf", "Cn", "Co")), max_size=6)


@given(rows=st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=6), bom=st.booleans())
def test_what_a_csv_writer_wrote_is_read_back(rows, bom, tmp_path_factory):
    root = tmp_path_factory.mktemp("any")
    text = io.StringIO()
    table = [(f"{number}.png", *row) for number, row in enumerate(rows)]
    csv.writer(text).writerows([("path", "modality", "anatomy", "class"), *table])
    (root / "t.csv").write_text(text.getvalue(), "utf-8-sig" if bom else "utf-8")
    for path, *_ in table:
        (root / path).touch()
    found = scan_table([root / "t.csv"], root, ("modality", "anatomy"))
    for entry, (path, modality, anatomy, name) in zip(found.entries, table, strict=True):
        fields = {"modality": modality, "anatomy": anatomy}
        assert entry.source == path
        assert entry.fields == {field: value for field, value in fields.items() if value}
        assert entry.category == (name or f"{modality or 'unknown'}/{anatomy or 'unknown'}")


WRONG = [
    ("", r"t\.csv, row 1: there is no column path among none"),
    ("file;modality\na.png;CT\n", r"t\.csv, row 1: there is no column path among file;modality: .* by commas"),
    ("path,view,view\na.png,x,y\n", r"t\.csv, row 1: there are two columns view"),
    ("path,modality\na.png\n", r"t\.csv, row 2: has 1 cells, and the first row 2"),
    ("path,modality\na.png,CT\n\n/etc/a.png,CT\n", r"t\.csv, row 4: its path must be one within"),
    ("path,modality\n../a.png,CT\n", r"t\.csv, row 2: its path must be one within .*, without \.\."),
    ("path,modality\nC:\\a.png,CT\n", r"t\.csv, row 2: its path must be one within"),
    ("path,modality\n,CT\n", r"t\.csv, row 2: its path must be one within"),
    ('path,modality\n"a.png,CT\n', r"t\.csv, row 2: is not valid CSV: unexpected end of data"),
    ("path,modality\na.png,caf\xe9\n", r"t\.csv is not UTF-8 text: save it as CSV in UTF-8"),
    ("path,label\na.png,x\n", r"t\.csv, row 2: its path names no modality and anatomy: add columns of labels"),
    (
        "path,label\nCT/x/a.png,x\n",
        r"t\.csv, row 2: CT/x names no modality and anatomy: name the anatomy with `anatomy=CT/x=abd`",
    ),
    (
        "path,modality\nb.png,CT\n",
        r"t\.csv, row 2: its image, b\.png, is not in .* \(1 of 1 images are missing\)",
    ),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_table_that_cannot_be_used_is_named_with_its_row(text, message, tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "t.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError, match=message) as caught:
        build(tmp_path / "t.csv", tmp_path / "set", BuildOptions(**SMALL))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"fields": "modality,vew"},
            r"`fields=vew`: .*table\.csv has no such field, but modality, anatomy, view, l",
        ),
        ({"fields": "path"}, r"`fields=path`: it identifies"),
        ({"require": "view"}, r"`require=view`: it is none of the label fields modality, anatomy"),
        (
            {"anatomy": ("US/x=abd",)},
            r"`anatomy` is for labels from folders, and .*table\.csv has columns of labels: rename values with `map`",
        ),
        ({"table": ("none.csv",)}, r"none\.csv cannot be read: No such file"),
        ({"map": "none.csv"}, r"none\.csv cannot be read: No such file"),
        ({"map": "field,from\nview,x\n"}, r"map\.csv, row 1: its columns must be field,from,to, not field, from"),
        ({"map": "field,from,to\nmodality,CT\n"}, r"map\.csv, row 2: has 2 cells, not 3: field,from,to"),
        (
            {"map": "field,from,to\nview,PA,AP\n"},
            r"map\.csv, row 2: there is no field view: name one of modality, an",
        ),
        ({"map": "field,from,to\nmodality,,AP\n"}, r"map\.csv, row 2: names no value to change"),
        (
            {"map": "field,from,to\nmodality,CR,XR\n\nmodality,CR,DX\n"},
            r"map\.csv, row 4: gives modality CR another name than a row before: keep one",
        ),
    ],
)
def test_options_that_do_not_fit_a_table_are_named(options, message, labelled, tmp_path):
    if "\n" in (text := options.get("map", "")):
        (tmp_path / "map.csv").write_text(text)
        options = {"map": tmp_path / "map.csv"}
    with pytest.raises(InputError, match=message) as caught:
        build(labelled, tmp_path / "set", BuildOptions(**options, **SMALL))
    assert "\n" not in str(caught.value)


def test_tables_without_a_field_that_the_first_one_has_are_named(labelled, tmp_path):
    other = write(labelled.parent / "other.csv", ("path", "modality"), ("b/4.png", "CT"))
    with pytest.raises(InputError, match=r"other\.csv, row 1: there is no column anatomy among path, modality"):
        build(labelled, tmp_path / "set", BuildOptions(table=(str(other),), **SMALL))


def test_every_ultrasound_class_of_radimagenet_has_its_anatomy_in_the_table(radimagenet):
    shipped = {folder[3:]: anatomy for folder, modality, anatomy in radimagenet if modality == "US"}
    assert shipped == RADIMAGENET_US
