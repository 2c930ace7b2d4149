"""`manifest.json`: what a shard set holds; reads and writes it, and checks the set's files against it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from shard_builder.atomic import replacing
from shard_builder.files import open_regular, read_regular
from shard_builder.index import check_index, read_index
from shard_builder.labels import bit_names
from shard_builder.settings import InputError, Progress, no_progress, usable_cores

FORMAT = 1
NAME = "manifest.json"

# Bounds of what a reader must be ready for. Without them, a small file could make it fill the memory.
MAX_BYTES = 2**28  # of a manifest: about two million images that were left out
MAX_SAMPLES = 10**8  # an id has 8 digits
MAX_SIZE = 8192  # pixels, as `BuildOptions.size` allows

Codec = Literal["png", "jpeg", "raw"]
EXTENSIONS: dict[Codec, str] = {"png": "png", "jpeg": "jpg", "raw": "raw"}  # of the image members


class OtherFormatError(InputError):
    """A set of a format version that this program cannot read. The set may be whole."""


@dataclass(frozen=True)
class Shard:
    """One tar: its file name, the number of its samples and bytes, and its SHA-256."""

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Rejected:
    """An image or folder that is in no shard: its path within the source, or a hash of it, and a short reason."""

    source: str
    reason: str


@dataclass(frozen=True)
class Manifest:
    """The contents of a shard set.

    `size` is the side of the square images in pixels. `fields` maps each label field to its sorted vocabulary, in
    the order of the multi-hot bits. `classes` are sorted; a `.target` member is an index into them. `options` are
    those that shape the content.
    """

    samples: int
    size: int
    codec: Codec
    fields: dict[str, list[str]]
    classes: list[str]
    shards: list[Shard]
    rejected: list[Rejected]
    options: dict[str, Any]
    format: int = FORMAT

    @property
    def labels(self) -> list[str]:
        """The names of the multi-hot bits in order, such as `modality=CT`."""
        return bit_names(self.fields)

    @property
    def bits(self) -> int:
        """The number of multi-hot bits of a sample."""
        return sum(map(len, self.fields.values()))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """Read the manifest in `folder`; raises `InputError` if it is missing or malformed."""
        path = folder / NAME
        try:
            content = read_regular(path, MAX_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            what = f"{folder} holds no {NAME}" if folder.is_dir() else f"no shard set at {folder}"
            raise InputError(f"{what}: make one with `modan-fast shard SOURCE`") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        return cls.parse(content, str(path))

    @classmethod
    def parse(cls, content: bytes, url: str) -> Manifest:
        """The manifest in a file's bytes; raises `InputError` naming its path or `url` if they are malformed."""
        if len(content) > MAX_BYTES:
            raise InputError(f"{url} is over {MAX_BYTES >> 20} MiB, which no manifest is: shard the source again")
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{url} is not valid JSON ({error}): shard the source again") from None
        return _from_json(found, url)

    def save(self, folder: Path) -> None:
        """Write the manifest into `folder`, atomically. Equal manifests give the same bytes.

        Raises `InputError`, and writes nothing, if the manifest would be too large to be read.
        """
        text = json.dumps({"format": self.format, **asdict(self)}, indent=1) + "\n"
        if len(text) > MAX_BYTES:
            raise InputError(
                f"the {len(self.rejected):,} images that are left out fill over {MAX_BYTES >> 20} MiB of {NAME}: shard "
                "in several sets, or pass `duplicates='keep'`"
            )
        with replacing(folder / NAME) as file:
            file.write(text.encode("ascii"))

    def check_files(self, folder: Path) -> None:
        """Compare each tar's size and each index with the manifest, without reading the tars.

        Raises `InputError` naming the first bad shard. DALI would crash on such a set without saying why.
        """
        for shard in self.shards:
            tar = folder / shard.name
            index = tar.with_suffix(".idx")
            try:
                with open_regular(tar) as file:
                    size = os.fstat(file.fileno()).st_size
                if size != shard.bytes:
                    raise InputError(
                        f"{tar} has {size:,} bytes, not the {shard.bytes:,} of its manifest: it is damaged; copy it "
                        "again or shard the source again"
                    )
                if size < shard.samples * self._least_bytes():
                    raise InputError(
                        f"{tar} has {size:,} bytes, too few for the {shard.samples:,} samples of its manifest: shard "
                        "the source again"
                    )
                check_index(read_index(tar), shard.samples, size)
            except OSError as error:
                raise InputError(
                    f"{error.filename} cannot be read ({error.strerror}): {NAME} lists {shard.name}"
                ) from None
            except InputError:
                raise
            except ValueError as error:
                raise InputError(f"{index} does not fit its shard: {error}") from None

    def _least_bytes(self) -> int:
        """The fewest bytes of a sample in a tar: what a reader allocates for a set is no more than its tars hold."""
        contents = (self.size**2 if self.codec == "raw" else 1, self.bits, 4, 1)
        return sum(tarfile.BLOCKSIZE * (1 + -(-each // tarfile.BLOCKSIZE)) for each in contents)

    def check_hashes(self, folder: Path, progress: Progress = no_progress) -> None:
        """Compare the SHA-256 of every tar with the manifest; raises `InputError` naming a damaged one."""

        def digest(shard: Shard) -> str:
            with open_regular(folder / shard.name) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()

        with ThreadPoolExecutor(usable_cores()) as pool:
            running = {pool.submit(digest, shard): shard for shard in self.shards}
            try:
                for done, future in enumerate(as_completed(running), 1):
                    tar = folder / running[future].name
                    try:
                        whole = future.result() == running[future].sha256
                    except OSError as error:
                        raise InputError(f"{tar} cannot be read: {error.strerror}") from None
                    if not whole:
                        raise InputError(
                            f"{tar} has another SHA-256 than its manifest lists: it is damaged; copy it again or "
                            "shard the source again"
                        )
                    progress("checking", done, len(running), "")
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def _from_json(found: Any, url: str) -> Manifest:
    def need(holds: bool, key: str, what: str) -> None:
        if not holds:
            raise InputError(f"{url}: {key} must be {what}: shard the source again")

    need(isinstance(found, dict), "the content", "an object")
    if (version := found.get("format")) != FORMAT or type(version) is not int:
        shown = f"{version}"[:20] if type(version) in (int, str) else "?"
        raise OtherFormatError(
            f"{url}: written by format {shown}, this version reads {FORMAT}: shard the source again, or use the "
            "version of modan-fast that wrote it"
        )
    content = {each.name: found.get(each.name) for each in fields(Manifest)}
    for key, most in (("samples", MAX_SAMPLES), ("size", MAX_SIZE)):
        need(_is_count(content[key], least=1, most=most), key, f"an integer from 1 to {most:,}")
    need(content["codec"] in get_args(Codec), "codec", "one of " + ", ".join(get_args(Codec)))
    vocabularies = content["fields"]
    need(
        isinstance(vocabularies, dict) and all(map(_is_vocabulary, vocabularies.values())),
        "fields",
        "sorted lists of texts, by field",
    )
    need(_is_vocabulary(content["classes"]), "classes", "a sorted list of texts")
    need(isinstance(content["options"], dict), "options", "an object")
    for key, kind in (("shards", Shard), ("rejected", Rejected)):
        keys = [each.name for each in fields(kind)]
        need(
            isinstance(content[key], list)
            and all(isinstance(each, dict) and set(each) == set(keys) for each in content[key]),
            key,
            f"a list of objects of {', '.join(keys)}",
        )
    for each in content["shards"]:
        # The name is joined to a folder's path: it must not lead out of the folder.
        need(_matches(r"shard-[0-9]{6,20}\.tar", each["name"]), "shards: name", "like shard-000000.tar")
        need(_is_count(each["samples"], least=1), "shards: samples", "a positive count")
        need(_is_count(each["bytes"]), "shards: bytes", "a count")
        need(_matches("[0-9a-f]{64}", each["sha256"]), "shards: sha256", "64 hexadecimal digits")
    names = [each["name"] for each in content["shards"]]
    need(len(set(names)) == len(names), "shards: name", "another for each shard")
    for each in content["rejected"]:
        need(all(isinstance(value, str) for value in each.values()), "rejected", "a list of texts")
    total = sum(each["samples"] for each in content["shards"])
    need(content["samples"] == total, "samples", "the sum of the shards' samples")
    content["shards"] = [Shard(**each) for each in content["shards"]]
    content["rejected"] = [Rejected(**each) for each in content["rejected"]]
    return Manifest(**content)


def _is_count(value: Any, *, least: int = 0, most: int = 2**63 - 1) -> bool:
    return type(value) is int and least <= value <= most


def _is_vocabulary(value: Any) -> bool:
    return (
        isinstance(value, list) and all(isinstance(each, str) for each in value) and value == sorted(set(value))
    )


def _matches(pattern: str, value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(pattern, value) is not None
