"""First pass of a build: decode, resize and encode the chosen images into spool files. N images chosen.

A spool holds the encoded images of one chunk, their rows and the reasons of its rejections. Finished spools outlive a
killed build.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray

from shard_builder import dicom_pixels, image
from shard_builder.atomic import replacing
from shard_builder.entries import Entry
from shard_builder.manifest import Codec
from shard_builder.settings import Progress
from shard_builder.workers import DIED, Job, Workers

CHUNK = 128  # images that a worker packs at a time: a fraction of a second of work, two megabytes
VERSION = 1  # of what packing makes of a file; a new one discards the spools of killed builds

ROW = np.dtype(
    [
        ("bytes", "<u4"),  # in the spool; 0 for a rejected image
        ("width", "<u4"),  # of the original, in pixels
        ("height", "<u4"),
        ("digest", "S16"),  # of the original's grey pixels and their shape
    ]
)
"""What is known of a packed image: 28 bytes, so that the parent process can hold millions."""

TAIL = struct.Struct("<4sII")  # mark, images, bytes of the reasons
MARK = b"spl1"


class Chunk(NamedTuple):
    """The chosen images from number `start` to before `stop`, and the name of their spool."""

    start: int
    stop: int
    spool: str


@dataclass
class Packed:
    """The result for each of the N chosen images, in their order.

    `rows` (N,) of `ROW`. The bytes of image n begin at `offset[n]` of the file `spools[spool[n]]`; both arrays are (N,)
    int64. `reasons` says why images were rejected, by number. `done` counts the images so far.
    """

    rows: NDArray[np.void]
    spool: NDArray[np.int64]
    offset: NDArray[np.int64]
    spools: list[str]
    reasons: dict[int, str]
    done: int = 0

    @classmethod
    def empty(cls, images: int) -> Packed:
        """Without results, for this number of images."""
        spool, offset = np.zeros((2, images), np.int64)
        return cls(np.zeros(images, ROW), spool, offset, spools=[], reasons={})

    def add(self, chunk: Chunk, rows: NDArray[np.void], reasons: dict[int, str]) -> None:
        """Add the rows of a chunk's spool, and its reasons by their numbers within the chunk."""
        images = slice(chunk.start, chunk.stop)
        self.rows[images] = rows
        self.spool[images] = len(self.spools)
        self.offset[images] = np.cumsum(rows["bytes"], dtype=np.int64) - rows["bytes"]
        self.spools.append(chunk.spool)
        self.reasons.update((chunk.start + number, reason) for number, reason in reasons.items())
        self.done += chunk.stop - chunk.start


@dataclass(frozen=True)
class Packer:
    """What is packed and how: divides the chosen images into chunks, and makes jobs of these for the workers."""

    source: Path
    chosen: Sequence[Entry]
    states: NDArray[np.int64]
    folder: Path
    size: int
    codec: Codec

    @cached_property
    def shaping(self) -> list[object]:
        """The settings and versions that shape a spool's content."""
        dicom = any(entry.frame is not None for entry in self.chosen)
        versions = [PIL.__version__, zlib.ZLIB_RUNTIME_VERSION, *(dicom_pixels.versions() if dicom else [])]
        return [VERSION, self.size, self.codec, *versions]

    def chunk(self, start: int, stop: int) -> Chunk:
        """The images from number `start` to before `stop`.

        Their spool is named by a hash of the files (path, size, modification time), the settings and the versions.
        """
        files = [[repr(self.chosen[n]), *self.states[n].tolist()] for n in range(start, stop)]
        made = json.dumps([*self.shaping, *files])
        return Chunk(start, stop, f"spool-{hashlib.sha256(made.encode()).hexdigest()[:32]}")

    def job(self, chunk: Chunk) -> Job[Chunk]:
        """The call of `pack_chunk` for a chunk."""
        entries = self.chosen[chunk.start : chunk.stop]
        return Job(chunk, (self.source.absolute(), entries, self.folder / chunk.spool, self.size, self.codec))

    def halves(self, job: Job[Chunk]) -> list[Job[Chunk]]:
        """The jobs of the two halves of a chunk; none for a single image."""
        start, stop, _ = job.key
        middle = (start + stop) // 2
        return (
            [self.job(self.chunk(start, middle)), self.job(self.chunk(middle, stop))] if stop - start > 1 else []
        )


