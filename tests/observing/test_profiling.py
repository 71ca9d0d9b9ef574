"""Traces: the steps that were asked for, each of them, and whole; nothing where they are over."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from jaxembed.errors import UserError
from jaxembed.observing.clock import Clock
from jaxembed.observing.profiling import Profile, parse, require


def traced(folder):
    """The numbers of the steps in each trace under a folder, in the order of the traces."""
    traces = sorted(folder.glob("process-0/plugins/profile/*/*.trace.json.gz"))
    assert len(traces) == len(list(folder.glob("process-0/plugins/profile/*/*.xplane.pb")))
    events = [json.loads(gzip.decompress(path.read_bytes()))["traceEvents"] for path in traces]
    return [
        sorted(int(event["args"]["step_num"]) for event in of_one if event.get("name") == "train") for of_one in events
    ]


@pytest.mark.parametrize(("text", "steps"), [("", range(0)), ("0:1", range(0, 1)), ("10:20", range(10, 20))])
def test_what_is_asked_for(text, steps):
    assert parse(text) == steps


@pytest.mark.parametrize("text", ["10", "10:", ":20", "20:10", "10:10", "-1:3", "a:b", "1:2:3", "1.5:2"])
def test_what_is_no_range_is_refused(text):
    with pytest.raises(UserError, match="wants START:END with START below END, such as 10:15"):
        parse(text)


def test_steps_after_the_end_are_refused():
    with pytest.raises(UserError, match="--profile=8:11: the run has 10 steps only"):
        require(range(8, 11), 10)
    require(range(8, 10), 10)
    require(range(0), 10)


def loop(profile, first, last):
    """Steps as the training loop makes them."""
    step_function = jax.jit(lambda x: jnp.tanh(x @ x))
    state = jnp.ones((64, 64))
    for step in range(first, last):
        profile.before(step, state)
        state = step_function(state)
        profile.after(step + 1, state)


@pytest.mark.parametrize(("first", "last", "steps"), [(0, 4, [3, 4]), (3, 9, [4, 5]), (5, 9, []), (0, 2, [])])
def test_the_steps_of_the_range_that_the_run_comes_by(tmp_path, first, last, steps):
    """All; what a restart left of them; none where they are over or it stops before."""
    said = []
    profile = Profile(tmp_path, range(2, 5), Clock(), said.append)
    loop(profile, first, last)
    profile.close()
    assert traced(tmp_path / "profile") == ([steps] if steps else [])
    assert len(said) == bool(steps) and all(str(tmp_path / "profile") in line and "xprof" in line for line in said)
    profile.close()
