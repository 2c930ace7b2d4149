"""The first pass: image files to spools of encoded images, which outlive a killed build. N images chosen."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray

from shard_builder import dicom, image
from shard_builder.atomic import replacing
from shard_builder.manifest import Codec
from shard_builder.scan import Entry
from shard_builder.settings import Progress
from shard_builder.workers import DIED, Job, Workers

CHUNK = 128  # images that a worker packs at a time: a fraction of a second of work, two megabytes
VERSION = 1  # of what packing makes of a file; another one makes the spools of killed builds worthless

ROW = np.dtype(
    [
        ("bytes", "<u4"),  # in the spool; 0 for a rejected image
        ("width", "<u4"),  # of the original, in pixels
        ("height", "<u4"),
        ("digest", "S16"),  # of the original's grey pixels and their shape
    ]
)
"""What is known of a packed image. 28 bytes, so that a parent can hold millions."""

TAIL = struct.Struct("<4sII")  # mark, images, bytes of the reasons
MARK = b"spl1"


class Chunk(NamedTuple):
    """The images `start` up to, not including, `stop` of those chosen, and the spool that holds them."""

    start: int
    stop: int
    spool: str


@dataclass
class Packed:
    """What has become of the N chosen images, in their order.

    `rows` (N,) of `ROW`; `reasons` says why an image was rejected, by its number; the bytes of the others lie in
    `spools[spool]` from `offset` on, both (N,) int64.
    """

    rows: NDArray[np.void]
    spool: NDArray[np.int64]
    offset: NDArray[np.int64]
    spools: list[str]
    reasons: dict[int, str]


def file_states(source: Path, chosen: Sequence[Entry], progress: Progress) -> NDArray[np.int64]:
    """Size in bytes and time of change in ns of each chosen file, (N, 2) int64; −1 where there is no telling."""
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


def pack(
    workers: Workers,
    source: Path,
    chosen: Sequence[Entry],
    states: NDArray[np.int64],
    folder: Path,
    *,
    size: int,
    codec: Codec,
    progress: Progress,
) -> Packed:
    """Decode, resize and encode the chosen images into spools in `folder`.

    A spool's name tells the files it was made of, by name, size and time of change, and what was made of them: one
    that is there already is used as it is, and others are removed.
    """
    spool, offset = np.zeros((2, len(chosen)), np.int64)
    packed = Packed(np.zeros(len(chosen), ROW), spool, offset, spools=[], reasons={})
    done = 0

    versions: list[object] = [VERSION, size, codec, PIL.__version__, zlib.ZLIB_RUNTIME_VERSION]
    if any(entry.frame is not None for entry in chosen):
        versions += dicom.versions()

    def chunk_of(start: int, stop: int) -> Chunk:
        made = list(versions)
        made += [[repr(chosen[n]), *states[n].tolist()] for n in range(start, stop)]
        return Chunk(start, stop, "spool-" + hashlib.sha256(json.dumps(made).encode()).hexdigest()[:32])

    def job_of(chunk: Chunk) -> Job[Chunk]:
        entries = chosen[chunk.start : chunk.stop]
        return Job(chunk, (source.absolute(), entries, folder / chunk.spool, size, codec))

    def halves(job: Job[Chunk]) -> list[Job[Chunk]]:
        start, stop, _ = job.key
        middle = (start + stop) // 2
        return [job_of(chunk_of(start, middle)), job_of(chunk_of(middle, stop))] if stop - start > 1 else []

    def take(chunk: Chunk, rows: NDArray[np.void], reasons: dict[int, str]) -> None:
        nonlocal done
        here = slice(chunk.start, chunk.stop)
        packed.rows[here] = rows
        packed.spool[here] = len(packed.spools)
        packed.offset[here] = np.cumsum(rows["bytes"], dtype=np.int64) - rows["bytes"]
        packed.spools.append(chunk.spool)
        packed.reasons.update((chunk.start + number, reason) for number, reason in reasons.items())
        done += chunk.stop - chunk.start

    def tell() -> None:
        rejected = len(packed.reasons)
        progress("packing", done, len(chosen), f"{rejected:,} rejected" if rejected else "")

    chunks = [chunk_of(start, min(start + CHUNK, len(chosen))) for start in range(0, len(chosen), CHUNK)]
    named = {chunk.spool for chunk in chunks}
    for path in folder.glob("spool-*"):
        if path.name not in named:
            path.unlink()
    missing = []
    for chunk in chunks:
        if (found := read_spool(folder / chunk.spool, chunk.stop - chunk.start)) is None:
            missing.append(chunk)
        else:
            take(chunk, *found)
    if done:
        tell()
    for chunk, result in workers.finish(pack_chunk, map(job_of, missing), halves):
        take(chunk, *(result or (np.zeros(1, ROW), {0: DIED})))
        tell()
    return packed


def pack_chunk(
    source: Path, entries: Sequence[Entry], spool: Path, size: int, codec: Codec
) -> tuple[NDArray[np.void], dict[int, str]]:
    """Write the encoded images to `spool`; return a `ROW` for each, and by their numbers why some have none."""
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


def grey(source: Path, entry: Entry) -> NDArray[np.uint8]:
    """The grey pixels (height, width) of an image; raises `ImageError` with the reason where it has none."""
    path = source / entry.file
    return image.decode(image.read(path)) if entry.frame is None else dicom.decode(path, entry.frame)


def read_spool(path: Path, images: int) -> tuple[NDArray[np.void], dict[int, str]] | None:
    """What `pack_chunk` returned when it wrote the spool `path`; None where there is no whole spool of `images`."""
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


def digest(pixels: NDArray[np.uint8]) -> bytes:
    """16 bytes that tell grey pixels (height, width) from any others."""
    found = hashlib.blake2b(struct.pack("<II", *pixels.shape), digest_size=ROW["digest"].itemsize)
    found.update(np.ascontiguousarray(pixels).data)
    return found.digest()
