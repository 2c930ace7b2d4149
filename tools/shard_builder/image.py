"""File bytes to a canvas of grey pixels, and pixels to stored bytes. C x C canvas."""

from __future__ import annotations

import io
import logging
import os
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from shard_builder.manifest import Codec

# Together they keep a worker below 1 GiB, whatever a file holds or declares.
MAX_PIXELS = 2**26  # 8192 x 8192: decoded, as 4 bytes a pixel, 256 MiB
MAX_BYTES = 2**28


class ImageError(ValueError):
    """An image that cannot be packed. The message is the reason, short, stable and without a path."""


def read(path: Path) -> bytes:
    """The bytes of the image file at `path`; raises `ImageError` where they cannot be read or are too many."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size > MAX_BYTES:
                raise ImageError(f"over {MAX_BYTES >> 20} MiB")
            return file.read()
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror or type(error).__name__}") from None


def decode(data: bytes) -> NDArray[np.uint8]:
    """The image in the PNG or JPEG file `data` as grey pixels (height, width) uint8.

    Colour becomes luma (ITU-R 601), alpha is dropped, 16-bit grey is scaled by the bits that it uses (see `_grey`),
    and an EXIF orientation is ignored, as the readers of the downstream images do. Raises `ImageError` with the
    reason where there is no whole image.
    """
    if not data:
        raise ImageError("empty file")
    try:
        with silenced():  # what Pillow warns of is refused here
            opened = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        # Before any pixel is decoded: a few bytes can declare a picture that fills the memory.
        if opened.width * opened.height > MAX_PIXELS:
            raise ImageError(f"declares over {MAX_PIXELS:,} pixels")
        if opened.format == "PNG":
            check_png(data)
        opened.load()
        return np.asarray(_grey(opened))
    except Image.DecompressionBombError:
        raise ImageError(f"declares over {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise ImageError("not a PNG or JPEG image") from None
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # damaged files raise whatever the decoder stumbles over
        raise ImageError("truncated" if "truncated" in str(error).lower() else "damaged") from None


def check_png(data: bytes) -> None:
    """Raise `ImageError` where a PNG file ends before its last chunk, or a chunk has another checksum than it says.

    Pillow does not look at the checksums of the pixels, and would show wrong ones.
    """
    place, kind = 8, b""
    while kind != b"IEND":
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        if end + 4 > len(data):
            raise ImageError("truncated")
        kind, checksum = data[place + 4 : place + 8], int.from_bytes(data[end : end + 4], "big")
        if checksum != zlib.crc32(memoryview(data)[place + 4 : end]):
            raise ImageError(f"damaged: the checksum of its {ascii(kind)[2:-1]} chunk is wrong")
        place = end + 4


def stretch(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The grey pixels (height, width) uint8 on the canvas (size, size), by antialiased bilinear resampling."""
    if pixels.shape == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def encode(pixels: NDArray[np.uint8], codec: Codec) -> bytes:
    """The grey pixels (C, C) uint8 as the bytes of a PNG or JPEG (quality 95) file, or as they are (raw)."""
    if codec == "raw":
        return pixels.tobytes()
    if codec == "png":
        return _png(pixels)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=95)
    return file.getvalue()


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of grey pixels (height, width) whose rows are differences from the row above (filter Up).

    On medical images, deflated by runs alone, it takes less than half the time of Pillow's fastest level and fewer
    bytes. Pillow's default level saves another tenth in six times the time.
    """
    height, width = pixels.shape
    rows = np.empty((height, 1 + width), np.uint8)
    rows[:, 0] = 2  # the filter's number
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
    deflate = zlib.compressobj(level=1, memLevel=9, strategy=zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, grey, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", deflate.compress(rows.data) + deflate.flush()), (b"IEND", b""))
    parts = [
        struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(b, zlib.crc32(k))) for k, b in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _grey(opened: Image.Image) -> Image.Image:
    if not opened.mode.startswith("I"):
        return opened if opened.mode == "L" else opened.convert("L")
    # 16 bits a pixel, of which scanners use 10, 12 or 14: white is the most that as many bits can hold.
    deep = np.asarray(opened).clip(0, 65535).astype(np.uint32)
    white = next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if deep.max() < 2**bits)
    deep *= 255  # in place: an image may have millions of pixels
    deep += white // 2
    deep //= white
    return Image.fromarray(deep.astype(np.uint8))


_silent = ExitStack()
_inside = 0
_lock = threading.Lock()


@contextmanager
def silenced() -> Iterator[None]:
    """Without warnings and log lines: those of the libraries that read files quote what they read.

    Both are switched off for the whole process, so with several threads inside the last one out switches them on.
    """
    global _inside  # noqa: PLW0603
    with _lock:
        if not _inside:
            _silent.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.CRITICAL)
            _silent.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                _silent.close()
