"""Settings files from a stranger: YAML and JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from modan_fast.config import EvaluateConfig, PretrainConfig, ReportConfig, changed, read_settings, to_json
from modan_fast.recipes import evaluate_config, pretrain_config
from shard_builder.settings import InputError

DEEP = 100_000
LAUGHS = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]" for i in range(1, 40))]
VALUES = [  # as YAML writes them
    *("", "null", "~", "true", "yes", "0", "-1", "1", "0.5", ".nan", ".inf", "-.inf", "NaN", "1e400", "-0.0"),
    *(str(2**63), "1" + "0" * 400, "9" * 5000, "0x" + "f" * 400, "1:59:59:59", "1:" * 4000 + "1", "0b", "0o", "1_0"),
    *("''", '"\\0"', '"\\ud800"', '"\\x1b[2J"', '"\\u202e"', '"a\\nb"', "'" + "x" * 9_000 + "'", "x" * 20_000),
    *("[]", "[[]]", "[null]", "[1, x, 2]", "{}", "{a: b}", "[{a: b}]", "[0.1]", "[1, 0.1]", "[.nan, 1]", "[1, 1e400]"),
    *("[" * 50 + "]" * 50, "{a: " * 500, "- " * 5000, "&a [*a]", "*nowhere", "&a {<<: *a}"),
    *("!!python/object/apply:os.system ['touch x']", "!!python/name:os.system", "!!python/object:os.x {}", "!x y"),
    *("!!bool maybe", "!!int ''", "!!float x", "!!timestamp x", "!!binary '***'", "!!set {a, b}", "!!omap [a: b]"),
    *("2026-99-99", "2026-01-01", "/etc/passwd", "../../x", "~/x", "pipe:touch x {}", "http://localhost/x", "file:///x"),
    *("mulsupcon", "paper", "released-code", "scratch", "cpu", "imagenet", "[scratch]", "(a+)+$", "'((('"),
    *("'a{9999999999}'", "'" + "(" * 5000 + ")" * 5000 + "'"),
    *("%YAML 9.9", "# x", "? [a, b]\n: c", "|\n  a\n  b", "\t", "- a\n  - b", "@", "`", "\0"),
]  # fmt: skip
BASE = {
    "method": "simclr",
    "epochs": 3,
    "lr": 0.1,
    "out": "run",
    "keep": [1, 2],
    "augmentation": {"flip": 0.5, "scale": [0.1, 1]},
    "shards": "set",
}


def mutated(content: bytes, chance: random.Random) -> bytes:
    """`content` with some bytes changed, cut, inserted or repeated."""
    at, to = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    some = bytes(chance.randrange(256) for _ in range(chance.randrange(1, 8)))
    other = chance.choice([b"\0", b"\xff\xfe", b'"', b"&a ", b"*a", b"\n", b"!!", b"[", b"{", b": ", some])
    return chance.choice(
        [
            content[:at] + some + content[at + len(some) :],
            content[:at] + other + content[at:],
            content[:at] + content[to:],
            content[:to] + content[at:],
            content[:at],
        ]
    )


def names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]


def files() -> Iterator[bytes]:
    several = dict.fromkeys([*names(PretrainConfig), *names(EvaluateConfig)])
    chosen = (
        "method",
        "recipe",
        "shards",
        "out",
        "epochs",
        "lr",
        "keep",
        "augmentation",
        "init",
        "group",
        "seed",
    )
    for name in chosen:
        for value in VALUES:
            yield f"{name}: {value}\n".encode()
    for name in several:
        for value in ("[]", "null", "1" + "0" * 400, ".nan", "x", "{a: b}", '"\\0"'):
            yield f"{name}: {value}\n".encode()
    for value in VALUES:
        yield f"augmentation: {{flip: {value}}}\n".encode()
        yield f"settings: {value}\n".encode()
        yield f"{value}: 3\n".encode()
        yield value.encode()
    for value in ("[1]", "x", "1"):
        yield f"lr: {value}\nlr: {value}\n".encode()
    yield "\n".join([*LAUGHS, "keep: *a39", ""]).encode()
    yield "\n".join([*LAUGHS, "? *a39\n: 3", ""]).encode()
    yield b"a" * 2**22
    yield b"lr: 1\n" * 2**15
    yield f"keep: {'[' * DEEP}".encode()
    yield f"lr: {'{a: ' * (DEEP // 2)}".encode()
    for whole in (json.dumps({"settings": BASE, "versions": {}}).encode(), json.dumps(BASE, indent=1).encode()):
        yield from (b"", b"\xef\xbb\xbf" + whole, whole.decode().encode("utf-16"), whole * 2, whole + b"\0")
        chance = random.Random(0)
        yield from (mutated(whole, chance) for _ in range(250))


def test_no_settings_file_does_harm(survives) -> None:
    cases = list(files())
    assert len(cases) >= 2000

    def write(case: bytes, folder: Path) -> None:
        (folder / "file.yaml").write_bytes(case)

    def use(folder: Path) -> None:
        problems = []
        for kind, make in ((PretrainConfig, pretrain_config), (EvaluateConfig, evaluate_config)):
            try:
                to_json(make(read_settings(folder / "file.yaml", kind)))
            except InputError as error:
                problems.append(error)
        if len(problems) == 2:
            raise problems[0]

    accepted, refused = survives(cases, write, use)
    print(f"settings files: {accepted} accepted, {refused} refused")
    assert accepted > 50
    assert refused > 1000


@pytest.mark.parametrize("location", ["pipe:touch x {}", "http://localhost/set", "file:///set", "S3://set"])
@pytest.mark.parametrize("kind", [PretrainConfig, ReportConfig])
def test_a_url_in_a_file_is_refused_unless_the_user_names_the_shards(
    tmp_path: Path, kind: Any, location: str
) -> None:
    for content in ({"shards": location}, {"settings": {"shards": location}}):
        path = tmp_path / "file.json"
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=r"file\.json names a URL, .* repeat `shards="):
            read_settings(path, kind)
        assert read_settings(path, kind, named={"shards": "mine"}) == {}
    assert changed(PretrainConfig(), {"shards": location}).shards == location


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: [a, b]", "`method` must be one of mulsupcon, .*, got \\['a', 'b'\\]"),
        (f"epochs: {10**400}", "`epochs` is an integer of over 64 bits"),
        (f"lr: 0x{'f' * 9000}", "`lr` is an integer of over 64 bits"),
        ('out: "a\\0b"', "`out` must be a path"),
        ("keep: &a [*a]", "line 1: `keep` must be one value, or a list of values"),
        ("keep: !!python/object/apply:os.system ['touch x']", "line 1: `keep` has no usable value"),
        ("lr: !!bool maybe", "line 1: `lr` has no usable value"),
        ("? [lr, epochs]\n: 3", "settings must be `name: value` pairs"),
        ("x" * 2**21, "has over 262,144 characters"),
    ],
)
def test_a_hostile_value_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        pretrain_config(read_settings(tmp_path / "file.yaml", PretrainConfig))


@pytest.mark.parametrize("group", ["(" * 5000 + ")" * 5000, "a{99999999999999999999}", "("])
def test_a_group_that_is_no_expression_is_refused(group: str) -> None:
    with pytest.raises(InputError, match="is no regular expression"):
        evaluate_config({"init": ["scratch"], "group": group})
