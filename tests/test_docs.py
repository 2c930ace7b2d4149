"""Every example in README.md and docs/ runs, in a folder with the files that it speaks of."""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pydicom
import pytest
import torch
import torchvision

from modan_fast import api, cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^[ ]*```(\w+)\n(.*?)^[ ]*```$", re.MULTILINE | re.DOTALL)
# Installers, other programs, and servers that do not exist.
NOT_OURS = re.compile(
    r"^(pip|uv pip|uv sync|uv run (pytest|--group|python benchmarks/)|uv export|uvx|MODAN_TEST_DATA=|printf)"
)
ELSEWHERE = re.compile(r"https://|gs://|pipe:aws|--dask")
SMALL = {
    "shard": "--size 32 --workers 1 --overwrite",
    "pretrain": "--epochs 1 --batch-size 12 --image-size 32 --stem 7x7 --threads 1 --device cpu",
    "resume": "--epochs 2 --threads 1",
    "evaluate": "--repeats 1 --epochs 1 --image-size 32 --stem 7x7 --device cpu --protocol probe",
    "report": "--samples 0 --device cpu",
    "phantom": "--per-class 1 --size 32 --workers 1",
}


def blocks(path, language):
    """The code blocks of a page in one language, without the indentation of a list."""
    found = [text for name, text in BLOCK.findall(path.read_text(encoding="utf-8")) if name == language]
    return [re.sub(rf"^{re.match(' *', text)[0]}", "", text, flags=re.MULTILINE) for text in found]


def commands(path):
    """The shell commands of a page, without comments."""
    lines = [line for block in blocks(path, "sh") for line in block.splitlines()]
    lines = [re.sub(r"\s+#.*", "", line).strip() for line in lines]
    return [part for line in lines if line for part in ([line] if NOT_OURS.match(line) else line.split(" && "))]


@pytest.fixture(scope="module")
def prepared(archive, shards, tmp_path_factory):
    """A folder with everything that the examples name; /data/X stands in its folder data/X."""
    home = tmp_path_factory.mktemp("docs")
    shutil.copytree(archive, home / "archive")
    shutil.copytree(archive, home / "data" / "RadImageNet")
    shutil.copytree(shards, home / "shards")
    for number, image in enumerate(sorted(archive.rglob("*.png"))[:20]):
        for task in (home / "data" / "breast", home / "task"):
            folder = task / ("benign", "malignant")[number % 2]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(image, folder / f"{number:04}_slice.png")
    small = {"epochs": 1, "batch_size": 12, "image_size": 32, "stem": "7x7", "device": "cpu", "threads": 1}
    api.pretrain(shards=shards, out=home / "runs" / "mulsupcon", **small)
    judged = {"repeats": 1, "epochs": 1, "image_size": 32, "stem": "7x7", "device": "cpu", "protocol": ["probe"]}
    init = [str(home / "runs" / "mulsupcon"), "scratch"]
    api.evaluate(task=home / "task", init=init, out=home / "results", **judged)

    images = sorted(path.relative_to(archive).as_posix() for path in archive.rglob("*.png"))
    rows = [f"{path},{path.split('/')[0]},{path.split('/')[1]},{'AP'[n % 2]}" for n, path in enumerate(images)]
    (home / "data" / "images").symlink_to(archive)
    (home / "labels.csv").write_text("\n".join(["path,modality,anatomy,view", *rows]))
    for path in {image.split("/")[0] for image in images}:
        (home / path).symlink_to(archive / path)  # the images beside labels.csv
    for name, part in (("train", images[::2]), ("val", images[1::2])):
        lines = [f"radiology_ai/{path},{path.split('/')[-2]}" for path in part]
        (home / f"RadiologyAI_{name}.csv").write_text("\n".join(["filename,label", *lines]))
    (home / "data" / "pacs").mkdir()
    shutil.copy(pydicom.data.get_testdata_file("MR_small.dcm"), home / "data" / "pacs" / "IM0001")
    (home / "weights").mkdir()
    network = torchvision.models.densenet121()
    numbered = torch.nn.ModuleDict(
        {"backbone": torch.nn.Sequential(network.features)}
    )  # as RadImageNet publishes it
    torch.save(numbered.state_dict(), home / "weights" / "RadImageNet-DenseNet121.pt")
    (home / "words.csv").write_text("field,from,to\nanatomy,LEBER,abd\n")
    return home


@pytest.fixture
def home(prepared, tmp_path, monkeypatch):
    """A copy of the prepared folder as the current one."""
    shutil.copytree(prepared, tmp_path / "home", symlinks=True)
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.mark.parametrize("path", [page for page in PAGES if blocks(page, "python")], ids=lambda path: path.name)
def test_the_python_examples_of_a_page_run_from_top_to_bottom(path, home):
    names = {}
    for block in blocks(path, "python"):
        exec(compile(block, path.name, "exec"), names)


@pytest.mark.parametrize("path", [page for page in PAGES if commands(page)], ids=lambda path: path.name)
def test_the_commands_of_a_page_run(path, home, monkeypatch, capsys):
    for block in blocks(path, "yaml"):
        (home / "settings.yaml").write_text(block)
    for number, command in enumerate(commands(path)):
        if NOT_OURS.match(command):
            continue
        words = shlex.split(command.replace("/data/", f"{home}/data/"))
        assert words[:3] == ["uv", "run", "modan-fast"], command
        name, *rest = words[3:]
        if ELSEWHERE.search(command):
            monkeypatch.setattr(sys, "argv", ["modan-fast", name, "--help"])
            with pytest.raises(SystemExit):
                cli.main()
            known = capsys.readouterr().out
            assert not [word for word in rest if word.startswith("--") and word not in known], command
            continue
        small = shlex.split(SMALL.get("resume" if "--resume" in rest else name, ""))
        if name == "shard":
            small += ["--out", f"shards-{number}"]
        elif name == "phantom":
            shutil.rmtree(home / rest[0])  # its output must be new
        elif name == "pretrain" and "--resume" not in rest:
            small += ["--out", f"runs/{number}"]
        monkeypatch.setattr(sys, "argv", ["modan-fast", name, *rest, *small])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, f"{command}\n{capsys.readouterr().err}"


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200
