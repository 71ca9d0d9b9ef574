"""Goodput over kills and restarts, by clocks that are set by hand."""

import json
import types

import pytest

from jaxembed.observing import clock as clock_module
from jaxembed.observing import goodput as goodput_module
from jaxembed.observing.clock import Clock, Phase
from jaxembed.observing.goodput import STARTED, Goodput, first_start


@pytest.fixture
def now(monkeypatch):
    hand = types.SimpleNamespace(at=1000.0)
    source = types.SimpleNamespace(perf_counter=lambda: hand.at, time=lambda: 1e9 + hand.at)
    monkeypatch.setattr(clock_module, "time", source)
    monkeypatch.setattr(goodput_module, "time", source)
    return hand


def work(clock, now, phase, seconds):
    with clock.during(phase):
        now.at += seconds


def test_of_hundred_seconds_with_a_kill(now, tmp_path):
    first = Clock()
    counted = Goodput(first, first_start(tmp_path, 1e9 + now.at, write=True), {})
    lost = ((Phase.OUTSIDE, 6), (Phase.COMPILE, 3), (Phase.FIRST, 1))
    for phase, seconds in (*lost, (Phase.COMPUTE, 25), (Phase.DATA, 4)):
        work(first, now, phase, seconds)
    work(first, now, Phase.HOST, 1)
    kept = json.loads(json.dumps(counted.meta))
    assert kept == {"productive_s": 30.0} and counted.value() == 30 / 40
    work(first, now, Phase.CHECKPOINT, 2)
    work(first, now, Phase.COMPUTE, 15)  # lost by the kill
    assert counted.value() == 45 / 57
    now.at += 23  # until it is started again

    second = Clock()
    counted = Goodput(second, first_start(tmp_path, 1e9 + now.at, write=True), kept)
    assert counted.meta == kept and counted.value() == 30 / 80
    work(second, now, Phase.EVAL, 5)
    work(second, now, Phase.COMPUTE, 15)
    assert counted.meta == {"productive_s": 45.0} and counted.value() == 45 / 100


def test_a_start_before_the_first_checkpoint_counts_too(tmp_path):
    assert first_start(tmp_path, 1000.5, write=True) == 1000.5
    assert first_start(tmp_path, 1050, write=True) == first_start(tmp_path, 1051, write=False) == 1000.5


def test_only_one_process_makes_the_note(tmp_path):
    assert first_start(tmp_path, 1000, write=False) == 1000
    assert not (tmp_path / STARTED).exists()


def test_clocks_that_disagree_do_not_make_it_more_than_all(now):
    clock = Clock()
    counted = Goodput(clock, 1e9 + 1400, {})  # another machine began it, "later"
    assert counted.value() == 0
    work(clock, now, Phase.COMPUTE, 10)
    assert counted.value() == 1
