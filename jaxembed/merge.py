"""Make one model of several that have the same shape: sums of their weights, and what lies between them.

    python -m jaxembed.merge --models=A,B,C --out=FOLDER
    python -m jaxembed.merge --models=A,B --method=slerp --t=0.3 --out=FOLDER
    python -m jaxembed.merge --models=A,B --method=search --base=BASE --probe=records.jsonl --out=FOLDER

Models are runs (RUN, RUN@STEP, RUN@best), folders, or names on the hub, of one architecture with one tokenizer. The
folder written has the prompts and the similarity of the first; sentence-transformers opens it. Where evaluation sets
are given, a table has the scores of every model and of what they became. One JSON line is printed last.

  --method   soup      the mean of the weights
             weighted  their mean by --weights
             slerp     of two models: a part --t of the way from the first to the second, along an arc
             task      --base and, times --weights, what each model has learned since
             search    the same with weights that are found: by gradient, for the pairs of --probe
  --weights  a number for each model. Of 'weighted' they are scaled to sum to 1, unless --weights_as_they_are
  --base     what all models began with
  --probe    records as for training, some hundreds; the contrastive loss of their pairs is brought down by changing
             nothing but the weights of the models. --steps, --batch_size, --learning_rate, --temperature, --negatives
             (hard ones of each record), --seed
  --sts, --pairs, --retrieval  sets to score all models on, as in jaxembed.evaluate
"""

import json
import math
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxembed import cli
from jaxembed.config import EvalConfig
from jaxembed.distributed import Peers, connect
from jaxembed.errors import UserError
from jaxembed.evaluation.sets import require_sets
from jaxembed.vectors.places import require_exportable, require_records

if TYPE_CHECKING:
    from jaxembed.embedder import Embedder
    from jaxembed.evaluation.report import Results
    from jaxembed.merging import Source

METHODS = ("soup", "weighted", "slerp", "task", "search")
OF_SEARCH = ("probe", "steps", "batch_size", "learning_rate", "temperature", "negatives", "seed")
SETS = ("sts", "retrieval", "pairs")  # flags that are fields of EvalConfig
MERGED = "merged"  # its row in the table


def main() -> None:
    """Runs the command."""
    flag = flags.FLAGS
    sets = EvalConfig(**{kind: tuple(flag[kind].value) for kind in SETS})
    weights = _require_flags(sets)
    with connect() as peers:
        _merge(sets, weights, peers)


def _merge(sets: EvalConfig, weights: list[float], peers: Peers) -> None:
    """Merges the models and writes the folder."""
    if peers.count > 1:
        raise UserError("jaxembed.merge runs in one process: start it without others")
    flag = flags.FLAGS
    from rich.console import Console

    from jaxembed import sharding
    from jaxembed.config import MeshConfig
    from jaxembed.evaluation.report import flat_scores
    from jaxembed.evaluation.tasks import Tasks
    from jaxembed.export import export_model
    from jaxembed.merging import open_sources
    from jaxembed.storage import path_of

    tasks = Tasks.read(sets, "--")
    mesh = sharding.make_mesh(MeshConfig())
    sources = open_sources(flag.models, mesh, flag.base)
    results: dict[str, Results] = {}

    def score(name: str, embedder: "Embedder") -> None:
        if name not in results:
            results[name] = tasks.evaluate(embedder, show_progress_bar=True)

    seen = score if any(getattr(sets, kind) for kind in SETS) else None
    model, weights, losses = _merged(sources, weights, mesh, seen)
    export_model(model, path_of(flag.out), dtype=flag.dtype, note=_note(flag.models, weights))
    if seen:
        seen(MERGED, model)
    Console().print(_table(_names(), weights, losses, results))
    said: dict[str, Any] = {MERGED: flag.out, "method": flag.method, "weights": dict(zip(flag.models, weights))}
    if losses:
        said["probe_loss"] = losses
    if results:
        said |= flat_scores(results.pop(MERGED))
        said["models"] = {name: flat_scores(scores) for name, scores in results.items()}
    print(json.dumps(said))


