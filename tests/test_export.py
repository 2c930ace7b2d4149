"""What `export` writes loads elsewhere, with the same features; its card says what is true and harms nobody."""

import contextlib
import hashlib
import json
import logging
import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import yaml
from markdown_it import MarkdownIt
from PIL import Image

import modan_fast
from modan_fast import api, cli, export
from modan_fast.encoders import Architecture, Encoder, save_encoder
from shard_builder.settings import InputError

SMALL = {"epochs": 1, "batch_size": 12, "image_size": 32, "stem": "7x7", "device": "cpu", "threads": 1}
JUDGED = {"repeats": 1, "epochs": 1, "image_size": 32, "stem": "7x7", "device": "cpu", "protocol": ["probe"]}
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ENCODERS = {
    "resnet18, 7x7": Architecture(stem="7x7"),
    "resnet18, 3x3": Architecture(stem="3x3"),
    "vit_tiny, 32 px": Architecture.of("timm/vit_tiny_patch16_224", image_size=32),
}
MORE_ENCODERS = {
    "vit_tiny, 64 px": Architecture.of("timm/vit_tiny_patch16_224", image_size=64, drop_path=0.1),
    "resnet50, normalised": Architecture.of(
        "timm/resnet50.a1_in1k", channels=3, mean=(0.4, 0.5, 0.6), std=(0.2,)
    ),
    "convnext_atto": Architecture.of("timm/convnext_atto"),
    "densenet121": Architecture.of("timm/densenet121"),
    "swin_tiny, 64 px": Architecture.of("timm/swin_tiny_patch4_window7_224", image_size=64),
}
# Appended to the card's timm example: timm's own transform, and a head for two classes.
BESIDE_TIMM = """
from timm.data import create_transform, resolve_data_config
from safetensors.torch import load_file
transform = create_transform(**resolve_data_config({}, model=network))
mode = "RGB" if inputs.shape[1] == 3 else "L"
assert (transform(Image.open("image.png").convert(mode)) - inputs[0]).abs().max() < 1e-6
headed = timm.create_model("local-dir:.", pretrained=True, num_classes=2)
assert headed.get_classifier().weight.shape == (2, features.shape[1])
state = headed.state_dict()
assert all((state[name] == value).all() for name, value in load_file("model.safetensors").items())
"""


@pytest.fixture(scope="module")
def run(shards, tmp_path_factory):
    """A run folder, as `pretrain` writes it."""
    out = tmp_path_factory.mktemp("runs") / "mulsupcon"
    return api.pretrain(shards=shards, out=out, **SMALL)


def encoder_file(folder, architecture):
    """A file of ours with random weights, and batch-norm statistics that are not the initial ones."""
    torch.manual_seed(0)
    encoder = Encoder(architecture).train()
    size = architecture.image_size or 64
    with torch.no_grad():
        encoder(torch.rand(4, 1, size, size))
    save_encoder(folder / "encoder.safetensors", encoder, {})
    return folder / "encoder.safetensors"


def blocks(folder):
    """The card's Python examples: the first makes the input, the others are named after what they import."""
    first, *others = BLOCK.findall((folder / "README.md").read_text(encoding="utf-8"))
    return first, {re.match(r"import (\w+)", block)[1]: block for block in others}


def picture(folder):
    """The image that the card's examples read."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 36), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")


def features_by_card(folder):
    """The image that the card's first example makes, and its features by each of the others."""
    picture(folder)
    first, others = blocks(folder)
    found, names = {}, {}
    with contextlib.chdir(folder):
        exec(first, names)
        for name, block in others.items():
            exec(block + (BESIDE_TIMM if name == "timm" else ""), names)
            found[name] = np.asarray(names["features"])
    return names["images"].numpy(), found


def worst_difference(run, folder):
    """The largest difference of each example's features from those of the encoder that was exported."""
    images, found = features_by_card(folder)
    with torch.no_grad():
        expected = modan_fast.load_encoder(run)(torch.from_numpy(images).float() / 255).numpy()
    assert expected.std() > 1e-3  # no network that answers the same to everything
    return {name: float(abs(features - expected).max()) for name, features in found.items()}


@pytest.mark.parametrize("name", ENCODERS)
def test_the_cards_examples_give_the_features_of_the_encoder(name, tmp_path):
    run = encoder_file(tmp_path, ENCODERS[name])
    folder = api.export_encoder(run, tmp_path / "out")
    differences = worst_difference(run, folder)
    resnet, in_timm = name.startswith("resnet18"), name != "resnet18, 3x3"
    assert set(differences) == {"modan_fast", *["torchvision"] * resnet, *["timm"] * in_timm}
    assert max(differences.values()) < 1e-5
    assert (folder / "config.json").exists() == in_timm


