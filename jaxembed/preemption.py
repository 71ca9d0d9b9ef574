"""Being told to stop: a machine that is taken away sends SIGTERM first."""

import signal

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Turns SIGTERM into a request to save and leave, agreed on by all processes."""

    def __enter__(self) -> "StopSignal":
        self.received, self.asked = False, 0
        self.multi = jax.process_count() > 1  # then jax's own preemption service has the handler
        if not self.multi:
            self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "received", True))
        return self

    def __exit__(self, *_: object) -> None:
        if not self.multi:
            signal.signal(signal.SIGTERM, self.before)

    def requested(self) -> bool:
        """Whether to stop now; to be called once a step.

        Several processes agree on the call after the last one that any of them has made. Calls are counted from this
        start: a signal that comes before the first one means the second, which a run that goes on at a later step would
        never meet by its steps.
        """
        if not self.multi:
            return self.received
        self.asked += 1
        return multihost_utils.reached_preemption_sync_point(self.asked - 1)
