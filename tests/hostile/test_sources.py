"""What `shard` reads: tables, DICOM files and folders from strangers."""

import csv
import io
import json
import os
import random
import socket
import struct
import tarfile

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file

from shard_builder.build import build
from shard_builder.dicom import Header, read_headers, referenced_files
from shard_builder.dicom_pixels import decode
from shard_builder.image import ImageError
from shard_builder.options import BuildOptions
from shard_builder.output import building
from shard_builder.settings import InputError, printable
from shard_builder.source import scan_source
from shard_builder.table import read_value_map
from shard_builder.terms import _VALUES
from shard_builder.workers import workers_of

SECRET = "outside.png"
TEXTS = [
    *(
        "",
        " ",
        ".",
        "..",
        "../" + SECRET,
        "x/../../" + SECRET,
        "..\\" + SECRET,
        "/etc/passwd",
        "//etc/passwd",
        "C:\\x",
    ),
    *(
        "C:x.png",
        "\\\\host\\share",
        "a\0b.png",
        "a\0/b.png",
        "\0",
        "a\nb",
        "a\rb",
        "a\tb",
        "\x1b[2J",
        "\u202egnp",
        "\ufeff",
    ),
    *(
        "x" * 300,
        "x/" * 5000,
        "x" * 131_073,
        "y" * 100_000,
        "=cmd|' /C calc'!A0",
        "<script>alert(1)</script>",
        "%s%n",
    ),
    *(
        "{0}",
        "[red]x[/]",
        "\\input{/etc/passwd}",
        "-rf",
        "~/x.png",
        "$HOME/x.png",
        "file:///etc/passwd",
        "NaN",
        "1e999",
    ),
    *("None", "null", "🦴", "à", "a/b/c/d", "CT/lung/x/0.png", "nul", "con.png", "name.dcm", "'\"", "a;b"),
]


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (12, 12), np.uint8))


def mutations(data, count, seed):
    """`count` changes of bytes."""
    generator = random.Random(seed)
    text = data.decode("latin-1")
    yield from (
        b"",
        b"\xef\xbb\xbf" + data,
        text.encode("utf-16"),
        text.encode("utf-32"),
        bytes(len(data)),
        data[::-1],
    )
    for _ in range(count):
        at, length = generator.randrange(len(data)), generator.choice([1, 1, 2, 4, 40, 400])
        some = bytes(generator.choice([0, 10, 13, 34, 44, 46, 47, 127, 128, 255]) for _ in range(length))
        yield generator.choice(
            [
                data[:at] + bytes([data[at] ^ 1 << generator.randrange(8)]) + data[at + 1 :],
                data[:at],
                data[:at] + some + data[at + length :],
                data[:at] + data[at + length :],
                data[:at] + data[at : at + length] * 3 + data[at + length :],
            ]
        )


def csv_of(rows):
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue().encode("utf-8", "surrogatepass")


ROWS = [["path", "modality", "anatomy", "class"], ["a/0.png", "CT", "lung", "x"], ["a/1.png", "MR", "hip", "y"]]


def hostile_tables():
    for row in range(len(ROWS)):
        for column in range(len(ROWS[0])):
            for text in TEXTS:
                rows = [list(each) for each in ROWS]
                rows[row][column] = text
                yield csv_of(rows)
    valid = csv_of(ROWS)
    yield from (
        valid + valid,
        valid * 1000,
        valid + b'"' * 99_999,
        valid + b"," * 10**6,
        b"," * 10**6,
        b'"' + bytes(10**6),
    )
    yield from (
        b"path," + b",".join(b"c%d" % n for n in range(200_000)),
        b"x" * 10**7,
        b"path\n" + b'"' + b"\n" * 10**6,
    )
    yield from (
        b"path,path\n",
        b"path\n",
        b"PATH,Modality\r\r\ra/0.png,CT",
        csv_of([["path"], *[["a/0.png"]] * 9]),
    )
    yield from mutations(valid, 400, seed=1)


@pytest.fixture
def images(survives, tmp_path):
    """A folder `given` with two images, and one outside, which no source may reach."""
    (tmp_path / "given/a").mkdir(parents=True)
    for number in range(2):
        picture(number).save(tmp_path / f"given/a/{number}.png")


def scanned(source, tmp_path, **options):
    """What `shard` finds in a source, before any image is decoded."""
    with workers_of(1) as workers:
        return scan_source(
            source, BuildOptions(**options), tmp_path / "set", source.parent / "key", workers, lambda *_: None
        )


