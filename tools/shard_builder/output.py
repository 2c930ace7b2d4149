"""The output folder of a build: what it may hold already, the lock on it, and the swap of the old set for the new one.

`path` is the folder's real path; `out` is the path as the user wrote it, for messages. A build works in the folder
`.NAME.building` beside it, where finished work outlives a killed build. During the swap, `.NAME.replaced` is the old
set.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shard_builder.atomic import UNFINISHED, sync_folder
from shard_builder.entries import as_text
from shard_builder.manifest import NAME, Manifest
from shard_builder.settings import InputError

if sys.platform != "win32":
    import fcntl

IN_SET = re.compile(rf"(manifest\.json|report\.html|shard-\d{{6,}}\.(tar|idx)){UNFINISHED}?")
IN_BUILDING = re.compile(rf"lock|((spool|set|done)-[0-9a-f-]+){UNFINISHED}?")


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f".{path.name}.{what}")


def _foreign(folder: Path, ours: re.Pattern[str]) -> list[str]:
    """The names in `folder` that no build writes. A folder with any is never removed."""
    return sorted(name for name in os.listdir(folder) if not ours.fullmatch(name))


def check_output(path: Path, out: Path, overwrite: bool) -> None:
    """Raise `InputError`, before any work, if the output can be neither left alone nor replaced."""
    if not path.exists():
        return
    if not path.is_dir():
        raise InputError(f"{out} is a file: choose a folder with `out`")
    if os.path.ismount(path):
        raise InputError(f"{out} is a mount point, which cannot be replaced: choose a folder in it with `out`")
    if not os.listdir(path):
        return
    if foreign := _foreign(path, IN_SET):
        raise InputError(
            f"{out} holds {as_text(foreign[0])}, which does not belong to a shard set: choose another folder with `out`"
        )
    if not overwrite:
        try:
            Manifest.load(path).check_files(path)
        except InputError as error:
            raise InputError(
                f"{out} holds a damaged shard set: pass `overwrite=True` to replace it ({error})"
            ) from None


def existing_set(path: Path, out: Path, options: Mapping[str, Any]) -> Manifest | None:
    """The manifest of a finished set at `path`, made with `options`; raises `InputError` for a set with others."""
    if not (path / NAME).exists():
        return None
    existing = Manifest.load(path)
    if existing.options == options:
        return existing
    # The source comes last: its digest is of the chosen images, so another seed changes it too.
    names = sorted([*options, *existing.options], key=lambda name: name == "source")
    name = next(name for name in names if existing.options.get(name) != options.get(name))
    other = "source" if name == "source" else f"{name}: {existing.options.get(name)}, not {options.get(name)}"
    raise InputError(
        f"{out} holds a shard set of another {other}: pass `overwrite=True` to replace it, or choose another folder "
        "with `out`"
    )


@contextmanager
def building(path: Path, out: Path) -> Iterator[Path]:
    """A folder beside `path` to work in, locked for this process.

    It is removed once the work is done. On an error it stays unless it is empty: the next build uses what is finished
    in it, and nothing else. Raises `InputError` if nothing can be written there.
    """
    folder = _beside(path, "building")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from None
    with _locked(folder / "lock", out):
        try:
            if foreign := _foreign(folder, IN_BUILDING):
                raise InputError(
                    f"{folder} holds {as_text(foreign[0])}, which does not belong to a build: move it away"
                )
            yield folder
            clear(folder)
        finally:
            # The lock goes last. From then on another build may use the folder, and makes a lock of its own in it.
            with suppress(OSError):
                (folder / "lock").unlink(missing_ok=True)
                folder.rmdir()


def clear(folder: Path) -> None:
    """Remove what a build has left in the folder it works in, except its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


def _unwritable(out: Path, error: OSError) -> InputError:
    return InputError(
        f"nothing can be written to {out}: {error.filename} cannot be made ({error.strerror}); choose another folder "
        "with `out`"
    )


@contextmanager
def _locked(path: Path, out: Path) -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    another = InputError(f"another build is writing to {out}: wait for it, or choose another folder with `out`")
    try:
        # Opened for writing, because NFS locks no other files. A link in its place is not followed.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except FileNotFoundError:  # its owner has finished, and removed the folder
        raise another from None
    except OSError as error:
        raise _unwritable(out, error) from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Since it was opened, its owner may have finished and removed it.
            mine = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        except BlockingIOError:
            mine = False
        except OSError:
            mine = True  # the file system has no locks
        if not mine:
            raise another
        yield
    finally:
        os.close(descriptor)


def replace_set(new: Path, path: Path) -> None:
    """Move the finished set `new` to `path`, and remove the set that is there."""
    aside = _beside(path, "replaced")
    if path.exists():
        _remove_set(aside)
        os.replace(path, aside)
    try:
        os.replace(new, path)
    except BaseException:
        if aside.exists():
            os.replace(aside, path)
        raise
    sync_folder(path.parent)
    _remove_set(aside)


def recover(path: Path) -> None:
    """Finish or undo a swap during which a build was killed. Only for the build that holds the lock."""
    aside = _beside(path, "replaced")
    if aside.exists():
        if path.exists():
            _remove_set(aside)
        else:
            os.replace(aside, path)


def _remove_set(folder: Path) -> None:
    if folder.exists() and not _foreign(folder, IN_SET):
        shutil.rmtree(folder)
