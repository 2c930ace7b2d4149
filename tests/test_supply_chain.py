"""What is published: wheel and sdist hold what git tracks and no more; their bytes are the same wherever built."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from modan_fast import __version__

ROOT = Path(__file__).parents[1]
NAME = f"modan_fast-{__version__}"
INFO = f"{NAME}.dist-info"


def tracked():
    """The files of this checkout, also those that are new, without what git ignores."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        found = subprocess.run(listing, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no git checkout")
    return sorted(name for name in found.split("\0") if name and (ROOT / name).is_file())


def build(source, out, *targets):
    """Build with hatchling, without a network."""
    for target in targets:
        command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(out)]
        subprocess.run(command, cwd=source, check=True, capture_output=True)
    return {path.name: path for path in out.iterdir()}


@pytest.fixture(scope="module")
def checkouts(tmp_path_factory):
    """Two copies of this checkout that differ in their path, modes and times, and hold things that nobody publishes."""
    copies = []
    for folder, mode, time in (("a", 0o644, 1_500_000_000), ("deep/er", 0o600, 1_600_000_000)):
        copy = tmp_path_factory.mktemp("checkout") / folder
        for name in tracked():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
            (copy / name).chmod(mode)
            os.utime(copy / name, (time, time))
        for stray in (
            "shards.key",
            "scan.dcm",
            "archive/CT/a.png",
            "modan_fast/__pycache__/x.pyc",
            ".venv/x",
            "uv.lock",
        ):
            (copy / stray).parent.mkdir(parents=True, exist_ok=True)
            (copy / stray).write_text("secret")
        copies.append(copy)
    return copies


@pytest.fixture(scope="module")
def built(checkouts, tmp_path_factory):
    """What the first copy gives: the wheel and the sdist."""
    files = build(checkouts[0], tmp_path_factory.mktemp("built"), "wheel", "sdist")
    return files[f"{NAME}-py3-none-any.whl"], files[f"{NAME}.tar.gz"]


def test_the_wheel_holds_the_two_packages_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        packed = {name for name in wheel.namelist() if not name.startswith(INFO)}
        about = {name.removeprefix(f"{INFO}/") for name in wheel.namelist() if name.startswith(INFO)}
        assert (
            wheel.read(f"{INFO}/entry_points.txt").decode()
            == "[console_scripts]\nmodan-fast = modan_fast.cli:main\n"
        )
        assert wheel.read(f"{INFO}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    own = [name for name in tracked() if name.startswith(("modan_fast/", "tools/shard_builder/"))]
    assert packed == {name.removeprefix("tools/") for name in own}
    assert {"modan_fast/py.typed", "shard_builder/py.typed"} <= packed
    assert {Path(name).suffix for name in packed} == {".py", ".typed", ".css", ".csv"}
    assert about == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_the_sdist_holds_what_git_tracks_and_nothing_else(built):
    with tarfile.open(built[1]) as sdist:
        packed = {name.removeprefix(f"{NAME}/") for name in sdist.getnames()}
        assert {(member.uid, member.uname) for member in sdist} == {(0, "")}
    assert packed == {*tracked(), "PKG-INFO"}


def test_the_same_files_give_the_same_bytes_wherever_and_whenever_they_are_built(checkouts, built, tmp_path):
    again = build(checkouts[1], tmp_path, "wheel", "sdist")
    for path in built:
        assert again[path.name].read_bytes() == path.read_bytes()


def test_the_sdist_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built[1]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    wheel = build(tmp_path / NAME, tmp_path / "out", "wheel")[built[0].name]
    assert wheel.read_bytes() == built[0].read_bytes()


def test_nothing_published_names_a_path_of_this_machine(checkouts, built):
    paths = {
        str(path).encode() for path in (ROOT, checkouts[0], Path(sys.prefix), Path.home()) if len(str(path)) > 5
    }
    with zipfile.ZipFile(built[0]) as wheel:
        contents = {name: wheel.read(name) for name in wheel.namelist()}
    with tarfile.open(built[1]) as sdist:
        contents |= {member.name: sdist.extractfile(member).read() for member in sdist if member.isfile()}
    assert not [(name, path) for name, content in contents.items() for path in paths if path in content]


CONSUMER = """
from pathlib import Path
from modan_fast import MulSupConLoss
from modan_fast.config import PretrainConfig
from shard_builder.options import BuildOptions

BuildOptions(size=64)
PretrainConfig(out=Path("run"), batch_size=8)
MulSupConLoss(temperature=0.1)
BuildOptions(size="64")
PretrainConfig(batch_size="8")
"""


def test_the_types_of_an_installed_wheel_are_seen_by_a_type_checker(built, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    find = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = subprocess.run(find, check=True, capture_output=True, text=True).stdout.strip()
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(site)
    (tmp_path / "consumer.py").write_text(CONSUMER)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--python-executable",
        python,
        "--config-file",
        os.devnull,
        "consumer.py",
    ]
    checked = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert [line.split(":")[1] for line in checked.stdout.splitlines() if ": error: " in line] == ["10", "11"], (
        checked
    )


@pytest.mark.slow  # fetches the build backend
def test_an_isolated_build_gives_the_same_bytes(checkouts, built, tmp_path):
    subprocess.run(["uv", "build", "-q", "-o", tmp_path], cwd=checkouts[1], check=True)
    for path in built:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
