"""Open a shard set: its manifest, checked against the files beside it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from shard_builder.manifest import Manifest


@dataclass(frozen=True)
class ShardSet:
    """A folder of shards whose files exist and have the sizes that its manifest states."""

    folder: Path
    manifest: Manifest

    @property
    def tars(self) -> list[Path]:
        """The shards in storage order."""
        return [self.folder / shard.name for shard in self.manifest.shards]

    @property
    def indices(self) -> list[Path]:
        """DALI's index of each shard."""
        return [tar.with_suffix(".idx") for tar in self.tars]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, and so of all the samples."""
        return hashlib.sha256((self.folder / "manifest.json").read_bytes()).hexdigest()


def open_shards(folder: Path) -> ShardSet:
    """Open the shard set in `folder`; raises `InputError` where it is missing, damaged or of another format."""
    manifest = Manifest.load(folder)
    manifest.check_files(folder)
    return ShardSet(folder, manifest)
