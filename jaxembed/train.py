"""Train a text-embedding model.

    python -m jaxembed.train --config=configs/finetune_pairs.py --config.model.init=hf:FOLDER \\
        --data=pairs.jsonl.gz --workdir=runs/first

Any field of the config can be set by a flag: --config.optimizer.learning_rate=1e-5, or in quotes for shells that read
brackets: '--config.data.train[0].path=pairs.jsonl'. Started again with the same --workdir, a run goes on where it was.
"""

import json
import pathlib
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxembed import cli, config
from jaxembed.errors import UserError
from jaxembed.host_memory import keep_freed_memory


def read_flags() -> tuple[config.Config, pathlib.Path]:
    """Returns the run's config and folder from the flags.

    Raises:
      UserError: one is missing or wrong.
    """
    if flags.FLAGS.config is None:
        raise UserError("--config is missing: name a config file, such as configs/finetune_pairs.py")
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is missing: name the run's folder")
    asked = _config_dict(flags.FLAGS.config)
    if flags.FLAGS.data:
        first = asked.data.train[0].to_dict() if len(asked.data.train) else {}
        # Settings of the file's first source hold for the files named here.
        asked = asked.to_dict()
        asked["data"]["train"] = tuple(first | {"path": path, "source": "auto"} for path in flags.FLAGS.data)
    return config.load(asked), pathlib.Path(flags.FLAGS.workdir)


def _config_dict(asked: Any) -> ConfigDict:
    """Makes sure that the config file was read and gave a ConfigDict."""
    try:
        if hasattr(asked, "to_dict"):
            return asked
    except OSError as error:  # what ml_collections puts in the place of a file that it cannot read
        raise UserError(f"--config: {error.__cause__}") from error
    raise UserError(f"--config: get_config() of that file returns {type(asked).__name__}, wants a ConfigDict")


def main() -> None:
    """Runs the command."""
    resolved, workdir = read_flags()
    _require_files(resolved)
    keep_freed_memory()
    from jaxembed.trainer import train  # jax and all that: only once the config is known to be right

    last = train(resolved, workdir)
    print(json.dumps({"workdir": str(workdir), **last}))


def _require_files(resolved: config.Config) -> None:
    """Refuses missing files at once, before heavy imports."""
    named = [(f"config.data.train[{i}].path", source.path) for i, source in enumerate(resolved.data.train)]
    named += [("config.eval.sts", path) for path in resolved.eval.sts]
    named += [("config.eval.retrieval", path) for path in resolved.eval.retrieval]
    for field, path in named:
        if not pathlib.Path(path).expanduser().exists():
            raise UserError(f"{field}: no such file or folder: {path}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The config file, as PATH or PATH:ARG (such as :tiny).")
    flags.DEFINE_string("workdir", "", "The run's folder: metrics, checkpoints, export.")
    flags.DEFINE_list("data", [], "Files of training pairs, instead of those that the config names.")
    cli.run(main, __doc__)
