"""Says where a run hangs: a peer that is gone, a file system that does not answer, a deadlock."""

import faulthandler
import os
import sys
import tempfile
import threading
import time

from jaxembed.errors import UserError
from jaxembed.observing.clock import Clock
from jaxembed.run_folder import write_whole
from jaxembed.storage import AnyPath

FOLDER = "stalls"  # in the work directory


class Watchdog:
    """Writes the stacks of all threads where the main one has done nothing new for some time. It ends no run.

    Once per stall, to standard error and to WORKDIR/stalls/process-N.txt; and a line when things go on. What takes
    long by right, such as a big evaluation, is named in the first line.
    """

    def __init__(self, clock: Clock, workdir: AnyPath, process: int, seconds: float) -> None:
        """Does not watch yet.

        Args:
          clock: its changes of phase are signs of life.
          workdir: the run's folder.
          process: this one's number.
          seconds: without a sign of life; 0 never watches.
        """
        self._clock, self._process, self._seconds = clock, process, seconds
        self._path = workdir / FOLDER / f"process-{process}.txt"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall watchdog", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        if self._seconds:
            self._thread.start()

    def close(self) -> None:
        """Ends to watch."""
        self._ended.set()
        if self._seconds:
            self._thread.join()

    def _watch(self) -> None:
        stalled_at: float | None = None  # when the phase began that is stalled
        while not self._ended.wait(min(self._seconds / 4, 5.0)):
            since = self._clock.since
            silent = time.perf_counter() - since
            if stalled_at is not None and since != stalled_at:
                self._say(f"going on after about {since - stalled_at:.0f} s\n")
                stalled_at = None
            if stalled_at is None and silent > self._seconds:
                stalled_at = since
                self._say(
                    f"no progress for {silent:.0f} s (config.stall_seconds): step {self._clock.step:,}, "
                    f"{self._clock.phase}; all threads:\n{_stacks()}"
                )

    def _say(self, text: str) -> None:
        """Shows a text and adds it to the file; neither waits for a lock that the main thread may hold."""
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} process {self._process}: {text}"
        print(text, end="", file=sys.__stderr__, flush=True)
        try:
            self._path.parent.mkdir(exist_ok=True)
            before = self._path.read_bytes() if self._path.exists() else b""
            write_whole(self._path, before + text.encode())
        except (OSError, UserError) as error:  # the disk may be what hangs the run; the text is shown already
            print(f"{self._path}: {error}", file=sys.__stderr__, flush=True)


def _stacks() -> str:
    with tempfile.TemporaryFile() as file:  # faulthandler writes to descriptors only
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0, os.SEEK_SET)
        return file.read().decode(errors="replace")
