"""Find out whether a training fits its chips, and how fast it will be, without having them.

    python -m jaxembed.plan --config=configs/qwen3_0p6b.py:v5e-16 --topology=v5e:4x4

Compiles the real train step ahead of time, and prints what a chip holds, what travels, and an estimate of a step's
time with all that it assumes; one JSON line last. --topology is a TPU slice (v5e:16x16, v5p:4x4x4, v6e:4x4),
GPUs (a100:1, h100:8, h200:16, b200:8) or virtual devices of this machine (cpu:8), which need nothing but jax; for TPUs
and GPUs: pip install -r requirements-aot.txt. No weights are read, and of the best-known models nothing is fetched.

Without --data every text is taken to be as long as the config lets it be; with it, where the model's folder and the
texts are at hand, lengths are theirs. A step that does not fit ends with exit code 2 and the bytes missing.
"""

import json
import os
from typing import Any

from absl import flags
from ml_collections import config_flags

from jaxembed import cli, config
from jaxembed.errors import UserError
from jaxembed.host_memory import keep_freed_memory
from jaxembed.train import config_dict, with_data

# The compilers for TPUs and GPUs are plugins: the process itself runs on its CPU, and looks for no accelerator.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
_ANY_FILE = "pairs.jsonl"  # stands for data that a plan does not look at


def planned_config(asked: dict[str, Any], data: list[str]) -> config.Config:
    """Returns the config of the flags, whose data need not be there.

    Args:
      asked: the config file's, with overrides.
      data: of --data; then they must be.

    Raises:
      UserError: a config that cannot be.
    """
    if data:
        return config.load(with_data(asked, data))
    for holder in (asked, *asked["stages"]):
        if sources := holder.get("data", {}).get("train"):
            holder["data"]["train"] = tuple({**source, "path": _ANY_FILE, **_NO_NAME} for source in sources)
    return config.load(asked)


_NO_NAME = {"source": "jsonl", "name": "", "split": "train"}


def main() -> None:
    """Runs the command."""
    flag = flags.FLAGS
    if flag.config is None:
        raise UserError("--config is missing: name a config file, such as configs/finetune_pairs.py")
    if not flag.topology:
        raise UserError("--topology is missing: name chips, such as v5e:4x4, h200:1 or cpu:1")
    resolved = planned_config(config_dict(flag.config).to_dict(), flag.data)
    os.environ.update(ENVIRONMENT)
    keep_freed_memory()
    kind, _, number = flag.topology.partition(":")
    if kind == "cpu" and number.isdigit():  # `parse` answers to others
        os.environ["JAX_NUM_CPU_DEVICES"] = number
    from rich.console import Console  # jax and all that: only once the config is known to be right

    from jaxembed.planning import report, topology
    from jaxembed.planning.planner import plan

    chips = topology.parse(flag.topology)
    found = plan(resolved, chips, bool(flag.data))
    named = f"{flag['config'].config_filename} on {chips.said}"
    Console(width=120).print(report.tables(found.planned, named, found.assumptions))
    print(json.dumps({"topology": chips.said, **report.summary(found.planned), "assumptions": found.assumptions}))
    report.require_fitting(found.planned, chips.said)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The config file, as PATH or PATH:ARG (such as :v5e-16).")
    flags.DEFINE_string("topology", "", "What to plan for: v5e:16x16, v5p:4x4x4, v6e:4x4, h100:8, h200:1, cpu:8 …")
    flags.DEFINE_list("data", [], "Training pairs instead of the config's, as for jaxembed.train: lengths are theirs.")
    cli.run(main, __doc__)
