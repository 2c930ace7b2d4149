"""DICOM files: what their headers say of an image, and their frames as grey pixels.

A header's text never leaves these functions but for the words that `terms` looks up, nor does a message of a library
that read it: reasons are of our own words. pydicom is imported where it is needed, never for other archives.

U different stored values.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shard_builder.image import MAX_BYTES, MAX_PIXELS, ImageError, silenced
from shard_builder.scan import Names
from shard_builder.terms import KEYWORDS, NO_IMAGES, label_values

if TYPE_CHECKING:
    from pydicom import Dataset

MAX_FRAME, MAX_DEEP = 2**27, 2**25  # bytes of a decoded frame, and of one whose values have over 16 bits
ROWS = 2**20  # pixels that are turned to grey at a time

PERCENTILES = (0.5, 99.5)
"""Values that become black and white in a file without a window."""

DECODERS = {
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG baseline
    "1.2.840.10008.1.2.4.51": "pillow",  # JPEG extended, of 8 bits
    "1.2.840.10008.1.2.4.57": "gdcm",  # lossless JPEG
    "1.2.840.10008.1.2.4.70": "gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",  # JPEG-LS
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg",  # high-throughput JPEG 2000
    "1.2.840.10008.1.2.4.202": "pylibjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg",
    "1.2.840.10008.1.2.5": "pydicom",  # run lengths
}
"""pydicom's plugin for each compression: one, so that pixels do not depend on what else is installed.