def test_no_table_names_an_image_outside_its_folder(images, survives, tmp_path):
    cases = list(hostile_tables())

    def use(folder):
        scan = scanned(folder / "table.csv", tmp_path)
        for entry in scan.entries:
            assert os.path.realpath(folder / entry.file).startswith(os.path.realpath(folder) + os.sep)
            assert (folder / entry.file).is_file()
            assert printable(entry.category) == entry.category

    accepted, refused = survives(cases, lambda case, folder: (folder / "table.csv").write_bytes(case), use)
    assert len(cases) > 900
    assert accepted > 50
    assert refused > 50


def test_no_map_does_more_than_rename(survives):
    valid = csv_of([["field", "from", "to"], ["modality", "CT", "MR"], ["anatomy", "lung", ""]])
    cases = [
        csv_of([["field", "from", "to"], [*before, text, *after]])
        for text in TEXTS
        for before, after in (([], ["a", "b"]), (["modality"], ["b"]), (["modality", "a"], []))
    ]
    cases += [*mutations(valid, 400, seed=2), b"field,from,to\n" + b"modality,a,b\n" * 10_000]

    def use(folder):
        for (field, old), new in read_value_map(folder / "map.csv", ("modality", "anatomy")).items():
            assert field in ("modality", "anatomy")
            assert old
            assert isinstance(new, str)

    accepted, refused = survives(cases, lambda case, folder: (folder / "map.csv").write_bytes(case), use)
    assert len(cases) > 500
    assert min(accepted, refused) > 50


def element(tag, kind, value, length=None):
    """The bytes of an explicit little-endian element, with a length that may lie."""
    length = len(value) if length is None else length
    head = struct.pack("<HH2s", tag >> 16, tag & 0xFFFF, kind)
    return (
        head
        + (
            struct.pack("<HI", 0, length)
            if kind in (b"OB", b"OW", b"SQ", b"UN", b"UT")
            else struct.pack("<H", length & 0xFFFF)
        )
        + value
    )


def dicom_file(changes=(), *, before=b"", pixels=None, syntax=b"1.2.840.10008.1.2.1\0"):
    """A DICOM image of 4 x 4 pixels; `changes` replace elements by tag."""
    meta = element(0x00020010, b"UI", syntax)
    elements = {
        0x00080060: element(0x00080060, b"CS", b"CT"),
        0x00180015: element(0x00180015, b"CS", b"CHEST "),
        0x00280002: element(0x00280002, b"US", struct.pack("<H", 1)),
        0x00280004: element(0x00280004, b"CS", b"MONOCHROME2 "),
        0x00280008: element(0x00280008, b"IS", b"1 "),
        0x00280010: element(0x00280010, b"US", struct.pack("<H", 4)),
        0x00280011: element(0x00280011, b"US", struct.pack("<H", 4)),
        0x00280100: element(0x00280100, b"US", struct.pack("<H", 8)),
        0x00280101: element(0x00280101, b"US", struct.pack("<H", 8)),
        0x00280102: element(0x00280102, b"US", struct.pack("<H", 7)),
        0x00280103: element(0x00280103, b"US", struct.pack("<H", 0)),
        0x7FE00010: element(0x7FE00010, b"OW", bytes(range(16))) if pixels is None else pixels,
        **dict(changes),
    }
    head = bytes(128) + b"DICM" + element(0x00020000, b"UL", struct.pack("<I", len(meta))) + meta
    return head + before + b"".join(elements[tag] for tag in sorted(elements))


