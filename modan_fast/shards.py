"""Open a shard set, in a folder or behind a URL: its manifest, checked against the files beside it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from shard_builder.manifest import NAME, Manifest
from shard_builder.settings import InputError


@dataclass(frozen=True)
class ShardSet:
    """What a shard set holds, and where.

    `place` is a folder, whose files exist and have the sizes that the manifest states, or a URL. `fingerprint` is
    the SHA-256 of the manifest, and so of all the samples.
    """

    place: str
    manifest: Manifest
    fingerprint: str

    @property
    def remote(self) -> bool:
        """Whether the set lies behind a URL."""
        return is_url(self.place)

    @property
    def counts(self) -> list[int]:
        """The samples of each shard."""
        return [shard.samples for shard in self.manifest.shards]

    def url(self, number: int) -> str:
        """A shard, counted in storage order, as the webdataset library opens it."""
        return url_of(self.place, self.manifest.shards[number].name)


def open_shards(place: str | Path) -> ShardSet:
    """Open the shard set at `place`: a folder, or a URL that the webdataset library knows.

    A `pipe:` URL is a command that prints a file, whose name it has as `{}`; to any other URL the name is added.
    Raises `InputError` where the set is missing, damaged or of another format.
    """
    place = str(place)
    if is_url(place):
        content = _fetched(url_of(place, NAME))
        manifest = Manifest.parse(content, url_of(place, NAME))
    else:
        folder = Path(place)
        manifest = Manifest.load(folder)
        manifest.check_files(folder)
        content = (folder / NAME).read_bytes()
    return ShardSet(place, manifest, hashlib.sha256(content).hexdigest())


def is_url(place: str) -> bool:
    """Whether `place` begins with a URL's scheme; a single letter is a drive of Windows."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", place) is not None


def url_of(place: str, name: str) -> str:
    """The URL of a file of the shard set at `place`."""
    if not is_url(place):
        return (Path(place).absolute() / name).as_uri()
    if place.startswith("pipe:"):
        if "{}" not in place:
            raise InputError(f"--shards {place} must have {{}} where the name of a file goes")
        return place.replace("{}", name)
    return f"{place.rstrip('/')}/{name}"


def _fetched(url: str) -> bytes:
    from webdataset.gopen import gopen

    try:
        with gopen(url) as stream:
            return bytes(stream.read())
    except Exception as error:  # whatever the library, or the program that it starts, makes of it
        raise InputError(f"no shard set at {url}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """What went wrong, on one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
