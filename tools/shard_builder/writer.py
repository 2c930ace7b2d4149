"""One shard: a USTAR tar of samples, and DALI's index beside it. K label bits."""

from __future__ import annotations

import hashlib
import json
import struct
import tarfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shard_builder.atomic import replacing
from shard_builder.index import Component, format_index
from shard_builder.manifest import Shard


@dataclass(frozen=True)
class Sample:
    """What a shard stores of one image.

    `image` is the encoded file; `labels` (K,) uint8, 0/1; `target` the class index; `metadata` becomes `.json`.
    """

    image: bytes
    labels: NDArray[np.uint8]
    target: int
    metadata: Mapping[str, object]


def write_shard(path: Path, samples: Iterable[Sample], *, first: int, extension: str) -> Shard:
    """Write the tar `path` and its index, and return the shard's line of the manifest.

    The samples get the ids `first`, `first + 1`, ...; `extension` is that of the image members. Takes one sample
    at a time. Raises `OSError` where writing fails, and then leaves no file.
    """
    digest, offset, lines = hashlib.sha256(), 0, []
    with replacing(path) as tar:
        for number, sample in enumerate(samples, first):
            members = (
                (extension, sample.image),
                ("labels", sample.labels.tobytes()),
                ("target", struct.pack("<i", sample.target)),
                ("json", json.dumps(sample.metadata).encode("ascii")),
            )
            line = []
            for ending, data in members:
                name = f"{number:08}.{ending}"
                block = _header(name, len(data)) + data + bytes(-len(data) % tarfile.BLOCKSIZE)
                tar.write(block)
                digest.update(block)
                line.append(Component(ending, offset + tarfile.BLOCKSIZE, len(data), name))
                offset += len(block)
            lines.append(line)
        # Two empty blocks end a tar, and it is filled up to whole records.
        end = bytes(2 * tarfile.BLOCKSIZE + -(offset + 2 * tarfile.BLOCKSIZE) % tarfile.RECORDSIZE)
        tar.write(end)
        digest.update(end)
    with replacing(path.with_suffix(".idx")) as index:
        index.write(format_index(lines).encode("ascii"))
    return Shard(path.name, len(lines), offset + len(end), digest.hexdigest())


def _header(name: str, size: int) -> bytes:
    member = tarfile.TarInfo(name)  # its defaults: mode 0644, mtime, uid and gid 0
    member.size = size
    return member.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