def file_states(source: Path, chosen: Sequence[Entry], progress: Progress) -> NDArray[np.int64]:
    """Size in bytes and modification time in ns of each chosen file, (N, 2) int64; −1 for files without."""
    states = np.full((len(chosen), 2), -1, np.int64)
    for number, entry in enumerate(chosen):
        try:
            state = (source / entry.file).stat()
        except OSError:
            pass  # it will be rejected when it is read
        else:
            states[number] = state.st_size, state.st_mtime_ns
        if (number + 1) % 10_000 == 0 or number + 1 == len(chosen):
            progress("listing", number + 1, len(chosen), "")
    return states


def pack(workers: Workers, packer: Packer, progress: Progress) -> Packed:
    """Decode, resize and encode the chosen images into spools in the packer's folder.

    A spool that a killed build has finished is used again if its name fits; others are removed.
    """
    total = len(packer.chosen)
    packed = Packed.empty(total)

    def show() -> None:
        rejected = len(packed.reasons)
        progress("packing", packed.done, total, f"{rejected:,} rejected" if rejected else "")

    chunks = [packer.chunk(start, min(start + CHUNK, total)) for start in range(0, total, CHUNK)]
    names = {chunk.spool for chunk in chunks}
    for path in packer.folder.glob("spool-*"):
        if path.name not in names:
            path.unlink()
    missing = []
    for chunk in chunks:
        if (found := read_spool(packer.folder / chunk.spool, chunk.stop - chunk.start)) is None:
            missing.append(chunk)
        else:
            packed.add(chunk, *found)
    if packed.done:
        show()
    for chunk, result in workers.finish(pack_chunk, map(packer.job, missing), packer.halves):
        packed.add(chunk, *(result or (np.zeros(1, ROW), {0: DIED})))
        show()
    return packed


def pack_chunk(
    source: Path, entries: Sequence[Entry], spool: Path, size: int, codec: Codec
) -> tuple[NDArray[np.void], dict[int, str]]:
    """Write the encoded images to `spool`; return a `ROW` for each, and the reasons of rejections by number."""
    rows, reasons = np.zeros(len(entries), ROW), {}
    with replacing(spool) as file:
        for number, entry in enumerate(entries):
            try:
                pixels = grey(source, entry)
                if pixels.min() == pixels.max():
                    raise image.ImageError(f"empty: every pixel is {pixels[0, 0]}")
            except image.ImageError as error:
                reasons[number] = str(error)
                continue
            data = image.encode(image.stretch(pixels, size), codec)
            file.write(data)
            rows[number] = len(data), pixels.shape[1], pixels.shape[0], digest(pixels)
        texts = json.dumps(reasons).encode("ascii")
        file.write(rows.tobytes() + texts + TAIL.pack(MARK, len(rows), len(texts)))
    return rows, reasons


def read_spool(path: Path, images: int) -> tuple[NDArray[np.void], dict[int, str]] | None:
    """What `pack_chunk` returned when it wrote the spool; None if `path` is no whole spool of this number of images."""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(end - TAIL.size, 0))
            mark, count, length = TAIL.unpack(file.read())
            begin = end - TAIL.size - length - count * ROW.itemsize
            file.seek(max(begin, 0))
            rows = np.frombuffer(file.read(count * ROW.itemsize), ROW)
            if mark != MARK or count != images or begin != rows["bytes"].sum(dtype=np.int64):
                return None
            return rows, {int(number): reason for number, reason in json.loads(file.read(length)).items()}
    except (OSError, ValueError, struct.error):
        return None


def grey(source: Path, entry: Entry) -> NDArray[np.uint8]:
    """The grey pixels (height, width) of an image; raises `ImageError` with the reason if it has none."""
    path = source / entry.file
    return image.decode(image.read(path)) if entry.frame is None else dicom_pixels.decode(path, entry.frame)


def digest(pixels: NDArray[np.uint8]) -> bytes:
    """A 16-byte hash of grey pixels (height, width) and their shape."""
    found = hashlib.blake2b(struct.pack("<II", *pixels.shape), digest_size=ROW["digest"].itemsize)
    found.update(np.ascontiguousarray(pixels).data)
    return found.digest()
