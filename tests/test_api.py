"""`import modan_fast` is cheap, and offers what a notebook needs."""

import subprocess
import sys

import pytest

import modan_fast
from shard_builder.settings import InputError

TWELVE_LINES = """
import torch
from modan_fast import Encoder, MulSupConLoss, open_loader

loader = open_loader("shards", batch_size=12, image_size=32)
encoder, loss = Encoder("7x7"), MulSupConLoss()
optimizer = torch.optim.SGD(encoder.parameters(), lr=0.01)
for step, batch in zip(range(2), loader):
    value = loss(encoder(batch.views.float()), batch.labels)
    value.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_twelve_lines_open_a_shard_set_and_train_two_steps(shards, tmp_path, monkeypatch):
    assert len(TWELVE_LINES.strip().splitlines()) <= 12
    (tmp_path / "shards").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(TWELVE_LINES, names)
    assert len(names["loader"]) == 4
    assert names["step"] == 1
    assert 0 < names["value"].item() < 20
    assert names["batch"].views.shape == (24, 1, 32, 32)


def test_each_iteration_over_a_loader_is_the_next_epoch(shards):
    loader = modan_fast.open_loader(shards, batch_size=16, image_size=32, device="cpu", threads=1)
    first, second = ([batch.ids.tolist() for batch in loader] for _ in range(2))
    assert len(first) == len(loader) == 3
    assert first != second
    assert first == [batch.ids.tolist() for batch in loader.epoch(0)]
    assert second == [batch.ids.tolist() for batch in loader.epoch(1)]


def test_a_loader_needs_no_more_than_the_path_of_a_set(shards):
    loader = modan_fast.open_loader(str(shards))
    (batch,) = loader
    assert batch.views.shape == (96, 1, 48, 48)


def test_importing_the_package_imports_nothing_heavy():
    heavy = {"torch", "numpy", "nvidia", "matplotlib", "sklearn", "webdataset", "typer", "yaml"}
    code = f"import modan_fast, sys; dir(modan_fast); print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", modan_fast.__all__)
def test_every_name_that_is_offered_exists_also_after_all_modules_are_imported(name):
    import modan_fast.cli
    import modan_fast.demo
    import modan_fast.trainer

    assert callable(getattr(modan_fast, name))
    assert name in dir(modan_fast)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = modan_fast.nothing


def test_errors_of_library_calls_name_arguments(shards, tmp_path):
    for call, message in [
        (lambda: modan_fast.open_loader(shards, batch_size=64), "`batch_size=64` is more than the 48 images"),
        (lambda: modan_fast.pretrain(batch_size=1), "`batch_size` must be at least 2"),
        (lambda: modan_fast.pretrain(bach_size=8), "unknown setting `bach_size`: did you mean `batch_size`"),
        (lambda: modan_fast.pretrain(epochs="ten"), "`epochs` must be an integer, got 'ten'"),
        (lambda: modan_fast.pretrain(stem="5x5"), "`stem` must be one of 3x3, 7x7, got '5x5'"),
        (lambda: modan_fast.evaluate(init=["scratch"], protocol=["svm"]), "`protocol` must be one of finetune"),
        (lambda: modan_fast.build_shards(tmp_path, codec="tiff"), "`codec` must be one of png, jpeg, raw"),
        (lambda: modan_fast.write_report(tmp_path, device="tpu"), "`device` must be one of auto, cpu, cuda"),
    ]:
        with pytest.raises(InputError) as refused:
            call()
        assert message in str(refused.value)
        assert "--" not in str(refused.value)


def test_the_commands_are_functions_from_an_archive_to_a_report(archive, make_task_folder, tmp_path):
    built = modan_fast.build_shards(archive, tmp_path / "shards", size=32, workers=1)
    assert built.manifest.samples == 48
    run = modan_fast.pretrain(
        shards=tmp_path / "shards", out=tmp_path / "run", epochs=1, batch_size=12, stem="7x7", device="cpu"
    )
    features = modan_fast.load_encoder(str(run))
    assert features.num_features == 512
    rows = modan_fast.evaluate(
        task=make_task_folder,
        init=[str(run)],
        out=tmp_path / "results",
        protocol=["probe"],
        repeats=1,
        epochs=1,
        image_size=32,
        device="cpu",
    )
    assert [(row.init, row.protocol, row.repeats) for row in rows] == [("run", "probe", 1)]
    page = modan_fast.write_report(tmp_path / "results", samples=0, device="cpu")
    assert page == tmp_path / "results" / "report.html"
