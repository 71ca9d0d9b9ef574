"""Ten kills and ten requests to stop, at random moments of a run of two processes with two devices each.

Minutes long: `make test-survival`.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import pytest
from survivors import assert_same_run, killed, plain_pairs, stopped, unbroken, write_config
from tiny_run import tiny_config

STEPS, TIMES = 120, 10


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("survival")
    config = tiny_config(
        folder,
        steps=STEPS,
        batch_size=16,
        log_every=1,
        data__train=plain_pairs(folder),
        model__dropout=0.1,
        optimizer__ema=0.9,
        mesh__fsdp=2,
        checkpoint__every=4,
    )
    file = write_config(folder, config)
    return folder, file, unbroken(folder, file)


def test_killed_ten_times(run):
    folder, config, whole = run
    workdir, hits = killed(folder, config, TIMES, STEPS, seed=1)
    assert hits >= TIMES - 2
    assert_same_run(workdir, whole)


def test_told_to_stop_ten_times(run):
    folder, config, whole = run
    assert_same_run(stopped(folder, config, TIMES, STEPS, seed=2), whole)
