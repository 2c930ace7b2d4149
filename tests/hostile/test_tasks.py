"""Fold files and images of a task from a stranger."""

from __future__ import annotations

import io
import itertools
import os
import random
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modan_fast.downstream import listing
from modan_fast.downstream.tasks import decode, read_task
from shard_builder.settings import InputError

NAMES = [f"images/{index}.png" for index in range(10)]
VALUES = [
    *("", " ", "0", "1", "-1", "NaN", "Infinity", "1e400", str(2**63), "9" * 5000, "x" * 300, "x" * 10_000),
    *("../task/images/0.png", "images/../images/0.png", "images/../../secret.png", "/etc/passwd", "//host/share"),
    *(
        "C:\\x.png",
        "images",
        "images/",
        ".",
        "..",
        "~",
        "file:///etc/passwd",
        "http://localhost/x.png",
        "pipe:touch x",
    ),
    *("images/fifo.png", "images/zero.png", "images/loop.png", "images/folder.png", "images/elsewhere.png"),
    *(
        "images/gone.png",
        "images/0.png\0",
        "images\\0.png",
        "\0",
        "\x1b[31mred",
        "a\nb",
        "a\rb",
        '"',
        '"a',
        "a,b",
    ),
    *(
        "\u202eimages/0.png",
        "\u2028",
        "\ufeffimages/0.png",
        "é",
        "日本",
        "=cmd|' /C calc'!A0",
        "<script>",
        "$\\frac",
    ),
    *(
        "[red]x[/red]",
        "%s%n",
        "{0}",
        "${HOME}",
        "$(touch x)",
        "`touch x`",
        "; touch x",
        "benign",
        "MALIGNANT",
        "yes",
    ),
]


def lines() -> list[list[str]]:
    return [[name, ("benign", "malignant")[index % 2], f"p{index}"] for index, name in enumerate(NAMES)]


def as_csv(header: str, rows: list[list[str]], quoted: bool = False) -> bytes:
    cells = [[f'"{cell}"' if quoted else cell for cell in row] for row in rows]
    return "\n".join([header, *map(",".join, cells), ""]).encode("utf-8", "surrogatepass")


def write_task(folder: Path) -> Path:
    task = folder / "task"
    (task / "images" / "folder.png").mkdir(parents=True)
    (task / "dataframe").mkdir()
    for index, name in enumerate(NAMES):
        Image.new("L", (8, 8), 20 * index).save(task / name)
    os.mkfifo(task / "images" / "fifo.png")
    (task / "images" / "zero.png").symlink_to("/dev/zero")
    (task / "images" / "loop.png").symlink_to("loop.png")
    (task / "images" / "elsewhere.png").symlink_to(task / "images" / "3.png")
    for split in ("train", "val", "test"):
        for fold in range(1, 6):
            (task / "dataframe" / f"{split}_fold{fold}.csv").write_bytes(
                as_csv("filename,label,patient", lines())
            )
    return task


def mutated(content: bytes, chance: random.Random) -> bytes:
    """`content` with some bytes changed, cut, inserted or repeated."""
    at, to = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    some = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 8)))
    other = chance.choice([b"\0", b"\xff\xfe", b'"', b",", b"\n", b"\r", b"../", some])
    return chance.choice(
        [
            content[:at] + some + content[at + len(some) :],
            content[:at] + other + content[at:],
            content[:at] + content[to:],
            content[:to] + content[at:],
            content[:at],
        ]
    )


def fold_files() -> list[bytes]:
    whole = as_csv("filename,label,patient", lines())
    cases = [b"", b"\0" * 100, b"\xef\xbb\xbf" + whole, whole.decode().encode("utf-16"), whole * 2, b"\n" * 1000]
    cases += [b"a," * 200_000, b'"' + b"a" * 200_000, as_csv("filename,label", []), b"filename,label,patient"]
    for value in VALUES:
        for quoted in (False, True):
            for column in range(3):
                for row in (0, 9):
                    changed = lines()
                    changed[row][column] = value
                    cases.append(as_csv("filename,label,patient", changed, quoted))
            rows = [[*row, value] for row in lines()]
            cases += [as_csv(f"filename,label,patient,{value}", rows, quoted)]
            cases += [as_csv(header, lines()) for header in (value, f"{value},label", f"filename,{value}")]
            cases += [as_csv("filename,filename,label", [[value, *row[:2]] for row in lines()], quoted)]
    chance = random.Random(0)
    return cases + [mutated(whole, chance) for _ in range(1100)]


