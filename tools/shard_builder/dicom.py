"""DICOM files: recognise them, and read labels and frame counts from their headers. `dicom_pixels` decodes the frames.

No text of a header leaves these functions except words that `terms` looks up. Nor does any message of a library that
read it: reasons are in our own words. pydicom is imported only when DICOM files are read.
"""

from __future__ import annotations

import io
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from shard_builder.entries import ValueMap
from shard_builder.files import open_regular, read_regular
from shard_builder.image import MAX_BYTES, MAX_PIXELS, ImageError, silenced
from shard_builder.terms import KEYWORDS, NO_IMAGES, label_values

MAX_FRAME, MAX_DEEP = 2**27, 2**25  # bytes of a decoded frame, and of one with values of over 16 bits
MAX_ELEMENT = 2**16  # bytes of an element that is read: a number, or a word of a vocabulary
DEFLATED = "1.2.840.10008.1.2.1.99"

COMPONENT = r"(?!\.\.?$)[^/\\:\0]+"
"""Regular expression of a folder's or file's name in a DICOMDIR, for any system: no separator, drive or `..`."""

_ELEMENTS = [
    *(keyword for keywords in KEYWORDS.values() for keyword in keywords),
    *("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "NumberOfFrames", "BurnedInAnnotation"),
]


@dataclass(frozen=True, slots=True)
class Header:
    """What is read of a file before its pixels.

    The number of frames, whether text is burned into the pixels, the values of label fields, and the fields whose text
    is in no vocabulary.
    """

    frames: int
    burned_in: bool
    values: Mapping[str, str]
    unknown: Sequence[str]


def is_dicom(path: Path) -> bool:
    """Whether the file has DICOM's mark, whatever its name."""
    try:
        return _start(path)[128:132] == b"DICM"
    except OSError:
        return False


def read_headers(
    root: Path, files: Sequence[str], fields: Sequence[str] = (), value_map: ValueMap | None = None
) -> list[Header | str]:
    """The header of each of `files` in the folder `root`, with the values of `fields`, or why a file holds no image.

    For `value_map` see `terms.label_values`.
    """
    with silenced():
        return [_check_file(root / file) or _header(root / file, fields, value_map or {}) for file in files]


def referenced_files(directory: Path) -> list[str]:
    """The paths of the files that a DICOMDIR lists, relative to its folder; raises `ImageError` if it is none."""
    import pydicom

    with silenced():
        try:
            content = io.BytesIO(read_regular(directory, MAX_BYTES))
            records = pydicom.dcmread(content).DirectoryRecordSequence
            listed = [each.ReferencedFileID for each in records if each.get("ReferencedFileID")]
            paths = [[each] if isinstance(each, str) else list(each) for each in listed]
            if not all(re.fullmatch(COMPONENT, name) for path in paths for name in path):
                raise ValueError  # it may lead out of the folder
            return ["/".join(path) for path in paths]
        except Exception:
            raise ImageError("not a DICOM directory") from None


def _start(path: Path) -> bytes:
    """The first bytes of a file, with DICOM's mark and the name of the compression."""
    with open_regular(path) as file:
        return file.read(min(1024, os.fstat(file.fileno()).st_size))  # some files of the system have no end


def _check_file(path: Path) -> str:
    """Why pydicom cannot be given the file, or the empty text."""
    try:
        start = _start(path)
        if start[128:132] != b"DICM":
            return "not a DICOM file"
        if DEFLATED.encode() in start and _inflates_beyond(read_regular(path, MAX_BYTES), MAX_BYTES):
            return f"over {MAX_BYTES >> 20} MiB"
    except OSError as error:
        return f"cannot be read: {error.strerror or type(error).__name__}"
    return ""


def _inflates_beyond(data: bytes, limit: int) -> bool:
    """Whether a deflated file holds more than `limit` bytes: pydicom would inflate them all at once."""
    offset = 132
    while data[offset : offset + 2] == b"\2\0":  # the elements of group 2, which are not deflated
        long = data[offset + 4 : offset + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT")
        size = data[offset + 8 : offset + 12] if long else data[offset + 6 : offset + 8]
        offset += (12 if long else 8) + int.from_bytes(size, "little")
    inflating, left, total = zlib.decompressobj(-zlib.MAX_WBITS), memoryview(data)[offset:], 0
    try:
        while left and not inflating.eof and total <= limit:
            total += len(inflating.decompress(left, 2**20))
            left = memoryview(inflating.unconsumed_tail)
    except zlib.error:
        pass  # pydicom will find the damage
    return total > limit


def _header(path: Path, fields: Sequence[str], value_map: ValueMap) -> Header | str:
    import pydicom

    try:
        found = pydicom.dcmread(
            path, stop_before_pixels=True, specific_tags=list(_ELEMENTS), defer_size=MAX_ELEMENT
        )
        if any(getattr(each, "length", 0) > MAX_ELEMENT for each in found.values()):
            return "damaged DICOM header"
        rows, columns = int(found.get("Rows") or 0), int(found.get("Columns") or 0)
        width = max(int(found.get("BitsAllocated") or 8) // 8, 1)
        frame = rows * columns * width * max(int(found.get("SamplesPerPixel") or 1), 1)
        frames = max(int(found.get("NumberOfFrames") or 1), 1)
        burned_in = str(found.get("BurnedInAnnotation") or "").strip().upper() == "YES"
        texts = {
            field: next((str(found[name].value) for name in names if name in found and found[name].value), "")
            for field, names in KEYWORDS.items()
        }
        values, unknown = label_values(texts, fields, value_map)
    except MemoryError:
        raise
    except Exception as error:  # damaged files raise errors of any type
        if isinstance(error, OSError) and error.errno is not None:
            return f"cannot be read: {error.strerror}"
        return "damaged DICOM header"
    if rows < 1 or columns < 1:
        return "a DICOM file without an image"
    if texts["modality"].strip() in NO_IMAGES:
        return "a segmentation or dose, no image"
    if rows * columns > MAX_PIXELS:
        return f"declares over {MAX_PIXELS:,} pixels"
    if frame > (most := MAX_FRAME if width <= 2 else MAX_DEEP):
        return f"declares over {most >> 20} MiB a frame"
    return Header(frames, burned_in, values, unknown)
