"""Verify a finished shard set against FORMATS.md: every byte of its tars, its indices, labels and images."""

from __future__ import annotations

import hashlib
import io
import json
import struct
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from shard_builder.image import ImageError, check_png
from shard_builder.index import Member, parse_index
from shard_builder.labels import multi_hot
from shard_builder.manifest import EXTENSIONS, NAME, Manifest, OtherFormatError, Shard
from shard_builder.settings import InputError, Progress, no_progress, usable_cores
from shard_builder.workers import Job, workers_of
from shard_builder.writer import member_header, tar_end


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
    slim = replace(manifest, shards=[], rejected=[])  # it is sent with each job
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
    return VerifyResult(
        manifest.samples, len(manifest.shards), sum(shard.bytes for shard in manifest.shards), lines
    )


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
    try:
        lines = parse_index(index.read_text("ascii"))
    except ValueError as error:
        raise DamageError(f"its index {index.name} is damaged: {error}") from None
    if len(lines) != shard.samples:
        raise DamageError(f"its index {index.name} has {len(lines)} samples, {NAME} {shard.samples}")
    digest, offset = hashlib.sha256(), 0
    extensions = (EXTENSIONS[manifest.codec], "labels", "target", "json")
    with open(tar, "rb") as file:
        for sample, line in enumerate(lines, first):
            contents = {}
            for number, extension in enumerate(extensions):
                name = f"{sample:08}.{extension}"
                size = line[number].size if number < len(line) else 0
                if line[number : number + 1] != [Member(extension, offset + tarfile.BLOCKSIZE, size, name)]:
                    raise DamageError(f"{name}: its entry in the index {index.name} is wrong")
                block = _read_member(file, name, size, most=shard.bytes)
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


def _read_member(file: BinaryIO, name: str, size: int, *, most: int) -> bytes:
    """The next member with its header and padding; reads at most `most` bytes."""
    length = tarfile.BLOCKSIZE + size + -size % tarfile.BLOCKSIZE
    block = file.read(min(length, most))
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
        check_image(contents[image], manifest)
    except DamageError as damage:
        raise DamageError(f"{key}.{image}: {damage}") from None
    try:
        metadata = json.loads(contents["json"])
        fields, category, source = (metadata[name] for name in ("fields", "class", "source"))
        whole = isinstance(source, str) and isinstance(fields, dict) and set(fields) <= set(manifest.fields)
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise DamageError(f"{key}.json: is not an object with fields, class and source")
    try:
        labels = multi_hot(fields, manifest.fields).tobytes()
    except ValueError:
        raise DamageError(f"{key}.json: a value of its fields is not in {NAME}") from None
    if contents["labels"] != labels:
        raise DamageError(f"{key}.labels: are not the bits of the fields in {key}.json")
    if category not in manifest.classes:
        raise DamageError(f"{key}.json: its class is not in {NAME}")
    if contents["target"] != struct.pack("<i", manifest.classes.index(category)):
        raise DamageError(f"{key}.target: is not the class in {key}.json")


def check_image(data: bytes, manifest: Manifest) -> None:
    """Raise `DamageError` unless `data` is a whole grey image of the set's codec and size."""
    if manifest.codec == "raw":
        if len(data) != manifest.size**2:
            raise DamageError(f"has {len(data):,} bytes, not {manifest.size}²")
        return
    size = (manifest.size, manifest.size)
    try:
        opened = Image.open(io.BytesIO(data), formats=(manifest.codec.upper(),))
        if manifest.codec == "png":
            check_png(data)
        if opened.mode != "L" or opened.size != size:
            raise DamageError(
                f"is {opened.width} x {opened.height} {opened.mode}, not {size[0]} x {size[1]} grey"
            )
        opened.load()
    except DamageError:
        raise
    except ImageError as error:
        raise DamageError(str(error)) from None
    except Exception as error:  # damaged files raise errors of any type
        raise DamageError(f"cannot be decoded as {manifest.codec}: {type(error).__name__}") from None