def test_no_fold_file_does_harm(survives) -> None:
    cases = fold_files()
    assert len(cases) >= 2000

    def write(case: tuple[int, bytes], folder: Path) -> None:
        if not (folder / "task").exists():
            write_task(folder)
        (folder / "task" / "dataframe" / "train_fold1.csv").write_bytes(case[1])

    def use(folder: Path) -> None:
        read_task(folder / "task", group="patient")

    accepted, refused = survives(enumerate(cases), write, use)
    print(f"fold files: {accepted} accepted, {refused} refused")
    assert accepted > 50
    assert refused > 1000


COLUMNS = "path,edema,mass,split,site,patient"
CHOICES = [
    *({"group": "patient"}, {"subgroup": ["site"]}, {"leave_out": "site"}, {"columns": ["mass"]}),
    *({"words": "positive=1,negative=0"}, {"columns": ["mass", "edema"]}),
]


def table_lines() -> list[list[str]]:
    splits = ("train", "train", "train", "val", "test")
    return [
        [name, str(index % 2), str(index // 2 % 2), splits[index // 2], f"s{index % 2}", f"p{index}"]
        for index, name in enumerate(NAMES)
    ]


def tables() -> list[bytes]:
    whole = as_csv(COLUMNS, table_lines())
    without = as_csv("path,edema,mass,dev,site,patient", table_lines())
    cases = [b"", b"\0" * 100, b"\xef\xbb\xbf" + whole, whole.decode().encode("utf-16"), whole * 2, b"\n" * 1000]
    cases += [whole, without, b"a," * 200_000, b'"' + b"a" * 200_000, as_csv(COLUMNS, []), COLUMNS.encode()]
    # As many columns of labels, of folds, and of values of each column, as a table can hold.
    cases.append(
        as_csv(",".join(["path", *map(str, range(2000))]), [[name] + ["0", "1"] * 1000 for name in NAMES])
    )
    cases += [as_csv("path,label,fold", [[name, "01"[n % 2], str(n)] for n, name in enumerate(NAMES)])]
    for value in [*VALUES, "fold", "label", "split", "-1", "2", "2" * 30]:
        for quoted in (False, True):
            for column in range(6):
                changed = table_lines()
                changed[3][column] = value
                cases.append(as_csv(COLUMNS, changed, quoted))
            for column in range(6):
                names = COLUMNS.split(",")
                names[column] = value
                cases.append(as_csv(",".join(names), table_lines(), quoted))
            cases.append(as_csv(f"path,label,{value}", [[*row[:2], value] for row in table_lines()], quoted))
            cases.append(
                as_csv("path,label", [[name, f"{value}{n % 4}"] for n, name in enumerate(NAMES)], quoted)
            )
            cases.append(as_csv("path,label,fold", [[*row[:2], value] for row in table_lines()], quoted))
    chance = random.Random(1)
    return cases + [mutated(chance.choice([whole, without]), chance) for _ in range(1100)]


def test_no_table_of_a_task_does_harm(survives) -> None:
    cases = list(enumerate(tables()))
    assert len(cases) >= 2000

    def write(case: tuple[int, bytes], folder: Path) -> None:
        if not (folder / "task").exists():
            write_task(folder)
        (folder / "task" / "table.csv").unlink(missing_ok=True)  # to cut a file short takes longer than a new one
        (folder / "task" / "table.csv").write_bytes(case[1])

    chosen = itertools.cycle(CHOICES)

    def use(folder: Path) -> None:
        read_task(folder / "task" / "table.csv", **next(chosen))

    accepted, refused = survives(cases, write, use)
    print(f"tables: {accepted} accepted, {refused} refused")
    assert accepted > 50
    assert refused > 1000


def arrays() -> dict[str, np.ndarray]:
    chance = np.random.default_rng(0)
    content = {}
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        content[f"{split}_images"] = chance.integers(0, 256, (count, 4, 4), dtype=np.uint8)
        content[f"{split}_labels"] = (np.arange(count) % 2).reshape(-1, 1).astype(np.uint8)
    return content


def npy(content: object, version: tuple[int, int] = (1, 0), header: bytes | None = None) -> bytes:
    """An array as numpy writes it; or with another text as its header."""
    file = io.BytesIO()
    if header is None:
        np.lib.format.write_array(file, np.asarray(content), version, allow_pickle=True)
        return file.getvalue()
    size = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
    return b"\x93NUMPY" + bytes(version) + size + header + np.asarray(content).tobytes()


def npz(members: dict[str, bytes], kind: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return file.getvalue()


def npz_files() -> list[bytes]:
    whole = {name: npy(array) for name, array in arrays().items()}
    stored, deflated = npz(whole), npz(whole, zipfile.ZIP_DEFLATED)
    cases = [
        b"",
        b"PK",
        stored,
        deflated,
        npz(whole, zipfile.ZIP_BZIP2),
        npz(whole, zipfile.ZIP_LZMA),
        stored * 2,
    ]
    cases += [
        b"x" * 1000 + stored,
        npz({}),
        npz(dict(reversed(whole.items()))),
        stored[:-1],
        b"PK\5\6" + bytes(18),
    ]
    other = [np.float32(0), np.int64(3), b"text", "text", object(), True, 1j, np.datetime64("2020-01-01"), np.nan]
    shapes = [
        (),
        (0,),
        (12,),
        (12, 0),
        (1, 12),
        (12, 1),
        (12, 4),
        (12, 4, 4),
        (12, 4, 4, 1),
        (12, 4, 4, 3),
        (12, 4, 4, 4),
    ]
    shapes += [
        (11, 4, 4),
        (13, 4, 4),
        (12, 2),
        (12, 3),
        (12, 1, 1),
        (1,) * 9,
        (3, 4, 4),
        (12, 9000, 1),
        (12, 2000),
    ]
    texts = ["", "{}", "None", "1", "'x'", "[]", "(" * 5000, "{" * 5000, "'" * 3, "{'descr': '|u1'}", "\0", "\n"]
    texts += ["__import__('os').system('touch x')", "lambda: 0", "-" * 9000 + "1", "{'descr': '|u1', " * 900]
    fields = {
        "descr": [
            "'|O'",
            "'|u1'",
            "'<U9999999'",
            "'|V0'",
            "[('a', '|u1')]",
            "('|u1', (3,))",
            "'<f8'",
            "None",
            "'x'",
            "1",
        ],
        "fortran_order": ["True", "False", "None", "1", "'x'", "[]"],
        "shape": [
            "(12, 4, 4)",
            "(2**63,)",
            f"({10**400},)",
            "(-12, 4, 4)",
            "(12.0, 4, 4)",
            "None",
            "12",
            "(True, 4, 4)",
        ],
    }
    fields["shape"] += [
        "(10**6, 8000, 8000)",
        "(1000000, 8000, 8000)",
        "('12', 4, 4)",
        "((12,), 4)",
        "(nan,)",
        "(0, 4, 4)",
    ]
    valid = {"descr": "'|u1'", "fortran_order": "False", "shape": "(12, 4, 4)"}
    headers = [text.encode() for text in texts]
    for key, values in fields.items():
        headers += [
            repr({**valid, key: 0}).replace(f"'{key}': 0", f"'{key}': {value}").encode() for value in values
        ]
    headers += [repr({**valid, "more": 1}).encode(), b"\xff\xfe\xfd", b"\x1b[31m", "\u202e".encode()]
    for name, array in arrays().items():
        cases.append(npz({each: content for each, content in whole.items() if each != name}))
        for version in ((1, 0), (2, 0), (3, 0), (9, 9)):
            for header in headers:
                cases.append(npz({**whole, name: npy(array, version, header)}))
        for value in other:
            cases.append(npz({**whole, name: npy(value)}))
            cases.append(npz({**whole, name: npy(np.full(array.shape, value))}))
        for shape in shapes:
            for kind in (np.uint8, np.int64, np.bool_):
                cases.append(npz({**whole, name: npy(np.zeros(shape, kind))}, zipfile.ZIP_DEFLATED))
        cases.append(npz({**whole, name: b"PK" * 9}))
        cases.append(npz({**whole, name: whole[name] + b"\0"}))
    # A megabyte of zeros in a kilobyte, and a count that a label cannot hold.
    cases.append(npz({**whole, "train_images": npy(np.zeros((12, 300, 300), np.uint8))}, zipfile.ZIP_DEFLATED))
    chance = random.Random(2)
    return cases + [mutated(chance.choice([stored, deflated]), chance) for _ in range(1200)]


def test_no_file_of_arrays_does_harm(survives) -> None:
    cases = list(enumerate(npz_files()))
    assert len(cases) >= 2000

    def write(case: tuple[int, bytes], folder: Path) -> None:
        (folder / "task.npz").unlink(missing_ok=True)
        (folder / "task.npz").write_bytes(case[1])

    def use(folder: Path) -> None:
        decode(read_task(folder / "task.npz"), 32)

    accepted, refused = survives(cases, write, use)
    print(f"files of arrays: {accepted} accepted, {refused} refused")
    assert accepted > 20
    assert refused > 1000


@pytest.mark.parametrize("name", ["fifo.png", "zero.png", "loop.png", "folder.png"])
def test_what_is_no_regular_file_is_no_image(tmp_path: Path, name: str) -> None:
    task = write_task(tmp_path)
    path = task / "dataframe" / "val_fold2.csv"
    path.write_text(path.read_text().replace("images/4.png", f"images/{name}"))
    with pytest.raises(InputError, match=rf"val_fold2\.csv, line 6: there is no image images/{name}"):
        read_task(task)


def test_links_to_images_elsewhere_are_images(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    (task / "images").rename(tmp_path / "archive")
    (task / "images").symlink_to(tmp_path / "archive")
    assert decode(read_task(task), 32).shape == (10, 1, 32, 32)


def test_a_fold_file_that_waits_for_a_writer_is_none(tmp_path: Path) -> None:
    path = write_task(tmp_path) / "dataframe" / "test_fold1.csv"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match=r"must have one file \*test_fold1\.csv, found none"):
        read_task(tmp_path / "task")


def test_a_class_folder_that_leads_to_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "task" / "benign").mkdir(parents=True)
    (tmp_path / "task" / "malignant").symlink_to("/")
    with pytest.raises(InputError, match="malignant is a link to a folder around it"):
        read_task(tmp_path / "task")


def png(width: int, height: int, mode: int) -> bytes:
    """A PNG file that declares an image of zeros, of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4) + kind + data + zlib.crc32(kind + data).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, mode, 0, 0, 0])
    pixels = zlib.compress(bytes(10_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("side", "found"), [(9_000, "over 67,108,864 pixels"), (60_000, "exceeds limit")])
def test_a_few_bytes_that_declare_a_large_image_are_refused(tmp_path: Path, side: int, found: str) -> None:
    task = write_task(tmp_path)
    (task / NAMES[3]).write_bytes(png(side, side, 6))
    with pytest.raises(InputError, match=rf"images/3\.png does not decode \(.*{found}"):
        decode(read_task(task), 32)


def test_a_file_larger_than_any_image_is_not_read(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    os.truncate(task / NAMES[3], 2**40)
    with pytest.raises(InputError, match=r"train_fold1\.csv, line 5: .*3\.png has over 256 MiB"):
        read_task(task)


def test_postscript_is_not_handed_to_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = write_task(tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    eps = "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    (task / NAMES[3]).write_text(eps)
    with pytest.raises(InputError, match=r"images/3\.png does not decode"):
        decode(read_task(task), 32)
    assert not (tmp_path / "started").exists()


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the tags of TIFF files
def test_no_damaged_image_stops_with_another_error(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    chance = random.Random(0)
    shades = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    messages = []
    for kind in ("png", "jpeg", "bmp", "tiff", "gif", "webp", "ppm", "tga"):
        shades.save(tmp_path / "whole", kind)
        content = (tmp_path / "whole").read_bytes()
        for _ in range(15):
            (task / NAMES[3]).write_bytes(mutated(content, chance))
            try:
                decode(read_task(task), 32)
            except InputError as error:
                messages.append(str(error))
    assert len(messages) > 10
    assert not any("\n" in message for message in messages)


def test_the_first_group_of_an_expression_must_find_a_patient(tmp_path: Path) -> None:
    task = write_task(tmp_path)
    assert read_task(task, group=r"images/(\d)").patients == tuple("0123456789")
    for group in ("(x)?images", "x*"):
        with pytest.raises(InputError, match=r"train_fold1\.csv, line 2: .* finds nothing in images/0\.png"):
            read_task(task, group=group)


def test_an_expression_that_never_ends_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = write_task(tmp_path)
    name = f"images/{'a' * 60}.png"
    (task / NAMES[3]).rename(task / name)
    for path in (task / "dataframe").iterdir():
        path.write_text(path.read_text().replace(NAMES[3], name))
    monkeypatch.setattr(listing, "SEARCH_SECONDS", 1)
    with pytest.raises(InputError, match=r"`group=\(a\+\)\+\$` takes over 1 seconds to search 10 paths"):
        read_task(task, group="(a+)+$")


def test_the_name_of_a_task_fits_a_line(tmp_path: Path) -> None:
    task = write_task(tmp_path).rename(tmp_path / "a\nb\x1b[2J")
    with pytest.raises(InputError, match=r"a b\\x1b\[2J is no name that the tables can hold: rename"):
        read_task(task)
    if sys.platform == "linux":
        raw = os.fsencode(tmp_path) + b"/\xff"
        subprocess.run(["mv", os.fsencode(task), raw], check=True)
        with pytest.raises(InputError, match="no name that the tables can hold"):
            read_task(Path(os.fsdecode(raw)))
