"""Runs MTEB tasks by name, or of one's own, and says in one line what keeps a task from running."""

import dataclasses
import importlib.util
import inspect
import logging
import pathlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jaxembed.config import nearest
from jaxembed.errors import UserError
from jaxembed.storage import path_of

if TYPE_CHECKING:
    from mteb.abstasks import AbsTask

    from jaxembed.embedder import Embedder

LOCAL = ".py:"  # in the name of a task of one's own: FILE.py:ClassName


@dataclasses.dataclass(frozen=True)
class MtebScore:
    """What a model reached in a task.

    Attributes:
      task, kind: the task's name and type.
      metric: the name of its main score.
      score: the main score times 100, the mean over languages and splits.
    """

    task: str
    kind: str
    metric: str
    score: float


def require_mteb(names: Sequence[str]) -> None:
    """Refuses at once what needs no look into mteb.

    Args:
      names: of tasks.

    Raises:
      UserError: mteb is not installed, or a task's own file is not there.
    """
    if importlib.util.find_spec("mteb") is None:
        raise UserError("--mteb needs the package mteb: pip install mteb")
    for name in names:
        if LOCAL in name and not _local_file(name).is_file():
            raise UserError(f"--mteb: no such file: {_local_file(name)}")


def open_tasks(names: Sequence[str]) -> "list[AbsTask]":
    """Returns the tasks of these names.

    Args:
      names: of mteb's registry, or 'FILE.py:ClassName' for a subclass of one of mteb's abstract tasks.

    Raises:
      UserError: no task of that name, one that is given twice, or one that is not about texts alone.
    """
    tasks = [_local_task(name) if LOCAL in name else _registered_task(name) for name in names]
    for name, task in zip(names, tasks):
        others = ", ".join(sorted(set(task.metadata.modalities) - {"text"}))
        if others:
            raise UserError(f"--mteb={name}: the task has {others} beside text; this model reads texts")
    titles = [task.metadata.name for task in tasks]
    for title in titles:
        if titles.count(title) > 1:
            raise UserError(f"--mteb: two tasks are called {title!r}: their results would have one name")
    return tasks


def model_name(spec: str) -> str:
    """Returns what results call a model: 'ORGANISATION/NAME', of a folder its last two names."""
    path = path_of(spec)
    return "/".join(path.resolve().parts[-2:]) if path.exists() else spec


def run_tasks(
    embedder: "Embedder", name: str, tasks: "Sequence[AbsTask]", folder: pathlib.Path
) -> Iterator[MtebScore | UserError]:
    """Evaluates a model on tasks, one after the other.

    Args:
      embedder: the model.
      name: what the results call it, see `model_name`; their revision is the run's step, where there is one.
      tasks: see `open_tasks`.
      folder: for the results in mteb's own layout, FOLDER/results/MODEL/REVISION/TASK.json; earlier ones of that name
        are replaced.

    Yields:
      The score of each task; or, where its data cannot be had, the error that says so.
    """
    import mteb

    from jaxembed.evaluation.mteb_adapter import MtebEncoder

    _keep_quiet()
    encoder, cache = MtebEncoder(embedder, name), mteb.ResultCache(folder)
    for task in tasks:
        try:
            _load_data(task)
        except UserError as error:
            yield error
            continue
        results = mteb.evaluate(encoder, task, cache=cache, overwrite_strategy="always", co2_tracker=False)
        task.unload_data()
        (result,) = results.task_results
        about = task.metadata
        yield MtebScore(about.name, str(about.type), about.main_score, 100 * float(result.get_score()))


def _load_data(task: "AbsTask") -> None:
    """Loads a task's data, or those of the tasks that it is the mean of."""
    for part in getattr(task, "tasks", [task]):
        try:
            part.load_data()
        # Whatever a download, a cache or a task's own code may raise: mteb has no common error for it.
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "") or "no reason given"
            raise UserError(
                f"--mteb={part.metadata.name}: its data cannot be loaded: {type(error).__name__}: {reason}"
            ) from error


def _registered_task(name: str) -> "AbsTask":
    import mteb

    try:
        return mteb.get_task(name)
    except KeyError as error:
        from mteb.get_tasks import TASK_LIST

        known = [task.metadata.name for task in TASK_LIST]
        raise UserError(f"--mteb: no task {name!r}{nearest(name, known)} (or give FILE.py:ClassName)") from error


def _local_task(name: str) -> "AbsTask":
    from mteb.abstasks import AbsTask

    file, class_name = _local_file(name), name.rpartition(":")[2]
    module = _import_file(file)
    classes = dict(inspect.getmembers(module, lambda x: isinstance(x, type) and issubclass(x, AbsTask)))
    own = {key: value for key, value in classes.items() if value.__module__ == module.__name__}
    if class_name not in own:
        raise UserError(f"--mteb={name}: {file} has no task class {class_name!r}; it has {', '.join(own) or 'none'}")
    return own[class_name]()


def _import_file(file: pathlib.Path) -> ModuleType:
    spec: Any = importlib.util.spec_from_file_location(f"mteb_tasks_of_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # data sets pickle what the file defines by this name
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the file is a program, which may raise anything
        raise UserError(f"--mteb: {file}: {type(error).__name__}: {error}") from error
    return module


def _local_file(name: str) -> pathlib.Path:
    return pathlib.Path(name.rpartition(":")[0]).expanduser().resolve()


def _keep_quiet() -> None:
    """Silences what mteb and its packages remark on standard error: a task that fails says so itself."""
    import datasets

    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", module=r"(mteb|datasets|sklearn|huggingface_hub)(\.|$)")
    for package in ("mteb", "datasets", "huggingface_hub", "sentence_transformers"):
        logging.getLogger(package).setLevel(logging.ERROR)
