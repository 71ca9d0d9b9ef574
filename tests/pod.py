"""Several processes of one run on this machine, as tests start them."""

import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Sequence

ROOT = pathlib.Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process has ended: its exit code, standard output and standard error, without gloo's greetings."""

    code: int
    out: str
    err: str


def free_port() -> int:
    """Returns a port that nobody listens to."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def environment(devices: int, timeout: int = 60) -> dict[str, str]:
    """Returns the environment of a process with so many CPU devices, no part of any run yet."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("JAXEMBED_")}
    return own | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAXEMBED_TIMEOUT": str(timeout),
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(
    processes: int, devices: int, commands: Sequence[Sequence[str]], timeout: int = 60, first: int = 0
) -> list[subprocess.Popen]:
    """Starts a process for each command (`python ARGUMENTS`), as numbers `first`, … of a run of so many processes."""
    port = free_port()
    started = []
    for process, command in enumerate(commands, first):
        env = environment(devices, timeout)
        if processes > 1:
            env |= {"JAXEMBED_COORDINATOR": f"localhost:{port}", "JAXEMBED_PROCESSES": str(processes)}
            env["JAXEMBED_PROCESS"] = str(process)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, *command], env=env, cwd=ROOT, text=True, **pipes))
    return started


def finish(started: Sequence[subprocess.Popen], seconds: float = 600) -> list[Ended]:
    """Waits for all; one that takes longer is killed."""
    ended = []
    for process in started:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
        said = ("\n".join(line for line in text.splitlines() if "[Gloo]" not in line) for text in (out, err))
        ended.append(Ended(process.returncode, *said))
    return ended
