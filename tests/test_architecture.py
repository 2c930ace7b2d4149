"""The arrows between modules point one way, and the checks that CI runs are clean."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOW = [
    "config",
    "recipes",
    "remote",
    "ranks",
    "shards",
    "decode",
    "devices",
    "doctor",
    "ahead",
    "stream",
    "store",
    "augment",
    "render",
]
FLOW += ["loader", "monitor", "tiles", "losses", "batch_norm", "weights", "encoders", "pretrained", "folder"]
FLOW += ["run", "metrics", "step", "trainer", "profile", "downstream"]
FLOW += ["report", "export", "embeddings", "api", "phantom", "demo"]
SCREEN = {"cli", "__main__"}
BUILDER = {f"shard_builder.{name}" for name in ("atomic", "files", "index", "manifest", "settings")}
MODULES = sorted((ROOT / "modan_fast").rglob("*.py"))


def imported(path):
    """Names of all modules that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def stage(path):
    return path.relative_to(ROOT / "modan_fast").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_modules_of_the_flow_before_it(path):
    here = stage(path)
    if here in SCREEN or here == "__init__":
        return
    own = {name.split(".")[1] for name in imported(path) if name.startswith("modan_fast.")} & {*FLOW, *SCREEN}
    assert not own & SCREEN, "the command line is imported by nothing"
    later = {name for name in own if FLOW.index(name) > FLOW.index(here)}
    assert not later, f"{here} imports {later}, which come after it"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_only_the_command_line_knows_typer_and_the_builder(path):
    names = imported(path)
    if stage(path) in {*SCREEN, "api", "demo", "__init__"}:
        return
    assert not {name for name in names if name.split(".")[0] in {"typer", "rich"}}
    if stage(path) == "embeddings":  # it reads any source, as the builder does
        return
    modules = {".".join(name.split(".")[:2]) for name in names if name.startswith("shard_builder.")}
    if path.name == "pixels.py":  # DICOM files, as the builder reads them
        modules -= {"shard_builder.dicom", "shard_builder.dicom_pixels"}
    assert modules <= BUILDER


def test_the_builder_needs_neither_torch_nor_modan_fast():
    for path in (ROOT / "tools" / "shard_builder").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(path)} & {"torch", "modan_fast", "typer", "nvidia"}
    code = "import shard_builder.build, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_command_line_imports_nothing_heavy():
    heavy = {"torch", "nvidia", "matplotlib", "umap", "sklearn", "scipy", "webdataset"}
    code = f"import modan_fast.cli, sys; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("check", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_the_checks_are_clean(check):
    result = subprocess.run([sys.executable, "-m", *check], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
