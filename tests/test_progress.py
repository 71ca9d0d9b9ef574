"""What a person sees while training runs: in terminals of any width, and in logs."""

import io
import re

import pytest
from rich.console import Console

from jaxembed import progress as progress_module
from jaxembed.progress import Progress

LINE = {"step": 1, "loss": 3.21987, "pairs_per_s": 23_124.0, "tokens_per_s": 1_203_450.0, "padding_waste": 0.0512}
LINE |= {"step_s": 0.08856, "mfu": 0.4123}
SCORES = {"eval/pairs/docs[test]": 41.0, "eval/pairs/docs[test]/recall@1": 30.0, "eval/sts/dev": 80.0}


@pytest.fixture
def screen(monkeypatch):
    """Makes standard error a terminal of some width, or a file; returns what is written there."""

    def make(width):
        out = io.StringIO()
        terminal = {"width": width, "height": 24, "force_terminal": True} if width else {"force_terminal": False}
        console = lambda file, quiet: Console(file=out, quiet=quiet, **terminal)  # noqa: E731
        monkeypatch.setattr(progress_module, "Console", console)
        return out

    return make


def last_screen(out):
    """The lines of the bar as it was drawn last."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue().replace("\r", ""))
    return [line for line in plain.splitlines() if line.strip()][-2:]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_every_width_shows_the_loss_on_one_line(screen, width):
    out = screen(width)
    with Progress(1_000_000, 999_000) as progress:
        for step in range(999_001, 999_011):
            progress.update({**LINE, "step": step, "stage": "a stage with quite a long name"})
    bar, figures = last_screen(out)
    assert len(bar) <= width and len(figures) <= width
    assert "loss 3.2199  23k pairs/s  1.2M tokens/s  waste 5.1%" in figures
    if width >= 80:
        assert "  waste 5.1%  0.0886 s/step  MFU 41.2%" in figures
        assert "999010/1000000" in bar and re.search(r"left \d:\d\d:\d\d|left -:--:--", bar)
    assert bar.startswith("a stage with")


def test_a_log_has_whole_lines_of_words(screen):
    out = screen(None)
    with Progress(40) as progress:
        for step in range(1, 41):
            progress.update({**LINE, "step": step})
    first, last = out.getvalue().splitlines()
    assert first == "step 1/40  loss 3.2199  23k pairs/s  1.2M tokens/s  waste 5.1%  0.0886 s/step  MFU 41.2%"
    assert last.startswith("step 40/40  loss") and "\x1b" not in out.getvalue()


def test_time_left_is_not_reckoned_from_steps_done_before(screen, monkeypatch):
    screen(None)
    progress = Progress(1100, 1000)
    now = 0.0
    monkeypatch.setattr(progress.bar, "get_time", lambda: now)
    progress.bar.reset(progress.task, completed=1000)
    for step in range(1001, 1051):
        now += 2.0
        progress.update({**LINE, "step": step})
    assert progress.bar.tasks[0].time_remaining == pytest.approx(100, rel=0.1)


def test_scores_tell_what_changed_and_keep_brackets(screen):
    out = screen(None)
    progress = Progress(10)
    progress.scores(0, {**SCORES, "bm25/pairs/docs[test]": 38.0, "bm25/pairs/docs[test]/recall@1": 20.0})
    progress.scores(5, {**SCORES, "eval/sts/dev": 79.5})
    assert out.getvalue().splitlines() == [
        "step 0: pairs/docs[test] 41.00, BM25 38.00  sts/dev 80.00",
        "step 5: pairs/docs[test] 41.00 (+0.00)  sts/dev 79.50 (-0.50)",
    ]


def test_other_processes_show_nothing(screen):
    out = screen(80)
    with Progress(3, active=False) as progress:
        progress.say("hello")
        progress.update(LINE)
        progress.scores(1, SCORES)
    assert not out.getvalue()
