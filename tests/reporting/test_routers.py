"""What the routers of a mixture of experts did: loads read, figures of the end, the picture, the page."""

import io
import json

import numpy as np
import pytest
from matplotlib import image
from rich.console import Console
from written_run import write_run

from jaxembed.report import write_report
from jaxembed.reporting import routers
from jaxembed.reporting.history import History, Series
from jaxembed.reporting.summary import summary


def loads_of(steps, layers, experts, seed=0):
    """Loads that grow even, [steps, layers, experts]."""
    rng = np.random.default_rng(seed)
    drift = rng.normal(size=(layers, experts)) * np.exp(-np.arange(steps) / max(steps / 4, 1))[:, None, None]
    taken = np.exp(drift + 0.05 * rng.normal(size=(steps, layers, experts)))
    return (experts * taken / taken.sum(-1, keepdims=True)).round(3)


def add_routers(workdir, loads):
    """Gives each logged step of a run its loads."""
    path = workdir / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line, load in zip(lines, loads, strict=True):
        said = {"balance": 1.25, "z": 3.0, "entropy": 0.5, "busiest": load.max(), "idlest": load.min(), "dropped": 0.0}
        line |= {f"router/{name}": float(value) for name, value in said.items()} | {"router/load": load.tolist()}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("steps", [1, 7, 2 * routers.POINTS - 1, 2 * routers.POINTS, 5 * routers.POINTS + 3])
def test_loads_are_read_and_those_of_long_runs_averaged(tmp_path, steps):
    values = loads_of(steps, 2, 4)
    lines = ({"step": i + 1, "router/load": load.tolist()} for i, load in enumerate(values))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    got = routers.read_loads(tmp_path)
    assert len(got.steps) == len(got.values) < 2 * routers.POINTS
    assert len(got.steps) >= min(steps, routers.POINTS)
    together = int(got.steps[0])
    assert (np.diff(got.steps) == together).all() and steps - got.steps[-1] < together
    for last, mean in zip(got.steps, got.values):
        np.testing.assert_allclose(mean, values[last - together : last].mean(0), atol=1e-5)
    tenth = max(1, round(0.1 * len(got.steps)))
    np.testing.assert_allclose(got.at_end, got.values[-tenth:].mean(0), atol=1e-6)


def test_a_run_without_routers_has_none(tmp_path):
    run = write_run(tmp_path / "run", 5)
    assert routers.read_loads(run) is None
    assert routers.in_words(History.read(run)) == ""


def test_figures_are_means_over_the_end():
    steps = np.arange(1, 41)
    series = {
        name: Series(steps, np.where(steps > 36, value, 77.0))
        for name, value in (("router/balance", 1.25), ("router/busiest", 2.5), ("router/idlest", 0.125))
    }
    series["router/entropy"] = Series(steps, steps / 40)
    series["router/dropped"] = Series(steps, steps * 0.0)
    words = "balance 1.250, entropy 96.2%, busiest 2.50, idlest 0.12, dropped 0.00%"
    assert routers.in_words(History(series, ())) == words


@pytest.mark.parametrize(("steps", "layers", "experts"), [(1, 1, 4), (60, 6, 8), (20, 48, 128)])
def test_routers_of_any_size_are_drawn(steps, layers, experts):
    loads = routers.Loads(np.arange(1, steps + 1), loads_of(steps, layers, experts).astype(np.float32))
    busiest = Series(loads.steps, loads.values.max((1, 2)))
    history = History({"router/busiest": busiest}, ())
    picture = routers.draw(history, loads, "a run")
    pixels = image.imread(io.BytesIO(picture), format="png")
    assert pixels.shape[:2] == (1000, 1600)
    orange = np.array([0xD5, 0x5E, 0x00]) / 255  # the busiest, in both pictures of loads
    for panel in (pixels[:550, 900:], pixels[550:, 1050:]):
        assert (np.abs(panel[..., :3] - orange).max(-1) < 0.02).sum() > 20
    assert routers.draw(history, loads, "a run") == picture
    other = routers.Loads(loads.steps, loads.values[:, :, ::-1])
    assert routers.draw(history, other, "a run") != picture


def test_the_report_shows_them(tmp_path):
    run = write_run(tmp_path / "run", 20, 5)
    add_routers(run, np.concatenate([np.ones((1, 2, 4)), loads_of(20, 2, 4)]))
    write_report(run)
    text = (run / "report" / "README.md").read_text()
    assert "| balance | entropy | busiest | idlest | dropped |" in text and "| 1.250 | 50.0% |" in text
    assert f"]({routers.NAME})" in text
    assert (run / "report" / routers.NAME).read_bytes().startswith(b"\x89PNG")
    console = Console(file=io.StringIO(), width=200)
    console.print(summary(run))
    assert "balance 1.250, entropy 50.0%, busiest" in console.file.getvalue()
