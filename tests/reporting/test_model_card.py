"""Model cards: what they say of a run, what they leave unsaid, and that their code gives the model's vectors."""

import dataclasses
import json
import re

import huggingface_hub
import jax
import numpy as np
import pytest
from test_embedder import changed, make
from tiny_run import SHALLOW, sentence, tiny_config, train_on, write_lines, write_pairs
from written_run import BM25, SOURCE, write_run

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.embedder import Embedder
from jaxembed.reporting import curves
from jaxembed.reporting.model_card import card_files, licence_of, model_card
from jaxembed.reporting.record import RunRecord, Source
from jaxembed.reporting.snippets import DOCUMENTS, QUERIES
from jaxembed.run_folder import RunStep

PROMPTS = {"query": "kaka lolo: ", "document": 'mi"mi: '}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cards")


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(MeshConfig(1), jax.devices()[:1])


@pytest.fixture(scope="module")
def model(folder, mesh):
    return make(folder, mesh, prompts=PROMPTS)


def of_run(model, workdir, step):
    """The same model as that of a run."""
    return Embedder(model.blueprint, model.factory, model.params, model.mesh, RunStep(workdir, step))


def card(model, workdir, step):
    return card_files(of_run(model, workdir, step))["README.md"].decode()


def code_of(text):
    """The card's code by what it is for."""
    return dict(re.findall(r"With ([\w-]+):\n\n```python\n(.*?)```", text, re.DOTALL))


HEADS = [
    {"model__pooling": "cls", "model__projection": 12},
    {"model__pooling": "cls", "model__pool_prompt": False},
    {"model__pooling": "last", "model__normalize": False, "loss__temperature": 1.0},
    {"model__pooling": "weighted_mean", "model__pool_prompt": False, "model__projection": 12},
    {"model__pool_prompt": False},
]


@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean", "manhattan"])
def test_scores_of_the_code_are_the_models(model, folder, monkeypatch, similarity):
    assert_code_runs(changed(model, similarity=similarity), folder / similarity, monkeypatch)


@pytest.mark.parametrize("head", HEADS)
def test_vectors_of_the_code_are_the_models(folder, mesh, monkeypatch, head):
    model = make(folder, mesh, prompts=PROMPTS, **head)
    assert_code_runs(model, folder / "-".join(map(str, head.values())), monkeypatch)


def test_the_code_serves_a_model_without_prompts(folder, mesh, monkeypatch):
    assert_code_runs(make(folder, mesh, model__pool_prompt=False), folder / "plain", monkeypatch)


def assert_code_runs(model, out, monkeypatch):
    """Runs the code of an exported card in its folder."""
    pytest.importorskip("sentence_transformers")
    model.save(out)
    monkeypatch.chdir(out)
    queries, documents = model.encode_query(json.loads(QUERIES)), model.encode_document(json.loads(DOCUMENTS))
    want = {"queries": queries, "documents": documents, "scores": model.similarity(queries, documents)}
    code = code_of((out / "README.md").read_text())
    assert list(code) == ["sentence-transformers", "transformers", "JAX"]
    for library, text in code.items():
        made = {}
        exec(text, made)
        for name, values in want.items():
            got = np.asarray(made[name])
            assert got.shape == values.shape and np.abs(got - values).max() <= 2e-5 * np.abs(values).max(), library


def test_a_card_tells_of_its_run(model, folder):
    run = write_run(folder / "told", 20, 5)
    text = card(model, run, 20)
    assert "# told\n" in text and "trained from scratch, 20 steps, 2 s of training" in text
    assert '| `query` | `"kaka lolo: "` |' in text and '| `document` | `"mi\\"mi: "` |' in text
    assert "| architecture | `bert`, 2 layers of width 32 |" in text
    assert f"| pairs/held-out | ndcg@10 | 35.00 | 20.00 | {BM25:.2f} |" in text
    assert "| `source-0.jsonl` | Apache-2.0 | 1,500 |" in text and "| `source-1.jsonl` | unknown | 1,500 |" in text
    assert "The licence of 1 of 2 sources is unknown." in text
    assert "`infonce`: temperature 0.05" in text and "`adamw`: learning_rate 0.0003" in text
    assert "![Curves of the training](curves.png)" in text
    assert str(folder) not in text
    for line in (run / "a.jsonl").read_text().splitlines():
        assert json.loads(line)["query"] not in text


def test_a_card_tells_of_adapters(model, folder):
    run = write_run(folder / "whole", 20, 5)
    assert "low-rank" not in card(model, run, 20)
    lora = {"model__lora__rank": 4, "model__lora__alpha": 6.0, "model__lora__targets": "query"}
    run = write_run(folder / "adapted", 20, 5, model__init="hf:org/name", **lora)
    said = f"low-rank adapters of rank 4 (scale 1.5), merged here: {2 * (32 * 4 + 4 * 32)} parameters; the others are "
    assert f"| trained | {said}" in card(model, run, 20)


def test_an_older_step_has_the_scores_of_that_step(model, folder):
    run = write_run(folder / "older", 20, 5, ("weak", "hard"))
    text = card(model, run, 7)
    assert "measured in JAX at step 5." in text and "| sts/dev | spearman | 25.00 | 20.00 |" in text
    assert "| steps | 7 |" in text and "hard" not in text.replace("hard negatives", "")
    text = card(model, run, 20)
    assert "|  | weak | hard |" in text and "| steps | 10 | 10 |" in text
    assert "| weak | `source-0.jsonl` |" in text


