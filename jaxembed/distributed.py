"""Several processes of one run: how they find each other, agree at the start, and learn that one is lost.

The environment says who is who; docs/launch.md lists the variables, launch/ sets them. JAX's own start-up connects the
processes. Beside it, they talk through its key-value store: at the start, to compare what they are about to run, and
every second after, to say that they are alive. Without that a process whose peer is gone would wait in a collective
for ever, or be ended by JAX's native code without a word that helps.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import pathlib
import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from jaxembed.config import Config, to_json
from jaxembed.errors import ProcessLost, UserError, exit_code
from jaxembed.run_folder import differences
from jaxembed.storage import AnyPath

START, COORDINATOR, PROCESSES, PROCESS, TIMEOUT = (
    f"JAXEMBED_{name}" for name in ("START", "COORDINATOR", "PROCESSES", "PROCESS", "TIMEOUT")
)
ALIVE, FAILED, SAID = (f"jaxembed/{name}/" for name in ("alive", "failed", "said"))
BEAT = 1.0  # seconds between two signs of life
LONG = 7 * 24 * 3600  # seconds, for what takes as long as it takes; a lost process ends the wait
LEAVE = 3 * BEAT  # seconds that others have to read why one leaves
NATIVE_TIMEOUTS = ("initialization_timeout", "heartbeat_timeout_seconds", "shutdown_timeout_seconds")
# In the message of a collective that failed, whichever error it comes as.
COLLECTIVE_WORDS = ("Gloo", "NCCL", "UNKNOWN:", "UNAVAILABLE:", "INTERNAL:", "ABORTED:", "DEADLINE_EXCEEDED:")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")


@dataclasses.dataclass(frozen=True)
class Start:
    """How the processes of a run find each other.

    Attributes:
      processes: how many; 1 where there is nothing to find.
      process: this one's number.
      coordinator: HOST:PORT of process 0.
      auto: the platform says all of that.
      timeout: seconds to wait for those that do not come; a third of it silent, and a process counts as lost.
    """

    processes: int = 1
    process: int = 0
    coordinator: str = ""
    auto: bool = False
    timeout: int = 300


def read_environment(environ: Mapping[str, str]) -> Start:
    """Reads JAXEMBED_START, _COORDINATOR, _PROCESSES, _PROCESS and _TIMEOUT.

    Raises:
      UserError: a value that cannot be, or one without the others.
    """
    timeout = _number(environ, TIMEOUT, Start.timeout, 6)
    start = environ.get(START, "")
    if start not in ("", "auto"):
        raise UserError(f"{START}={start!r}: wants 'auto', or leave it out")
    named = [name for name in (COORDINATOR, PROCESSES, PROCESS) if environ.get(name)]
    if start == "auto":
        if named:
            raise UserError(f"{START}=auto and {', '.join(named)}: give either; the platform says who is who, or you")
        return Start(auto=True, timeout=timeout)
    if not named:
        return Start(timeout=timeout)
    processes = _number(environ, PROCESSES, 0, 1)
    if processes == 1:
        return Start(timeout=timeout)
    if len(named) < 3:
        raise UserError(f"{', '.join(named)} without the rest: wants {COORDINATOR}, {PROCESSES} and {PROCESS}")
    process, coordinator = _number(environ, PROCESS, 0, 0), environ[COORDINATOR]
    if process >= processes:
        raise UserError(f"{PROCESS}={process}: of {processes} processes ({PROCESSES}) the last is {processes - 1}")
    if not coordinator.rpartition(":")[0] or not coordinator.rpartition(":")[2].isdigit():
        raise UserError(f"{COORDINATOR}={coordinator!r}: wants HOST:PORT of process 0")
    return Start(processes, process, coordinator, timeout=timeout)


def _number(environ: Mapping[str, str], name: str, default: int, least: int) -> int:
    said = environ.get(name, "")
    if said and not (said.isdigit() and int(said) >= least):
        raise UserError(f"{name}={said!r}: wants a whole number, {least} or more")
    return int(said) if said else default


def connect() -> "Peers":
    """Connects this process with the others of its run, as the environment says, before any device is used.

    Where the others do not come in time, the process ends, with a message and code 3.

    Raises:
      UserError: the environment is wrong, or the platform does not say who is who.
    """
    start = read_environment(os.environ)
    if not start.auto and start.processes == 1:
        return Peers()
    import jax

    said: dict[str, Any] = {}
    if not start.auto:
        said = {"coordinator_address": start.coordinator, "num_processes": start.processes, "process_id": start.process}
        said["cluster_detection_method"] = "deactivate"  # which would say what devices are this process's
    impatience = threading.Timer(start.timeout, _end, (_nobody_came(start), ProcessLost.code))
    impatience.daemon = True
    impatience.start()
    try:
        jax.distributed.initialize(
            **said,
            # Later than ours: native code ends the process without a word that helps.
            **dict.fromkeys(NATIVE_TIMEOUTS, start.timeout + 60),
        )
    except (ValueError, RuntimeError, OSError) as error:
        why = " ".join(str(error).split())
        if start.auto:
            why = f"{START}=auto: the platform does not say which processes there are ({why})"
        raise UserError(f"{why}; see docs/launch.md") from error
    finally:
        impatience.cancel()
    from jax._src.distributed import global_state  # the only way to its key-value store

    return Peers(global_state.client, global_state.process_id, global_state.num_processes, start.timeout)


def _nobody_came(start: Start) -> str:
    who = "this process" if start.auto else f"process {start.process} of {start.processes}"
    where = f" at {start.coordinator}" if start.coordinator else ""
    said = "" if start.auto else f", with the same {PROCESSES} and each with its own {PROCESS}"
    return (
        f"{who} has waited {start.timeout} s ({TIMEOUT}) for the others{where}: see whether all were started{said}, "
        "and whether they may reach process 0's port"
    )


class Peers:
    """The processes of a run, seen from one of them. Made by `connect`; a context manager around all that they do.

    An error inside is told to the others, which end with its message and code; so is the silence of a process. The
    context of several processes is never left with an error: the process ends there, since JAX's own way to shut down
    waits for all.

    Attributes:
      index: this process's number.
      count: how many there are.
    """

    def __init__(self, client: Any = None, index: int = 0, count: int = 1, timeout: int = Start.timeout) -> None:
        self._client, self.index, self.count = client, index, count
        self._silence = max(timeout / 3, 3 * BEAT)
        self._asked = 0  # all processes ask the same questions in the same order, some of them more than once
        self._leaving = threading.Event()
        self._watch = threading.Thread(target=self._keep_watch, name="peers", daemon=True)

    @property
    def main(self) -> bool:
        """Whether this is the process that writes what one process writes."""
        return self.index == 0

    def __enter__(self) -> "Peers":
        if self.count > 1:
            self._watch.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.count == 1:
            return
        if error is None:
            self.wait()  # or the first to come to JAX's own barrier at the end of the process would lose patience there
            self._leaving.set()
            self._watch.join()
            return
        if isinstance(error, SystemExit) and not error.code:
            return
        code, message = exit_code(error), " ".join(str(error).split())[:500]
        if code is None and _is_of_others(error):
            news = self._news()
            if news:
                _end(*news)
            code = ProcessLost.code
            message = f"a computation failed, most likely because another process was lost: {message}"
        elif code is None:
            sys.excepthook(kind, error, trace)
            code, message = 1, f"{kind.__name__}: {message}"
        self._say(FAILED, {"code": code, "message": message})
        time.sleep(LEAVE)  # with this process's connections goes what the others might still read
        self._leaving.set()
        _end(f"process {self.index} of {self.count}: {message}", code)

    def _news(self) -> tuple[str, int] | None:
        """Returns what another process says of its failure, the message and the code, if it does so soon."""
        until = time.monotonic() + LEAVE
        while time.monotonic() < until:
            try:
                failed = self._failed()
            except Exception:  # process 0 is gone, and with it what was said
                return None
            if failed:
                return failed
            time.sleep(BEAT / 5)
        return None

    def _failed(self) -> tuple[str, int] | None:
        """Returns message and code of the process that has failed first of all: not merely since another was lost."""
        failed = self._read(FAILED)
        if not failed:
            return None
        who, said = min(failed.items(), key=lambda item: (item[1]["code"] == ProcessLost.code, item[0]))
        return f"process {who} of {self.count}: {said['message']}", said["code"]

    def require_same(self, what: str, value: Any) -> None:
        """Makes sure that all processes have the same, and waits for all of them.

        Args:
          what: that is, for messages.
          value: as JSON knows it; dicts are compared field by field.

        Raises:
          UserError: another process has another; it says what differs.
        """
        if self.count == 1:
            return
        value = json.loads(json.dumps(value))
        where = self._place(SAID)
        self._say(where, value)
        if not self.main:
            first = json.loads(self._client.blocking_key_value_get(f"{where}0", LONG * 1000))
            different = differences(first, value, what)
            if different:
                raise UserError(
                    f"another {what} than process 0 has ({'; '.join(different[:8])}): all processes of a run need the "
                    "same files, flags and packages"
                )
        self.wait()

    def of_main(self, value: Any) -> Any:
        """Returns the value that process 0 gives, one that JSON knows; waits for it."""
        if self.count == 1:
            return value
        where = self._place(SAID)
        if self.main:
            self._say(where, value)
        return json.loads(self._client.blocking_key_value_get(f"{where}0", LONG * 1000))

    def wait(self) -> None:
        """Waits for all processes, as long as it takes; a lost one ends the wait."""
        if self.count > 1:
            self._client.wait_at_barrier(self._place("jaxembed/barrier/"), LONG * 1000)

    def _place(self, prefix: str) -> str:
        self._asked += 1
        return f"{prefix}{self._asked}/"

    def _say(self, where: str, value: Any) -> None:
        self._client.key_value_set(f"{where}{self.index}", json.dumps(value), allow_overwrite=True)

    def _read(self, where: str) -> dict[int, Any]:
        return {int(key.rpartition("/")[2]): json.loads(value) for key, value in self._client.key_value_dir_get(where)}

    def _keep_watch(self) -> None:
        """Says that this process is alive; ends it where another has failed, or process 0 is gone."""
        beats, heard = 0, dict.fromkeys(range(1, self.count), (0, time.monotonic()))
        lost = (
            f"process {self.index} of {self.count}: process 0, where all meet, is gone: it was killed, or its machine"
        )
        while True:
            left = self._leaving.wait(BEAT)
            beats += 1
            # A machine that hangs, or its network, does not answer at all.
            hanging = threading.Timer(self._silence, _end, (f"{lost} does not answer", ProcessLost.code))
            hanging.daemon = True
            hanging.start()
            try:
                self._say(ALIVE, "left" if left else beats)
                failed = self._failed()
                if self.main and not failed:
                    failed = self._silent(heard)
            except Exception as error:  # whatever the client raises then
                if not left:
                    _end(f"{lost} was ({str(error)[:100]})", ProcessLost.code)
                return
            finally:
                hanging.cancel()
            if left:
                return
            if failed:
                time.sleep(LEAVE * self.main)  # with process 0 goes what the others read
                _end(*failed)

    def _silent(self, heard: dict[int, tuple[Any, float]]) -> tuple[str, int] | None:
        """Returns message and code of a process that has been silent for too long, after telling the others."""
        now, alive = time.monotonic(), self._read(ALIVE)
        for process, (before, since) in heard.items():
            beats = alive.get(process, 0)
            if beats == "left" or beats != before:
                heard[process] = beats, now
            elif now - since > self._silence:
                lost = f"nothing was heard of it for {self._silence:.0f} s: it was killed, or its machine is gone"
                failure = {"code": ProcessLost.code, "message": lost}
                self._client.key_value_set(f"{FAILED}{process}", json.dumps(failure), allow_overwrite=True)
                return self._failed()
        return None


def _is_of_others(error: BaseException) -> bool:
    """Whether an error may come from a collective that another process did not join: JAX gives it several types."""
    import jax

    said = str(error)
    if "RESOURCE_EXHAUSTED" in said or not isinstance(error, jax.errors.JaxRuntimeError | ValueError | RuntimeError):
        return False
    return isinstance(error, jax.errors.JaxRuntimeError) or any(word in said for word in COLLECTIVE_WORDS)


def require_same_program(peers: Peers, config: Config, workdir: AnyPath) -> None:
    """Makes sure that all processes run the same config in the same place with the same code and packages.

    Raises:
      UserError: what differs.
    """
    if peers.count == 1:
        return
    peers.require_same("config", to_json(config))
    peers.require_same("--workdir", str(workdir.absolute()))
    root = pathlib.Path(__file__).parent
    code = {str(path.relative_to(root)): _digest(path) for path in sorted(root.rglob("*.py"))}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    peers.require_same("code", {"processes": peers.count, **versions, **code})


def _digest(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _end(message: str, code: int) -> None:
    """Ends the process at once, from whichever thread: the main one may wait in native code for ever."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
