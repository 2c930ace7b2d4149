"""Settings: what files, options and keyword arguments give, and which wrong values are refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modan_fast.config import Augmentation, PretrainConfig, changed, read_settings, to_json
from modan_fast.recipes import evaluate_config, pretrain_config
from shard_builder.settings import InputError


def test_a_file_sets_nested_settings_by_both_spellings(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 1e-3\naugmentation:\n  scale: [0.5, 1]\naugmentation.flip: 0\n")
    given = read_settings(tmp_path / "run.yaml", PretrainConfig)
    config = pretrain_config(given)
    assert config.lr == 1e-3
    assert config.augmentation == Augmentation(scale=(0.5, 1), flip=0)


@pytest.mark.parametrize("method", ["mulsupcon", "simclr", "supervised"])
def test_a_runs_own_record_is_such_a_file(tmp_path, method):
    config = pretrain_config({"method": method, "epochs": 10}).resolved(64)
    (tmp_path / "config.json").write_text(json.dumps({"settings": to_json(config), "versions": {}}, indent=2))
    assert pretrain_config(read_settings(tmp_path / "config.json", PretrainConfig)) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epochs: 3\n\nbach_size: 8\n", "line 3: unknown setting `bach_size`: did you mean `batch_size`"),
        ("augmentation:\n  scale: [0.5, 1]\n  hue: 0.1\n", "line 3: unknown setting `augmentation.hue`"),
        ("augmentation.hue: 0.1\n", "line 1: unknown setting `augmentation.hue`"),
        ("epochs: 3\nepochs: 4\n", "line 2: `epochs` is given twice"),
        ("epochs: [3\n", "line 2: no YAML or JSON"),
        ("- epochs\n", "line 1: settings must be `name: value` pairs"),
        ("augmentation: 3\n", "line 1: settings must be `name: value` pairs"),
        ("a: &a [*a]\n", "line 1: unknown setting `a`"),
    ],
)
def test_a_wrong_file_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(InputError) as refused:
        read_settings(tmp_path / "run.yaml", PretrainConfig)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="none.yaml cannot be read"):
        read_settings(tmp_path / "none.yaml", PretrainConfig)


def read_or_refuse(path):
    try:
        return read_settings(path, PretrainConfig)
    except InputError as error:
        return str(error)


@given(st.text(max_size=200))
def test_any_text_is_settings_or_one_line(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("settings") / "run.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    result = read_or_refuse(path)
    assert isinstance(result, dict) or len(result.splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "mocov2"}, "`method` must be one of mulsupcon, simclr, supcon, supervised, got 'mocov2'"),
        ({"recipe": "fast"}, "`recipe` must be one of paper, released-code, vit, got 'fast'"),
        ({"threshold": 1.1}, "`threshold` must be at least 0 and at most 1, got 1.1"),
        ({"threshold": float("nan")}, "`threshold` must be at least 0"),
        ({"temperature": 0}, "`temperature` must be above 0, got 0"),
        ({"milestones": (0.5, 10.5)}, "`milestones` must be shares of the epochs below 1 or whole epochs"),
        ({"milestones": (0,)}, "`milestones` must be above 0"),
        ({"channels": 2}, "`channels` must be 1 or 3, got 2"),
        ({"imagenet_weights": "w.pth", "start_from": "random"}, "`imagenet_weights` needs `start_from=imagenet`"),
        ({"augmentation.scale": (1, 0.5)}, "`scale` must be two numbers, the smaller one first"),
        ({"augmentation": {"flip": 2}}, "`flip` must be at least 0 and at most 1, got 2"),
        ({"out": 3}, "`out` must be a path, got 3"),
        ({"keep": 3}, "`keep` must be a list, got 3"),
        ({"drop_last": "yes"}, "`drop_last` must be true or false, got 'yes'"),
    ],
)
def test_wrong_values_are_refused_in_python_as_on_the_command_line(given, message):
    with pytest.raises(InputError) as refused:
        pretrain_config(given)
    assert message in str(refused.value)


def test_every_value_of_a_recipe_can_be_overridden():
    released = pretrain_config({"method": "simclr", "recipe": "released-code"})
    for name, value in {"augmentation.blur": 0.0, "keep": (7,), "stem": "3x3", "warmup_from": 0.1}.items():
        other = pretrain_config({"method": "simclr", "recipe": "released-code", name: value})
        assert other == changed(released, {name: value}) != released


def test_what_the_evaluators_recipes_differ_in_can_be_set_one_by_one():
    paper = evaluate_config({"init": ("scratch",)})
    released = evaluate_config({"init": ("scratch",), "recipe": "released-code"})
    differing = {name for name, value in to_json(paper).items() if to_json(released)[name] != value}
    assert differing == {
        "recipe",
        "probe_lr",
        "probe_batch_norm",
        "finetune_head",
        "model_selection",
        "stem",
        "sum_filters",
        "normalize",
    }
    for name in differing - {"recipe"}:
        value = getattr(released, name)
        assert getattr(evaluate_config({"init": ("scratch",), name: value}), name) == value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"shards": "pipe:touch PWNED {}"}, "names a URL, and a URL may be a command"),
        ({"init_from": "timm/resnet50"}, "downloads weights"),
        ({"out": "/somewhere/else"}, "writes to a folder elsewhere"),
        ({"out": "runs/../../elsewhere"}, "writes to a folder elsewhere"),
    ],
)
def test_a_settings_file_does_nothing_that_only_the_user_may_ask_for(tmp_path, setting, message):
    path = tmp_path / "settings.json"
    for content in (setting, {"settings": setting}):  # written by hand, or a run's record
        path.write_text(json.dumps(content))
        with pytest.raises(InputError, match=f"{message}, which is done only if you name it yourself: repeat"):
            read_settings(path, PretrainConfig)
        assert read_settings(path, PretrainConfig, named=setting) == {}


def test_a_settings_file_may_name_folders_and_files_of_its_own_place(tmp_path):
    given = {"shards": "sets/mine", "out": "runs/mine", "init_from": "timm/resnet50=weights/theirs.pth"}
    (tmp_path / "settings.json").write_text(json.dumps(given))
    assert read_settings(tmp_path / "settings.json", PretrainConfig) == given
