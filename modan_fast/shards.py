"""A shard set, in a folder or behind a URL: its manifest, checked against the files beside it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from shard_builder.manifest import NAME, Manifest
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
    def remote(self) -> bool:
        """Whether the set lies behind a URL."""
        return is_url(self.location)

    @property
    def counts(self) -> list[int]:
        """The number of samples in each shard."""
        return [shard.samples for shard in self.manifest.shards]

    def shard_url(self, number: int) -> str:
        """The URL of a shard, numbered in storage order, for the webdataset library."""
        return url_of(self.location, self.manifest.shards[number].name)


def open_shards(location: str | Path) -> ShardSet:
    """Open a shard set: a folder, or a URL that the webdataset library can open.

    A `pipe:` URL is a command that prints a file; `{}` in it stands for the file's name. To any other URL the name is
    appended. Raises `InputError` if the set is missing, damaged or of another format.
    """
    location = str(location)
    if is_url(location):
        content = _fetched(url_of(location, NAME))
        manifest = Manifest.parse(content, url_of(location, NAME))
    else:
        folder = Path(location)
        manifest = Manifest.load(folder)
        manifest.check_files(folder)
        content = (folder / NAME).read_bytes()
    return ShardSet(location, manifest, hashlib.sha256(content).hexdigest())


def is_url(location: str) -> bool:
    """Whether `location` begins with a URL's scheme; a single letter is a Windows drive."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", location) is not None


def url_of(location: str, name: str) -> str:
    """The URL of the file `name` of the shard set at `location`."""
    if not is_url(location):
        return (Path(location).absolute() / name).as_uri()
    if location.startswith("pipe:"):
        if "{}" not in location:
            raise InputError(f"`shards={location}` must have {{}} where the file's name belongs")
        return location.replace("{}", name)
    return f"{location.rstrip('/')}/{name}"


def _fetched(url: str) -> bytes:
    from webdataset.gopen import gopen

    try:
        with gopen(url) as stream:
            return bytes(stream.read())
    except Exception as error:  # the library raises anything, and so does the program that it starts
        raise InputError(f"no shard set at {url}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The error's message, cut to one line."""
    return next(iter(str(error).splitlines()), type(error).__name__)[:300]
