"""Stored images to pixels, on all cores, with DALI or else Pillow. N images of C x C pixels."""

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

from modan_fast.config import RendererName
from shard_builder.manifest import Codec

Pixels = NDArray[np.uint8]


def dali_installed() -> bool:
    """Whether NVIDIA DALI can be imported."""
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


class Decoder(Protocol):
    """Decodes in the background; `collect` returns the batches in the order of `submit`."""

    def submit(self, images: Sequence[bytes]) -> None:
        """Start decoding a batch: the stored bytes of N images."""

    def collect(self) -> Pixels:
        """The oldest submitted batch, (N, C, C) uint8; waits until it is decoded."""


def open_decoder(renderer: RendererName, *, codec: Codec, size: int, batch_size: int, threads: int) -> Decoder:
    """A decoder for batches of up to `batch_size` images of `size` pixels: DALI's, unless `renderer` is torch."""
    if codec != "raw" and renderer != "torch" and dali_installed():
        return DaliDecoder(batch_size, threads)
    return PillowDecoder(codec, size, threads)


class PillowDecoder:
    """Decodes with Pillow in threads (it releases Python's lock); raw pixels are only copied."""

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
    """Decodes with DALI on the CPU, also for training on a GPU, because DALI has no GPU decoder for PNG."""

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
