"""Encoded images to pixels, on all cores: DALI, or Pillow where there is none. N images, C x C canvas."""

from __future__ import annotations

import importlib.util
import io
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from modan_fast import config
from shard_builder.manifest import Codec

Pixels = NDArray[np.uint8]


def dali_installed() -> bool:
    """Whether NVIDIA DALI can be imported."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


class Decoder(Protocol):
    """Decodes in the background: what `submit` is given, `collect` hands over, in the same order."""

    def submit(self, images: Sequence[bytes]) -> None:
        """Start decoding `images`, the stored files of N images."""

    def collect(self) -> Pixels:
        """The oldest submitted images, (N, C, C) uint8; waits until they are decoded."""


def open_decoder(renderer: config.Renderer, *, codec: Codec, size: int, batch_size: int, threads: int) -> Decoder:
    """What decodes up to `batch_size` images of `size` pixels at a time: DALI, unless `renderer` is torch."""
    if codec != "raw" and renderer != "torch" and dali_installed():
        return DaliDecoder(batch_size, threads)
    return PillowDecoder(codec, size, threads)


class PillowDecoder:
    """Decodes with Pillow, which works outside Python's lock, in threads; raw pixels are only copied."""

    def __init__(self, codec: Codec, size: int, threads: int) -> None:
        self.codec, self.size = codec, size
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._pending: deque[list[Future[Pixels]]] = deque()

    def _decode(self, image: bytes) -> Pixels:
        if self.codec == "raw":
            return np.frombuffer(image, np.uint8).reshape(self.size, self.size)
        return np.asarray(Image.open(io.BytesIO(image)))

    def submit(self, images: Sequence[bytes]) -> None:
        """See `Decoder.submit`."""
        self._pending.append([self._threads.submit(self._decode, image) for image in images])

    def collect(self) -> Pixels:
        """See `Decoder.collect`."""
        return np.stack([decoded.result() for decoded in self._pending.popleft()])


class DaliDecoder:
    """Decodes with DALI. On the CPU, for GPUs too: there DALI decodes PNG on the CPU as well."""

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

    def submit(self, images: Sequence[bytes]) -> None:
        """See `Decoder.submit`."""
        self._pipeline.feed_input("images", [np.frombuffer(image, np.uint8) for image in images])
        self._pipeline.schedule_run()

    def collect(self) -> Pixels:
        """See `Decoder.collect`."""
        (decoded,) = self._pipeline.share_outputs()
        pixels = decoded.as_array()[..., 0].copy()
        self._pipeline.release_outputs()
        return pixels
