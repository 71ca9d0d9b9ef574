"""Score a model on similarity and retrieval sets.

    python -m jaxembed.evaluate --model=FOLDER --sts=stsb-dev.jsonl.gz --retrieval=scifact

--model takes a run's folder (RUN, RUN@STEP, RUN@best), a sentence-transformers or transformers folder, or the name of a
model on the hub. --sts: files of sentence1, sentence2, score. --retrieval: BEIR folders. Several are given by commas.
Prints a table, and one JSON line last.
"""

import json

from absl import flags

from jaxembed import cli
from jaxembed.errors import UserError


def main() -> None:
    """Runs the command."""
    model, sts, retrieval = flags.FLAGS.model, flags.FLAGS.sts, flags.FLAGS.retrieval
    if not model:
        raise UserError("--model is missing: name a run's folder or an exported one")
    if not sts and not retrieval:
        raise UserError("nothing to evaluate on: give --sts=FILE or --retrieval=FOLDER")
    from rich.console import Console

    from jaxembed.embedder import Embedder
    from jaxembed.evaluation.report import flat_scores, scores_tables
    from jaxembed.evaluation.tasks import Tasks

    tasks = Tasks.read(sts, retrieval)
    embedder = Embedder.load(model, dtype=flags.FLAGS.dtype)
    results = tasks.evaluate(embedder, show_progress_bar=True)
    Console().print(*scores_tables(results))
    print(json.dumps({"model": model, **flat_scores(results)}))


if __name__ == "__main__":
    flags.DEFINE_string("model", "", "The model: a run, a folder, or a name on the hub.")
    flags.DEFINE_list("sts", [], "Similarity sets: files of sentence1, sentence2, score.")
    flags.DEFINE_list("retrieval", [], "Retrieval sets: BEIR folders.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
    cli.run(main, __doc__)
