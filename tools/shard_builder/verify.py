"""Verify a finished shard set against FORMATS.md: every byte of its tars, its indices, labels and images."""

from __future__ import annotations

import hashlib
import json
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from shard_builder.files import open_regular
from shard_builder.image import MAX_BYTES, ImageError, open_stored
from shard_builder.index import Member, parse_index, read_index
from shard_builder.labels import multi_hot, position
from shard_builder.manifest import EXTENSIONS, NAME, Manifest, OtherFormatError, Shard
from shard_builder.settings import InputError, Progress, no_progress, printable, usable_cores
from shard_builder.workers import Job, workers_of
from shard_builder.writer import member_header, tar_end

MAX_JSON = 2**24  # bytes of a sample's metadata


class DamageError(ValueError):
    """What is wrong, in one line that begins with the member's name if it is in a member."""


@dataclass(frozen=True)
class VerifyResult:
    """What a shard set holds, and its damage: a line for each bad file, naming its first bad member."""

    samples: int
    shards: int
    bytes: int
    damage: list[str]


def verify(folder: Path, *, workers: int | None = None, progress: Progress = no_progress) -> VerifyResult:
    """Check everything that FORMATS.md promises of the shard set in `folder`, on all cores or with `workers` processes.

    For each shard: its size and SHA-256; each entry of its index; each member's offset, header and padding; each
    image's checksums, size and decoding; and that labels and target agree with the `.json`. Raises `InputError` if
    there is no shard set, or one of another format version.
    """
    try:
        manifest = Manifest.load(folder)
    except OtherFormatError:
        raise
    except InputError as error:
        if not (folder / NAME).is_file():
            raise
        return VerifyResult(0, 0, 0, [str(error)])
    damage: dict[int, str] = {}
    slim = replace(manifest, shards=[], rejected=[], options={})  # it is sent with each job
    jobs, first = [], 0
    for number, shard in enumerate(manifest.shards):
        jobs.append(Job(number, (folder, shard, first, slim)))
        first += shard.samples
    done = 0
    with workers_of(min(workers or usable_cores(), len(jobs))) as pool:
        for number, found in pool.finish(check_shard, jobs):
            shard = manifest.shards[number]
            if found != "":
                damage[number] = f"{shard.name}: {found or 'the worker died three times while checking it'}"
            done += shard.samples
            progress("verifying", done, manifest.samples, f"{len(damage)} damaged" if damage else "")
    lines = [damage[number] for number in sorted(damage)] + _unlisted(folder, manifest)
    total = sum(shard.bytes for shard in manifest.shards)
    return VerifyResult(manifest.samples, len(manifest.shards), total, [printable(line) for line in lines])


def _unlisted(folder: Path, manifest: Manifest) -> list[str]:
    """A line for each tar or index that is not in the manifest: a reader of all tars in the folder would read it."""
    listed = {shard.name for shard in manifest.shards}
    return [
        f"{path.name}: is not in {NAME}"
        for path in sorted([*folder.glob("*.tar"), *folder.glob("*.idx")])
        if path.with_suffix(".tar").name not in listed
    ]


def check_shard(folder: Path, shard: Shard, first: int, manifest: Manifest) -> str:
    """What is wrong with the shard whose first sample has the id `first`, or the empty text."""
    try:
        _check_tar(folder / shard.name, shard, first, manifest)
    except DamageError as damage:
        return str(damage)
    except OSError as error:
        which = "its index " if str(error.filename).endswith(".idx") else ""
        return f"{which}cannot be read: {error.strerror}"
    return ""


