"""DICOM pixels: decode a frame, and turn stored values into grey pixels through LUTs, windows or percentiles.

U distinct stored values.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shard_builder.dicom import DEFLATED
from shard_builder.image import MAX_BYTES, MAX_SCANS, ImageError, silenced

if TYPE_CHECKING:
    from pydicom import Dataset

CHUNK = 2**20  # pixels that are turned into grey at a time

PERCENTILES = (0.5, 99.5)
"""Percentiles that become black and white in a file without a window."""

DECODERS = {
    "1.2.840.10008.1.2.4.50": "pillow",  # JPEG baseline
    "1.2.840.10008.1.2.4.51": "pillow",  # JPEG extended, 8 bits
    "1.2.840.10008.1.2.4.57": "gdcm",  # lossless JPEG
    "1.2.840.10008.1.2.4.70": "gdcm",
    "1.2.840.10008.1.2.4.80": "pyjpegls",  # JPEG-LS
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": "pylibjpeg",  # JPEG 2000
    "1.2.840.10008.1.2.4.91": "pylibjpeg",
    "1.2.840.10008.1.2.4.201": "pylibjpeg",  # high-throughput JPEG 2000
    "1.2.840.10008.1.2.4.202": "pylibjpeg",
    "1.2.840.10008.1.2.4.203": "pylibjpeg",
    "1.2.840.10008.1.2.5": "pydicom",  # RLE
}
"""pydicom's plugin for each compression. Only one, so that pixels do not depend on what else is installed.

On damaged data other plugins abort the process: gdcm on JPEG-LS, pylibjpeg on RLE.
"""

CODESTREAMS = {syntax for syntax, plugin in DECODERS.items() if plugin != "pydicom"}
"""The compressions whose data repeat the size of the frame."""

_FUNCTIONAL_GROUPS = [0x52009229, 0x52009230]  # shared, and per frame

REASONS = {
    "not supported": "in a compression that is not read",
    "not a transfer syntax": "in a compression that is not read",
    "does not support": "in a compression that is not read",
    "missing dependencies": "in a compression that is not read",
    "no pixel data": "a DICOM file without an image",
}
"""Our reason for each of pydicom's errors, which differ only in their words."""


def versions() -> list[str]:
    """The versions of the libraries that decode, on which pixels may depend."""
    found = []
    for name in ("pydicom", "pyjpegls", "pylibjpeg-openjpeg", "python-gdcm"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return found


def decode(path: Path, frame: int) -> NDArray[np.uint8]:
    """A frame of the DICOM file `path`, counted from 0, as grey pixels (height, width) uint8.

    Stored values pass the file's modality LUT or rescaling, then its VOI LUT or its first window. Without a usable
    one, the percentiles of the values become black and white, and values of 8 bits stay unchanged. MONOCHROME1 is
    inverted, colour becomes luma. Raises `ImageError` with the reason if the frame cannot be decoded.
    """
    with silenced():
        try:
            return _grey(path, frame)
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # damaged files raise errors of any type
            if isinstance(error, OSError) and error.errno is not None:
                raise ImageError(f"cannot be read: {error.strerror}") from None
            text = str(error).lower()
            reason = next((reason for words, reason in REASONS.items() if words in text), "damaged pixel data")
            raise ImageError(reason) from None


def _grey(path: Path, frame: int) -> NDArray[np.uint8]:
    import pydicom
    from pydicom.pixels import apply_color_lut, pixel_array

    syntax = pydicom.filereader.read_file_meta_info(path).TransferSyntaxUID
    elements: Any = pydicom.Dataset()
    if syntax == DEFLATED:  # its pixels cannot be read alone
        elements = pydicom.dcmread(path)
        stored = pixel_array(elements, index=frame)
    elif syntax in CODESTREAMS:
        if path.stat().st_size > MAX_BYTES:
            raise ImageError(f"over {MAX_BYTES >> 20} MiB")
        elements = pydicom.dcmread(path)
        _check_size(elements, frame)
        stored = pixel_array(elements, index=frame, decoding_plugin=DECODERS[syntax])
    else:
        stored = pixel_array(
            path,
            ds_out=elements,
            specific_tags=_FUNCTIONAL_GROUPS,
            index=frame,
            decoding_plugin=DECODERS.get(syntax, ""),
        )
    kind = elements.PhotometricInterpretation
    if kind == "PALETTE COLOR" or stored.ndim == 3:

        def luma(rows: NDArray[Any]) -> NDArray[Any]:
            colour, depth = rows[..., :3], elements.BitsStored
            if kind == "PALETTE COLOR":
                colour = apply_color_lut(rows, elements)[..., :3]
                depth = 8 * colour.dtype.itemsize
            colour = colour >> (depth - 8) if depth > 8 else colour
            return np.asarray(Image.fromarray(colour.astype(np.uint8)).convert("L"))

        return _by_rows(stored, luma)
    return _by_value(stored, _frame_elements(elements, frame), inverted=kind == "MONOCHROME1")


def _check_size(elements: Any, frame: int) -> None:
    """Raise `ImageError` if a compressed frame has another size than its header says, or countless scans.

    Decoders trust the frame, and a few of its bytes can declare an image that fills the memory.
    """
    from pydicom.encaps import get_frame

    data = get_frame(elements.PixelData, frame, number_of_frames=int(elements.get("NumberOfFrames") or 1))
    if data.count(b"\xff\xda") > MAX_SCANS or _coded_size(data) != (elements.Rows, elements.Columns):
        raise ImageError("damaged pixel data")


def _coded_size(data: bytes) -> tuple[int, int] | None:
    """Height and width in the first header of a JPEG, JPEG-LS or JPEG 2000 codestream; None if there is none."""
    if (start := data.find(b"\xff\x4f\xff\x51")) >= 0 and len(data) >= start + 24:  # SOC and SIZ (T.800, A.5.1)
        right, bottom, left, top = struct.unpack_from(">4I", data, start + 8)
        return bottom - top, right - left
    offset = 2
    while len(data) >= offset + 9 and data[offset] == 0xFF:  # from marker to marker (T.81, B.1.1)
        marker = data[offset + 1]
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)):  # a start of frame
            height, width = struct.unpack_from(">2H", data, offset + 5)
            return height, width
        # A marker may be padded with further bytes 0xFF.
        offset += 1 if marker == 0xFF else 2 + int.from_bytes(data[offset + 2 : offset + 4], "big")
    return None


