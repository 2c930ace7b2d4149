"""Weights from a stranger: safetensors files, and .pth files of ImageNet's weights."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from modan_fast.downstream.inits import imagenet
from modan_fast.encoders import Architecture, Encoder, encoder_metadata
from modan_fast.pretrained import imagenet_encoder, imagenet_weights, load_encoder
from modan_fast.recipes import evaluate_config
from shard_builder.settings import InputError

FIRST = "conv1.weight"
GREY = evaluate_config({"init": ["imagenet"], "stem": "7x7"})
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 0.5, 2**31, 2**63, 2**64, 10**30, float("nan"), float("inf"), "", "x", "x" * 10_000),
    *(
        "\0",
        "\x1b[31m",
        "\u202e",
        "../../x",
        [],
        [0],
        [0, 0],
        [-1, 1],
        [1, 0],
        [0, 2**63],
        [2**64, 2**64 + 1],
        {},
    ),
    *([[0, 1]], ["0", "1"], [None, None], [64, 1, 7, 7], [64, 3, 7, 7], [64, 0, 7, 7], [2**40, 2**40], [1] * 100),
    *("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F4", "C64", "f32", "U128"),
]


def header_of_an_encoder() -> dict[str, Any]:
    header: dict[str, Any] = {"__metadata__": {"epoch": "3", "method": "simclr"}}
    end = 0
    for name, value in Encoder("7x7").weights.items():
        start, end = end, end + value.nbytes
        kind = "I64" if value.dtype == torch.int64 else "F32"
        header[name] = {"dtype": kind, "shape": list(value.shape), "data_offsets": [start, end]}
    return header


HEADER = header_of_an_encoder()
SIZE = max(entry["data_offsets"][1] for name, entry in HEADER.items() if name != "__metadata__")


def mutated(content: bytes, chance: random.Random) -> bytes:
    """`content` with some bytes changed, cut, inserted or repeated."""
    at, to = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    some = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 8)))
    return chance.choice(
        [
            content[:at] + some + content[at + len(some) :],
            content[:at] + chance.choice([b"\0", b"\xff\xfe", b'"', b"}", some]) + content[at:],
            content[:at] + content[to:],
            content[:to] + content[at:],
            content[:at],
        ]
    )


def framed(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def changed(name: str, field: str, value: Any) -> bytes:
    header = {**HEADER, name: {**HEADER[name], field: value}}
    return framed(json.dumps(header).encode())


def safetensors_files() -> Iterator[tuple[bytes, int]]:
    """The beginning of a file, and the number of zeros that follow."""
    text = json.dumps(HEADER).encode()
    whole = framed(text)
    yield from (
        (whole, SIZE),
        (whole, SIZE - 1),
        (whole, SIZE + 1),
        (whole, 0),
        (b"", 0),
        (b"", SIZE),
        (whole, 2**30),
    )
    for length in (0, 1, 7, len(text) - 1, len(text) + 1, 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1):
        yield length.to_bytes(8, "little") + text, SIZE
    yield framed(b"[" * 100_000), 0
    yield framed(b'{"a":' * 100_000), 0
    yield framed(b'{"__metadata__":{"a":"' + b"x" * 10**6 + b'"}}'), 0
    yield framed(text[:-1] + b"," + text[1:]), SIZE
    for field in ("dtype", "shape", "data_offsets"):
        for value in VALUES:
            for name in (FIRST, "bn1.running_mean", "bn1.num_batches_tracked", "layer4.1.conv2.weight"):
                yield changed(name, field, value), SIZE
            for name in ("fc.weight", "\0"):
                entry = {"dtype": "F32", "shape": [1], "data_offsets": [SIZE, SIZE + 4], field: value}
                yield framed(json.dumps({**HEADER, name: entry}).encode()), SIZE + 4
    for value in VALUES:
        yield framed(json.dumps({**HEADER, "__metadata__": value}).encode()), SIZE
        yield framed(json.dumps(value).encode()), 0
    chance = random.Random(0)
    for _ in range(1150):
        yield mutated(whole, chance), SIZE


def test_no_safetensors_file_does_harm(survives) -> None:
    cases = list(safetensors_files())
    assert len(cases) >= 2000

    def write(case: tuple[bytes, int], folder: Path) -> None:
        path = folder / "encoder.safetensors"
        path.write_bytes(case[0])
        os.truncate(path, len(case[0]) + case[1])

    def use(folder: Path) -> None:
        assert isinstance(encoder_metadata(folder / "encoder.safetensors"), dict)
        load_encoder(folder)

    accepted, refused = survives(cases, write, use)
    print(f"safetensors files: {accepted} accepted, {refused} refused")
    assert accepted > 5
    assert refused > 1500


def save(path: Path, **values: Any) -> None:
    """An encoder of zeros, with some other tensors."""
    weights = {name: torch.zeros_like(value) for name, value in Encoder("7x7").weights.items()}
    safetensors.torch.save_file(
        {**weights, **{name.replace("__", "."): each for name, each in values.items()}}, path
    )


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.float16])
def test_floats_of_any_width_become_an_encoder(tmp_path: Path, kind: torch.dtype) -> None:
    first = torch.rand(64, 3, 7, 7).to(kind)
    save(tmp_path / "encoder.safetensors", conv1__weight=first)
    loaded = load_encoder(tmp_path).weights[FIRST]
    torch.testing.assert_close(loaded, first.float().sum(1, keepdim=True))


@pytest.mark.parametrize("kind", [torch.int64, torch.bool, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_are_no_floats_are_refused_by_name(tmp_path: Path, kind: torch.dtype) -> None:
    save(tmp_path / "encoder.safetensors", bn1__weight=torch.ones(64).to(kind))
    with pytest.raises(InputError, match=r"bn1\.weight is torch\."):
        load_encoder(tmp_path)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e300])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    bad = torch.zeros(64, dtype=torch.float64)
    bad[3] = value
    save(tmp_path / "encoder.safetensors", bn1__running_var=bad)
    with pytest.raises(InputError, match=r"holds weights that are not finite \(bn1\.running_var\)"):
        load_encoder(tmp_path)


SHAPES = {name: value.shape for name, value in Encoder(Architecture(stem="7x7", channels=3)).weights.items()}


class Command:
    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.called = function, arguments

    def __reduce__(self) -> Any:
        return self.called


def weights() -> dict[str, Any]:
    """ImageNet's names and shapes; each tensor is one stored number, so that a file is small."""
    half, count = torch.full((1,), 0.5), torch.tensor(0)
    made: dict[str, Any] = {name: half.expand(shape) if shape else count for name, shape in SHAPES.items()}
    return {**made, "fc.weight": half.expand(1000, 512), "fc.bias": half.expand(1000)}