def _check_tar(tar: Path, shard: Shard, first: int, manifest: Manifest) -> None:
    index = tar.with_suffix(".idx")
    digest, offset = hashlib.sha256(), 0
    # A member's most bytes.
    extensions = {EXTENSIONS[manifest.codec]: MAX_BYTES, "labels": manifest.bits, "target": 4, "json": MAX_JSON}
    with open_regular(tar) as file:
        for sample, line in enumerate(_index_lines(tar, shard.samples), first):
            contents = {}
            for number, (extension, most) in enumerate(extensions.items()):
                name = f"{sample:08}.{extension}"
                size = line[number].size if number < len(line) else 0
                if line[number : number + 1] != [Member(extension, offset + tarfile.BLOCKSIZE, size, name)]:
                    raise DamageError(f"{name}: its entry in the index {index.name} is wrong")
                if size > most:
                    raise DamageError(f"{name}: has {size:,} bytes, over {most:,}")
                block = _read_member(file, name, size)
                digest.update(block)
                contents[extension] = block[tarfile.BLOCKSIZE : tarfile.BLOCKSIZE + size]
                offset += len(block)
            if len(line) > len(extensions):
                raise DamageError(f"{sample:08}.json: the index {index.name} has more entries after it")
            _check_sample(f"{sample:08}", contents, manifest)
        if (end := file.read(2 * tarfile.RECORDSIZE)) != tar_end(offset):
            raise DamageError(f"it does not end after {sample:08}.json")
    digest.update(end)
    if digest.hexdigest() != shard.sha256 or offset + len(end) != shard.bytes:
        raise DamageError(f"its size or SHA-256 differs from {NAME}, though each of its members is well-formed")


def _index_lines(tar: Path, samples: int) -> Iterator[list[Member]]:
    """The members of each sample as the index lists them."""
    index = tar.with_suffix(".idx")
    try:
        text = read_index(tar)
        lines = parse_index(text)
        if (count := text.count("\n") - 1) != samples:
            raise DamageError(f"its index {index.name} has {count} samples, {NAME} {samples}")
        yield from lines
    except DamageError:
        raise
    except ValueError as error:
        raise DamageError(f"its index {index.name} is damaged: {error}") from None


def _read_member(file: BinaryIO, name: str, size: int) -> bytes:
    """The next member with its header and padding."""
    length = tarfile.BLOCKSIZE + size + -size % tarfile.BLOCKSIZE
    block = file.read(length)
    if len(block) < length:
        raise DamageError(f"{name}: the tar ends within it")
    if block[: tarfile.BLOCKSIZE] != member_header(name, size):
        raise DamageError(f"{name}: its tar header is damaged")
    if any(block[tarfile.BLOCKSIZE + size :]):
        raise DamageError(f"{name}: the padding after it is not empty")
    return block


def _check_sample(key: str, contents: dict[str, bytes], manifest: Manifest) -> None:
    """Check the contents of a sample's members, by extension, against each other."""
    image = EXTENSIONS[manifest.codec]
    try:
        open_stored(contents[image], manifest.codec, manifest.size)
    except ImageError as damage:
        raise DamageError(f"{key}.{image}: {damage}") from None
    try:
        metadata = json.loads(contents["json"])
        fields, category, source = (metadata[name] for name in ("fields", "class", "source"))
        whole = isinstance(fields, dict) and fields.keys() <= manifest.fields.keys()
        whole = whole and all(isinstance(each, str) for each in (category, source, *fields.values()))
    except (ValueError, KeyError, TypeError, RecursionError):
        whole = False
    if not whole:
        raise DamageError(f"{key}.json: is not an object with fields, class and source")
    try:
        labels = multi_hot(fields, manifest.fields).tobytes()
    except ValueError:
        raise DamageError(f"{key}.json: a value of its fields is not in {NAME}") from None
    if contents["labels"] != labels:
        raise DamageError(f"{key}.labels: are not the bits of the fields in {key}.json")
    try:
        target = position(manifest.classes, category)
    except ValueError:
        raise DamageError(f"{key}.json: its class is not in {NAME}") from None
    if contents["target"] != struct.pack("<i", target):
        raise DamageError(f"{key}.target: is not the class in {key}.json")
