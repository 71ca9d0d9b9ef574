"""Train a text-embedding model.

    python -m jaxembed.train --config=configs/finetune_pairs.py --config.model.init=hf:FOLDER \\
        --data=pairs.jsonl.gz --workdir=runs/first

--data takes files, folders, globs (in quotes) and data sets (tfds:NAME:SPLIT, hf:NAME:SPLIT), with commas in between.
Any field of the config can be set by a flag: --config.optimizer.learning_rate=1e-5, or in quotes for shells that read
brackets: '--config.data.train[0].path=pairs.jsonl'. Started again with the same --workdir, a run goes on where it was.
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxembed import cli, config
from jaxembed.data.sources import check_place, parse_spec
from jaxembed.distributed import connect, require_same_program
from jaxembed.errors import UserError
from jaxembed.evaluation.sets import require_sets
from jaxembed.host_memory import keep_freed_memory
from jaxembed.loggers import require_packages
from jaxembed.stages import stages_of
from jaxembed.storage import AnyPath, path_of


def read_flags() -> tuple[config.Config, AnyPath]:
    """Returns the run's config and folder from the flags.

    Raises:
      UserError: one is missing or wrong.
    """
    if flags.FLAGS.config is None:
        raise UserError("--config is missing: name a config file, such as configs/finetune_pairs.py")
    if not flags.FLAGS.workdir:
        raise UserError("--workdir is missing: name the run's folder")
    asked = with_data(config_dict(flags.FLAGS.config).to_dict(), flags.FLAGS.data)
    return config.load(asked), path_of(flags.FLAGS.workdir)


def with_data(asked: dict[str, Any], data: Sequence[str]) -> dict[str, Any]:
    """Returns a config with the sources of --data, where there are any, in the place of its own.

    Raises:
      UserError: a stage of the config has its own data, or a source has no name.
    """
    if not data:
        return asked
    for i, changes in enumerate(asked["stages"]):
        if "train" in changes.get("data", {}):
            raise UserError(f"--data: config.stages[{i}] has data of its own: set its data.train[0].path")
    sources = asked["data"]["train"]
    first = dict(sources[0]) if sources else {}
    return asked | {"data": asked["data"] | {"train": tuple(source_of(first, spec) for spec in data)}}


def source_of(first: dict[str, Any], spec: str) -> dict[str, Any]:
    """Returns a source of --data: what the data are comes from there, how they are read from the config's first.

    Args:
      first: fields of the config's first source.
      spec: one of --data's.

    Raises:
      UserError: a shorthand without a name.
    """
    place = parse_spec(spec)
    own = {"path", "name", "subset", "split", "data_dir", "source", "licence"}
    if place["source"] == "tfds" and "name" in place:
        own.remove("data_dir")  # where the data sets of this machine are
    return {field: value for field, value in first.items() if field not in own} | place


def config_dict(asked: Any) -> ConfigDict:
    """Makes sure that the config file was read and gave a ConfigDict."""
    try:
        if hasattr(asked, "to_dict"):
            return asked
    except OSError as error:  # what ml_collections puts in the place of a file that it cannot read
        named = flags.FLAGS["config"].config_filename.partition(":")[0]
        missing = not pathlib.Path(named).exists()
        raise UserError(f"--config: no such file: {named}" if missing else f"--config: {error.__cause__}") from error
    raise UserError(f"--config: get_config() of that file returns {type(asked).__name__}, wants a ConfigDict")


def main() -> None:
    """Runs the command."""
    resolved, workdir = read_flags()
    keep_freed_memory()
    with connect() as peers:
        require_same_program(peers, resolved, workdir)
        require_files(resolved)
        require_packages(resolved.log_to)
        from jaxembed.observing.profiling import parse  # jax and all that: only once the config is known to be right
        from jaxembed.trainer import train

        last = train(resolved, workdir, peers, parse(flags.FLAGS.profile))
        if peers.main:
            print(json.dumps({"workdir": str(workdir), **last}))


def require_files(resolved: config.Config) -> None:
    """Refuses missing files at once, before heavy imports.

    Raises:
      UserError: a path of the config, or one in its stages, leads nowhere.
    """
    for i, stage in enumerate(stages_of(resolved)):
        own = stage.config.data.train != resolved.data.train
        for j, source in enumerate(stage.config.data.train):
            check_place(source, f"config.{f'stages[{i}].' * own}data.train[{j}].path")
    require_sets(resolved.eval, "config.eval.")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "The config file, as PATH or PATH:ARG (such as :tiny).")
    flags.DEFINE_string("workdir", "", "The run's folder: metrics, checkpoints, export.")
    flags.DEFINE_list("data", [], "Training pairs instead of the config's: files, folders, globs, tfds:NAME, hf:NAME.")
    flags.DEFINE_string("profile", "", "START:END traces the steps after START up to END, into WORKDIR/profile.")
    cli.run(main, __doc__)
