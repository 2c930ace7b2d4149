"""A shard set, in a folder or behind a URL: its manifest, checked against the files beside it; its shards' bytes."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
from numpy.typing import NDArray

from modan_fast.config import is_url
from modan_fast.remote import fetch, shown_file, shown_location
from shard_builder.files import open_regular, read_regular
from shard_builder.index import first_places, read_index
from shard_builder.manifest import MAX_BYTES, NAME, Manifest
from shard_builder.settings import InputError


@dataclass(frozen=True)
class ShardSet:
    """An open shard set.

    `location` is a folder, whose files exist and have the sizes that the manifest states, or a URL. `fingerprint` is
    the SHA-256 of the manifest, and so identifies all samples.
    """

    location: str
    manifest: Manifest
    fingerprint: str

    @property
    def shown_location(self) -> str:
        """`location` for messages, without passwords."""
        return shown_location(self.location)

    @property
    def remote(self) -> bool:
        """Whether the set lies behind a URL."""
        return is_url(self.location)

    @property
    def counts(self) -> list[int]:
        """The number of samples in each shard."""
        return [shard.samples for shard in self.manifest.shards]

    def shown(self, number: int) -> str:
        """Where a shard lies, numbered in storage order, for people."""
        name = self.manifest.shards[number].name
        return shown_file(self.location, name) if self.remote else str(Path(self.location) / name)

    def read(self, number: int, stop: threading.Event | None = None) -> bytes:
        """The bytes of a shard, numbered in storage order; they have the size and SHA-256 that the manifest lists.

        Raises `InputError` if the file is missing, another, or does not arrive, and `CancelledError` soon after `stop`
        is set.
        """
        shard = self.manifest.shards[number]
        if self.remote:
            return fetch(self.location, shard.name, most=shard.bytes, sha256=shard.sha256, stop=stop)
        tar = Path(self.location) / shard.name
        try:
            content = read_regular(tar, shard.bytes)
        except OSError as error:
            raise InputError(f"{tar} cannot be read ({error.strerror}): {NAME} lists it") from None
        if hashlib.sha256(content).hexdigest() != shard.sha256:
            raise InputError(
                f"{tar} has another SHA-256 than its manifest lists: it is damaged; copy it again or shard the source "
                "again"
            )
        return content

    def open(self, number: int) -> BufferedReader:
        """A shard of a folder, numbered in storage order, to be read from any offset.

        Raises `InputError` if it cannot be opened or does not have the size that the manifest lists.
        """
        shard = self.manifest.shards[number]
        tar = Path(self.location) / shard.name
        try:
            file = open_regular(tar)
        except OSError as error:
            raise InputError(f"{tar} cannot be read ({error.strerror}): {NAME} lists it") from None
        if (size := os.fstat(file.fileno()).st_size) != shard.bytes:
            file.close()
            raise InputError(
                f"{tar} has {size:,} bytes, not the {shard.bytes:,} of its manifest: it is damaged; copy it again or "
                "shard the source again"
            )
        return file

    def places(self, number: int) -> NDArray[np.int64]:
        """Offset and size (samples, 2) of the images in a shard of a folder, from the index beside it.

        Raises `InputError` if the index cannot be read or is malformed.
        """
        shard = self.manifest.shards[number]
        index = (Path(self.location) / shard.name).with_suffix(".idx")
        try:
            return first_places(read_index(index), shard.samples)
        except OSError as error:
            raise InputError(f"{index} cannot be read ({error.strerror}): it belongs to {shard.name}") from None
        except ValueError as error:
            raise InputError(f"{index} does not fit its shard: {error}; shard the source again") from None


def open_shards(location: str | Path) -> ShardSet:
    """Open a shard set: a folder, or a URL.

    http and https are read here, other schemes by the webdataset library. A `pipe:` URL is a command that prints a
    file; `{}` in it stands for the file's name. To any other URL the name is appended. Raises `InputError` if the set
    is missing, damaged or of another format.
    """
    location = str(location)
    if location.startswith("file:"):
        parts = urlsplit(location)
        if parts.netloc not in ("", "localhost"):
            raise InputError(f"`shards={location}` names a file of another machine: pass its folder")
        location = url2pathname(parts.path)
    if is_url(location):
        content = fetch(location, NAME, most=MAX_BYTES)
        manifest = Manifest.parse(content, shown_file(location, NAME))
    else:
        folder = Path(location)
        try:
            content = read_regular(folder / NAME, MAX_BYTES)
        except OSError:
            Manifest.load(folder)  # raises `InputError`, which says what is missing
            raise
        manifest = Manifest.parse(content, str(folder / NAME))
        manifest.check_files(folder)
    return ShardSet(location, manifest, hashlib.sha256(content).hexdigest())


def first_line(error: BaseException) -> str:
    """The error's message, cut to one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
