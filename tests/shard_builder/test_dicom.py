"""DICOM files: their labels, their grey values against arithmetic, and those that cannot be packed."""

import errno
import hashlib
import hmac
import io
import json
import random
import re
import shutil
import stat
import struct
import subprocess
import sys
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_files
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from shard_builder import dicom, dicom_pixels, terms
from shard_builder.build import build
from shard_builder.image import ImageError, stretch
from shard_builder.manifest import Manifest
from shard_builder.options import BuildOptions
from shard_builder.pseudonym import load_key
from shard_builder.settings import InputError

pytestmark = pytest.mark.filterwarnings("ignore:Invalid value for VR:UserWarning")  # as some are meant
SMALL = {"size": 16, "workers": 1, "per_class": 0, "duplicates": "keep"}
RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16  # 12 bits
CT = "1.2.840.10008.5.1.4.1.1.2"


def dataset(pixels=RAMP, **elements):
    """A CT image with these pixels, grey, colour or of several frames, and further elements."""
    found = pydicom.Dataset()
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.SOPClassUID, found.SOPInstanceUID = CT, generate_uid()
    found.Modality, found.BodyPartExamined = "CT", "CHEST"
    colour = pixels.shape[-1] == 3
    found.Rows, found.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    found.SamplesPerPixel = 3 if colour else 1
    found.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        found.PlanarConfiguration = 0
    if pixels.ndim - colour == 3:
        found.NumberOfFrames = len(pixels)
    found.BitsAllocated = 8 * pixels.dtype.itemsize
    found.BitsStored = elements.pop("BitsStored", 12 if found.BitsAllocated == 16 else found.BitsAllocated)
    found.HighBit = found.BitsStored - 1
    found.PixelRepresentation = int(pixels.dtype.kind == "i")
    found.PixelData = pixels.tobytes()
    for name, value in elements.items():
        setattr(found, name, value)
    return found


def save(path, *arguments, **elements):
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset(*arguments, **elements).save_as(path, enforce_file_format=True)
    return path


def shown(tmp_path, *arguments, frame=0, **elements):
    """The grey pixels of one file on a canvas of its own size."""
    return stretch(dicom_pixels.decode(save(tmp_path / "x", *arguments, **elements), frame), 16)


def rounded(share):
    return np.rint(255 * np.clip(share, 0, 1)).astype(int)


# Grey values.


@pytest.mark.parametrize(("centre", "width"), [(2000, 1000), (0, 4096), (4000, 2), (1024.5, 333.3)])
def test_a_window_is_the_standards_formula(tmp_path, centre, width):
    # PS3.3, C.11.2.1.2.1
    values = RAMP.astype(float) - 1024
    expected = (values - (centre - 0.5)) / (width - 1) + 0.5
    found = shown(tmp_path, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=centre, WindowWidth=width)
    assert np.abs(found.astype(int) - rounded(expected)).max() <= 1


def test_other_window_functions_are_the_standards(tmp_path):
    window = {"WindowCenter": 2000, "WindowWidth": 900}
    exact = shown(tmp_path, VOILUTFunction="LINEAR_EXACT", **window)
    assert np.abs(exact.astype(int) - rounded((RAMP - 2000.0) / 900 + 0.5)).max() <= 1
    sigmoid = shown(tmp_path, VOILUTFunction="SIGMOID", **window)
    assert np.abs(sigmoid.astype(int) - rounded(1 / (1 + np.exp(-4 * (RAMP - 2000.0) / 900)))).max() <= 1


def test_of_many_windows_the_first_is_taken(tmp_path):
    found = shown(tmp_path, WindowCenter=[2000, 50], WindowWidth=[1000, 10])
    assert np.array_equal(found, shown(tmp_path, WindowCenter=2000, WindowWidth=1000))


def test_a_negative_slope_turns_values_around_but_not_the_window(tmp_path):
    found = shown(tmp_path, RescaleSlope=-1, RescaleIntercept=0, WindowCenter=-2000, WindowWidth=1000)
    assert np.abs(found.astype(int) - rounded((-1.0 * RAMP + 2000.5) / 999 + 0.5)).max() <= 1


