"""Fit a linear layer to a model's vectors, and write the model with it: no weight of the model itself is trained.

    python -m jaxembed.head --model=MODEL --kind=pca --dim=128 --texts=corpus.jsonl --out=FOLDER
    python -m jaxembed.head --model=MODEL --kind=residual --rank=16 --pairs=records.jsonl --out=FOLDER
    python -m jaxembed.head --model=NEW --old=OLD --kind=map --texts=queries.jsonl --out=FOLDER

--model takes a run's folder (RUN, RUN@STEP, RUN@best), a folder, or the name of a model on the hub. The layer stands
where the model's vectors have not been brought to length 1 yet, as a Dense module of the folder, which
sentence-transformers opens; where the model has a Dense already, the two become one. A table says what the layer does,
for kinds that are trained on texts that it has not seen. One JSON line is printed last.

  --kind    pca       the directions of most variance, --dim of them; --centre takes the mean off
            whiten    the same with the mean off, scaled so that all directions vary alike
            linear    any layer, trained by the contrastive loss of --pairs; --dim outputs
            residual  the vectors and a layer of low --rank on them, trained likewise
            drift     shifts a new model's queries to where those of --old were, so that they search its vectors
            map       leads from a new model's queries to those of --old, by ridge regression (--ridge)
  --texts   single texts: a file, folder, glob, tfds:NAME:SPLIT or hf:NAME:SPLIT, with a column text. --prompt names the
            prompt that stands before them: 'document' if not given, for drift and map 'query'
  --pairs   records as for training, whose queries and positives match. pca and whiten take all their texts, drift and
            map their queries
  --vectors for pca and whiten: vectors that jaxembed.encode --raw has made with the model
  --side    of linear and residual: 'both', or 'query', so that vectors of documents stay valid. The folder written is
            then the encoder of queries alone
  --epochs, --batch_size, --learning_rate, --temperature, --held_out (part of the queries), --patience, --negatives
            (hard ones of each record), --seed: of the training, whose best epoch for the held-out queries is taken
  --cache   a folder that keeps encoded vectors, so that a second fit to the same texts does not encode
"""

import json
import math
from typing import Any

from absl import flags

from jaxembed import cli
from jaxembed.distributed import Peers, connect
from jaxembed.errors import UserError
from jaxembed.storage import path_of
from jaxembed.vectors.places import require_exportable, require_records

FITTED, TRAINED, TOWARDS = ("pca", "whiten"), ("linear", "residual"), ("drift", "map")
OF_TRAINING = (
    "side",
    "epochs",
    "batch_size",
    "learning_rate",
    "temperature",
    "held_out",
    "patience",
    "negatives",
    "seed",
)
OF_KINDS = {
    "dim": (*FITTED, "linear"),
    "centre": ("pca",),
    "rank": ("residual",),
    "ridge": ("map",),
    "old": TOWARDS,
    "vectors": FITTED,
    **dict.fromkeys(OF_TRAINING, TRAINED),
}


def main() -> None:
    """Runs the command."""
    _require_flags()
    with connect() as peers:
        _fit(peers)


def _fit(peers: Peers) -> None:
    """Fits the layer and writes the folder."""
    if peers.count > 1:
        raise UserError("jaxembed.head runs in one process: start it without others")
    flag = flags.FLAGS
    from rich.console import Console

    from jaxembed.export import export_model
    from jaxembed.vectors.head_kinds import fit

    fitted = fit(flag)
    note = f"A linear layer was fitted to its vectors, by `jaxembed.head --kind={flag.kind}`."
    export_model(fitted.model, path_of(flag.out), dtype=flag.dtype, note=note)
    Console().print(_table(fitted.before, fitted.after))
    said: dict[str, Any] = {"head": flag.out, "kind": flag.kind, **fitted.said}
    print(json.dumps(said | {"before": fitted.before, "after": fitted.after}))


