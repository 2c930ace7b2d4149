"""DICOM files: what their headers say of an image, and their frames as grey pixels.

A header's text never leaves this process but for the words that `terms` looks up, nor does a message of a library
that read it: reasons are of our own words. pydicom is imported where it is needed, never for other archives.
"""

from __future__ import annotations

import logging
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shard_builder.image import MAX_BYTES, MAX_PIXELS, ImageError
from shard_builder.terms import KEYWORDS, NO_IMAGES

if TYPE_CHECKING:
    from pydicom import Dataset

PERCENTILES = (0.5, 99.5)
"""Stored values that become black and white in a file without a window."""

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

DEFLATED = "1.2.840.10008.1.2.1.99"
_FUNCTIONAL_GROUPS = [0x52009229, 0x52009230]  # shared, and per frame


@dataclass(frozen=True, slots=True)
class Header:
    """What is read of a file before its pixels: its frames, whether text is burned in, and its texts by field."""

    frames: int
    burned_in: bool
    texts: Mapping[str, str]


def is_dicom(path: Path) -> bool:
    """Whether the file at `path` has DICOM's mark, whatever its name."""
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def read_headers(root: Path, names: Sequence[str]) -> list[Header | str]:
    """The header of each of the files `names` in the folder `root`, or the reason why it holds no image."""
    with _silenced():
        return [_header(root / name) for name in names]


def referenced_files(directory: Path) -> list[str]:
    """The paths, from its folder, of the files that a DICOMDIR lists; raises `ImageError` where it is none."""
    import pydicom

    with _silenced():
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
    with _silenced():
        try:
            return np.asarray(_grey(path, frame))
        except MemoryError:
            raise ImageError("too large for the memory") from None
        except Exception as error:  # damaged files raise whatever pydicom or a decoder stumbles over
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


def _header(path: Path) -> Header | str:
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
    wanted = [*keywords, "Rows", "Columns", "NumberOfFrames", "BurnedInAnnotation"]
    try:
        found = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=wanted)
        rows, columns = int(found.get("Rows") or 0), int(found.get("Columns") or 0)
        frames = max(int(found.get("NumberOfFrames") or 1), 1)
        burned_in = str(found.get("BurnedInAnnotation") or "").strip().upper() == "YES"
        texts = {
            field: next((str(found[name].value) for name in several if name in found and found[name].value), "")
            for field, several in KEYWORDS.items()
        }
    except Exception:
        return "damaged DICOM header"
    if not (rows and columns):
        return "a DICOM file without an image"
    if texts["modality"].strip() in NO_IMAGES:
        return "a segmentation or dose, no image"
    if rows * columns > MAX_PIXELS:
        return f"declares over {MAX_PIXELS:,} pixels"
    return Header(frames, burned_in, texts)


def _inflated_beyond(data: bytes, limit: int) -> bool:
    """Whether a deflated file holds more than `limit` bytes: pydicom would inflate all of it at once."""
    meta = 144 + int.from_bytes(data[140:144], "little")  # the length of group 2 is its first element
    try:
        return len(zlib.decompressobj(-zlib.MAX_WBITS).decompress(data[meta:], limit + 1)) > limit
    except zlib.error:
        return False  # damaged, as pydicom will find


def _grey(path: Path, frame: int) -> Image.Image:
    import pydicom
    from pydicom.pixels import apply_color_lut, pixel_array

    syntax = pydicom.filereader.read_file_meta_info(path).TransferSyntaxUID
    described: Any = pydicom.Dataset()
    if syntax == DEFLATED:  # its pixels cannot be read alone
        described = pydicom.dcmread(path)
        stored = pixel_array(described, index=frame)
    else:
        stored = pixel_array(
            path,
            ds_out=described,
            specific_tags=_FUNCTIONAL_GROUPS,
            index=frame,
            decoding_plugin=DECODERS.get(syntax, ""),
        )
    kind = described.PhotometricInterpretation
    if kind == "PALETTE COLOR":
        stored = apply_color_lut(stored, described)
    if stored.ndim == 3:
        depth = 8 * stored.dtype.itemsize if kind == "PALETTE COLOR" else described.BitsStored
        bright = stored[..., :3] >> (depth - 8) if depth > 8 else stored[..., :3]
        return Image.fromarray(bright.astype(np.uint8)).convert("L")
    share = _share_of_white(stored, _frame_elements(described, frame))
    if kind == "MONOCHROME1":
        share = 1 - share
    return Image.fromarray(np.rint(255 * share).astype(np.uint8))


def _frame_elements(described: Dataset, frame: int) -> Dataset:
    """The elements that turn stored values to grey: the file's, or where these are of frames, the frame's own."""
    per_frame = described.get("PerFrameFunctionalGroupsSequence") or []
    for groups in (*(described.get("SharedFunctionalGroupsSequence") or []), *per_frame[frame : frame + 1]):
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for each in groups.get(name) or []:
                described.update(each)
    return described


def _share_of_white(stored: NDArray[Any], elements: Any) -> NDArray[np.float64]:
    """From 0, black, to 1, white, of each of the values `stored`."""
    from pydicom.pixels import apply_modality_lut

    try:
        rescaled = apply_modality_lut(stored, elements)
    except Exception:  # an unusable one
        rescaled = stored
    values = np.nan_to_num(rescaled)
    shown = _windowed(values, elements)
    if shown is None and rescaled is stored and stored.dtype.kind == "u" and elements.BitsStored <= 8:
        shown = stored / (2**elements.BitsStored - 1)
    if shown is None:
        inside = values[~_padding(stored, elements)]
        black, white = np.percentile(inside if inside.size else values, PERCENTILES)
        if white <= black:
            black, white = values.min(), values.max()
        shown = (values - black) / max(white - black, np.finfo(np.float64).tiny)
    return shown.clip(0, 1)


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


@contextmanager
def _silenced() -> Iterator[None]:
    """Without warnings and log lines: those of the libraries that read files quote headers."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