def _merged(
    sources: "list[Source]", weights: list[float], mesh: Any, seen: Any
) -> tuple["Embedder", list[float], dict[str, float]]:
    """Returns the merged model, the models' weights in it, and the probe's losses, {} without one."""
    from jaxembed import merging

    flag = flags.FLAGS
    if flag.method == "slerp":
        return merging.between(*sources, flag.t, mesh, seen), [1 - flag.t, flag.t], {}
    if flag.method == "search":
        return _searched(sources, mesh, seen)
    coefficients = [*weights, 1 - sum(weights)] if flag.method == "task" else weights
    return merging.linear(sources, coefficients, mesh, seen), weights, {}


def _note(models: list[str], weights: list[float]) -> str:
    """Returns what the model card says of a merged model."""
    from jaxembed.evaluation.mteb_tasks import model_name

    parts = ", ".join(f"{model_name(model)} ({weight:.3g})" for model, weight in zip(models, weights))
    base = f" on {model_name(flags.FLAGS.base)}" if flags.FLAGS.base else ""
    return f"Merged of {parts}{base}, by `jaxembed.merge --method={flags.FLAGS.method}`."


def _searched(sources: "list[Source]", mesh: Any, seen: Any) -> tuple["Embedder", list[float], dict[str, float]]:
    from rich.console import Console
    from rich.progress import Progress

    from jaxembed.merging_search import SearchSettings, search
    from jaxembed.vectors.record_pairs import compares_by_cosine, read_pairs

    flag = flags.FLAGS
    *models, base = sources
    unit = compares_by_cosine(models[0].blueprint.similarity, f"--models={models[0].spec}")
    pairs = read_pairs(flag.probe, "--probe", flag.negatives)
    settings = SearchSettings(flag.steps, flag.batch_size, flag.learning_rate, flag.temperature, flag.seed)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("searching", total=flag.steps)

        def done(loss: float) -> None:
            progress.update(task, advance=1, description=f"searching, loss {loss:.4f}")

        found = search(base, models, pairs, settings, unit, mesh, seen, done)
    return found.model, list(found.weights), dict(zip([*_names(), "mean", MERGED], found.losses))


def _names() -> list[str]:
    """Returns the base's name, if there is one, and the models'."""
    return [*([flags.FLAGS.base] if flags.FLAGS.base else []), *flags.FLAGS.models]


