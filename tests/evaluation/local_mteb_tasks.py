"""MTEB tasks on a little of the real data, so that mteb runs offline: named as FILE.py:ClassName."""

import gzip
import json
import os
import pathlib

from datasets import Dataset, DatasetDict
from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.retrieval_dataset_loaders import RetrievalSplitData
from mteb.abstasks.task_metadata import TaskMetadata


def about(name, kind, main_score, category="t2t"):
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


def rows(name, step):
    """Every step-th row of a file of the real data."""
    with gzip.open(pathlib.Path(os.environ["JAXEMBED_DATA"]) / name) as stream:
        return [json.loads(line) for line in list(stream)[::step]]


class LocalSTS(AbsTaskSTS):
    metadata = about("LocalSTS", "STS", "cosine_spearman")
    min_score, max_score = 0, 5

    def load_data(self, num_proc=None, **_):
        self.dataset = DatasetDict(test=Dataset.from_list(rows("sts/stsb-dev.jsonl.gz", 30)))
        self.data_loaded = True


class LocalRetrieval(AbsTaskRetrieval):
    metadata = about("LocalRetrieval", "Retrieval", "ndcg_at_10")

    def load_data(self, num_proc=None, **_):
        pairs = rows("pairs/py_docstrings.jsonl.gz", 100)
        corpus = [
            {"id": f"d{i}", "title": pair["source"], "text": pair["positive"][:120]} for i, pair in enumerate(pairs)
        ]
        queries = [{"id": f"q{i}", "text": pair["query"]} for i, pair in enumerate(pairs)]
        split = RetrievalSplitData(
            corpus=Dataset.from_list(corpus),
            queries=Dataset.from_list(queries),
            relevant_docs={f"q{i}": {f"d{i}": 1} for i in range(len(pairs))},
            top_ranked=None,
        )
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True


class LocalClassification(AbsTaskClassification):
    metadata = about("LocalClassification", "Classification", "accuracy", "t2c")
    n_experiments = 2

    def load_data(self, num_proc=None, **_):
        train, test = rows("classification/trec-train.jsonl.gz", 60), rows("classification/trec-test.jsonl.gz", 10)
        names = sorted({row["label"] for row in train + test})
        parts = {"train": train, "test": test}
        self.dataset = DatasetDict(
            {
                part: Dataset.from_list([{"text": r["text"], "label": names.index(r["label"])} for r in found])
                for part, found in parts.items()
            }
        )
        self.data_loaded = True


class LocalClustering(AbsTaskClustering):
    metadata = about("LocalClustering", "Clustering", "v_measure", "t2c")
    max_fraction_of_documents_to_embed = 1.0
    n_clusters = 2  # k-means runs

    def load_data(self, num_proc=None, **_):
        found = rows("classification/trec-test.jsonl.gz", 8)
        columns = {"sentences": [row["text"] for row in found], "labels": [row["label"] for row in found]}
        self.dataset = DatasetDict(test=Dataset.from_dict(columns))
        self.data_loaded = True


class NoData(LocalSTS):
    metadata = about("NoData", "STS", "cosine_spearman")

    def load_data(self, num_proc=None, **_):
        raise ConnectionError("the hub is far away\nand other lines")
