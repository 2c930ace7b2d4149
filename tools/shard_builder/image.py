"""PNG and JPEG files to grey pixels, resizing to the C x C canvas, and encoding for storage."""

from __future__ import annotations

import errno
import io
import logging
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

from shard_builder.files import read_regular
from shard_builder.manifest import Codec

# With these two limits a worker needs less than 1 GiB, whatever a file holds or declares.
MAX_PIXELS = 2**26  # 8192 x 8192; 256 MiB when decoded to 4 bytes per pixel
MAX_BYTES = 2**28  # of a file
MAX_SCANS = 100  # of a JPEG file, which has about ten: each takes as long as the whole image


class ImageError(ValueError):
    """An image that cannot be packed. The message is the reason: short, stable, and without a path."""


def read(path: Path) -> bytes:
    """The bytes of an image file; raises `ImageError` if it cannot be read or is too large."""
    try:
        return read_regular(path, MAX_BYTES)
    except OSError as error:
        if error.errno in (errno.EFBIG, errno.EINVAL):  # our own words
            raise ImageError(str(error.strerror)) from None
        raise ImageError(f"cannot be read: {error.strerror or type(error).__name__}") from None


def decode(data: bytes) -> NDArray[np.uint8]:
    """The image in the PNG or JPEG file `data` as grey pixels (height, width) uint8.

    Colour becomes luma (ITU-R 601), alpha is dropped, 16-bit grey is scaled by the bits that it uses (see `_grey`),
    and EXIF orientation is ignored, as it is when downstream images are read. Raises `ImageError` with the reason if
    `data` is no whole image.
    """
    if not data:
        raise ImageError("empty file")
    try:
        with silenced():  # Pillow only warns of images that are refused below
            opened = Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))
        # Before any pixel is decoded: a few bytes can declare an image that fills the memory.
        if opened.width * opened.height > MAX_PIXELS:
            raise ImageError(f"declares over {MAX_PIXELS:,} pixels")
        check_data(data, opened.format)
        opened.load()
        return np.asarray(_grey(opened))
    except Image.DecompressionBombError:
        raise ImageError(f"declares over {MAX_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise ImageError("not a PNG or JPEG image") from None
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # damaged files raise errors of any type
        raise ImageError("truncated" if "truncated" in str(error).lower() else "damaged") from None


def open_stored(data: bytes, codec: Codec, size: int) -> Image.Image:
    """The grey image (size, size) in the bytes that a shard stores; raises `ImageError` if they are anything else."""
    if codec == "raw":
        if len(data) != size**2:
            raise ImageError(f"has {len(data):,} bytes, not {size}²")
        return Image.frombytes("L", (size, size), data)
    try:
        with silenced():
            # Only this format: for some others Pillow starts programs.
            opened = Image.open(io.BytesIO(data), formats=(codec.upper(),))
        check_data(data, codec.upper())
        if opened.mode != "L" or opened.size != (size, size):
            raise ImageError(f"is {opened.width} x {opened.height} {opened.mode}, not {size} x {size} grey")
        opened.load()
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # damaged files raise errors of any type
        raise ImageError(f"cannot be decoded as {codec}: {type(error).__name__}") from None
    return opened


def check_data(data: bytes, kind: str | None) -> None:
    """Raise `ImageError` for what Pillow lets pass in a file of this kind: see `_check_png`, and `MAX_SCANS`."""
    if kind == "PNG":
        _check_png(data)
    elif data.count(b"\xff\xda") > MAX_SCANS:  # these bytes are never pixels
        raise ImageError(f"damaged: over {MAX_SCANS} scans")


def _check_png(data: bytes) -> None:
    """Raise `ImageError` if a PNG file ends before its last chunk, or the checksum of a chunk is wrong.

    Pillow ignores the checksums of the chunks that hold pixels, and would decode wrong pixels.
    """
    start, kind = 8, b""
    while kind != b"IEND":
        end = start + 8 + int.from_bytes(data[start : start + 4], "big")
        if end + 4 > len(data):
            raise ImageError("truncated")
        kind, checksum = data[start + 4 : start + 8], int.from_bytes(data[end : end + 4], "big")
        if checksum != zlib.crc32(memoryview(data)[start + 4 : end]):
            raise ImageError(f"damaged: the checksum of its {ascii(kind)[2:-1]} chunk is wrong")
        start = end + 4


def stretch(pixels: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize grey pixels (height, width) uint8 to (size, size) by antialiased bilinear resampling."""
    if pixels.shape == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))


def encode(pixels: NDArray[np.uint8], codec: Codec) -> bytes:
    """Grey pixels (C, C) uint8 as the bytes of a PNG or JPEG (quality 95) file, or unchanged (raw)."""
    if codec == "raw":
        return pixels.tobytes()
    if codec == "png":
        return _png(pixels)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=95)
    return file.getvalue()


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file of grey pixels (height, width): each row minus the row above (filter Up), deflated by runs alone.

    On medical images this takes less than half the time of Pillow's fastest level, and fewer bytes. Pillow's default
    level saves another tenth of the bytes in six times the time.
    """
    height, width = pixels.shape
    rows = np.empty((height, 1 + width), np.uint8)
    rows[:, 0] = 2  # the filter's number
    rows[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=rows[1:, 1:])
    deflate = zlib.compressobj(level=1, memLevel=9, strategy=zlib.Z_RLE)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits, grey, not interlaced
    chunks = ((b"IHDR", header), (b"IDAT", deflate.compress(rows.data) + deflate.flush()), (b"IEND", b""))
    file = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in chunks:
        file += [struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))]
    return b"".join(file)


def _grey(opened: Image.Image) -> Image.Image:
    if not opened.mode.startswith("I"):
        return opened if opened.mode == "L" else opened.convert("L")
    # Scanners use 10, 12 or 14 of the 16 bits: white is the largest value of the bits in use.
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
    """Without warnings and log lines, because libraries quote in them what they read from files.

    Both are off for the whole process; with several threads inside, the last one to leave turns them on again.
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