Damaged data makes other choices abort the process: gdcm on JPEG-LS, pylibjpeg on run lengths.
"""

CODESTREAMS = {syntax for syntax, plugin in DECODERS.items() if plugin != "pydicom"}
"""The compressions whose data say once more how large a frame is."""

DEFLATED = "1.2.840.10008.1.2.1.99"
_FUNCTIONAL_GROUPS = [0x52009229, 0x52009230]  # shared, and per frame


@dataclass(frozen=True, slots=True)
class Header:
    """What is read of a file before its pixels: its frames, whether text is burned in, the values of label fields, and
    the fields whose text is in no vocabulary.
    """

    frames: int
    burned_in: bool
    values: Mapping[str, str]
    unknown: Sequence[str]


def is_dicom(path: Path) -> bool:
    """Whether the file at `path` has DICOM's mark, whatever its name."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def versions() -> list[str]:
    """The versions of what decodes, on which pixels may depend."""
    found = []
    for name in ("pydicom", "pyjpegls", "pylibjpeg-openjpeg", "python-gdcm"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return found


def read_headers(
    root: Path, files: Sequence[str], fields: Sequence[str] = (), names: Names | None = None
) -> list[Header | str]:
    """What the headers of `files` in the folder `root` say of `fields`, or the reason why a file holds no image.

    For `names` see `terms.label_values`.
    """
    with silenced():
        return [_header(root / file, fields, names or {}) for file in files]


def referenced_files(directory: Path) -> list[str]:
    """The paths, from its folder, of the files that a DICOMDIR lists; raises `ImageError` where it is none."""
    import pydicom

    with silenced():
        try:
            records = pydicom.dcmread(directory).DirectoryRecordSequence
            listed = [each.ReferencedFileID for each in records if each.get("ReferencedFileID")]
            parts = [[each] if isinstance(each, str) else list(each) for each in listed]
            if any("/" in name or name == ".." for each in parts for name in each):
                raise ValueError  # they lead out of its folder
            return ["/".join(each) for each in parts]
        except Exception:
            raise ImageError("no DICOM directory") from None


def decode(path: Path, frame: int) -> NDArray[np.uint8]:
    """A frame of the DICOM file `path`, counted from 0, as grey pixels (height, width) uint8.

    Grey values pass the file's modality LUT or rescaling, then its VOI LUT or its first window; where it has no
    usable one, its percentiles become black and white, and values of 8 bits stay as they are. MONOCHROME1 is
    inverted, colour becomes luma. Raises `ImageError` with the reason where the frame cannot be decoded.
    """
    with silenced():
        try:
            return _grey(path, frame)
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # damaged files raise whatever pydicom or a decoder stumbles over
            if isinstance(error, OSError) and error.errno is not None:
                raise ImageError(f"cannot be read: {error.strerror}") from None
            reasons = {
                "not supported": "in a compression that is not read",
                "not a transfer syntax": "in a compression that is not read",
                "does not support": "in a compression that is not read",
                "missing dependencies": "in a compression that is not read",
                "no pixel data": "a DICOM file without an image",
            }
            said = str(error).lower()  # pydicom's errors tell these apart by their words alone
            reason = next((reason for words, reason in reasons.items() if words in said), "damaged pixel data")
            raise ImageError(reason) from None


def _header(path: Path, fields: Sequence[str], names: Names) -> Header | str:
    import pydicom

    try:
        with open(path, "rb") as file:
            start = file.read(1024)
            if start[128:132] != b"DICM":
                return "not a DICOM file"
            if DEFLATED.encode() in start and _inflated_beyond(start + file.read(), MAX_BYTES):
                return f"over {MAX_BYTES >> 20} MiB"
    except OSError as error:
        return f"cannot be read: {error.strerror or type(error).__name__}"
    keywords = [keyword for several in KEYWORDS.values() for keyword in several]
    wanted = [
        *keywords,
        "Rows",
        "Columns",
        "SamplesPerPixel",
        "BitsAllocated",
        "NumberOfFrames",
        "BurnedInAnnotation",
    ]
    try:
        found = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=wanted)
        rows, columns = int(found.get("Rows") or 0), int(found.get("Columns") or 0)
        width = max(int(found.get("BitsAllocated") or 8) // 8, 1)
        frame = rows * columns * width * max(int(found.get("SamplesPerPixel") or 1), 1)
        frames = max(int(found.get("NumberOfFrames") or 1), 1)
        burned_in = str(found.get("BurnedInAnnotation") or "").strip().upper() == "YES"
        texts = {
            field: next((str(found[name].value) for name in several if name in found and found[name].value), "")
            for field, several in KEYWORDS.items()
        }
        values, unknown = label_values(texts, fields, names)
    except MemoryError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            return f"cannot be read: {error.strerror}"
        return "damaged DICOM header"
    if not (rows and columns):
        return "a DICOM file without an image"
    if texts["modality"].strip() in NO_IMAGES:
        return "a segmentation or dose, no image"
    if rows * columns > MAX_PIXELS:
        return f"declares over {MAX_PIXELS:,} pixels"
    if frame > (most := MAX_FRAME if width <= 2 else MAX_DEEP):
        return f"declares over {most >> 20} MiB a frame"
    return Header(frames, burned_in, values, unknown)


def _inflated_beyond(data: bytes, limit: int) -> bool:
    """Whether a deflated file holds more than `limit` bytes: pydicom would inflate all of it at once."""
    place = 132
    while data[place : place + 2] == b"\2\0":  # the elements of group 2, which are not deflated
        long = data[place + 4 : place + 6] in (b"OB", b"OW", b"SQ", b"UN", b"UT")
        size = data[place + 8 : place + 12] if long else data[place + 6 : place + 8]
        place += (12 if long else 8) + int.from_bytes(size, "little")
    inflating, left, total = zlib.decompressobj(-zlib.MAX_WBITS), memoryview(data)[place:], 0
    try:
        while left and not inflating.eof and total <= limit:
            total += len(inflating.decompress(left, 2**20))
            left = memoryview(inflating.unconsumed_tail)
    except zlib.error:
        pass  # damaged, as pydicom will find
    return total > limit


def _grey(path: Path, frame: int) -> NDArray[np.uint8]:
    import pydicom
    from pydicom.pixels import apply_color_lut, pixel_array

    syntax = pydicom.filereader.read_file_meta_info(path).TransferSyntaxUID
    described: Any = pydicom.Dataset()
    if syntax == DEFLATED:  # its pixels cannot be read alone
        described = pydicom.dcmread(path)
        stored = pixel_array(described, index=frame)
    elif syntax in CODESTREAMS:
        if path.stat().st_size > MAX_BYTES:
            raise ImageError(f"over {MAX_BYTES >> 20} MiB")
        described = pydicom.dcmread(path)
        _check_size(described, frame)
        stored = pixel_array(described, index=frame, decoding_plugin=DECODERS[syntax])
    else:
        stored = pixel_array(
            path,
            ds_out=described,
            specific_tags=_FUNCTIONAL_GROUPS,
            index=frame,
            decoding_plugin=DECODERS.get(syntax, ""),
        )
    kind = described.PhotometricInterpretation
    if kind == "PALETTE COLOR" or stored.ndim == 3:

        def luma(rows: NDArray[Any]) -> NDArray[Any]:
            shown, depth = rows[..., :3], described.BitsStored
            if kind == "PALETTE COLOR":
                shown = apply_color_lut(rows, described)[..., :3]
                depth = 8 * shown.dtype.itemsize
            shown = shown >> (depth - 8) if depth > 8 else shown
            return np.asarray(Image.fromarray(shown.astype(np.uint8)).convert("L"))

        return _by_rows(stored, luma)
    return _by_value(stored, _frame_elements(described, frame), inverted=kind == "MONOCHROME1")


def _check_size(described: Any, frame: int) -> None:
    """Raise `ImageError` where a compressed frame is of another size than its file says: decoders believe the frame,
    and some bytes of it can fill the memory.
    """
    from pydicom.encaps import get_frame

    data = get_frame(described.PixelData, frame, number_of_frames=int(described.get("NumberOfFrames") or 1))
    if _coded_size(data) != (described.Rows, described.Columns):
        raise ImageError("damaged pixel data")


def _coded_size(data: bytes) -> tuple[int, int] | None:
    """Height and width that a JPEG, JPEG-LS or JPEG 2000 codestream begins with."""
    if (place := data.find(b"\xff\x4f\xff\x51")) >= 0 and len(data) >= place + 24:  # SOC and SIZ (T.800, A.5.1)
        right, bottom, left, top = struct.unpack_from(">4I", data, place + 8)
        return bottom - top, right - left
    place = 2
    while len(data) >= place + 9 and data[place] == 0xFF:  # from marker to marker (T.81, B.1.1)
        marker = data[place + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):  # a start of frame
            height, width = struct.unpack_from(">2H", data, place + 5)
            return height, width
        # Another 0xFF before a marker fills up.
        place += 1 if marker == 0xFF else 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return None


def _by_rows(stored: NDArray[Any], grey: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[np.uint8]:
    """`grey` of some rows of an image after the other, so that what it needs in between takes little memory."""
    shown = np.empty(stored.shape[:2], np.uint8)
    step = max(1, ROWS // stored.shape[1])
    for top in range(0, len(stored), step):
        shown[top : top + step] = grey(stored[top : top + step])
    return shown


def _by_value(stored: NDArray[Any], elements: Any, *, inverted: bool) -> NDArray[np.uint8]:
    """Grey values to grey pixels, by way of a table: an image has far more pixels than values."""

    def levels(values_U: NDArray[Any], counts_U: NDArray[np.int64]) -> NDArray[np.uint8]:
        share_U = _share_of_white(values_U, counts_U, elements)
        return np.asarray(np.rint(255 * (1 - share_U if inverted else share_U)), np.uint8)

    if stored.dtype.itemsize > 2:
        values_U, place, counts_U = np.unique(stored, return_inverse=True, return_counts=True)
        return levels(values_U, counts_U)[place.reshape(stored.shape)]
    low, high = int(stored.min()), int(stored.max())
    step = max(1, ROWS // stored.shape[1])
    counts_U = np.zeros(high - low + 1, np.int64)
    for top in range(0, len(stored), step):
        counts_U += np.bincount(stored[top : top + step].ravel().astype(np.intp) - low, minlength=len(counts_U))
    levels_U = levels(np.arange(low, high + 1).astype(stored.dtype), counts_U)
    return _by_rows(stored, lambda rows: levels_U[rows.astype(np.intp) - low])


def _frame_elements(described: Dataset, frame: int) -> Dataset:
    """The elements that turn stored values to grey: the file's, or where these are of frames, the frame's own."""
    per_frame = described.get("PerFrameFunctionalGroupsSequence") or []
    for groups in (*(described.get("SharedFunctionalGroupsSequence") or []), *per_frame[frame : frame + 1]):
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for each in groups.get(name) or []:
                described.update(each)
    return described


def _share_of_white(stored_U: NDArray[Any], counts_U: NDArray[np.int64], elements: Any) -> NDArray[np.float64]:
    """From 0, black, to 1, white, of each of the values `stored_U`, which as many pixels have as `counts_U` says."""
    from pydicom.pixels import apply_modality_lut

    try:
        rescaled_U = apply_modality_lut(stored_U, elements)
    except MemoryError:
        raise
    except Exception:  # an unusable one
        rescaled_U = stored_U
    values_U = np.nan_to_num(rescaled_U)
    shown_U = _windowed(values_U, elements)
    as_stored = stored_U.dtype.kind == "u" and np.array_equal(rescaled_U, stored_U)
    if shown_U is None and as_stored and elements.BitsStored <= 8:
        shown_U = stored_U / (2**elements.BitsStored - 1)
    if shown_U is None:
        shown = (counts_U > 0) & ~_padding(stored_U, elements)
        inside, counts = (values_U[shown], counts_U[shown]) if shown.any() else (values_U, counts_U)
        black, white = _percentiles(inside, counts)
        if white <= black:
            black, white = inside.min(), inside.max()
        shown_U = (values_U - black) / max(white - black, np.finfo(np.float64).tiny)
    return shown_U.clip(0, 1)


def _percentiles(values_U: NDArray[Any], counts_U: NDArray[np.int64]) -> NDArray[np.float64]:
    """numpy's percentiles of each value as often as `counts_U` says."""
    order = np.argsort(values_U, kind="stable")
    values_U, last_U = values_U[order], np.cumsum(counts_U[order]) - 1  # the rank of the last of each value
    rank = np.array(PERCENTILES) / 100 * last_U[-1]
    below, above = (values_U[np.searchsorted(last_U, whole(rank))] for whole in (np.floor, np.ceil))
    return np.asarray(below + (above - below) * (rank % 1), np.float64)


def _windowed(values: NDArray[Any], elements: Any) -> NDArray[np.float64] | None:
    """`values` through the VOI LUT or the first window, or none where there is no usable one."""
    from pydicom.pixels import apply_voi_lut

    try:
        if elements.get("VOILUTSequence"):
            entries, first = elements.VOILUTSequence[0].LUTDescriptor[:2]
            values = np.rint(values).astype(np.int64)
            out = apply_voi_lut(np.arange(first, first + (entries or 2**16)), elements)
            black, white = float(out.min()), float(out.max())
        elif elements.get("WindowCenter") is not None and elements.get("WindowWidth") is not None:
            black, white = apply_voi_lut(np.array([-np.inf, np.inf]), elements)
        else:
            return None
        shown = (apply_voi_lut(values, elements) - black) / (white - black)
    except MemoryError:
        raise
    except Exception:  # an unusable one
        return None
    return shown if np.isfinite(shown).all() else None


def _padding(stored: NDArray[Any], elements: Any) -> NDArray[np.bool_]:
    """Which of the values `stored` only fill up the picture."""
    first = elements.get("PixelPaddingValue")
    if first is None:
        return np.zeros(stored.shape, bool)
    low, high = sorted((first, elements.get("PixelPaddingRangeLimit", first)))
    return (stored >= low) & (stored <= high)
