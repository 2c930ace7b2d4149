"""Names for DICOM files, whose paths often name patients: a keyed hash that only the key's owner can follow back."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from pathlib import Path

from shard_builder.settings import InputError


def key_beside(out: Path) -> Path:
    """Where the key of the shard set `out` lies unless the user names another place: beside it, never within."""
    place = Path(os.path.realpath(out))
    return place.with_name(f"{place.name}.key")


def load_key(path: Path) -> bytes:
    """The key in the file `path`, 64 hexadecimal digits; it is made, for its owner alone, where there is none."""
    if not path.exists():
        _make_key(path)
    text = path.read_bytes().strip() if path.is_file() else b""
    if not re.fullmatch(rb"[0-9a-fA-F]{64}", text):
        raise InputError(f"{path} is no key of 64 hexadecimal digits: name another `key`, it is made if missing")
    return bytes.fromhex(text.decode("ascii"))


def _make_key(path: Path) -> None:
    """Write a new key, whole or not at all; one that another build has made in the meantime stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with open(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_hex(32) + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(beside, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def pseudonym(key: bytes, path: str) -> str:
    """32 hexadecimal digits for a path within the source: the first half of its HMAC-SHA256."""
    return hmac.new(key, os.fsencode(path), hashlib.sha256).hexdigest()[:32]
