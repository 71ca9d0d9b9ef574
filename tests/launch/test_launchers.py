"""The scripts of launch/: what they print, what they run, and when they start a run again. Stubs stand for programs."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch"
WORDS = {  # each script's own words, where it needs some
    "local.sh": ["2", "--devices=3"],
    "host.sh": [],
    "gpu.sh": [],
    "slurm.sbatch": [],
    "tpu_vm.sh": ["slice", "--zone=here"],
    "gke_xpk.sh": ["--cluster=c", "--workload=first", "--tpu-type=v5litepod-16", "--docker-image=image"],
}
RUN = ["--config=configs/a b.py:tiny", '--workdir=runs/it\'s "new" $HOME']
FLAGS = ["--config.data.train[0].path=a b.jsonl", "--data=*.jsonl", "--config.note=$(false) \\ 'q'"]
TRAIN = ["-m", "jaxembed.train", *RUN, *FLAGS]
# What the stub of Python does is told by $DOES; it knows how often it was started and which process it is.
STUB = """#!/usr/bin/env bash
# in one write, so that processes do not mix theirs
env printf '%s\\0' "${0##*/}" "$@" $'\\n' >>"$RECORD"
me=${JAXEMBED_PROCESS-0}
echo >>"$RECORD.$me"
start=$(wc -l <"$RECORD.$me")
ready() { : >"$RECORD.ready$me"; }  # traps are set
eval "${DOES-}"
"""


class Place:
    """A home folder with stubs of all programs that launchers call."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.record = folder, folder / "record"
        for name in ("python", "gcloud", "xpk", "srun", "scontrol"):
            (folder / name).write_text(STUB)
            (folder / name).chmod(0o755)
        self.env = {"HOME": str(folder), "PATH": f"{folder}:{os.environ['PATH']}", "RECORD": str(self.record)}
        self.env |= {"JAXEMBED_RESTART_PAUSE": "0", "PYTHON": str(folder / "python")}

    def start(self, script: str, *arguments: str, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            [LAUNCH / script, *arguments],
            env=self.env | env,
            cwd=ROOT,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def run(self, script: str, *arguments: str, **env: str) -> subprocess.CompletedProcess:
        process = self.start(script, *arguments, **env)
        out, err = process.communicate(timeout=30)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def runs(self) -> list[list[str]]:
        """What was called so far, with its arguments."""
        lines = self.record.read_text().split("\0\n\0")[:-1] if self.record.exists() else []
        return [line.split("\0") for line in lines]

    def wait_for_ready(self, count: int) -> None:
        deadline = time.monotonic() + 20
        while len(list(self.folder.glob("*.ready*"))) < count:
            assert time.monotonic() < deadline, self.runs()
            time.sleep(0.02)


@pytest.fixture
def place(tmp_path: pathlib.Path) -> Place:
    return Place(tmp_path)


def commands(printed: str) -> list[list[str]]:
    """The commands that were printed, read as a shell would."""
    return [shlex.split(line[2:]) for line in printed.splitlines() if line.startswith("+ ")]


def test_shellcheck_finds_nothing():
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    files = sorted(LAUNCH.iterdir())
    done = subprocess.run([shellcheck, "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert not [file.name for file in files if "shellcheck disable" in file.read_text()]
    assert all(len(file.read_text().splitlines()) <= 150 for file in files)


@pytest.mark.parametrize("script", WORDS)
def test_help_is_the_header(place, script):
    done = place.run(script, "--help")
    assert done.returncode == 0 and not done.stderr and not place.runs()
    assert f"launch/{script}" in done.stdout and "--dry-run" in done.stdout and "docs/launch.md" in done.stdout
    assert "set -euo" not in done.stdout and "#" not in done.stdout


@pytest.mark.parametrize("script", WORDS)
def test_dry_run_prints_words_that_a_shell_reads_back(place, script):
    done = place.run(script, *WORDS[script], *RUN, "--dry-run", "--", *FLAGS, XLA_FLAGS="--xla_own=1")
    assert done.returncode == 0 and not place.runs(), done.stderr
    printed = commands(done.stdout)
    if script == "local.sh":
        for i, words in enumerate(printed):
            assert f"JAXEMBED_PROCESS={i}" in words and "JAXEMBED_PROCESSES=2" in words
            assert "JAX_PLATFORMS=cpu" in words and "JAX_NUM_CPU_DEVICES=3" in words
        assert printed[0][1] == printed[1][1] and printed[0][1].startswith("JAXEMBED_COORDINATOR=127.0.0.1:")
    assert len(printed) == (2 if script == "local.sh" else 1)
    if script in ("tpu_vm.sh", "gke_xpk.sh"):
        inner = shlex.split(printed[0][-1].removeprefix("--command="))
        assert inner[-4 - len(FLAGS) :][-len(FLAGS) :] == FLAGS and set(RUN) <= set(inner)
        assert "XLA_FLAGS=--xla_own=1" in inner
    else:
        assert all(words[-len(TRAIN) :] == TRAIN for words in printed)
        assert f"JAX_COMPILATION_CACHE_DIR={place.folder}/.cache/jaxembed/jax" in printed[0]
        assert "JAXEMBED_TIMEOUT=300" in printed[0]
    if script in ("host.sh", "slurm.sbatch"):
        assert "JAXEMBED_START=auto" in printed[0]
    if script in ("gpu.sh", "slurm.sbatch"):
        assert "XLA_FLAGS=--xla_gpu_enable_latency_hiding_scheduler=true --xla_own=1" in printed[0]


@pytest.mark.parametrize("script", WORDS)
def test_environment_is_as_good_as_flags(place, script):
    contract = {"JAXEMBED_CONFIG": RUN[0].partition("=")[2], "JAXEMBED_WORKDIR": RUN[1].partition("=")[2]}
    contract |= {"JAXEMBED_TIMEOUT": "60", "JAXEMBED_RESTARTS": "7", "JAX_COMPILATION_CACHE_DIR": "/cache"}
    flags = "--data=a,b '--config.note=two words' \"--config.more=it's\" --config.last=a\\ b"
    by_environment = place.run(script, *WORDS[script], "--dry-run", JAXEMBED_FLAGS=flags, **contract)
    written = [f"--timeout={contract['JAXEMBED_TIMEOUT']}", "--restarts", "7", "--dry-run", "--", *shlex.split(flags)]
    by_flags = place.run(script, *WORDS[script], *RUN, *written, JAX_COMPILATION_CACHE_DIR="/cache")
    assert by_environment.returncode == by_flags.returncode == 0

    def without_port(text: str) -> list[list[str]]:
        return [[w for w in words if not w.startswith("JAXEMBED_COORDINATOR")] for words in commands(text)]

    assert without_port(by_environment.stdout) == without_port(by_flags.stdout)
    assert "/cache" in by_flags.stdout and "60" in by_flags.stdout


@pytest.mark.parametrize("script", WORDS)
def test_mistakes_are_one_line_and_code_2(place, script):
    for arguments, said in (
        (RUN[1:], "--config is missing"),
        (RUN[:1], "--workdir is missing"),
        ([*RUN, "--restarts=many"], "--restarts: want a whole number"),
        ([*RUN, "--config.seed=1"], "come after --"),
        ([*RUN, "--nonsense"], "unknown option --nonsense"),
    ):
        done = place.run(script, *WORDS[script], *arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, (arguments, done)
        assert done.stderr.startswith("error: ") and said in done.stderr
    assert place.run(script, *WORDS[script], *RUN, JAXEMBED_FLAGS="--a='b").returncode == 2
    if script in ("local.sh", "host.sh", "gpu.sh"):
        assert "PYTHON=none" in place.run(script, *WORDS[script], *RUN, PYTHON="none").stderr
    assert not place.runs()


@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("local.sh", [], "how many processes?"),
        ("local.sh", ["2", "--devices=0"], "--devices"),
        ("gpu.sh", ["--nodes=2", "--node-rank=0"], "--coordinator"),
        ("gpu.sh", ["--nodes=2", "--coordinator=a:1"], "--node-rank"),
        ("gpu.sh", ["--nodes=2", "--coordinator=a:1", "--node-rank=2"], "count from 0"),
        ("tpu_vm.sh", [], "which TPU VM?"),
        ("gke_xpk.sh", ["--cluster=c"], "--workload is missing"),
        ("slurm.sbatch", ["stray"], "unexpected argument stray"),
    ],
)
def test_mistakes_of_one_script(place, script, arguments, said):
    done = place.run(script, *arguments, *RUN)
    assert done.returncode == 2 and said in done.stderr and not place.runs()


def test_several_gpu_nodes(place):
    own = ["--nodes=2", "--node-rank=1", "--coordinator=first:1234"]
    does = 'echo "$JAXEMBED_COORDINATOR $JAXEMBED_PROCESSES $JAXEMBED_PROCESS"'
    assert place.run("gpu.sh", *own, *RUN, DOES=does).stdout == "first:1234 2 1\n"
    place.env |= {"JAXEMBED_COORDINATOR": "first:1234", "JAXEMBED_PROCESSES": "2", "JAXEMBED_PROCESS": "1"}
    assert place.run("gpu.sh", *RUN, DOES=does).stdout == "first:1234 2 1\n"


def test_flags_for_gpus_are_known_to_xla(place):
    [words] = commands(place.run("gpu.sh", *RUN, "--dry-run").stdout)
    [flags] = [word.partition("=")[2] for word in words if word.startswith("XLA_FLAGS=")]
    env = os.environ | {"XLA_FLAGS": f"{flags} --xla_gpu_deterministic_ops=true", "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=env, check=True)  # XLA aborts on others


@pytest.mark.parametrize(
    ("does", "starts", "code"),
    [
        ("codes=(3 3 0); exit ${codes[start - 1]}", 3, 0),
        ("exit 2", 1, 2),
        ("exit 1", 1, 1),
        ("kill -KILL $$", 3, 137),
        ("((me == 1)) && exit 2; sleep 0.5; exit 3", 1, 2),  # a user's mistake, and what the others made of it
        ("((me == 0)) && exit 134; sleep 0.5; exit 1", 1, 1),
    ],
)
def test_restarts(place, does, starts, code):
    done = place.run("local.sh", "2", *RUN, "--restarts=2", DOES=does)
    assert done.returncode == code, done.stderr
    assert len(place.runs()) == 2 * starts
    assert done.stderr.count(": restart ") == starts - 1
    assert ("giving up" in done.stderr) == (code == 137)
    ports = [words[1] for words in commands(done.stderr)]
    assert len(set(ports)) == starts  # another for each start


def test_output_of_processes_is_told_apart(place):
    done = place.run("local.sh", "3", *RUN, DOES='echo "out $me"; echo "err $me" >&2')
    assert done.stdout == "out 0\n"  # as of a run in one process, its last line JSON
    said = done.stderr.splitlines()
    assert {"err 0", "[1] out 1", "[1] err 1", "[2] out 2", "[2] err 2"} <= set(said)


def test_told_to_stop_all_save_and_none_starts_again(place):
    does = "trap 'echo saved $me; exit 0' TERM; ready; while :; do sleep 0.05; done"
    process = place.start("local.sh", "2", *RUN, DOES=does)
    place.wait_for_ready(2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0 and out == "saved 0\n" and "[1] saved 1" in err
    assert len(place.runs()) == 2


def test_told_to_stop_between_two_starts(place):
    process = place.start("local.sh", "1", *RUN, DOES="exit 3", JAXEMBED_RESTART_PAUSE="30")
    while "restart 1" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 3 and len(place.runs()) == 1


def test_second_signal_ends_what_does_not_listen(place):
    process = place.start("gpu.sh", *RUN, DOES="trap '' TERM; ready; exec sleep 60")
    place.wait_for_ready(1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 137 and len(place.runs()) == 1


def test_others_end_soon_after_one_has_failed(place):
    before = time.monotonic()
    does = "((me == 1)) && exit 3; trap '' TERM; exec sleep 60"
    done = place.run("local.sh", "3", *RUN, "--restarts=0", DOES=does)
    assert done.returncode == 3 and "ending process 0 2" in done.stderr
    assert 8 < time.monotonic() - before < 30


def test_tpu_workers_run_on_by_themselves(place):
    (place.folder / "my code").symlink_to(ROOT)
    own = ["slice", "--dir=my code", "--gcloud=--project='my p'"]
    assert place.run("tpu_vm.sh", *own, *RUN, "--", *FLAGS).returncode == 0
    assert place.run("tpu_vm.sh", *own, "--stop").returncode == 0
    assert place.run("tpu_vm.sh", *own, "--watch").returncode == 0
    start, stop, watch = place.runs()
    common = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice", "--project=my p"]
    assert start[:-1] == stop[:-1] == [*common, "--worker=all"] and watch[:-1] == [*common, "--worker=0"]

    def on_worker(words: list[str], **env: str) -> subprocess.CompletedProcess:
        command = words[-1].removeprefix("--command=")
        env = place.env | {"RECORD": str(place.folder / "worker")} | env
        return subprocess.run(["bash", "-c", command], env=env, cwd=place.folder, capture_output=True, text=True)

    place.record = place.folder / "worker"
    done = on_worker(start, DOES="trap 'echo saved; exit 0' TERM; ready; while :; do sleep 0.05; done")
    assert done.returncode == 0, done.stderr
    place.wait_for_ready(1)
    assert place.runs() == [["python", *TRAIN]]
    again = on_worker(start)
    assert again.returncode == 2 and "under way" in again.stderr
    stopped = on_worker(stop)
    assert stopped.returncode == 0 and stopped.stdout.endswith("saved\n")
    assert "no run" in on_worker(stop).stderr
    assert "saved" in on_worker(watch).stdout


def test_pod_says_that_it_was_told_to_go(place):
    own = [*WORDS["gke_xpk.sh"], f"--dir={ROOT}", "--xpk=--spot --zone=z", "--restarts=9"]
    assert place.run("gke_xpk.sh", *own, *RUN, "--", *FLAGS).returncode == 0
    [words] = place.runs()
    assert words[:3] == ["xpk", "workload", "create"] and {"--spot", "--zone=z", "--max-restarts=9"} <= set(words)
    assert "--restart-on-exit-codes=3" in words
    command = words[-1].removeprefix("--command=")
    assert "\n" not in command  # it stands in a line of YAML
    # xpk runs it in the background of a shell, to which it hands SIGTERM on.
    shell = f"trap 'kill -TERM $!' TERM; ({command}) & while kill -0 $! 2>/dev/null; do sleep 0.1; done; wait $!"
    place.record = place.folder / "pod"
    env = place.env | {"RECORD": str(place.record)}
    for does, told, code in (
        ("exit 0", False, 0),
        ("exit 3", False, 3),
        ("trap 'exit 0' TERM; ready; while :; do sleep 0.05; done", True, 143),  # 0 would be done for ever
    ):
        pod = subprocess.Popen(["bash", "-c", shell], env=env | {"DOES": does}, stderr=subprocess.DEVNULL)
        if told:
            place.wait_for_ready(1)
            pod.terminate()
        assert pod.wait(timeout=20) == code
    assert place.runs() == [["python", *TRAIN]] * 3


@pytest.mark.parametrize(
    ("srun", "restarted", "code", "queued"),
    [(0, "0", 0, False), (2, "0", 2, False), (137, "0", 0, True), (3, "2", 0, True), (3, "3", 3, False)],
)
def test_slurm_queues_a_failed_run_again(place, srun, restarted, code, queued):
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarted}
    slurm |= {"SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "6"}
    copy = shutil.copy(LAUNCH / "slurm.sbatch", place.folder / "slurm_script")  # what SLURM runs
    done = place.run(copy, *RUN, "--", *FLAGS, DOES=f"[[ $0 != *srun ]] || exit {srun}", **slurm)
    assert done.returncode == code, done.stderr
    srun_words, *rest = place.runs()
    assert srun_words[-len(TRAIN) :] == TRAIN
    assert {"--kill-on-bad-exit=0", "--wait=60", "--cpus-per-task=6"} <= set(srun_words)
    assert rest == [["scontrol", "requeue", "7"]] * queued


def test_slurm_wants_a_task_for_each_gpu(place):
    done = place.run("slurm.sbatch", *RUN, SLURM_NTASKS_PER_NODE="1", SLURM_GPUS_ON_NODE="8")
    assert done.returncode == 2 and "--ntasks-per-node=8" in done.stderr and not place.runs()
