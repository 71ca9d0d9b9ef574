"""Checkpoints in stores that orbax cannot write: kept in a folder of this machine, whole steps sent to the store.

orbax writes gs:// by itself, each process its own shards. For any other store it works in a local folder, and what it
keeps there is mirrored: after a step is complete, a thread sends it, its mark last, and removes from the store what
orbax has removed. When a run goes on, the local folder begins with what orbax wants to know of the steps in the store,
their names and metrics; the arrays are fetched for the step that is restored.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from jaxembed.errors import UserError
from jaxembed.storage import AnyPath, StorePath, fetch, remove, send, staged

COMPLETE = "commit_success.txt"  # in a step's folder in any store: the name is that of orbax on gs://
_NATIVE = "gs"
_SMALL = ("metrics/", "_CHECKPOINT_METADATA", COMPLETE)  # what orbax reads of steps that it does not restore


def is_mirrored(folder: AnyPath) -> bool:
    """Whether checkpoints there are a matter of this module."""
    return isinstance(folder, StorePath) and folder.scheme != _NATIVE


def complete_steps(folder: AnyPath) -> list[int]:
    """Returns the steps of which there is a complete checkpoint, in order.

    Args:
      folder: of a run's checkpoints, maybe not there.
    """
    if isinstance(folder, StorePath):
        names = (name.split("/") for name in folder.files())
        return sorted(int(parts[0]) for parts in names if parts[0].isdigit() and parts[1:] == [COMPLETE])
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


class Mirror:
    """A folder of checkpoints on this machine that follows one in a store. One process writes it.

    Attributes:
      folder: the local one, absolute.
    """

    def __init__(self, store: StorePath) -> None:
        """Makes the local folder anew, with what is to be known of each complete step in the store.

        Raises:
          UserError: the run has several processes; the store cannot be read or written.
        """
        if jax.process_count() > 1:
            raise UserError(
                f"{store}: a run of several processes cannot save its checkpoints in a store of this kind: take a "
                "--workdir on gs://, or on a file system that all processes share"
            )
        self._store, self.folder = store, staged(store).absolute()
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        complete = complete_steps(store)
        for begun in {name.partition("/")[0] for name in store.files()} - {str(step) for step in complete}:
            remove(store / begun, COMPLETE)  # what a kill left
        for step in complete:
            names = [name for name in (store / str(step)).files() if name.startswith(_SMALL)]
            fetch(store / str(step), self.folder / str(step), names)
        self._whole: set[int] = set()  # steps whose arrays are here
        self._sender = ThreadPoolExecutor(1)
        self._sending: Future[None] | None = None

    def fetch(self, step: int) -> None:
        """Makes sure that a step is here with its arrays."""
        if step not in self._whole:
            here, there = self.folder / str(step), self._store / str(step)
            shutil.rmtree(here)
            fetch(there, here, tuple(there.files()))
            self._whole.add(step)

    def follow(self, finish: Callable[[], None]) -> None:
        """Starts to send the step that is being saved, and to remove what is no more.

        Args:
          finish: waits until it is saved here. Nobody else may use the checkpoints before `settle`.
        """
        self._sending = self._sender.submit(self._follow, finish)

    def settle(self) -> None:
        """Waits until all is sent.

        Raises:
          UserError: it was not: the store cannot be written. Whatever saving raised.
        """
        sending, self._sending = self._sending, None
        if sending:
            sending.result()

    def close(self) -> None:
        """Ends the thread and removes the local folder."""
        self._sender.shutdown()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _follow(self, finish: Callable[[], None]) -> None:
        finish()
        here, there = set(complete_steps(self.folder)), set(complete_steps(self._store))
        for step in sorted(here - there):
            (self.folder / str(step) / COMPLETE).touch()
            send(self.folder / str(step), self._store / str(step), COMPLETE)
            self._whole.add(step)
        for step in sorted(there - here):
            remove(self._store / str(step), COMPLETE)