def _table(before: dict[str, float], after: dict[str, float]) -> Any:
    """Lays out what the layer changes, a row per figure."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    table.add_column("")
    for name in ("before", "after"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, value in after.items():
        table.add_row(name, *(_cell(x) for x in (before.get(name), value)))
    return table


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4f}"


def _require_flags() -> None:
    """Refuses at once what needs no look into the files."""
    flag = flags.FLAGS
    for name, wanted in (
        ("model", "name a run's folder or an exported one"),
        ("kind", f"give one of {', '.join((*FITTED, *TRAINED, *TOWARDS))}"),
        ("out", "name the folder to write"),
    ):
        if not flag[name].value:
            raise UserError(f"--{name} is missing: {wanted}")
    kind = flag.kind
    for name, kinds in OF_KINDS.items():
        if flag[name].present and kind not in kinds:
            raise UserError(f"--{name} is for --kind={', '.join(kinds)}, not for {kind}: leave it out")
    for name in ("learning_rate", "temperature"):
        if not (math.isfinite(flag[name].value) and flag[name].value > 0):
            raise UserError(f"--{name}={flag[name].value}: wants a finite number above 0")
    if not math.isfinite(flag.ridge):
        raise UserError(f"--ridge={flag.ridge}: wants a finite number")
    if not 0 < flag.held_out < 1:
        raise UserError(f"--held_out={flag.held_out}: wants a part of the queries between 0 and 1, as 0.1")
    if flag.side == "query" and flag.dim:
        raise UserError("--side=query: documents keep their dimensions, so queries must too: leave --dim out")
    if kind in TOWARDS and not flag.old:
        raise UserError(f"--kind={kind} wants --old, the model whose vectors are to be searched")
    _require_input()
    require_exportable(flag.out, "--out", [flag.model, flag.old])


def _require_input() -> None:
    """Refuses texts that are missing, not wanted, or not there."""
    flag = flags.FLAGS
    inputs = ("pairs",) if flag.kind in TRAINED else ("texts", "pairs", *(("vectors",) if flag.kind in FITTED else ()))
    given = [name for name in ("texts", "pairs", "vectors") if flag[name].value]
    if len(given) != 1 or given[0] not in inputs:
        wanted = " or ".join(f"--{name}" for name in inputs)
        raise UserError(f"--kind={flag.kind} wants {'one of ' * (len(inputs) > 1)}{wanted}, and nothing else to fit to")
    if flag["prompt"].present and not flag.texts:
        raise UserError("--prompt stands before the texts of --texts; records have queries and documents: leave it out")
    if flag["cache"].present and flag.vectors:
        raise UserError("--cache: vectors of --vectors are there already: leave it out")
    if flag.cache and path_of(flag.cache).is_file():
        raise UserError(f"--cache={flag.cache}: is a file, wants a folder (it need not exist yet)")
    for name in ("texts", "pairs"):
        if flag[name].value:
            require_records(flag[name].value, f"--{name}")


if __name__ == "__main__":
    flags.DEFINE_string("model", "", "The model: a run, a folder, or a name on the hub.")
    flags.DEFINE_enum("kind", "", ["", *FITTED, *TRAINED, *TOWARDS], "What is fitted.")
    flags.DEFINE_string("out", "", "The folder to write.")
    flags.DEFINE_string("texts", "", "Single texts.")
    flags.DEFINE_string("prompt", "", "Name of the prompt before --texts; '' = by the kind.")
    flags.DEFINE_string("pairs", "", "Records.")
    flags.DEFINE_string("vectors", "", "A folder of vectors, by jaxembed.encode --raw.")
    flags.DEFINE_string("old", "", "Of 'drift' and 'map': the model whose vectors are searched.")
    flags.DEFINE_integer("dim", 0, "Outputs; 0 = as many as inputs.", lower_bound=0)
    flags.DEFINE_bool("centre", False, "Of 'pca': take the mean off.")
    flags.DEFINE_integer("rank", 16, "Of 'residual'.", lower_bound=1)
    flags.DEFINE_float("ridge", 0.01, "Of 'map': part of the mean variance that is added.", lower_bound=0.0)
    flags.DEFINE_enum("side", "both", ["both", "query"], "Whose vectors go through the layer.")
    flags.DEFINE_integer("epochs", 20, "At most.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 128, "Pairs in a batch.", lower_bound=2)
    flags.DEFINE_float("learning_rate", 1e-3, "Of AdamW.", lower_bound=0.0)
    flags.DEFINE_float("temperature", 0.05, "Divides the similarities.", lower_bound=0.0)
    flags.DEFINE_float("held_out", 0.1, "Part of the queries that is not trained on, but judged.")
    flags.DEFINE_integer("patience", 3, "Epochs without a lower loss of these that end it.", lower_bound=1)
    flags.DEFINE_integer("negatives", 1, "Hard negatives of each record that are used.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Of what is drawn.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_string("cache", "", "A folder that keeps encoded vectors.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the weights written.")
    cli.run(main, __doc__)
