"""A stall is reported once, with the stacks and what was being done, and so is its end."""

import threading
import time

from jaxembed.observing.clock import Clock, Phase
from jaxembed.observing.watchdog import Watchdog


def wait_for(path, words, seconds=10.0):
    """Returns what a file holds as soon as it holds these words."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if path.exists() and words in path.read_text():
            return path.read_text()
        time.sleep(0.01)
    raise AssertionError(f"{path}: no {words!r}")


def wait_for_a_peer_that_is_gone(release):
    release.wait(20)


def test_a_stall_is_reported_once_and_its_end(tmp_path, capfd):
    clock, release = Clock(), threading.Event()
    clock.step = 1234
    watchdog = Watchdog(clock, tmp_path, 3, 0.2)
    watchdog.start()
    path = tmp_path / "stalls" / "process-3.txt"
    try:
        for _ in range(20):  # longer than the limit in all, but never silent
            with clock.during(Phase.HOST):
                time.sleep(0.02)
        assert not path.exists()
        said = []

        def look():
            said.append(wait_for(path, "all threads"))
            time.sleep(0.6)
            said.append(path.read_text())
            release.set()

        threading.Thread(target=look).start()
        with clock.during(Phase.COMPUTE):
            wait_for_a_peer_that_is_gone(release)
        text = wait_for(path, "going on after")
    finally:
        watchdog.close()
    first, later = said
    head = first.splitlines()[0]
    assert "process 3: no progress for 0" in head and "config.stall_seconds" in head
    assert "step 1,234, computing; all threads:" in head
    assert "in wait_for_a_peer_that_is_gone" in first and "in look" in first
    assert later == first and text.count("no progress") == 1 and text.startswith(first)
    assert "no progress" in (errors := capfd.readouterr().err) and "going on after" in errors
    with clock.during(Phase.COMPUTE):
        time.sleep(0.5)
    assert path.read_text() == text  # nobody watches any more


def test_each_stall_adds_to_the_file(tmp_path):
    clock = Clock()
    watchdog = Watchdog(clock, tmp_path, 0, 0.1)
    path = tmp_path / "stalls" / "process-0.txt"
    path.parent.mkdir()
    path.write_text("of the start before\n")
    watchdog.start()
    try:
        wait_for(path, "starting or ending")
        with clock.during(Phase.CHECKPOINT):
            text = wait_for(path, "saving a checkpoint")
    finally:
        watchdog.close()
    assert text.startswith("of the start before\n") and text.count("no progress") == 2


def test_zero_never_watches(tmp_path):
    before = threading.active_count()
    watchdog = Watchdog(Clock(), tmp_path, 0, 0)
    watchdog.start()
    assert threading.active_count() == before
    watchdog.close()


def test_a_folder_that_cannot_be_written_leaves_the_message(tmp_path, capfd):
    (tmp_path / "stalls").write_text("a file")
    watchdog = Watchdog(Clock(), tmp_path, 0, 0.1)
    watchdog.start()
    time.sleep(0.4)
    watchdog.close()
    errors = capfd.readouterr().err
    assert "no progress" in errors and "stalls" in errors.splitlines()[-1]
