"""The images of a task that are files: their bytes' digests, and their pixels; DICOM files by the builder's reader."""

from __future__ import annotations

import hashlib
from contextlib import nullcontext
from pathlib import Path
from threading import Lock

from PIL import Image

from shard_builder import dicom, dicom_pixels
from shard_builder.settings import InputError

# Of an image, as in shard_builder: what is larger would fill the memory.
MOST_PIXELS, MOST_BYTES = 2**26, 2**28
LARGE = 2**23  # pixels
# Not all that Pillow knows: it hands PostScript to a program.
FORMATS = ("PNG", "JPEG", "JPEG2000", "BMP", "DIB", "TIFF", "GIF", "WEBP", "PPM", "PCX", "TGA", "SGI")
LARGE_LOCK = Lock()  # one at a time: a few bytes may declare an image of half a GiB


def digest(path: Path, where: str) -> bytes:
    """The SHA-256 of an image. Raises `InputError` if it cannot be read."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{where}: {path} has over {MOST_BYTES >> 20} MiB: replace it")
        return hashlib.sha256(path.read_bytes()).digest()
    except OSError as error:
        raise InputError(f"{where}: {path} cannot be read ({error.strerror}): replace it") from error


def read_image(path: Path, size: int, channels: int) -> Image.Image:
    """An image file stretched to (size, size), grey for one channel and RGB for three.

    The resampling is bilinear and antialiased. DICOM files are grey, and of several frames the middle one is taken.
    Raises errors of any type for a file that does not decode.
    """
    if dicom.is_dicom(path):
        return resized(_read_dicom(path), size, channels)
    with Image.open(path, formats=FORMATS) as image:
        if image.width * image.height > MOST_PIXELS:
            raise ValueError(f"over {MOST_PIXELS:,} pixels")
        if image.mode[0] in "IF":
            raise ValueError("more than 8 bits a pixel")
        with LARGE_LOCK if image.width * image.height > LARGE else nullcontext():
            return resized(image, size, channels)


def resized(image: Image.Image, size: int, channels: int) -> Image.Image:
    """An image in grey or RGB, stretched to (size, size)."""
    return image.convert("L" if channels == 1 else "RGB").resize((size, size), Image.Resampling.BILINEAR)


def _read_dicom(path: Path) -> Image.Image:
    """The middle frame of a DICOM file, windowed as in a shard set. The reasons of its errors quote no header."""
    header = dicom.read_headers(path.parent, [path.name])[0]
    if isinstance(header, str):
        raise ValueError(header)
    with LARGE_LOCK:  # its header may declare any size, and a decoder needs several times as much
        return Image.fromarray(dicom_pixels.decode(path, header.frames // 2))
