"""Score a model on similarity, retrieval and classification sets.

    python -m jaxembed.evaluate --model=FOLDER --sts=stsb-dev.jsonl.gz --retrieval=scifact --bm25

--model takes a run's folder (RUN, RUN@STEP, RUN@best), a sentence-transformers or transformers folder, or the name of a
model on the hub. --sts: files of sentence1, sentence2, score. --retrieval: BEIR folders. --pairs: training records that
were held out, whose queries are to find their positives. Several are given by commas. Prints a table for each kind, and
one JSON line last.
"""

import json

from absl import flags

from jaxembed import cli
from jaxembed.config import EvalConfig
from jaxembed.errors import UserError

SETS = ("sts", "retrieval", "pairs")  # flags that are fields of EvalConfig


def main() -> None:
    """Runs the command."""
    model, asked = flags.FLAGS.model, {name: tuple(flags.FLAGS[name].value) for name in SETS}
    if not model:
        raise UserError("--model is missing: name a run's folder or an exported one")
    if not any(asked.values()):
        raise UserError(f"nothing to evaluate on: give {' or '.join(f'--{name}' for name in SETS)}")
    if flags.FLAGS.bm25 and not asked["retrieval"] + asked["pairs"]:
        raise UserError("--bm25 searches the sets of --retrieval and --pairs: give one")
    from rich.console import Console

    from jaxembed.embedder import Embedder
    from jaxembed.evaluation.report import flat_scores, scores_tables
    from jaxembed.evaluation.tasks import Tasks

    tasks = Tasks.read(EvalConfig(**asked, bm25=flags.FLAGS.bm25))
    embedder = Embedder.load(model, dtype=flags.FLAGS.dtype)
    results, baselines = tasks.evaluate(embedder, show_progress_bar=True), tasks.baselines()
    Console().print(*scores_tables(results, baselines))
    print(json.dumps({"model": model, **flat_scores(results | baselines)}))


if __name__ == "__main__":
    flags.DEFINE_string("model", "", "The model: a run, a folder, or a name on the hub.")
    flags.DEFINE_list("sts", [], "Similarity sets: files of sentence1, sentence2, score.")
    flags.DEFINE_list("retrieval", [], "Retrieval sets: BEIR folders.")
    flags.DEFINE_list("pairs", [], "Records to find each other: files, folders, tfds:NAME:SPLIT or hf:NAME:SPLIT.")
    flags.DEFINE_bool("bm25", False, "Score BM25 too, on the retrieval and pairs sets.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
    cli.run(main, __doc__)
