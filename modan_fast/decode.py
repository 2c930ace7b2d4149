"""Stored images to pixels, on all cores. N images of C x C pixels."""

from __future__ import annotations

import importlib.util
import io
import struct
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from modan_fast.config import RendererName
from shard_builder.manifest import Codec

Pixels = NDArray[np.uint8]
Stored = bytes | Pixels  # an image's stored bytes

DATA_AT = 41  # where the data of a PNG file begins whose second chunk they are
UP = 2  # PNG's number of the filter that keeps differences from the row above
CHUNK = 8  # images that a thread decodes together: threads wait for one another less often

PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR"
# Markers of baseline and extended frames. A progressive one may have thousands of scans, which take minutes to decode.
JPEG_FRAMES = (0xC0, 0xC1)


def dali_installed() -> bool:
    """Whether NVIDIA DALI can be imported."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


class Decoder(Protocol):
    """Decodes in the background; `collect` returns the batches in the order of `submit`."""

    def submit(self, images: Sequence[Stored]) -> None:
        """Start decoding a batch: the stored bytes of N images."""

    def collect(self) -> Pixels:
        """The oldest submitted batch, (N, C, C) uint8; waits until it is decoded."""


def check_header(image: bytes, codec: Codec, size: int) -> None:
    """Raise `ValueError` unless the stored image says of itself that it is grey, 8 bits, and `size` pixels square.

    Asked before a decoder is called: what decoders do with a header of 60,000 x 60,000 pixels is to ask for 3.6 GB.
    """
    if codec == "raw":
        if len(image) != size**2:
            raise ValueError(f"it has {len(image):,} bytes, not {size} x {size}")
    elif codec == "png":
        if not image.startswith(png_start(size)):
            raise ValueError(f"it is not a grey PNG image of {size} x {size} pixels")
    elif _jpeg_frame(image) != struct.pack(">BHHB", 8, size, size, 1):
        raise ValueError(f"it is not a grey baseline JPEG image of {size} x {size} pixels")


def png_start(size: int) -> bytes:
    """The first bytes of every grey PNG file of 8 bits and `size` x `size` pixels."""
    return PNG_START + struct.pack(">IIBB", size, size, 8, 0)


def _jpeg_frame(image: bytes) -> bytes | None:
    """Bits, height, width and channels in the header of a JPEG file, as they are stored; None if there is none."""
    at = 2
    while image.startswith(b"\xff\xd8") and len(image) >= at + 10 and image[at] == 0xFF:
        marker = image[at + 1]
        if marker in JPEG_FRAMES:
            return image[at + 4 : at + 10]
        if marker < 0xC0 or marker in (0xD8, 0xD9, 0xDA):  # without a length, or pixels before a header
            return None
        at += 2 + int.from_bytes(image[at + 2 : at + 4])
    return None


def open_decoder(renderer: RendererName, *, codec: Codec, size: int, batch_size: int, threads: int) -> Decoder:
    """A decoder for batches of up to `batch_size` images of `size` pixels.

    JPEG files are decoded by DALI, unless `renderer` is torch. Our own PNG files take longer with it.
    """
    if codec == "jpeg" and renderer != "torch" and dali_installed():
        return DaliDecoder(batch_size, threads)
    return ThreadDecoder(codec, size, threads)


def decode_into(pixels: Pixels, image: Stored, codec: Codec) -> None:
    """Write the pixels of one image to `pixels` (C, C); a damaged image raises anything, or what Pillow raises."""
    if codec == "raw":
        pixels[:] = np.frombuffer(image, np.uint8).reshape(pixels.shape)
    elif codec == "jpeg" or not unfiltered_into(pixels, image):
        found = np.asarray(Image.open(io.BytesIO(bytes(image)), formats=("PNG", "JPEG")))
        if found.shape != pixels.shape:  # numpy would repeat a single row
            raise ValueError(f"{found.shape} pixels where {pixels.shape} belong")
        pixels[:] = found


def unfiltered_into(pixels: Pixels, image: Stored) -> bool:
    """Decode a PNG file as our shards have them, in half of Pillow's time; False for any other file.

    They have one chunk of data, and each row holds the differences from the row above. zlib compares the checksum.
    """
    size = len(pixels)
    data = bytes(image[DATA_AT:-16])  # up to a checksum and the last chunk
    start = png_start(size) + bytes(3)
    if bytes(image[: len(start)]) != start or bytes(image[DATA_AT - 8 : DATA_AT]) != struct.pack(
        ">I4s", len(data), b"IDAT"
    ):
        return False
    inflate = zlib.decompressobj()
    rows = np.frombuffer(inflate.decompress(data, size * (size + 1)), np.uint8)
    if not inflate.eof or len(rows) != size * (size + 1):
        return False
    rows = rows.reshape(size, size + 1)
    if (rows[:, 0] != UP).any():
        return False
    np.add.accumulate(rows[:, 1:], axis=0, dtype=np.uint8, out=pixels)
    return True


class ThreadDecoder:
    """Decodes in threads, with zlib, numpy and Pillow, which release Python's lock; raw pixels are only copied."""

    def __init__(self, codec: Codec, size: int, threads: int) -> None:
        self.codec, self.size = codec, size
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._pending: deque[tuple[Pixels, list[Future[None]]]] = deque()

    def _decode(self, pixels: Pixels, images: Sequence[Stored]) -> None:
        for row, image in zip(pixels, images, strict=True):
            decode_into(row, image, self.codec)

    def submit(self, images: Sequence[Stored]) -> None:
        """See `Decoder.submit`."""
        pixels = np.empty((len(images), self.size, self.size), np.uint8)
        chunks = [slice(first, first + CHUNK) for first in range(0, len(images), CHUNK)]
        self._pending.append(
            (pixels, [self._threads.submit(self._decode, pixels[rows], images[rows]) for rows in chunks])
        )

    def collect(self) -> Pixels:
        """See `Decoder.collect`."""
        pixels, chunks = self._pending.popleft()
        for chunk in chunks:
            chunk.result()
        return pixels


class DaliDecoder:
    """Decodes with DALI on the CPU, also for training on a GPU."""

    def __init__(self, batch_size: int, threads: int) -> None:
        from nvidia.dali import Pipeline, fn, types

        self._pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=None,
            prefetch_queue_depth=1,
            exec_dynamic=True,
        )
        with self._pipeline:
            encoded = fn.external_source(name="images", dtype=types.UINT8, ndim=1, batch=True)
            self._pipeline.set_outputs(fn.decoders.image(encoded, output_type=types.GRAY))
        self._pipeline.build()

    def submit(self, images: Sequence[Stored]) -> None:
        """See `Decoder.submit`."""
        self._pipeline.feed_input("images", [np.frombuffer(image, np.uint8) for image in images])
        self._pipeline.schedule_run()

    def collect(self) -> Pixels:
        """See `Decoder.collect`."""
        (decoded,) = self._pipeline.share_outputs()
        pixels = decoded.as_array()[..., 0].copy()
        self._pipeline.release_outputs()
        return pixels
