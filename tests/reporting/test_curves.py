"""The picture: its size, that something is in it, and that long curves keep their outline."""

import io

import numpy as np
import pytest
from matplotlib import image
from written_run import write_run

from jaxembed.reporting.curves import BINS, draw, running_mean, thin
from jaxembed.reporting.history import History, Series


def pixels(png):
    """[height, width, 4], from 0 to 1."""
    return image.imread(io.BytesIO(png), format="png")


def ink(picture):
    """The share of pixels that are not white."""
    return float((picture[..., :3].min(-1) < 0.95).mean())


@pytest.mark.parametrize(
    ("steps", "every", "stages"), [(1, 0, ()), (20, 5, ("weak", "hard")), (300, 20, ()), (5000, 250, ())]
)
def test_runs_of_any_length_are_drawn(tmp_path, steps, every, stages):
    history = History.read(write_run(tmp_path / "run", steps, every, stages))
    picture = pixels(draw(history, "a run"))
    assert picture.shape[:2] == (1000, 1600)
    assert 0.01 < ink(picture) < 0.4
    blue = np.array([0x00, 0x72, 0xB2]) / 255  # of the curves, and of nothing else
    for panel in (picture[:500], picture[500:]):
        assert (np.abs(panel[..., :3] - blue).max(-1) < 0.02).sum() > 50


def test_the_same_history_gives_the_same_picture(tmp_path):
    history = History.read(write_run(tmp_path / "run", 50, 10))
    assert draw(history, "a run") == draw(history, "a run") != draw(history, "another")


def test_every_metric_changes_the_picture(tmp_path):
    history = History.read(write_run(tmp_path / "run", 30, 10))
    whole = draw(history, "a run")
    names = ["loss", "grad_norm", "learning_rate", "pairs_per_s", "tokens_per_s", "padding_waste"]
    for name in [*names, "eval/sts/dev", "bm25/pairs/held-out"]:
        rest = {key: series for key, series in history.series.items() if key != name}
        assert draw(History(rest, ()), "a run") != whole, name


def test_parts_of_the_loss_are_drawn(tmp_path):
    history = History.read(write_run(tmp_path / "run", 30, 10))
    loss = history.series["loss"]
    parts = {
        f"loss/{name}": type(loss)(loss.steps, factor * loss.values) for name, factor in (("full", 0.5), ("dim4", 2))
    }
    one, both = (History({**history.series, **dict(list(parts.items())[:n])}, ()) for n in (1, 2))
    assert len({draw(h, "a run") for h in (history, one, both)}) == 3


def test_an_empty_history_is_drawn():
    assert ink(pixels(draw(History({}, ()), "a run"))) > 0.001


@pytest.mark.parametrize("n", [1, 10, 4 * BINS, 4 * BINS + 1, 1_000_000])
def test_thinning_keeps_extremes_and_ends(n):
    values = np.random.default_rng(0).normal(size=n)
    values[n // 3] = 50
    values[n // 2] = -50 if n > 2 else values[n // 2]
    steps, kept = thin(Series(np.arange(n), values))
    assert len(kept) <= 4 * BINS and (np.diff(steps) > 0).all()
    np.testing.assert_array_equal(kept, values[steps])
    assert kept.max() == values.max() and kept.min() == values.min()
    assert steps[0] == 0 and steps[-1] == n - 1


def test_the_smoothed_curve_is_the_mean_around_each_point():
    values = np.random.default_rng(0).normal(size=800)
    steps, smooth = running_mean(Series(np.arange(800), values))
    assert len(smooth) == len(steps) == 800
    assert smooth[400] == pytest.approx(values[390:411].mean())
    assert smooth[0] == pytest.approx(values[:11].mean()) and smooth[-1] == pytest.approx(values[-11:].mean())
    assert smooth.std() < 0.4 * values.std()
