"""The stage table, and what it makes of a slow stage."""

import time

import pytest

from modan_fast import profile as module
from modan_fast.config import PretrainConfig
from modan_fast.profile import COMPUTE, REMEDIES, Profile, profile
from modan_fast.render import cropped_and_resized


def settings(shards, **changes):
    return PretrainConfig(
        shards=str(shards), batch_size=12, image_size=32, stem="7x7", device="cpu", threads=1, **changes
    )


@pytest.mark.parametrize(
    ("tier", "before"), [("host", ["fetch"]), ("stream", ["read", "decode"])], ids=["host", "stream"]
)
def test_every_stage_of_a_step_is_timed_and_nothing_is_written(shards, tmp_path, monkeypatch, tier, before):
    monkeypatch.chdir(tmp_path)
    found = profile(settings(shards, store=tier))
    assert list(found.stages) == [*before, "augment", "render", *COMPUTE]
    assert all(seconds > 0 for seconds in found.stages.values())
    # Alone, its stages before the step overlap with nothing: together they take longer than a step in training.
    assert sum(found.stages[stage] for stage in COMPUTE) < 2 * found.step
    assert 0 <= found.waits <= 1
    assert not list(tmp_path.iterdir())


def test_a_slow_renderer_is_named_as_what_limits_the_speed(shards, monkeypatch):
    def slow(*arguments, **settings):
        time.sleep(1.0)
        return cropped_and_resized(*arguments, **settings)

    monkeypatch.setattr("modan_fast.render.cropped_and_resized", slow)
    monkeypatch.setattr(module, "STEPS", 3)
    found = profile(settings(shards, renderer="torch"))
    assert found.waits > 0.2
    assert found.stages["render"] > 1
    assert "The data limits the speed" in found.verdict
    assert "slowest stage before it is render" in found.verdict


def test_a_step_that_never_waits_is_what_limits_the_speed():
    stages = {"fetch": 9.0, "augment": 9.0, "render": 9.0, "forward": 1.0, "backward": 2.0, "optimiser": 1.0}
    assert Profile(stages, step=4.0, waits=0.01).verdict == (
        "The training step limits the speed, most of all backward (50% of it): the device waits for data 1.0% of "
        "the time."
    )


def test_each_stage_that_may_be_the_slowest_has_a_remedy():
    for slowest in REMEDIES:
        verdict = Profile({**dict.fromkeys(REMEDIES, 1.0), slowest: 2.0}, step=4.0, waits=0.5).verdict
        assert f"slowest stage before it is {slowest}" in verdict
        assert REMEDIES[slowest] in verdict