def hostile_dicom():
    numbers = [0, 1, 2, 3, 5, 7, 9, 16, 32, 64, 255, 4096, 8192, 65535]
    for tag in (0x00280002, 0x00280010, 0x00280011, 0x00280100, 0x00280101, 0x00280102, 0x00280103):
        for number in numbers:
            yield dicom_file({tag: element(tag, b"US", struct.pack("<H", number))})
        for number in (-1, -4, -32768):
            yield dicom_file({tag: element(tag, b"SS", struct.pack("<h", number))})
        for kind, value in (
            (b"DS", b"1e400 "),
            (b"IS", b"-4"),
            (b"IS", b"9" * 400),
            (b"FD", struct.pack("<d", np.nan)),
        ):
            yield dicom_file({tag: element(tag, kind, value)})
        yield dicom_file({tag: element(tag, b"US", struct.pack("<2H", 4, 4))})
        yield dicom_file({tag: b""})
        yield dicom_file({tag: element(tag, b"US", b"")})
        yield dicom_file({tag: element(tag, b"SQ", b"", 0xFFFFFFFF)})
    negative = {tag: element(tag, b"SS", struct.pack("<h", -4)) for tag in (0x00280010, 0x00280011)}
    yield dicom_file(negative)
    for tag, kinds in (
        (0x00080060, (b"CS", b"UT", b"UN")),
        (0x00180015, (b"CS", b"PN")),
        (0x00280004, (b"CS", b"UT")),
        (0x00280008, (b"IS", b"CS", b"DS")),
        (0x00080005, (b"CS",)),
        (0x00281050, (b"DS",)),
        (0x00281051, (b"DS",)),
        (0x00281052, (b"DS",)),
        (0x00281053, (b"DS",)),
        (0x00280120, (b"US",)),
    ):
        for kind in kinds:
            for value in (
                b"",
                b"\0\0",
                b"-1",
                b"0 ",
                b"9" * 64,
                b"1e999 ",
                b"nan ",
                b"\\" * 60_000,
                b"x" * 65_534,
                b"\xff\xfe",
                b"\x1b[2J",
                b"../x",
                b"<b>x",
                b"SEG ",
                b"2147483648",
                b"CT\\MR ",
            ):
                yield dicom_file({tag: element(tag, kind, value)})
    for length in (0xFFFFFFFF, 0xFFFFFFFE, 2**31, 2**31 - 1, 10**9, 17, 15, 0):
        for kind in (b"OW", b"OB", b"UN", b"SQ"):
            yield dicom_file(pixels=element(0x7FE00010, kind, bytes(16), length))
            yield dicom_file(before=element(0x00080001, kind, b"", length))
            yield dicom_file({0x00080060: element(0x00080060, kind, b"CT", length)})
    deep = element(0x00081140, b"SQ", b"", 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
    for depth in (10, 900, 100_000):
        yield dicom_file(before=deep * depth)
        yield dicom_file({0x52009229: element(0x52009229, b"SQ", b"", 0xFFFFFFFF) + deep[12:] + deep * depth})
    for syntax in (
        b"1.2.840.10008.1.2\0",
        b"1.2.840.10008.1.2.2\0",
        b"1.2.840.10008.1.2.5\0",
        b"1.2.840.10008.1.2.1.99",
        b"1.2.840.10008.1.2.4.50",
        b"1.2.840.10008.1.2.4.80",
        b"1.2.840.10008.1.2.4.90",
        b"",
        b"x" * 64,
    ):
        yield dicom_file(syntax=syntax)
        yield dicom_file(syntax=syntax, pixels=element(0x7FE00010, b"OB", bytes(64), 0xFFFFFFFF))
    yield from mutations(dicom_file(), 500, seed=3)
    with open(get_testdata_file("MR_small_RLE.dcm"), "rb") as file:
        yield from mutations(file.read(), 200, seed=4)
    with open(get_testdata_file("JPGExtended.dcm"), "rb") as file:
        yield from mutations(file.read(), 60, seed=5)


def test_no_dicom_file_is_more_than_an_image_or_a_reason(survives):
    cases = list(hostile_dicom())
    images = 0

    def use(folder):
        nonlocal images
        (header,) = read_headers(folder, ["x.dcm"], ("modality", "anatomy"))
        if not isinstance(header, Header):
            raise InputError(header)
        assert set(header.values.values()) <= {word for words in _VALUES.values() for word in words.values()}
        assert header.frames >= 1
        try:
            pixels = decode(folder / "x.dcm", 0)
        except ImageError as error:
            raise InputError(str(error)) from None
        assert pixels.dtype == np.uint8
        assert pixels.ndim == 2
        images += 1

    accepted, refused = survives(cases, lambda case, folder: (folder / "x.dcm").write_bytes(case), use)
    assert len(cases) > 1000
    assert images == accepted > 100
    assert refused > 100


def test_a_word_of_two_gibibytes_is_not_read(survives):
    def write(case, folder):
        head = dicom_file({0x00080060: element(0x00080060, b"UT", b"", 2**31)})
        with open(folder / "x.dcm", "wb") as file:
            file.write(head)
            file.truncate(2**31 + 10_000)  # takes no room on the disk

    def use(folder):
        assert read_headers(folder, ["x.dcm"], ("modality",)) == ["damaged DICOM header"]

    assert survives([0], write, use) == (1, 0)


def test_a_compressed_frame_of_countless_scans_is_not_decoded(tmp_path):
    with open(get_testdata_file("JPGExtended.dcm"), "rb") as file:
        found = pydicom.dcmread(file)
    assert found.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.4.51"
    picture = io.BytesIO()
    Image.new("L", (found.Columns, found.Rows), 9).save(picture, "JPEG", progressive=True)
    data = picture.getvalue()
    at = data.rindex(b"\xff\xda")
    for scans, reason in ((1, None), (101, "damaged pixel data")):
        found.PixelData = pydicom.encaps.encapsulate([data[:at] + data[at:-2] * scans + data[-2:]])
        found.BitsAllocated = found.BitsStored = 8
        found.HighBit = 7
        found.save_as(tmp_path / "x.dcm")
        if reason:
            with pytest.raises(ImageError, match=reason):
                decode(tmp_path / "x.dcm", 0)
        else:
            assert decode(tmp_path / "x.dcm", 0).shape == (found.Rows, found.Columns)


def test_the_file_that_the_cases_change_is_an_image(tmp_path):
    (tmp_path / "x.dcm").write_bytes(dicom_file())
    assert read_headers(tmp_path, ["x.dcm"], ("modality", "anatomy"))[0].values == {
        "modality": "CT",
        "anatomy": "chest",
    }
    assert decode(tmp_path / "x.dcm", 0).shape == (4, 4)


def dicomdir(names):
    """A DICOMDIR whose one record lists a file by these components."""
    found = pydicom.Dataset()
    record = pydicom.Dataset()
    record.DirectoryRecordType = "IMAGE"
    record.add_new(0x00041500, "CS", names)
    found.DirectoryRecordSequence = [record]
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    found.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    found.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    file = io.BytesIO()
    with pydicom.config.disable_value_validation():
        found.save_as(file, enforce_file_format=True)
    return file.getvalue()


OUT = [
    ["..", "x"],
    ["", "etc", "passwd"],
    ["", ""],
    ["/etc/passwd"],
    ["a", "", "..", "x"],
    ["..\\x"],
    [".", "x"],
    ["C:", "x"],
    ["C:x"],
    ["a\0b"],
    ["a", "../x"],
    ["../../x"],
    ["", "", "x"],
]


@pytest.mark.parametrize("names", OUT, ids=ascii)
def test_a_dicomdir_leads_to_no_file_outside_its_folder(tmp_path, names):
    (tmp_path / "DICOMDIR").write_bytes(dicomdir(names))
    try:
        paths = referenced_files(tmp_path / "DICOMDIR")
    except ImageError as error:
        assert str(error) == "not a DICOM directory"  # noqa: PT017
        with pytest.raises(InputError, match="is not a DICOM directory"):
            scanned(tmp_path / "DICOMDIR", tmp_path)
    else:  # the separator of components is a backslash, so some names arrive as other ones
        for path in paths:
            assert os.path.realpath(tmp_path / path).startswith(os.path.realpath(tmp_path) + os.sep)
            assert ".." not in path.split("/")


def test_no_dicomdir_does_more_than_list_files_in_its_folder(survives):
    cases = [dicomdir(names) for names in OUT]
    cases += mutations(dicomdir(["IMAGES", "IM0001"]), 500, seed=6)

    def use(folder):
        try:
            paths = referenced_files(folder / "DICOMDIR")
        except ImageError as error:
            raise InputError(str(error)) from None
        for path in paths:
            assert os.path.realpath(folder / path).startswith(os.path.realpath(folder) + os.sep)

    accepted, refused = survives(cases, lambda case, folder: (folder / "DICOMDIR").write_bytes(case), use)
    assert min(accepted, refused) > 20


def bound_socket(path):
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's path has at most 107 bytes
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(path.name)
    os.chdir(before)


SPECIAL = {"pipe": os.mkfifo, "socket": bound_socket}
SPECIAL |= {
    name: (lambda path, name=name: path.symlink_to(f"/dev/{name}")) for name in ("zero", "urandom", "tty")
}
SPECIAL |= {"kmsg": lambda path: path.symlink_to("/proc/kmsg"), "self": lambda path: path.symlink_to(path.name)}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", ["x.png", "x.dcm", "x"])
def test_pipes_and_devices_among_images_are_left_out_at_once(survives, tmp_path, name, kind):
    def write(case, folder):
        (folder / "CT/lung/x").mkdir(parents=True)
        for number in range(2):
            picture(number).save(folder / f"CT/lung/x/{number}.png")
        SPECIAL[kind](folder / "CT/lung/x" / name)

    def use(folder):
        result = build(folder / "CT/../", folder / "set", BuildOptions(size=8, workers=1))
        assert result.manifest.samples == 2
        expected = {f"CT/lung/x/{name}"} if name == "x.png" else set()
        assert {each.source for each in result.manifest.rejected} == expected

    assert survives([0], write, use) == (1, 0)


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_pipe_or_a_device_is_no_source_table_map_or_key(images, survives, kind):
    def write(case, folder):
        SPECIAL[kind](folder / "x.csv")
        (folder / "good.csv").write_bytes(csv_of(ROWS))
        (folder / "bad.dcm").write_bytes(dicom_file())

    def use(folder):
        for options in (
            {"table": (str(folder / "x.csv"),)},
            {"table": (str(folder / "good.csv"),), "map": folder / "x.csv"},
        ):
            with pytest.raises(InputError):
                build(folder, folder / "set", BuildOptions(size=8, workers=1, **options))
        build(folder / "x.csv", folder / "set", BuildOptions(size=8, workers=1))

    assert survives([0], write, use) == (0, 1)


def test_names_of_files_are_escaped_wherever_they_are_shown(tmp_path):
    odd = [
        "a\nb",
        "%s{0}$x",
        "[red]x[/]",
        "-rf",
        os.fsdecode(b"\xff\xfe"),
        "\x1b[2J\x07",
        "<img src=x onerror=alert(1)>",
        "\\input{x}&#39;",
        "=cmd()",
        "\u202egnp",
        "'\"",
        "@x",
        "\u2028",
    ]
    for number, name in enumerate(odd):
        folder = tmp_path / "in/CT" / name.replace("/", "_") / "x"
        folder.mkdir(parents=True)
        picture(number).save(folder / "0.png")
        (folder / f"{name.replace('/', '_')}.png").write_bytes(b"no image")
    seen = []
    result = build(
        tmp_path / "in", tmp_path / "set", BuildOptions(size=8, workers=1), progress=lambda *s: seen.append(s[3])
    )
    page = (tmp_path / "set/report.html").read_text("utf-8")
    texts = (
        [each.source for each in result.manifest.rejected]
        + result.manifest.labels
        + result.manifest.classes
        + seen
    )
    texts += [page.replace("\n", "")]
    with tarfile.open(tmp_path / "set/shard-000000.tar") as tar:
        texts += [
            value
            for each in tar
            if each.name.endswith("json")
            for value in map(str, json.load(tar.extractfile(each)).values())
        ]
    for text in texts:
        assert printable(text) == text
    assert len(result.manifest.rejected) == len(odd)
    assert "<img src=x" not in page
    assert "&lt;img src=x onerror" in page


@pytest.mark.parametrize("where", ["file/set", "file/deeper/set", "file/set/", "full"])
def test_an_output_that_cannot_be_written_is_one_line_of_advice(tmp_path, monkeypatch, where):
    (tmp_path / "file").write_text("kept")
    if where == "full":

        def mkdir(path, *_, **__):
            raise OSError(30, "Read-only file system", str(path))

        monkeypatch.setattr("pathlib.Path.mkdir", mkdir)
    (tmp_path / "in.csv").write_bytes(csv_of(ROWS))
    with pytest.raises(
        InputError, match=r"nothing can be written to .*cannot be made \(.*choose another folder with `out`"
    ):
        build(tmp_path / "in.csv", tmp_path / where, BuildOptions())
    assert (tmp_path / "file").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "in.csv"}