def _table(names: list[str], weights: list[float], losses: dict[str, float], results: "dict[str, Results]") -> Any:
    """Lays out what each model gave and how good it is; the base, if any, is the first of `names`."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from jaxembed.evaluation.report import main_scores

    scores = {name: main_scores(found) for name, found in results.items()}
    columns = list(next(iter(scores.values()), {}))
    table = Table(box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("model", overflow="fold")
    table.add_column("weight", justify="right", no_wrap=True)
    for name in [*(["probe loss"] if losses else []), *(name.removeprefix("eval/") for name in columns)]:
        table.add_column(name, justify="right")
    shown = [""] * (len(names) - len(weights)) + [f"{weight:.4f}" for weight in weights]
    rows = [*zip(names, shown), *([("mean", "")] if losses else []), (MERGED, "")]
    for name, weight in rows:
        loss = [f"{losses[name]:.4f}" if name in losses else ""] if losses else []
        cells = [f"{scores[name][column]:.2f}" if name in scores else "" for column in columns]
        table.add_row(name, weight, *loss, *cells, style="bold" if name == MERGED else "")
    return table


def _require_flags(sets: EvalConfig) -> list[float]:
    """Refuses at once what needs no look into the models; returns the weights of sums, [] for other methods."""
    flag = flags.FLAGS
    method, n = flag.method, len(flag.models)
    if not n or not flag.out:
        raise UserError(f"--{'out' if n else 'models'} is missing: give --models=A,B and --out=FOLDER")
    of_base = method in ("task", "search")
    if n < 2 and not of_base:
        raise UserError(f"--models={flag.models[0]}: --method={method} wants two models or more, by commas")
    if method == "slerp" and n != 2:
        raise UserError(f"--models: --method=slerp goes from one model to one other, {n} are given")
    if of_base != bool(flag.base):
        raise UserError(
            f"--method={method} wants --base, what all models began with"
            if of_base
            else f"--base={flag.base} is only for --method=task and search: leave it out"
        )
    for name, methods in (("t", ("slerp",)), ("weights_as_they_are", ("weighted",)), *_searching()):
        if flag[name].present and method not in methods:
            raise UserError(f"--{name} is only for --method={' and '.join(methods)}: leave it out, or name that method")
    if method == "search" and not flag.probe:
        raise UserError("--method=search wants --probe, records as for training that the merged model is to serve")
    _require_finite("t", "learning_rate", "temperature")
    if flag.temperature == 0 or flag.learning_rate == 0:
        raise UserError("--temperature and --learning_rate must be above 0")
    weights = _weights(method, n)
    require_exportable(flag.out, "--out", [*flag.models, flag.base])
    require_sets(sets, "--")
    if flag.probe:
        require_records(flag.probe, "--probe")
    return weights


def _searching() -> list[tuple[str, tuple[str, ...]]]:
    return [(name, ("search",)) for name in OF_SEARCH]


def _require_finite(*names: str) -> None:
    for name in names:
        if not math.isfinite(flags.FLAGS[name].value):
            raise UserError(f"--{name}={flags.FLAGS[name].value}: must be finite")


def _weights(method: str, n: int) -> list[float]:
    """Returns the models' weights in a sum, [] of methods that have none."""
    given = flags.FLAGS.weights
    if method not in ("weighted", "task"):
        if given:
            raise UserError(f"--weights are for --method=weighted and task, not for {method}: leave them out")
        return [1 / n] * n if method == "soup" else []
    try:
        weights = [float(text) for text in given]
    except ValueError as error:
        raise UserError(f"--weights={','.join(given)}: wants numbers with commas between") from error
    if len(weights) != n or not all(map(math.isfinite, weights)):
        raise UserError(f"--weights={','.join(given)}: wants a finite number for each of the {n} models")
    if not any(weights):
        raise UserError(f"--weights={','.join(given)}: all are 0, so no model would be merged")
    if method == "task" or flags.FLAGS.weights_as_they_are:
        return weights
    total = sum(weights)
    if abs(total) < 1e-6 * max(map(abs, weights)):
        raise UserError(f"--weights={','.join(given)}: their sum is 0 and cannot be made 1; --weights_as_they_are?")
    return [weight / total for weight in weights]


if __name__ == "__main__":
    flags.DEFINE_list("models", [], "The models: runs, folders, or names on the hub.")
    flags.DEFINE_string("out", "", "The folder to write.")
    flags.DEFINE_enum("method", "soup", METHODS, "How they become one.")
    flags.DEFINE_list("weights", [], "A number for each model, of 'weighted' and 'task'.")
    flags.DEFINE_bool("weights_as_they_are", False, "Do not scale the weights of 'weighted' to sum to 1.")
    flags.DEFINE_float("t", 0.5, "Of 'slerp': 0 = the first model, 1 = the second.", lower_bound=0.0, upper_bound=1.0)
    flags.DEFINE_string("base", "", "Of 'task' and 'search': what all models began with.")
    flags.DEFINE_string("probe", "", "Of 'search': records whose pairs the merged model is to serve.")
    flags.DEFINE_integer("steps", 100, "Of 'search': batches.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Of 'search': pairs in each.", lower_bound=2)
    flags.DEFINE_float("learning_rate", 0.05, "Of 'search', by Adam.", lower_bound=0.0)
    flags.DEFINE_float("temperature", 0.05, "Of 'search': divides the similarities.", lower_bound=0.0)
    flags.DEFINE_integer("negatives", 1, "Of 'search': hard negatives of each record that are used.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of 'search': of the order of the pairs.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the weights written.")
    for kind in SETS:
        flags.DEFINE_list(kind, [], "Sets to score the models on.")
    cli.run(main, __doc__)