def test_timm_alone_gives_the_features_in_a_process_without_this_package(tmp_path):
    code = ["import os, sys"]
    expected = []
    for number, name in enumerate(("resnet18, 7x7", "vit_tiny, 32 px")):
        run = encoder_file(tmp_path, ENCODERS[name])
        folder = api.export_encoder(run, tmp_path / f"out-{number}")
        images, _ = features_by_card(folder)
        with torch.no_grad():
            expected.append(modan_fast.load_encoder(run)(torch.from_numpy(images).float() / 255).numpy())
        first, others = blocks(folder)
        code += [f"os.chdir({str(folder)!r})", first, others["timm"], "np.save('found.npy', features.numpy())"]
    code.append("assert not [name for name in sys.modules if name.startswith(('modan_fast', 'shard_builder'))]")
    subprocess.run([sys.executable, "-c", "\n".join(code)], check=True)
    for number, features in enumerate(expected):
        assert abs(np.load(tmp_path / f"out-{number}" / "found.npy") - features).max() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ENCODERS, *MORE_ENCODERS])
def test_onnxruntime_timm_and_torchvision_give_the_features_of_every_encoder(name, tmp_path):
    run = encoder_file(tmp_path, (ENCODERS | MORE_ENCODERS)[name])
    folder = api.export_encoder(run, tmp_path / "out", onnx=True)
    differences = worst_difference(run, folder)
    print(name, differences)
    assert differences.pop("onnxruntime") < 1e-4
    assert max(differences.values()) < 1e-5
    assert_onnx_takes_any_batch_and_knows_no_path(run, folder)


def assert_onnx_takes_any_batch_and_knows_no_path(run, folder):
    encoder = modan_fast.load_encoder(run)
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    fixed = encoder.architecture.image_size
    for count, height, width in ((1, fixed or 96, fixed or 64), (5, fixed or 33, fixed or 47)):
        pixels = np.random.default_rng(count).integers(0, 256, (count, 1, height, width), dtype=np.uint8)
        with torch.no_grad():
            expected = encoder(torch.from_numpy(pixels).float() / 255).numpy()
        [features] = session.run(["features"], {"images": pixels})
        assert features.dtype == np.float32
        assert features.shape == expected.shape
        assert abs(features - expected).max() < 1e-4
    model = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(model)
    del model.graph.initializer[:]  # weights may hold any bytes
    content = model.SerializeToString()
    assert not [word for word in (b"site-packages", b".py", b"modan_fast") if word in content]