def test_signed_values_are_windowed_as_they_are(tmp_path):
    signed = (RAMP.astype(np.int16) - 2048).astype(np.int16)
    found = shown(tmp_path, signed, WindowCenter=0, WindowWidth=1001)
    assert np.abs(found.astype(int) - rounded((signed + 0.5) / 1000 + 0.5)).max() <= 1


@pytest.mark.parametrize(
    "window",
    [
        {},
        {"WindowCenter": 2000},
        {"WindowCenter": 2000, "WindowWidth": 0},
        {"WindowCenter": 2000, "WindowWidth": 100, "VOILUTFunction": "CUBIC"},
    ],
    ids=["none", "half", "width 0", "unknown function"],
)
def test_without_a_usable_window_percentiles_become_black_and_white(tmp_path, window):
    values = RAMP.copy()
    values[0, :2] = 60000  # metal
    black, white = np.percentile(values, (0.5, 99.5))
    expected = rounded((values - black) / (white - black))
    assert np.abs(shown(tmp_path, values, BitsStored=16, **window).astype(int) - expected).max() <= 1


def test_padding_does_not_count_in_the_percentiles(tmp_path):
    signed = RAMP.astype(np.int16)
    signed[:8] = -2000
    black, white = np.percentile(signed[8:], (0.5, 99.5))
    found = shown(tmp_path, signed, BitsStored=16, PixelPaddingValue=-2000)
    assert np.abs(found.astype(int) - rounded((signed - black) / (white - black))).max() <= 1


def test_a_flat_image_is_black_and_no_division_by_zero(tmp_path):
    assert not shown(tmp_path, np.full((16, 16), 7, np.uint16)).any()