def test_the_hub_reads_the_front_matter(model, folder):
    write_run(folder / "hub", 20, 5, licences=("Apache-2.0", "Apache-2.0"))
    data = huggingface_hub.ModelCard(card(model, folder / "hub", 20)).data
    assert data.library_name == "sentence-transformers" and data.pipeline_tag == "sentence-similarity"
    assert data.license == "apache-2.0" and data.base_model is None
    scores = {(result.dataset_name, result.metric_type): result.metric_value for result in data.eval_results}
    assert scores == {("dev", "spearman"): 35, ("held-out", "ndcg@10"): 35}


@pytest.mark.parametrize(
    ("licences", "init", "told"),
    [
        (("MIT", "MIT"), "scratch", "mit"),
        (("MIT", ""), "scratch", ""),
        (("MIT", "Apache-2.0"), "scratch", ""),
        (("", ""), "scratch", ""),
        (("free to use, ask us first",), "scratch", ""),
        (("MIT",), "hf:ORG/NAME", ""),  # the base's own licence holds too
        ((), "scratch", ""),
    ],
)
def test_a_licence_is_told_only_where_all_is_known(tmp_path, licences, init, told):
    record = RunRecord.read(write_run(tmp_path / "run", 2))
    sources = tuple(Source("", "a", licence=licence, **SOURCE) for licence in licences)
    model = dataclasses.replace(record.config.model, init=init)
    config = dataclasses.replace(record.config, model=model)
    assert licence_of(dataclasses.replace(record, sources=sources, config=config)) == told


@pytest.mark.parametrize(
    ("init", "said", "base"),
    [
        ("hf:ORG/NAME@abc", "trained from `ORG/NAME@abc`", "ORG/NAME"),
        ("hf:/home/me/secret/base", "trained from `base`", None),
        ("run:/home/me/secret/first@best", "trained from the run `first@best`", None),
    ],
)
def test_the_beginning_is_told_without_paths(model, folder, init, said, base):
    workdir = folder / re.sub(r"\W", "-", init)
    text = card(model, write_run(workdir, 2, model__init=init, model__arch="auto", model__shape={}), 2)
    assert said in text and "/home" not in text
    assert huggingface_hub.ModelCard(text).data.base_model == base


def test_a_model_that_is_of_no_run_has_a_card_too(model):
    text = model_card(model, None, False)
    assert "Usage" in text and "Prompts" in text and "Training" not in text and "curves.png" not in text
    assert huggingface_hub.ModelCard(text).data.license is None
    assert list(card_files(model)) == ["README.md"]


def test_a_picture_that_fails_does_not_keep_a_model_from_being_exported(model, folder, monkeypatch):
    run = write_run(folder / "blind", 4, 2)

    def fail(*_):
        raise ZeroDivisionError("in a library")

    monkeypatch.setattr(curves, "_draw", fail)
    files = card_files(of_run(model, run, 4))
    assert list(files) == ["README.md"] and b"curves.png" not in files["README.md"] and b"sts/dev" in files["README.md"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a real run with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    rows = [{"sentence1": sentence(rng), "sentence2": sentence(rng), "score": float(rng.random())} for _ in range(10)]
    config = tiny_config(
        folder,
        steps=4,
        batch_size=16,
        model__shape=SHALLOW,
        checkpoint__every=2,
        eval__every=2,
        eval__sts=(str(write_lines(folder / "dev.jsonl", rows)),),
        eval__pairs=(str(write_pairs(folder / "held.jsonl", 20, 7)),),
        eval__bm25=True,
        data__train=({"path": str(write_pairs(folder / "pairs.jsonl", 80, 1)), "licence": "MIT"},),
    )
    train_on(1, config, folder / "first", pictures=True)
    return folder / "first"


def test_what_is_saved_of_a_run_carries_its_card(run, tmp_path):
    lines = {line["step"]: line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}
    for spec, step in ((f"{run}@2", 2), (str(run), 4)):
        Embedder.load(spec).save(tmp_path / str(step))
        text = (tmp_path / str(step) / "README.md").read_text()
        assert f"| sts/dev | spearman | {lines[step]['eval/sts/dev']:.2f} |" in text and f" {step} steps" in text
        assert f"| pairs/held | ndcg@10 | {lines[step]['eval/pairs/held']:.2f} |" in text
        assert f"{lines[0]['bm25/pairs/held']:.2f}" in text
        assert "| `pairs.jsonl` | MIT | 80 |" in text and "license: mit" in text
        assert (tmp_path / str(step) / "curves.png").stat().st_size > 10_000
    pictures = {(tmp_path / str(step) / "curves.png").read_bytes() for step in (2, 4)}
    assert len(pictures) == 2


def test_a_model_that_pools_otherwise_than_its_run_does_not_boast_of_its_scores(run, tmp_path):
    Embedder.load(run, pooling="cls").save(tmp_path / "out")
    assert "spearman" not in (tmp_path / "out" / "README.md").read_text()
