"""What one process of a test's run does: trains one config after the other. `python tests/pod_runs.py RUNS.json`.

RUNS.json: a list of {"config": …, "workdir": …}.
"""

import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from jaxembed import config as config_lib
from jaxembed.distributed import connect
from jaxembed.trainer import train

if __name__ == "__main__":
    with connect() as peers:
        for run in json.loads(pathlib.Path(sys.argv[1]).read_text()):
            train(config_lib.load(run["config"]), pathlib.Path(run["workdir"]), peers)