def test_a_lock_that_cannot_be_made_is_one_line_of_advice(tmp_path):
    (tmp_path / ".set.building/lock").mkdir(parents=True)
    with (
        pytest.raises(InputError, match=r"lock cannot be made \(Is a directory\); choose"),
        building(tmp_path / "set", tmp_path / "set"),
    ):
        pass


def test_the_person_at_the_screen_may_learn_which_dicom_file_was_left_out_and_no_file_does(tmp_path):
    (tmp_path / "in").mkdir()
    for number in range(3):
        (tmp_path / f"in/good{number}.dcm").write_bytes(
            dicom_file(pixels=element(0x7FE00010, b"OW", bytes(range(number, number + 16))))
        )
    (tmp_path / "in/Secret^Name.txt").write_text("a note")
    (tmp_path / "in/Secret^Cut.dcm").write_bytes(dicom_file(pixels=element(0x7FE00010, b"OW", b"\1\2", 16)))
    (tmp_path / "in/Secret^Link.dcm").symlink_to("nowhere")
    (tmp_path / "in/Secret^Part.dcm").write_bytes(dicom_file({0x00180015: b""}))
    for _ in range(2):  # also when the set exists
        result = build(tmp_path / "in", tmp_path / "set", BuildOptions(size=8, workers=1, require="anatomy"))
        found = {result.hidden[each.source]: each.reason for each in result.manifest.rejected}
        assert found.keys() >= {"Secret^Name.txt", "Secret^Link.dcm", "Secret^Part.dcm"}
        assert found["Secret^Name.txt"] == "not a DICOM file"
    assert not any(b"Secret" in path.read_bytes() for path in (tmp_path / "set").iterdir())
    assert "Secret" not in repr(result)