def _by_rows(stored: NDArray[Any], grey: Callable[[NDArray[Any]], NDArray[Any]]) -> NDArray[np.uint8]:
    """`grey` of an image, computed for some rows at a time, so that intermediate arrays take little memory."""
    pixels = np.empty(stored.shape[:2], np.uint8)
    step = max(1, CHUNK // stored.shape[1])
    for top in range(0, len(stored), step):
        pixels[top : top + step] = grey(stored[top : top + step])
    return pixels


def _by_value(stored: NDArray[Any], elements: Any, *, inverted: bool) -> NDArray[np.uint8]:
    """Stored values to grey pixels through a table: an image has far more pixels than values."""

    def levels(values_U: NDArray[Any], counts_U: NDArray[np.int64]) -> NDArray[np.uint8]:
        white_U = _whiteness(values_U, counts_U, elements)
        return np.asarray(np.rint(255 * (1 - white_U if inverted else white_U)), np.uint8)

    if stored.dtype.itemsize > 2:
        values_U, inverse, counts_U = np.unique(stored, return_inverse=True, return_counts=True)
        return levels(values_U, counts_U)[inverse.reshape(stored.shape)]
    low, high = int(stored.min()), int(stored.max())
    step = max(1, CHUNK // stored.shape[1])
    counts_U = np.zeros(high - low + 1, np.int64)
    for top in range(0, len(stored), step):
        counts_U += np.bincount(stored[top : top + step].ravel().astype(np.intp) - low, minlength=len(counts_U))
    levels_U = levels(np.arange(low, high + 1).astype(stored.dtype), counts_U)
    return _by_rows(stored, lambda rows: levels_U[rows.astype(np.intp) - low])


def _frame_elements(elements: Dataset, frame: int) -> Dataset:
    """`elements` updated with those by which an enhanced file turns the values of this frame into grey."""
    per_frame = elements.get("PerFrameFunctionalGroupsSequence") or []
    for groups in (*(elements.get("SharedFunctionalGroupsSequence") or []), *per_frame[frame : frame + 1]):
        for name in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for each in groups.get(name) or []:
                elements.update(each)
    return elements


def _whiteness(stored_U: NDArray[Any], counts_U: NDArray[np.int64], elements: Any) -> NDArray[np.float64]:
    """The whiteness of each stored value, from 0, black, to 1, white; `counts_U` are the pixels with each value."""
    from pydicom.pixels import apply_modality_lut

    try:
        rescaled_U = apply_modality_lut(stored_U, elements)
    except MemoryError:
        raise
    except Exception:  # an unusable LUT
        rescaled_U = stored_U
    values_U = np.nan_to_num(rescaled_U)
    white_U = _windowed(values_U, elements)
    unchanged = stored_U.dtype.kind == "u" and np.array_equal(rescaled_U, stored_U)
    if white_U is None and unchanged and elements.BitsStored <= 8:
        white_U = stored_U / (2**elements.BitsStored - 1)
    if white_U is None:
        counted = (counts_U > 0) & ~_padding(stored_U, elements)
        inside, counts = (values_U[counted], counts_U[counted]) if counted.any() else (values_U, counts_U)
        black, white = _percentiles(inside, counts)
        if white <= black:
            black, white = inside.min(), inside.max()
        white_U = (values_U - black) / max(white - black, np.finfo(np.float64).tiny)
    return white_U.clip(0, 1)


def _percentiles(values_U: NDArray[Any], counts_U: NDArray[np.int64]) -> NDArray[np.float64]:
    """`PERCENTILES` as numpy computes them, of the values repeated `counts_U` times."""
    order = np.argsort(values_U, kind="stable")
    values_U, last_U = values_U[order], np.cumsum(counts_U[order]) - 1  # the rank of the last of each value
    rank = np.array(PERCENTILES) / 100 * last_U[-1]
    below, above = (values_U[np.searchsorted(last_U, whole(rank))] for whole in (np.floor, np.ceil))
    return np.asarray(below + (above - below) * (rank % 1), np.float64)


def _windowed(values: NDArray[Any], elements: Any) -> NDArray[np.float64] | None:
    """`values` through the VOI LUT or the first window, black to white as 0 to 1; None without a usable one."""
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
        windowed = (apply_voi_lut(values, elements) - black) / (white - black)
    except MemoryError:
        raise
    except Exception:  # an unusable LUT or window
        return None
    return windowed if np.isfinite(windowed).all() else None


def _padding(stored: NDArray[Any], elements: Any) -> NDArray[np.bool_]:
    """Which of the values `stored` are padding around the image."""
    first = elements.get("PixelPaddingValue")
    if first is None:
        return np.zeros(stored.shape, bool)
    low, high = sorted((first, elements.get("PixelPaddingRangeLimit", first)))
    return (stored >= low) & (stored <= high)
