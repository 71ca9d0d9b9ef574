"""Being told to stop: a machine that is taken away sends SIGTERM first."""

import signal

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """Turns SIGTERM into a request to save and leave, agreed on by all processes."""

    def __enter__(self) -> "StopSignal":
        self.received = False
        self.multi = jax.process_count() > 1  # then jax's own preemption service has the handler
        if not self.multi:
            self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "received", True))
        return self

    def __exit__(self, *_: object) -> None:
        if not self.multi:
            signal.signal(signal.SIGTERM, self.before)

    def requested(self, step: int) -> bool:
        """Whether to stop after this step."""
        return multihost_utils.reached_preemption_sync_point(step) if self.multi else self.received
