"""What is watched from a run's start to its end, and what is said when its steps begin."""

import types

import jax
import pytest
from test_watchdog import wait_for

from jaxembed.observing import rest
from jaxembed.observing.clock import Phase
from jaxembed.observing.goodput import STARTED
from jaxembed.observing.observer import Observer


def test_stalls_before_and_after_the_steps_are_reported(tmp_path):
    path = tmp_path / "stalls" / "process-0.txt"
    with Observer(tmp_path, 0.1) as observer:
        for phase in (Phase.PREPARE, Phase.CHECKPOINT, Phase.EXPORT):
            with observer.clock.during(phase):
                wait_for(path, f"step 0, {phase}; all threads")
            if phase is Phase.PREPARE:
                assert not (tmp_path / STARTED).exists()  # nothing but the wrong data may have come of it
                with observer.begin({}, range(0), print):
                    pass
        observer.end()
    assert (tmp_path / STARTED).exists() and rest.read(tmp_path)["checkpoint_s"] > 0.1


@pytest.mark.parametrize(
    ("platform", "kind", "told"), [("gpu", "Some GPU", True), ("gpu", "NVIDIA H200", False), ("cpu", "cpu", False)]
)
def test_a_chip_without_known_peak_is_named(tmp_path, monkeypatch, platform, kind, told):
    device = types.SimpleNamespace(platform=platform, device_kind=kind)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    said = []
    with Observer(tmp_path, 0.0).begin({}, range(0), said.append):
        assert len(said) == told and all("MFU is not known for 'Some GPU'" in line for line in said)
