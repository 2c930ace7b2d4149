"""Files and folders that are written beside and renamed: whole or absent, also when several processes write them."""

import errno
import re
import stat

import pytest

from shard_builder.atomic import UNFINISHED, new_folder, new_private_file, replacing
from shard_builder.settings import InputError


def interrupted(writer, path):
    """Begin to write a file or a folder, and stop."""
    with writer(path) as made:
        if writer is new_folder:
            (made / "file").touch()
        else:
            made.write(b"half")
        raise KeyboardInterrupt


def test_a_file_appears_when_it_is_complete_and_its_folders_with_it(tmp_path):
    path = tmp_path / "a/b/file"
    with replacing(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("writer", [replacing, new_private_file])
def test_an_error_leaves_what_was_there(tmp_path, writer):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        interrupted(writer, path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"old"


def test_a_private_file_keeps_what_another_process_has_written_first(tmp_path):
    path = tmp_path / "key"
    with new_private_file(path) as file:
        file.write(b"mine")
        path.write_bytes(b"another")
    assert path.read_bytes() == b"another"
    assert [each.name for each in tmp_path.iterdir()] == ["key"]


@pytest.mark.parametrize("links", [True, False])
def test_only_its_owner_may_read_a_private_file_also_while_it_is_written(tmp_path, monkeypatch, links):
    if not links:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(PermissionError()))
    with new_private_file(tmp_path / "key") as file:
        file.write(b"mine")
        assert [stat.S_IMODE(each.stat().st_mode) for each in tmp_path.iterdir()] == [0o600]
    assert [(each.name, stat.S_IMODE(each.stat().st_mode)) for each in tmp_path.iterdir()] == [("key", 0o600)]


def test_a_folder_appears_when_it_is_complete_and_an_error_leaves_nothing(tmp_path):
    with new_folder(tmp_path / "a/b") as folder:
        (folder / "file").touch()
        assert not (tmp_path / "a/b").exists()
    assert [each.name for each in (tmp_path / "a/b").iterdir()] == ["file"]
    with pytest.raises(KeyboardInterrupt):
        interrupted(new_folder, tmp_path / "a/c")
    assert [each.name for each in (tmp_path / "a").iterdir()] == ["b"]


def test_unfinished_names_are_recognised(tmp_path):
    ours = re.compile(f"(file|folder){UNFINISHED}")
    with replacing(tmp_path / "file"), new_folder(tmp_path / "folder"):
        names = [each.name for each in tmp_path.iterdir()]
    assert len(names) == 2
    assert all(map(ours.fullmatch, [*names, "file.part"]))
    assert not any(map(ours.fullmatch, ["file", "file.parts", "file.12.part"]))


def test_a_folder_that_another_process_has_filled_meanwhile_is_kept(tmp_path):
    def write():
        with new_folder(tmp_path / "a") as folder:
            (folder / "mine").touch()
            (tmp_path / "a").mkdir()
            (tmp_path / "a/another").touch()

    with pytest.raises(InputError, match="was filled by another process"):
        write()
    assert [str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*")] == ["a", "a/another"]


@pytest.mark.parametrize("writer", [replacing, new_private_file, new_folder])
@pytest.mark.parametrize("hidden", [False, True])
def test_an_error_of_the_disk_names_the_file(tmp_path, writer, hidden):
    def write():
        with writer(tmp_path / "file"):
            try:
                raise OSError(errno.ENOSPC, "No space left on device")  # as `write` raises it
            except OSError:
                if hidden:
                    raise RuntimeError("unexpected pos 64 vs 0")  # noqa: B904 - as torch.save does
                raise

    with pytest.raises(OSError, match="No space left on device") as error:
        write()
    assert error.value.filename == str(tmp_path / "file")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "Broken pipe"), RuntimeError("of another kind")])
def test_other_errors_are_passed_on_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as passed, replacing(tmp_path / "file"):
        raise error
    assert passed.value is error
    assert getattr(error, "filename", None) is None