def saved(value: Any, new: bool = True) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def with_pickle(whole: bytes, content: bytes) -> bytes:
    """A .pth file with another pickle in it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(file, "w") as new:
        for each in old.infolist():
            new.writestr(each.filename, content if each.filename.endswith("data.pkl") else old.read(each))
    return file.getvalue()


def odd_values() -> list[Any]:
    quantized = torch.quantize_per_tensor(torch.zeros(64), 0.1, 0, torch.qint8)
    one = torch.ones(1)
    return [
        *(None, True, 0, -1, 10**400, 1.5, float("nan"), "", "x" * 10_000, b"x", [], [one], (one,), {}, {"a": one}),
        *(one, one.expand(10**12), one.expand(64, 10**9, 7, 7), torch.ones(()), torch.zeros(0), torch.zeros(0, 3)),
        *(torch.zeros(64, device="meta"), quantized, torch.zeros(64).to_sparse(), torch.zeros(64, 2).to_sparse_csr()),
        *(torch.full((64,), torch.nan), torch.full((64,), torch.inf), torch.zeros(64, dtype=torch.complex64)),
        *(torch.zeros(64, dtype=kind) for kind in (torch.int64, torch.bool, torch.uint8, torch.float8_e5m2)),
        *(torch.zeros(64, dtype=kind) for kind in (torch.float64, torch.bfloat16, torch.float16)),
        *(torch.nn.Parameter(torch.zeros(64)), torch._neg_view(torch.zeros(64)), torch.zeros(128)[::2]),
        *(torch.Size([1]), torch.float32, {1, 2}, Command(), Call(eval, "open('ran', 'w')"), Call(exec, "import os")),
        *(Call(bytearray, 10**7), Call(print, "x"), Call(__import__, "os"), Call(getattr, one, "shape")),
    ]  # fmt: skip


def pth_files() -> Iterator[bytes]:
    good = weights()
    whole, old = saved(good), saved(good, new=False)
    yield from (
        whole,
        old,
        b"",
        b"\0" * 1000,
        b"PK\x03\x04",
        pickle.dumps(good["fc.bias"].tolist()),
        pickle.dumps(Command()),
    )
    yield from (with_pickle(whole, b""), with_pickle(whole, b"."), with_pickle(whole, b"(" * 100_000 + b"."))
    yield with_pickle(whole, b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    for value in odd_values():
        small = {FIRST: good[FIRST], "x": value}
        variants = [value, [value], {"state_dict": value}, {0: value}, {None: value}, {"x" * 9000: value}, small]
        variants += [
            {**good, name: value} for name in (FIRST, "bn1.weight", "bn1.num_batches_tracked", "fc.bias", "x")
        ]
        for variant in variants:
            for new in (True, False):
                try:
                    yield saved(variant, new)
                except (RuntimeError, AttributeError, pickle.PicklingError):  # torch cannot write it so
                    yield pickle.dumps(str(variant)[:100])
            try:
                yield with_pickle(whole, pickle.dumps(variant, 2))
            except (RuntimeError, AttributeError, NotImplementedError, MemoryError, pickle.PicklingError):
                yield with_pickle(whole, pickle.dumps(None, 2))
    chance = random.Random(0)
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        inner = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    for _ in range(400):
        yield mutated(whole, chance)
        yield mutated(old, chance)
        yield with_pickle(whole, mutated(inner, chance))


@pytest.mark.filterwarnings("ignore")  # torch's, about what the files hold
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_no_pth_file_does_harm(survives, every: int) -> None:
    cases = list(pth_files())
    assert len(cases) >= 2000
    cases = cases[::every]

    def write(case: bytes, folder: Path) -> None:
        (folder / "weights.pth").write_bytes(case)

    found = []

    def use(folder: Path) -> None:
        imagenet_weights(folder / "weights.pth")
        found.append(folder)
        if len(found) % 20 == 0:  # as it takes a tenth of a second
            imagenet(folder / "weights.pth", GREY, normalize=False)

    accepted, refused = survives(cases, write, use)
    print(f".pth files: {accepted} accepted, {refused} refused")
    assert accepted > 20 / every
    assert refused > 1000 / every


def test_a_pickle_that_runs_a_command_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Command()))
    assert Path("ran").exists(), "the command itself works"
    Path("ran").unlink()
    for content in (saved({**weights(), FIRST: Command()}), pickle.dumps(Command())):
        Path("weights.pth").write_bytes(content)
        with pytest.raises(InputError, match=r"weights\.pth holds no weights of torchvision's ResNet-18"):
            imagenet_weights(Path("weights.pth"))
        assert not Path("ran").exists()


def test_imagenets_weights_in_half_precision_are_judged(tmp_path: Path) -> None:
    half = {name: value.bfloat16() if value.is_floating_point() else value for name, value in weights().items()}
    torch.save(half, tmp_path / "half.pth")
    judged = imagenet(tmp_path / "half.pth", GREY, normalize=False)
    assert judged.weights is not None
    assert judged.weights[FIRST].dtype == torch.float32
    assert judged.weights[FIRST].unique().tolist() == [1.5]


def test_imagenets_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path) -> None:
    torch.save({**weights(), "bn1.weight": torch.full((64,), torch.nan)}, tmp_path / "nan.pth")
    with pytest.raises(InputError, match=r"not finite \(bn1\.weight\)"):
        imagenet_encoder(tmp_path / "nan.pth", Architecture(stem="7x7"), sum_filters=True)


def test_a_small_archive_of_many_zeros_and_a_fifo_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, 2))
        with archive.open("archive/data/0", "w") as file:
            for _ in range(600):
                file.write(bytes(2**20))
    assert (tmp_path / "bomb.pth").stat().st_size < 10**6
    os.mkfifo(tmp_path / "fifo.pth")
    os.mkfifo(tmp_path / "encoder.safetensors")
    for name in ("bomb.pth", "fifo.pth"):
        with pytest.raises(InputError, match=f"{name} holds no weights"):
            imagenet_weights(tmp_path / name)
    with pytest.raises(InputError, match="no encoder at"):
        load_encoder(tmp_path)
