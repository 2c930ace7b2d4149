"""Anybody's weights: names that other programs write, matched to the names of a network."""

import re

import pytest
import timm
import torch
import torchvision

from modan_fast.weights import match, tensors_in

SOURCES = {
    "resnet50": torchvision.models.resnet50,
    "densenet121": torchvision.models.densenet121,
    "inception_v3": lambda: torchvision.models.inception_v3(init_weights=False),
}


@pytest.fixture(scope="module", params=SOURCES)
def pair(request):
    """torchvision's network, and timm's of the same name."""
    with torch.device("meta"):
        return SOURCES[request.param](), timm.create_model(request.param, num_classes=0)


def radimagenet(network):
    """The names of RadImageNet's published files: a Sequential of the children before the classifier."""
    return torch.nn.ModuleDict({"backbone": torch.nn.Sequential(*list(network.children())[:-1])}).state_dict()


def test_radimagenets_numbered_children_get_the_names_that_torchvision_gives_them(pair):
    source, target = pair
    names = target.state_dict().keys()
    found = match(radimagenet(source), names)
    assert found.missing == ()
    originals = {id(value): name for name, value in source.state_dict(keep_vars=True).items()}
    sequential = torch.nn.ModuleDict({"backbone": torch.nn.Sequential(*list(source.children())[:-1])})
    by_place = match(sequential.state_dict(keep_vars=True), names).weights
    assert {name: originals[id(value)] for name, value in by_place.items()} == {name: name for name in names}
    assert all(".AuxLogits" in name or re.match(r"backbone\.15\.", name) for name in found.left_out)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "backbone.", "encoder.", "model.", "module.backbone.", "module.encoder_q."]
)
def test_known_prefixes_are_stripped_and_the_head_is_left_out(pair, prefix):
    source, target = pair
    weights = {prefix + name: value for name, value in source.state_dict().items()}
    found = match({**weights, "optimizer_step": torch.zeros(())}, target.state_dict())
    assert found.missing == ()
    assert found.prefix == prefix
    left = {name.removeprefix(prefix).partition(".")[0] for name in found.left_out}
    assert left <= {"fc", "classifier", "AuxLogits", "optimizer_step"}
    assert {"optimizer_step"} < left


def test_counts_of_batches_may_be_missing_and_nothing_else(pair):
    source, target = pair
    weights = {
        name: value for name, value in source.state_dict().items() if not name.endswith("num_batches_tracked")
    }
    assert match(weights, target.state_dict()).missing == ()
    gone = sorted(target.state_dict())[7]
    gone = gone if not gone.endswith("num_batches_tracked") else sorted(target.state_dict())[8]
    assert match(
        {name: value for name, value in weights.items() if name != gone}, target.state_dict()
    ).missing == (gone,)


def test_names_of_the_first_densenets_are_known():
    with torch.device("meta"):
        source = torchvision.models.densenet121().state_dict()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", name): value for name, value in source.items()
    }
    assert set(old) != set(source)
    assert match(old, [name for name in source if "classifier" not in name]).missing == ()


@pytest.mark.parametrize("container", [[], ["state_dict"], ["model"], ["teacher"], ["model", "state_dict"]])
def test_weights_are_found_under_the_usual_names(container):
    content: object = {"conv1.weight": torch.zeros(1)}
    for name in container:
        content = {name: content, "epoch": 3}
    assert list(tensors_in(content)) == ["conv1.weight"]


@pytest.mark.parametrize(
    "content", [None, [], {}, {"epoch": 3}, {"state_dict": 3}, {"model": {"teacher": []}}, torch.zeros(1)]
)
def test_a_file_without_tensors_is_refused(content):
    with pytest.raises(ValueError, match="no named tensors"):
        tensors_in(content)


def test_what_was_done_is_one_line():
    weights = {f"module.{name}": torch.zeros(1) for name in ("conv1.weight", "fc.weight", "fc.bias")}
    assert str(match(weights, ["conv1.weight"])) == "1 tensors matched, `module.` stripped, 2 left out (fc)"
