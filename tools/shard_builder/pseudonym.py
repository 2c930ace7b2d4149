"""Keyed hashes in place of DICOM file paths, which often name patients; and the file of the key."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from shard_builder.atomic import new_private_file
from shard_builder.settings import InputError


def key_beside(out: Path) -> Path:
    """The default file of the key of the shard set `out`: beside the set, never in it."""
    path = Path(os.path.realpath(out))
    return path.with_name(f"{path.name}.key")


def load_key(path: Path) -> bytes:
    """The key in the file `path`, 64 hexadecimal digits. A missing file is made, readable by its owner alone."""
    if not path.exists():
        with new_private_file(path) as file:
            file.write(secrets.token_hex(32).encode("ascii") + b"\n")
    text = path.read_bytes().strip() if path.is_file() and path.stat().st_size < 100 else b""
    if not re.fullmatch(rb"[0-9a-fA-F]{64}", text):
        raise InputError(
            f"{path} is not a key of 64 hexadecimal digits: choose another file with `key`; it is made if missing"
        )
    return bytes.fromhex(text.decode("ascii"))


def pseudonym(key: bytes, path: str) -> str:
    """32 hexadecimal digits for a path within the source: the first half of its HMAC-SHA256."""
    return hmac.new(key, os.fsencode(path), hashlib.sha256).hexdigest()[:32]