def test_the_command_writes_everything_and_says_it_in_one_line(
    run, tmp_path, monkeypatch, capfd, caplog, recwarn
):
    out, exporter = tmp_path / "out", torch.onnx.export

    def chatty(*arguments, **settings):
        print("[torch.onnx] chatter")
        print("[torch.onnx] chatter", file=sys.stderr)
        warnings.warn("chatter", stacklevel=1)
        logging.getLogger("torch.onnx").warning("chatter")
        return exporter(*arguments, **settings)

    monkeypatch.setattr(torch.onnx, "export", chatty)
    monkeypatch.setattr(sys, "argv", ["modan-fast", "export", str(run), "--out", str(out), "--onnx"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    printed = capfd.readouterr()
    assert not ended.value.code, printed.err
    assert printed.out == f"{out}: README.md, config.json, model.onnx, model.safetensors\n"
    assert not [line for line in printed.err.splitlines() if not line.startswith("shards: ")]
    assert "chatter" not in caplog.text
    assert not [each for each in recwarn if "chatter" in str(each.message)]
    assert worst_difference(run, out)["onnxruntime"] < 1e-4
    assert_onnx_takes_any_batch_and_knows_no_path(run, out)


def test_the_card_says_what_the_run_and_its_results_record(run, shards, tmp_path, make_task_folder):
    init = [str(run), "scratch"]
    rows = api.evaluate(task=make_task_folder, init=init, out=tmp_path / "results", **JUDGED)
    folder = api.export_encoder(run, tmp_path / "out", results=tmp_path / "results")
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---\n")[1])["library_name"] == "timm"
    for file in (run / "encoder.safetensors", folder / "model.safetensors", shards / "manifest.json"):
        assert hashlib.sha256(file.read_bytes()).hexdigest() in text
    assert "| modality | 3 | CT, MR, US |" in text
    assert "48 images of 4 classes. Stored with 48 px as png; 0 images" in text
    assert "| method | mulsupcon |" in text
    assert "| epochs trained | 1 |" in text
    own, scratch = sorted(rows, key=lambda row: row.init)
    assert f"| task | paper | probe | mulsupcon | 1 | {own.mean:.3f} |" in text
    assert scratch.init == "scratch"
    assert "| scratch |" not in text
    assert "not a medical device" in text
    assert "Takaya and Inamori" in text
    assert str(tmp_path) not in text
    assert str(run.parent) not in text


def test_results_of_other_weights_are_refused(run, tmp_path, make_task_folder):
    api.evaluate(task=make_task_folder, init=[str(run)], out=tmp_path / "results", **JUDGED)
    other = encoder_file(tmp_path, ENCODERS["resnet18, 7x7"])
    with pytest.raises(InputError, match="no finished repeats of these weights"):
        api.export_encoder(other, tmp_path / "out", results=tmp_path / "results")
    assert not (tmp_path / "out").exists()


def test_another_programs_weights_are_exported_with_their_normalisation(tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model("resnet10t").state_dict(), tmp_path / "theirs.pth")
    source = f"timm/resnet10t={tmp_path / 'theirs.pth'}"
    folder = api.export_encoder(source, tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert config["mean"] == list(timm.get_pretrained_cfg("resnet10t").mean)
    assert config["input_size"][0] == 3
    assert max(worst_difference(source, folder).values()) < 1e-5
    assert "Nothing is recorded about how these weights were trained" in (folder / "README.md").read_text()


class Tags(HTMLParser):
    """The tags and headings of a page."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.attributes, self.headings, self.rows = set(), [], [], 0
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [name for name, _ in attributes if name in ("href", "src") or name.startswith("on")]
        self.headings += [tag] * (tag in ("h1", "h2", "h3"))
        self.rows += tag == "tr"


HOSTILE = [
    "<script>alert(1)</script>",
    "![x](https://evil.example/x.png)",
    "[click](javascript:alert(1))",
    "<https://evil.example>",
    "a | b\n\n# Approved as a medical device\n\n---\n",
    "`</code><img src=x onerror=alert(1)>`",
    "\u202ehidden\x1b]0;title\x07",
    "![a`](https://evil.example/`)",
    "\\](https://evil.example)![",
    "&lt;img src=x&gt;",
    "[evil]: https://evil.example",
    "z" * 10_000,
    "\ud800",
]


def test_a_strangers_names_become_no_html_links_headings_or_lines_of_a_card(run, tmp_path):
    pages = []
    for number, names in enumerate((["a"] * len(HOSTILE), HOSTILE)):
        copy = shutil.copytree(run, tmp_path / f"run-{number}")
        config = json.loads((copy / "config.json").read_text())
        config["shards"]["fields"] = {name + str(place): [name, name] for place, name in enumerate(names)}
        config["shards"]["fingerprint"] = names[0]
        config["settings"]["init_from"] = names[1]
        (copy / "config.json").write_text(json.dumps(config))
        text = (api.export_encoder(copy, tmp_path / f"out-{number}") / "README.md").read_text(encoding="utf-8")
        assert len(text) < 20_000
        assert not {"\u202e", "\x1b"} & set(text)
        header, body = text.split("---\n", 2)[1:]
        assert yaml.safe_load(header)["license"] == "unknown"
        pages.append(Tags(MarkdownIt("commonmark").enable("table").render(body)))
    benign, hostile = pages
    assert hostile.tags <= benign.tags
    assert (hostile.headings, hostile.rows) == (benign.headings, benign.rows)
    assert not hostile.attributes


def test_a_recorded_shard_set_that_is_a_url_or_another_set_is_not_used(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").write_text("{}")
    for number, location in enumerate(("pipe:touch opened {}", "https://127.0.0.1:9/set", "set", "x" * 5000)):
        copy = shutil.copytree(run, tmp_path / f"run-{number}")
        config = json.loads((copy / "config.json").read_text())
        config["settings"]["shards"] = location
        (copy / "config.json").write_text(json.dumps(config))
        folder = api.export_encoder(copy, tmp_path / f"out-{number}")
        text = (folder / "README.md").read_text(encoding="utf-8")
        assert "48 images of 4 classes. SHA-256" in text
        assert "127.0.0.1" not in text
    assert not (tmp_path / "opened").exists()


@pytest.mark.parametrize(
    ("prepare", "settings", "message"),
    [
        ("full", {}, "holds other files than an export"),
        ("full", {"overwrite": True}, "holds other files than an export"),
        ("exported", {}, "`overwrite=True` replaces it"),
        ("file", {}, "is a link, or no folder"),
        ("link", {"overwrite": True}, "is a link, or no folder"),
        ("", {"results": "nowhere"}, "nowhere"),
        ("", {"onnx": "yes"}, "`onnx` must be true or false"),
        ("", {"stem": "7x7"}, "unknown setting `stem`"),
    ],
)
def test_a_wrong_use_is_named_in_one_line_and_writes_nothing(run, tmp_path, prepare, settings, message):
    out = tmp_path / "out"
    if prepare in ("full", "exported"):
        out.mkdir()
        (out / ("thesis.tex" if prepare == "full" else "README.md")).write_text("mine")
    elif prepare == "file":
        out.write_text("mine")
    elif prepare == "link":
        (tmp_path / "else").mkdir()
        out.symlink_to(tmp_path / "else")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=re.escape(message)) as raised:
        api.export_encoder(run, out, **settings)
    assert len(str(raised.value).splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_what_onnx_needs_is_named_if_it_is_missing(run, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'modan-fast\[onnx\]'"):
        api.export_encoder(run, tmp_path / "out", onnx=True)


@pytest.mark.parametrize(
    "content", ["{", '{"settings": {}, "shards": {}}', '{"settings": {"lr": "x"}, "shards": {}}']
)
def test_a_damaged_record_is_named(run, tmp_path, content):
    copy = shutil.copytree(run, tmp_path / "run")
    (copy / "config.json").write_text(content)
    with pytest.raises(InputError, match=r"config\.json"):
        api.export_encoder(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


WRONG = [
    None,
    True,
    -1,
    0,
    0.5,
    2**63,
    10**400,
    float("nan"),
    float("inf"),
    "",
    "x",
    "\0",
    "\ud800",
    [],
    [[]],
    {},
]
WRONG += [{"x": 1}, {"x": ["\x1b[2J", "\n# x"]}, ["a", 1], "\u202e" * 1000]


def test_any_value_of_a_record_is_refused_in_one_line_or_makes_a_card_of_the_same_lines(run, tmp_path):
    recorded = json.loads((run / "config.json").read_text())
    messages, made = [], 0
    for part in ("settings", "shards"):
        for key in recorded[part]:
            for value in WRONG:
                changed = {**recorded, part: {**recorded[part], key: value}}
                (tmp_path / "config.json").write_text(json.dumps(changed))
                try:
                    record = export._record(tmp_path / "config.json")
                except InputError as error:
                    messages.append(str(error))
                    continue
                text = "\n".join(export._pretraining(record))
                assert not {"\x1b", "\u202e", "\0"} & set(text)
                assert re.findall("^#.*", text, re.MULTILINE) == [
                    "## Pretraining",
                    "### The images",
                    "### Settings",
                ]
                made += 1
    assert len(messages) > 500
    assert not [message for message in messages if len(message.splitlines()) != 1]
    assert made > 40


def test_an_export_replaces_another_and_can_be_exported_again(run, tmp_path):
    other = encoder_file(tmp_path, ENCODERS["resnet18, 3x3"])
    out = api.export_encoder(run, tmp_path / "out")
    first = (out / "model.safetensors").read_bytes()
    api.export_encoder(other, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.safetensors"]
    api.export_encoder(run, out, overwrite=True)
    again = api.export_encoder(out / "model.safetensors", tmp_path / "again")
    assert (out / "model.safetensors").read_bytes() == first
    tensors = [modan_fast.load_encoder(folder / "model.safetensors").weights for folder in (out, again)]
    assert all((tensors[0][name] == tensors[1][name]).all() for name in tensors[0])


def test_a_failed_export_leaves_the_one_before_as_it_was(run, tmp_path, monkeypatch):
    out = api.export_encoder(run, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(export, "card", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        api.export_encoder(run, out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_weights_too_large_for_one_onnx_file_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(export, "LARGEST_ONNX", 0)
    run = encoder_file(tmp_path, ENCODERS["vit_tiny, 32 px"])
    folder = api.export_encoder(run, tmp_path / "out", onnx=True)
    assert (folder / "model.onnx").stat().st_size < 10**6 < (folder / "model.onnx.data").stat().st_size
    assert worst_difference(run, folder)["onnxruntime"] < 1e-4
    (folder / "image.png").unlink()
    api.export_encoder(run, folder, overwrite=True)
    assert not (folder / "model.onnx.data").exists()