def test_eight_bits_without_a_window_stay_as_they_are(tmp_path):
    pixels = (RAMP // 32).astype(np.uint8)
    assert np.array_equal(shown(tmp_path, pixels), pixels)
    assert np.array_equal(shown(tmp_path, pixels, RescaleSlope=1, RescaleIntercept=0), pixels)


def test_monochrome1_is_inverted(tmp_path):
    window = {"WindowCenter": 2000, "WindowWidth": 1000}
    white = shown(tmp_path, PhotometricInterpretation="MONOCHROME1", **window)
    assert np.abs(255 - white.astype(int) - shown(tmp_path, **window)).max() <= 1


def lut(first, data, bits=16):
    item = pydicom.Dataset()
    item.LUTDescriptor, item.LUTData = [len(data), first, bits], np.asarray(data).astype("<u2").tobytes()
    return pydicom.Sequence([item])


def test_a_modality_lut_comes_before_the_window(tmp_path):
    table = np.linspace(3000, 1000, 4096).astype(int)
    found = shown(tmp_path, ModalityLUTSequence=lut(0, table), WindowCenter=2000, WindowWidth=1001)
    assert np.abs(found.astype(int) - rounded((table[RAMP] - 1999.5) / 1000 + 0.5)).max() <= 1


@pytest.mark.parametrize("bits", [16, 12])
def test_a_voi_lut_comes_before_a_window_and_its_own_range_is_black_to_white(tmp_path, bits):
    table = (np.arange(1000) ** 2 // 250).clip(0, 4000)
    found = shown(tmp_path, VOILUTSequence=lut(500, table, bits), WindowCenter=1, WindowWidth=2)
    expected = rounded(table[np.clip(RAMP.astype(int) - 500, 0, 999)] / table.max())
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_the_frames_of_an_enhanced_file_have_windows_of_their_own(tmp_path):
    def groups(**elements):
        item, group = pydicom.Dataset(), pydicom.Dataset()
        for name, value in elements.items():
            setattr(item, name, value)
        kind = "FrameVOILUTSequence" if "WindowCenter" in elements else "PixelValueTransformationSequence"
        setattr(group, kind, [item])
        return group

    elements = {
        "SharedFunctionalGroupsSequence": [groups(RescaleSlope=2, RescaleIntercept=-1000)],
        "PerFrameFunctionalGroupsSequence": [groups(WindowCenter=c, WindowWidth=1001) for c in (1000, 3000)],
    }
    for frame, centre in ((0, 1000), (1, 3000)):
        found = shown(tmp_path, np.stack([RAMP, RAMP]), frame=frame, **elements)
        expected = rounded((2.0 * RAMP - 1000 - (centre - 0.5)) / 1000 + 0.5)
        assert np.abs(found.astype(int) - expected).max() <= 1


def test_colour_becomes_luma(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    expected = np.asarray(Image.fromarray(colour).convert("L"))
    assert np.array_equal(shown(tmp_path, colour), expected)
    deep = shown(tmp_path, colour.astype(np.uint16) * 257, BitsStored=16)
    assert np.array_equal(deep, expected)


def test_a_palette_is_looked_up(tmp_path):
    generator, elements = np.random.default_rng(0), {"PhotometricInterpretation": "PALETTE COLOR"}
    tables = [generator.integers(0, 65536, 256).astype(np.uint16) for _ in range(3)]
    for name, table in zip(("Red", "Green", "Blue"), tables, strict=True):
        elements[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        elements[f"{name}PaletteColorLookupTableData"] = table.tobytes()
    pixels = generator.integers(0, 256, (16, 16), np.uint8)
    colour = np.stack([table[pixels] >> 8 for table in tables], -1).astype(np.uint8)
    assert np.array_equal(shown(tmp_path, pixels, **elements), np.asarray(Image.fromarray(colour).convert("L")))


def test_lossless_compressions_give_the_pixels_of_the_uncompressed_file():
    folder = Path(pydicom.data.get_testdata_file("MR_small.dcm")).parent
    plain = stretch(dicom_pixels.decode(folder / "MR_small.dcm", 0), 64)
    others = ("RLE", "bigendian", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded")
    for name in others:
        assert np.array_equal(stretch(dicom_pixels.decode(folder / f"MR_small_{name}.dcm", 0), 64), plain), name


# Labels, frames and what is left out.


def metadata_of(folder):
    """The metadata of all samples, and their pixels, by the name of the source."""
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            read = {each.name: tar.extractfile(each).read() for each in tar}
        for name, data in read.items():
            if name.endswith(".json"):
                metadata = json.loads(data)
                pixels = np.asarray(Image.open(io.BytesIO(read[name.replace("json", "png")])))
                found[metadata["source"]] = (metadata, pixels)
    return found


def hashed(key, path):
    digest = hmac.new(bytes.fromhex(key.read_text()), str(path).encode(), hashlib.sha256)
    return digest.hexdigest()[:32]


def test_files_are_found_by_their_mark_whatever_their_name(tmp_path):
    for name in ("IM0001", "series/a.dcm", "series/IMG.1.2.3", "b.ima"):
        save(tmp_path / "study" / name)
    (tmp_path / "study/readme.txt").write_text("a CD")
    build(tmp_path / "study", tmp_path / "set", BuildOptions(**SMALL))
    found = Manifest.load(tmp_path / "set")
    assert (found.samples, found.classes, found.options["source"]["form"]) == (4, ["CT/chest"], "dicom")
    assert [(each.source, each.reason) for each in found.rejected] == [
        (hashed(tmp_path / "set.key", "readme.txt"), "not a DICOM file")
    ]


def test_a_folder_is_what_most_of_its_files_are_and_many_of_either_are_refused(tmp_path):
    source = tmp_path / "in"
    save(source / "CT/lung/x/stray.dcm")
    for number in range(12):
        Image.fromarray((RAMP // 16).astype(np.uint8)).save(source / f"CT/lung/x/{number}.png")
    tree = build(source, tmp_path / "tree", BuildOptions(**SMALL)).manifest
    assert (tree.options["source"]["form"], tree.samples, tree.rejected) == ("tree", 12, [])
    # Previews beside patients' files: folder names must not become labels.
    save(source / "CT/lung/x/another")
    with pytest.raises(
        InputError, match="holds DICOM files among its PNG or JPEG images: shard each from a folder of its own"
    ):
        build(source, tmp_path / "mixed", BuildOptions(**SMALL))
    # The content of a file decides, not its name.
    for number in range(6):
        save(source / f"CT/lung/x/{number}.png")
    files = build(source, tmp_path / "files", BuildOptions(**SMALL)).manifest
    assert (files.options["source"]["form"], files.samples) == ("dicom", 8)
    assert Counter(each.reason for each in files.rejected) == {"not a DICOM file": 6}


def test_a_set_and_its_key_within_their_own_source_are_no_part_of_it(tmp_path, monkeypatch):
    for number in range(3):
        save(tmp_path / f"series/{number}", RAMP + number)
    monkeypatch.chdir(tmp_path)
    first = build(Path(), Path("shards"), BuildOptions(**SMALL)).manifest
    assert (first.samples, first.rejected) == (3, [])
    assert build(Path(), Path("shards"), BuildOptions(**SMALL), overwrite=True).manifest == first


def test_a_key_within_the_set_is_refused_before_anything_is_written(tmp_path):
    save(tmp_path / "in/x")
    with pytest.raises(
        InputError, match="`key=.*my.key` lies in .*set, which is replaced as a whole: keep it elsewhere"
    ):
        build(tmp_path / "in", tmp_path / "set", BuildOptions(**SMALL, key=tmp_path / "set/my.key"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_key_is_made_once_however_many_ask_for_it(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        for number in range(20):
            keys = set(pool.map(load_key, [tmp_path / f"{number}.key"] * 8))
            assert len(keys) == 1
    assert all(path.stat().st_mode & 0o77 == 0 for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 20


def test_a_dicomdir_names_the_files_that_are_packed(tmp_path):
    folder = Path(pydicom.data.get_testdata_file("dicomdirtests/DICOMDIR")).parent
    shutil.copytree(folder, tmp_path / "disc")
    for name in ("98892003", "98892001", "77654033"):
        shutil.rmtree(tmp_path / "disc" / name, ignore_errors=True)
    listed = [
        "/".join(record.ReferencedFileID)
        for record in pydicom.dcmread(tmp_path / "disc/DICOMDIR").DirectoryRecordSequence
        if "ReferencedFileID" in record
    ]
    for path in listed[:-2]:
        save(tmp_path / "disc" / path)
    found = build(tmp_path / "disc/DICOMDIR", tmp_path / "set", BuildOptions(**SMALL)).manifest
    assert found.samples == len(listed) - 2
    reason = "cannot be read: No such file or directory"
    assert {each.source: each.reason for each in found.rejected} == {
        hashed(tmp_path / "set.key", path): reason for path in listed[-2:]
    }
    (tmp_path / "DICOMDIR").write_text("no directory")
    with pytest.raises(InputError, match="DICOMDIR is not a DICOM directory"):
        build(tmp_path / "DICOMDIR", tmp_path / "other", BuildOptions(**SMALL))


def test_a_directory_cannot_lead_out_of_its_folder(tmp_path):
    directory = dataset()
    record = pydicom.Dataset()
    record.ReferencedFileID = ["..", "outside"]
    directory.DirectoryRecordSequence = [record]
    (tmp_path / "disc").mkdir()
    directory.save_as(tmp_path / "disc/DICOMDIR", enforce_file_format=True)
    save(tmp_path / "outside")
    with pytest.raises(InputError, match="DICOMDIR is not a DICOM directory"):
        build(tmp_path / "disc/DICOMDIR", tmp_path / "set", BuildOptions(**SMALL))


@pytest.mark.parametrize(
    ("text", "anatomy"),
    [
        *(
            ("CHEST", "chest"),
            ("THORAX", "chest"),
            ("ABDOMENPELVIS", "abd"),
            ("CSPINE", "spine"),
            ("ANKLE", "af"),
        ),
        *(("WHOLE BODY", "wholebody"), ("Head ", "head"), ("head_neck", "headneck"), ("SHOULDER", "shoulder")),
        *(("Smith, J", None), ("", None)),
    ],
)
def test_body_parts_become_words_of_one_vocabulary(tmp_path, text, anatomy):
    save(tmp_path / "in/x", BodyPartExamined=text)
    found = build(tmp_path / "in", tmp_path / "set", BuildOptions(**SMALL)).manifest
    assert found.fields == {"modality": ["CT"], "anatomy": [anatomy] if anatomy else []}
    assert found.classes == [f"CT/{anatomy or 'unknown'}"]
    assert found.options["source"].get("unknown") == ({"anatomy": 1} if text == "Smith, J" else None)
    assert found.options["source"].get("missing") == (None if anatomy else {"anatomy": 1})


def test_no_word_means_two_regions_and_radimagenets_are_among_them():
    words = [word for terms_ in terms._REGIONS.values() for word in terms_.split()]
    assert len(words) == len(set(words))
    assert all(word == terms.plain(word) for word in words)
    radimagenet = {"abd", "af", "brain", "hip", "knee", "lung", "shoulder", "spine", "thyroid"}
    assert radimagenet <= set(terms._REGIONS)


def test_a_value_map_adds_what_the_vocabulary_lacks(tmp_path):
    for number, (modality, text) in enumerate(
        (("CR", "CHEST"), ("DX", "Brust, re."), ("DX", "THORAX"), ("CT", "X"))
    ):
        save(tmp_path / f"in/{number}", Modality=modality, BodyPartExamined=text)
    names = tmp_path / "names.csv"
    names.write_text(
        "field,from,to\nmodality,CR,XR\nmodality,dx,XR\nanatomy,brust re.,lung\nanatomy,chest,lung\n"
    )
    names.write_text(names.read_text().replace("brust re.", '"Brust, re."'))
    found = build(tmp_path / "in", tmp_path / "set", BuildOptions(map=names, **SMALL)).manifest
    assert found.fields == {"modality": ["CT", "XR"], "anatomy": ["lung"]}
    assert found.options["source"]["unknown"] == {"anatomy": 1}
    assert b"Brust" not in b"".join(path.read_bytes() for path in (tmp_path / "set").iterdir())


def test_laterality_and_view_are_fields_for_those_who_ask(tmp_path):
    save(tmp_path / "in/a", Modality="MG", BodyPartExamined="BREAST", ImageLaterality="L", ViewPosition="MLO")
    save(tmp_path / "in/b", Modality="DX", Laterality="R", ViewPosition="ODD")
    options = BuildOptions(fields="modality,laterality,view", **SMALL)
    found = build(tmp_path / "in", tmp_path / "set", options).manifest
    assert found.fields == {"modality": ["DX", "MG"], "laterality": ["L", "R"], "view": ["MLO"]}
    assert found.classes == ["DX/R/unknown", "MG/L/MLO"]
    with pytest.raises(
        InputError, match="`fields=device`: a DICOM file has no such field, but modality, anatomy, l"
    ):
        build(tmp_path / "in", tmp_path / "other", BuildOptions(fields="device", **SMALL))
    with pytest.raises(InputError, match="`anatomy` is for labels from folders, and DICOM files have their own"):
        build(tmp_path / "in", tmp_path / "other", BuildOptions(anatomy=("a/b=abd",), **SMALL))


@pytest.mark.parametrize(
    ("frames", "expected"), [(1, [5]), (2, [2, 7]), (3, [1, 5, 8]), (10, range(10)), (99, range(10))]
)
def test_frames_are_taken_evenly_and_one_from_the_middle(tmp_path, frames, expected):
    many = np.stack([np.full((16, 16), 20 * number, np.uint8) for number in range(10)])
    many[:, 8:] += 1  # a frame of one grey value would be left out
    save(tmp_path / "in/x", many)
    build(tmp_path / "in", tmp_path / "set", BuildOptions(frames=frames, **SMALL))
    name = hashed(tmp_path / "set.key", "x")
    found = {source: int(pixels[0, 0]) for source, (_, pixels) in metadata_of(tmp_path / "set").items()}
    assert found == {f"{name}-{frame}": 20 * frame for frame in expected}


def test_files_with_burned_in_text_are_left_out_unless_asked_for(tmp_path):
    save(tmp_path / "in/a", BurnedInAnnotation="YES")
    save(tmp_path / "in/b", BurnedInAnnotation="NO")
    found = build(tmp_path / "in", tmp_path / "set", BuildOptions(**SMALL)).manifest
    reason = "text burned into its pixels: --allow-burned-in takes it"
    assert [(each.source, each.reason) for each in found.rejected] == [
        (hashed(tmp_path / "set.key", "a"), reason)
    ]
    assert (
        build(tmp_path / "in", tmp_path / "all", BuildOptions(allow_burned_in=True, **SMALL)).manifest.samples
        == 2
    )


def test_a_table_gives_dicom_files_their_labels_and_their_names_stay_hidden(tmp_path):
    save(tmp_path / "in/Smith^John", BodyPartExamined="HEAD")
    save(tmp_path / "in/Smith^Jane.dcm", BurnedInAnnotation="YES")
    Image.fromarray((RAMP // 16).astype(np.uint8)).save(tmp_path / "in/c.png")
    rows = (
        "path,modality,anatomy,class",
        "Smith^John,MR,brain,glioma",
        "c.png,MR,brain,none",
        "Smith^Jane.dcm,MR,,",
    )
    (tmp_path / "t.csv").write_text("\n".join(rows))
    table = (str(tmp_path / "t.csv"),)
    found = build(tmp_path / "in", tmp_path / "set", BuildOptions(table=table, **SMALL)).manifest
    name = hashed(tmp_path / "set.key", "Smith^John")
    labels = {source: metadata["class"] for source, (metadata, _) in metadata_of(tmp_path / "set").items()}
    assert labels == {name: "glioma", "c.png": "none"}
    assert [each.source for each in found.rejected] == [hashed(tmp_path / "set.key", "Smith^Jane.dcm")]
    (tmp_path / "in/Smith^John").unlink()
    with pytest.raises(InputError, match=r"t\.csv, row 2: its image is not in") as caught:
        build(tmp_path / "in", tmp_path / "other", BuildOptions(table=table, **SMALL))
    assert "Smith" not in str(caught.value).replace(str(tmp_path), "")


def test_the_same_key_gives_the_same_bytes_with_any_number_of_workers(tmp_path, monkeypatch):
    monkeypatch.setattr("shard_builder.source.CHUNK", 3)
    monkeypatch.setattr("shard_builder.pack.CHUNK", 3)
    for number in range(8):
        save(tmp_path / f"in/{number}", np.roll(RAMP, number))
    key = tmp_path / "keys/mine"
    for name, workers in (("one", 1), ("two", 2)):
        build(tmp_path / "in", tmp_path / name, BuildOptions(key=key, **{**SMALL, "workers": workers}))
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two")
    )
    assert first == second
    assert not build(tmp_path / "in", tmp_path / "one", BuildOptions(key=key, **SMALL)).built
    build(tmp_path / "in", tmp_path / "three", BuildOptions(**SMALL))
    assert not set(metadata_of(tmp_path / "one")) & set(metadata_of(tmp_path / "three"))
    (tmp_path / "bad").write_text("short")
    with pytest.raises(
        InputError, match="bad is not a key of 64 hexadecimal digits: choose another file with `key`"
    ):
        build(tmp_path / "in", tmp_path / "four", BuildOptions(key=tmp_path / "bad", **SMALL))


def test_every_file_that_pydicom_ships_is_packed_or_listed_with_its_reason(tmp_path):
    root = Path(pydicom.data.__file__).parent
    assert get_testdata_files("MR_small.dcm")
    found = build(root, tmp_path / "set", BuildOptions(frames=2, **{**SMALL, "workers": 2})).manifest
    names = {hashed(tmp_path / "set.key", path.relative_to(root).as_posix()): path for path in root.rglob("*")}
    files = {name: path for name, path in names.items() if path.is_file() and "__pycache__" not in path.parts}
    packed = metadata_of(tmp_path / "set")
    accounted = Counter({name.partition("-")[0] for name in packed})
    accounted.update({each.source.partition("-")[0] for each in found.rejected})
    assert {name for name in accounted if name in files} == set(files)
    assert set(accounted.values()) == {1}
    for name, (metadata, _) in packed.items():
        header = pydicom.dcmread(files[name.partition("-")[0]], stop_before_pixels=True)
        assert metadata["fields"].get("modality") == header.get("Modality")
        known = {"CSPINE": "spine", "HEAD": "head", "ABDOMEN": "abd", "WHOLE BODY": "wholebody"}
        assert metadata["fields"].get("anatomy") == known.get(header.get("BodyPartExamined"))
    reasons = {files[each.source.partition("-")[0]].name: each.reason for each in found.rejected}
    assert reasons["MR_truncated.dcm"] == "damaged pixel data"
    assert reasons["JPGExtended.dcm"] == "in a compression that is not read"
    assert reasons["rtdose.dcm"] == "a segmentation or dose, no image"
    assert reasons["rtplan.dcm"] == reasons["DICOMDIR"] == "a DICOM file without an image"
    assert reasons["README.txt"] == "not a DICOM file"


def test_no_cut_or_flipped_file_does_anything_but_decode_or_give_a_reason(tmp_path):
    folder = Path(pydicom.data.get_testdata_file("MR_small.dcm")).parent
    names = (
        "MR_small_RLE",
        "MR_small_jpeg_ls_lossless",
        "MR_small_jp2klossless",
        "SC_rgb_jpeg_gdcm",
        "image_dfl",
    )
    whole = [(folder / f"{name}.dcm").read_bytes() for name in names]
    generator, reasons = random.Random(0), Counter()
    for _ in range(120):
        data = bytearray(generator.choice(whole))
        if generator.random() < 0.3:
            del data[generator.randrange(132, len(data)) :]
        for _ in range(4):
            data[generator.randrange(min(132, len(data) - 1), len(data))] = generator.randrange(256)
        (tmp_path / "x").write_bytes(data)
        (header,) = dicom.read_headers(tmp_path, ["x"])
        if isinstance(header, str):
            reasons[header] += 1
            continue
        try:
            assert stretch(dicom_pixels.decode(tmp_path / "x", 0), 8).shape == (8, 8)
        except ImageError as error:
            reasons[str(error)] += 1
    assert "damaged pixel data" in reasons
    assert all(re.fullmatch("[a-zA-Z0-9 ,]+", reason) for reason in reasons)


def test_a_header_that_declares_too_much_is_refused_before_any_pixel_is_read(tmp_path):
    save(tmp_path / "x", Rows=60000, Columns=60000)
    assert dicom.read_headers(tmp_path, ["x"]) == ["declares over 67,108,864 pixels"]


def test_a_frame_that_declares_more_pixels_than_its_header_is_damaged_and_takes_no_memory(tmp_path):
    folder = Path(pydicom.data.get_testdata_file("MR_small.dcm")).parent
    headers = {
        "MR_small_jpeg_ls_lossless": (b"\xff\xf7", 5, ">HH"),
        "MR_small_jp2klossless": (b"\xff\x4f\xff\x51", 8, ">II"),
        "SC_rgb_jpeg_gdcm": (b"\xff\xc3", 5, ">HH"),
    }
    for name, (mark, distance, kind) in headers.items():
        data = bytearray((folder / f"{name}.dcm").read_bytes())
        struct.pack_into(kind, data, data.index(mark, 1000) + distance, 60000, 60000)
        (tmp_path / "x").write_bytes(data)
        assert not isinstance(dicom.read_headers(tmp_path, ["x"])[0], str)
        with pytest.raises(ImageError, match="damaged pixel data"):
            dicom_pixels.decode(tmp_path / "x", 0)


def test_a_lack_of_memory_or_an_unreadable_disk_never_passes_for_another_image(tmp_path, monkeypatch):
    save(tmp_path / "x", WindowCenter=1000, WindowWidth=500, RescaleSlope=2, RescaleIntercept=1)

    def raising(error):
        def fail(*_, **__):
            raise error

        return fail

    for name in ("apply_modality_lut", "apply_voi_lut", "pixel_array"):
        with monkeypatch.context() as patch:
            patch.setattr(f"pydicom.pixels.{name}", raising(MemoryError()))
            with pytest.raises(MemoryError):
                dicom_pixels.decode(tmp_path / "x", 0)
    unreadable = OSError(errno.EIO, "Input/output error")
    with monkeypatch.context() as patch:
        patch.setattr("pydicom.pixels.pixel_array", raising(unreadable))
        with pytest.raises(ImageError, match="cannot be read: Input/output error"):
            dicom_pixels.decode(tmp_path / "x", 0)
    with monkeypatch.context() as patch:
        patch.setattr("pydicom.dcmread", raising(unreadable))
        assert dicom.read_headers(tmp_path, ["x"]) == ["cannot be read: Input/output error"]
        patch.setattr("pydicom.dcmread", raising(MemoryError()))
        with pytest.raises(MemoryError):
            dicom.read_headers(tmp_path, ["x"])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
@pytest.mark.parametrize("bits", [16, 32])
def test_the_largest_frames_take_less_than_a_gibibyte(tmp_path, bits):
    side = {16: 8192, 32: 2896}[bits]
    save(tmp_path / "x", (np.arange(side**2, dtype=f"u{bits // 8}").reshape(side, side)), BitsStored=bits)
    assert not isinstance(dicom.read_headers(tmp_path, ["x"])[0], str)
    code = (
        "import re, sys; from pathlib import Path; from shard_builder import dicom_pixels\n"
        "print(dicom_pixels.decode(Path(sys.argv[1]), 0).mean())\n"
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], check=True, capture_output=True)
    mean, peak = map(float, done.stdout.split())
    assert 120 < mean < 135
    assert peak < 2**20  # KiB


def test_a_deflated_file_is_not_inflated_beyond_measure(tmp_path, monkeypatch):
    path = Path(pydicom.data.get_testdata_file("image_dfl.dcm"))
    assert not isinstance(dicom.read_headers(path.parent, [path.name])[0], str)
    monkeypatch.setattr(dicom, "MAX_BYTES", 2**18)
    assert dicom.read_headers(path.parent, [path.name]) == ["over 0 MiB"]


def test_archives_of_other_images_do_without_pydicom(tree, tmp_path):
    code = (
        "import sys; from pathlib import Path; from shard_builder.build import build\n"
        "from shard_builder.options import BuildOptions\n"
        f"build(Path({str(tree)!r}), Path({str(tmp_path / 'set')!r}), BuildOptions(size=8, workers=1))\n"
        "sys.exit('pydicom' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_pydicom_it_is_asked_for(tmp_path, monkeypatch):
    save(tmp_path / "in/x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="read by pydicom, which is not installed: pip install"):
        build(tmp_path / "in", tmp_path / "set", BuildOptions(**SMALL))


def test_all_real_files_are_packed_with_the_labels_of_their_headers(real_data, tmp_path):
    root = real_data / "dicom"
    files = [path for path in root.rglob("*") if path.is_file()]
    found = build(root, tmp_path / "set", BuildOptions(size=64, per_class=0)).manifest
    left_out = {each.source: each.reason for each in found.rejected}
    assert (found.samples, len(left_out)) == (len(files) - 2, 2)
    assert found.options["source"]["missing"] == {"anatomy": 24}
    packed = metadata_of(tmp_path / "set")
    known = {"CHEST": "chest", "HEAD": "head", "CSPINE": "spine"}
    for path in files:
        name, header = hashed(tmp_path / "set.key", path.relative_to(root).as_posix()), pydicom.dcmread(path)
        # The window by the standard's formula, not by pydicom.
        values = header.pixel_array * float(header.get("RescaleSlope", 1)) + float(
            header.get("RescaleIntercept", 0)
        )
        centre, width = (np.atleast_1d(header[name].value)[0] for name in ("WindowCenter", "WindowWidth"))
        share = rounded((values - (float(centre) - 0.5)) / (float(width) - 1) + 0.5)
        share = 255 - share if header.PhotometricInterpretation == "MONOCHROME1" else share
        if name in left_out:
            assert left_out[name] == f"empty: every pixel is {int(share.min())}"
            assert share.min() == share.max()  # the window lies beside all of its values
            continue
        metadata, pixels = packed[name]
        body_part = header.get("BodyPartExamined")
        fields = {"modality": header.Modality} | ({"anatomy": known[body_part]} if body_part else {})
        assert metadata["fields"] == fields
        assert metadata["class"] == f"{header.Modality}/{known.get(body_part, 'unknown')}"
        expected = Image.fromarray(share.astype(np.uint8)).resize((64, 64), Image.Resampling.BILINEAR)
        assert np.abs(pixels.astype(int) - np.asarray(expected)).max() <= 1
