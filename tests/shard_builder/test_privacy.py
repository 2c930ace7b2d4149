"""A marker in everything that a DICOM file can say about a person leaves no trace in anything that is written."""

import io
import json
import logging
import struct
import subprocess
import sys
import tarfile
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pydicom
import pytest
from pydicom.datadict import DicomDictionary, tag_for_keyword
from pydicom.uid import ExplicitVRLittleEndian

from shard_builder.build import build
from shard_builder.dicom import read_headers
from shard_builder.options import BuildOptions

MARKER, NUMBER = "ZQXMARK", "77333777"
VALUES = {
    **dict.fromkeys(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"), MARKER),
    **{"UR": f"http://{MARKER}", "UI": f"1.2.{NUMBER}", "DA": NUMBER, "TM": "101010", "AS": "077Y"},
    **{"DT": NUMBER, "DS": f"{NUMBER}.5", "IS": NUMBER},
}
"""A value with the marker for each text type (VR), also for dates and decimals."""

NEEDED = {"PhotometricInterpretation", "NumberOfFrames", "BurnedInAnnotation", "SpecificCharacterSet"}
TRACES = [MARKER.encode(), NUMBER.encode(), MARKER.lower().encode(), MARKER.encode("utf-16-le")]


def marked(depth=1):
    """A data set with every text element of DICOM's dictionary, also in sequences and private elements."""
    found = pydicom.Dataset()
    for tag, (kind, *_, keyword) in DicomDictionary.items():
        group = tag >> 16
        if group <= 2 or group == 0xFFFE or keyword in NEEDED or not keyword:
            continue
        if kind in VALUES:
            found.add_new(tag, kind, VALUES[kind])
    block = found.private_block(0x0009, f"{MARKER} CREATOR", create=True)
    block.add_new(0x01, "LO", MARKER)
    block.add_new(0x02, "OB", MARKER.encode() + b" ")
    block.add_new(0x03, "UN", MARKER.encode() + b" ")
    if depth:
        for name in ("RequestAttributesSequence", "OtherPatientIDsSequence", "ReferencedImageSequence"):
            setattr(found, name, [marked(depth - 1)])
        block.add_new(0x04, "SQ", [marked(0)])
    return found


def whole_file():
    """An image with the marker everywhere, also in its preamble, file meta information and padding."""
    found = marked()
    found.file_meta = pydicom.dataset.FileMetaDataset()
    found.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found.file_meta.ImplementationVersionName = MARKER
    found.file_meta.SourceApplicationEntityTitle = MARKER
    found.file_meta.PrivateInformationCreatorUID = VALUES["UI"]
    found.file_meta.PrivateInformation = MARKER.encode() + b" "
    found.preamble = (MARKER * 20)[:128].encode()
    image = {"Rows": 8, "Columns": 8, "SamplesPerPixel": 1, "PhotometricInterpretation": "MONOCHROME2"}
    image |= {"BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "PixelRepresentation": 0}
    image |= {"Modality": "CT", "BodyPartExamined": "CHEST", "NumberOfFrames": "1", "BurnedInAnnotation": "NO"}
    image |= {
        "PixelData": np.arange(64, dtype=np.uint16).tobytes(),
        "DataSetTrailingPadding": MARKER.encode() + b" ",
    }
    for name, value in image.items():
        setattr(found, name, value)
    file = io.BytesIO()
    found.save_as(file, enforce_file_format=True)
    return file.getvalue()


def element(keyword, kind, value):
    """The bytes of a short element."""
    tag = tag_for_keyword(keyword)
    value += b" " * (len(value) % 2)
    return struct.pack("<HH2sH", tag >> 16, tag & 0xFFFF, kind, len(value)) + value


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Whole files, files with unknown words, and damaged files, all with the marker in their names."""
    root, marker = tmp_path_factory.mktemp("in"), MARKER.encode()
    folder = root / MARKER / f"{MARKER}_{NUMBER}"
    folder.mkdir(parents=True)
    logging.disable()  # pydicom's, of values that are no dates
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = whole_file()
    logging.disable(logging.NOTSET)

    def changed(*change):
        keyword, kind, old, new = change
        assert element(keyword, kind, old) in whole
        return whole.replace(element(keyword, kind, old), element(keyword, kind, new))

    syntax = element("TransferSyntaxUID", b"UI", ExplicitVRLittleEndian.encode())[:-1] + b"\0"
    files = {
        "1.dcm": whole,
        "modality": changed("Modality", b"CS", b"CT", marker),
        "part": changed("BodyPartExamined", b"CS", b"CHEST", marker),
        "burned": changed("BurnedInAnnotation", b"CS", b"NO", b"YES"),
        "kind": changed("PhotometricInterpretation", b"CS", b"MONOCHROME2", marker),
        "seg": changed("Modality", b"CS", b"CT", b"SEG"),
        "frames": changed("NumberOfFrames", b"IS", b"1", marker),
        # A window that is no number, and undecodable text: libraries quote these in their messages.
        "window": changed("WindowCenter", b"DS", f"{NUMBER}.5".encode(), marker + b"ABC"),
        "text": changed("BodyPartExamined", b"CS", b"CHEST", b"CHE\xff\xfe"),
        "syntax": whole.replace(syntax, element("TransferSyntaxUID", b"UI", f"1.2.840.{NUMBER}.99".encode())),
        "cut": whole[: len(whole) // 2],
        "short": whole[:-80],
        "file.txt": marker,
    }
    for name, data in files.items():
        (folder / f"{MARKER}{name}").write_bytes(data)
    (root / f"{MARKER}link").symlink_to(f"{MARKER}nowhere")
    return root


def expect_no_trace(*texts):
    for text in texts:
        for trace in TRACES:
            at = text.find(trace)
            assert at < 0, text[max(at - 200, 0) : at + 200]


def everything(folder):
    """The names and bytes of all files of a set, and the headers of the members of its tars."""
    for path in sorted(folder.iterdir()):
        yield path.name.encode()
        yield path.read_bytes()
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:
                for member in tar:
                    yield repr(member.get_info()).encode()


@pytest.mark.parametrize(
    "options",
    [(), ("--workers", "1", "--duplicates", "keep", "--fields", "modality,anatomy,laterality,view", "--debug")],
)
def test_no_output_has_a_trace_of_a_header_or_of_a_path(archive, tmp_path, options):
    command = [
        sys.executable,
        "-m",
        "modan_fast",
        "shard",
        ".",
        "--out",
        str(tmp_path / "set"),
        "--per-class",
        "0",
    ]
    done = subprocess.run([*command, "--size", "8", *options], cwd=archive, capture_output=True, check=False)
    expect_no_trace(done.stdout, done.stderr, *everything(tmp_path / "set"))
    manifest = json.loads((tmp_path / "set/manifest.json").read_bytes())
    assert done.returncode == 0
    assert manifest["samples"] + len(manifest["rejected"]) == 14
    assert manifest["samples"] == (5 if options else 1)  # one image, and its duplicates
    unknown = {"modality", "anatomy"} | ({"laterality", "view"} if options else set())
    assert set(manifest["options"]["source"]["unknown"]) == unknown
    assert manifest["fields"]["modality"] == ["CT"]


@pytest.mark.parametrize("kept", ["kind", "syntax", "frames"])
def test_nor_does_a_failure(archive, tmp_path, kept):
    (tmp_path / "in").mkdir()
    (source,) = archive.rglob(f"{MARKER}{kept}")
    (tmp_path / "in" / source.name).write_bytes(source.read_bytes())
    command = [sys.executable, "-m", "modan_fast", "shard", "in", "--out", "set", "--debug"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode != 0
    assert b"no usable image in in: 1 were rejected, such as" in done.stderr
    expect_no_trace(done.stdout, done.stderr)


def test_nor_do_warnings_and_logs(archive, tmp_path, caplog, capfd, recwarn):
    caplog.set_level(logging.DEBUG)
    build(archive, tmp_path / "set", BuildOptions(size=8, workers=1, per_class=0))
    printed = capfd.readouterr()
    expect_no_trace(*(text.encode() for text in (caplog.text, printed.out, printed.err)))
    expect_no_trace(*(str(each.message).encode() for each in recwarn))


def test_nor_do_threads_that_read_at_the_same_time(tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    found, file = pydicom.dcmread(pydicom.data.get_testdata_file("MR_small.dcm")), io.BytesIO()
    found.SpecificCharacterSet = "ISO_IR 100"
    found.save_as(file)
    # A character set that pydicom quotes in a warning.
    data, known = file.getvalue(), element("SpecificCharacterSet", b"CS", b"ISO_IR 100")
    assert known in data
    for number in range(60):
        odd = element("SpecificCharacterSet", b"CS", f"{MARKER}{number:03}".encode())
        (tmp_path / f"in/{number}").parent.mkdir(exist_ok=True)
        (tmp_path / f"in/{number}").write_bytes(data.replace(known, odd))
    before = logging.root.manager.disable
    with ThreadPoolExecutor(4) as pool, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            jobs = [
                pool.submit(read_headers, tmp_path / "in", [str(number)], ("modality",)) for number in range(60)
            ]
            assert all(job.result()[0].values == {"modality": "MR"} for job in jobs)
    assert logging.root.manager.disable == before
    printed = capfd.readouterr()
    expect_no_trace(*(text.encode() for text in (caplog.text, printed.out, printed.err)))
    expect_no_trace(*(str(each.message).encode() for each in caught))


def test_the_marker_is_where_a_careless_reader_would_find_it(archive):
    path = next(archive.rglob(f"{MARKER}1.dcm"))
    data = path.read_bytes()
    assert data.count(MARKER.encode()) > 5000
    assert data.count(NUMBER.encode()) > 1000
    assert "ZQXMARK" in str(pydicom.dcmread(path).PatientName)
