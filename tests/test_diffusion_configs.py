"""The recipes of diffusion LMs and of other losses over tokens: tiny modes train in stages, export and verify."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
import transformers
from test_architectures import make
from test_model_configs import get_config
from tiny_run import SHALLOW, sentence, tiny_config, train_on, write_lines, write_tokenizer

from jaxembed import config as config_lib
from jaxembed import model_source, sharding, trainer
from jaxembed.config import MeshConfig
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.evaluation.likelihood import TextsData, evaluate_likelihood, require_language
from jaxembed.metrics import read_metrics
from jaxembed.verification import verify

STAGED = ("adapt_qwen3_to_diffusion", "llm2vec_mntp")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Texts, pairs and a small decoder; one device, as a laptop has it."""
    monkeypatch.setattr(trainer, "_report", lambda *_: None)
    monkeypatch.setattr(sharding, "make_mesh", functools.partial(sharding.make_mesh, devices=jax.devices()[:1]))
    rng = np.random.default_rng(0)
    rows = [{key: sentence(rng, 6, 6) for key in ("query", "positive", "negative")} for _ in range(40)]
    write_lines(tmp_path / "pairs.jsonl", rows)
    write_lines(tmp_path / "texts.jsonl", [{"text": row["query"]} for row in rows])
    tokenizers = {"": write_tokenizer(tmp_path / "tokenizer.json")}
    make("mistral", "native", tokenizers, sharding.make_mesh(MeshConfig())).save(tmp_path / "base")
    return tmp_path


def test_every_machine_has_a_config():
    for name in STAGED:
        for machine, chips in (("h200", 1), ("v5e-16", 16), ("v5p-64", 64)):
            c = get_config(name)(machine).to_dict()
            for stage in c["stages"]:
                stage["data"]["train"][0]["path"] = "texts.jsonl"
            config = config_lib.load(c)
            sizes = [getattr(config.mesh, axis) for axis in sharding.AXES]
            assert math.prod(size for size in sizes if size != -1) in (1, chips)
        with pytest.raises(ValueError, match="knows the arguments h200, v5e-16, v5p-64, tiny, not 'tpu'"):
            get_config(name)("tpu")
    for wrong in ("next", "tiny,masked_lm", "masked_lm,small"):
        with pytest.raises(ValueError, match="knows the arguments next_token, masked_lm"):
            get_config("pretrain_decoder")(wrong)


@pytest.mark.parametrize("name", STAGED)
def test_stages(name, folder):
    c = get_config(name)("tiny").to_dict()
    c["model"]["init"], c["data"]["cache_dir"], c["log_to"] = f"hf:{folder / 'base'}", str(folder / "cache"), ()
    for stage in c["stages"]:
        plain = stage["data"]["train"][0].get("format") == "texts"
        stage["data"]["train"][0]["path"] = str(folder / ("texts.jsonl" if plain else "pairs.jsonl"))
    if name == "adapt_qwen3_to_diffusion":
        c["model"]["mask_token"] = "<|mask|>"
    trainer.train(config_lib.load(c), folder / "run")
    lines = read_metrics(folder / "run")
    first = c["stages"][0]["loss"]["name"]
    assert all(f"loss/{first}" in line for line in lines[:2]) and "accuracy" in lines[-1]
    assert all(math.isfinite(line["loss"]) for line in lines)
    verify(folder / "run" / "export")
    run = Embedder.load(folder / "run")
    assert run.blueprint.language.shift and run.blueprint.tokenizer.mask_id >= 0
    assert run.blueprint.backbone.attention == ("bidirectional",)


def test_pretrain_then_jointly(folder):
    """From scratch by the next token; then masked diffusion; then with pairs, by the tiny modes of two recipes."""
    c = get_config("pretrain_decoder")("tiny")
    c.steps, c.log_to, c.export, c.data.cache_dir = 2, (), False, str(folder / "cache")
    c.data.train[0].path = str(folder / "texts.jsonl")
    c.tokenizer = f"file:{folder / 'tokenizer.json'}"
    trainer.train(config_lib.load(c), folder / "next")
    c = get_config("pretrain_decoder")("masked_diffusion,tiny")
    c.steps, c.log_to, c.export, c.data.cache_dir = 2, (), False, str(folder / "cache")
    c.data.train[0].path = str(folder / "texts.jsonl")
    c.model.init, c.tokenizer, c.model.shape = f"run:{folder / 'next'}", "auto", {}
    c.model.anneal_attention = 2
    trainer.train(config_lib.load(c), folder / "diffusion")
    c = get_config("joint_denoising")("tiny")
    c.steps, c.log_to, c.data.cache_dir = 3, (), str(folder / "cache")
    c.model.init, c.model.mask_token = f"run:{folder / 'diffusion'}", ""
    c.data.train[0].path = str(folder / "pairs.jsonl")
    trainer.train(config_lib.load(c), folder / "joint")
    lines = read_metrics(folder / "joint")
    for done, line in enumerate(lines):
        weight = 0.2 * (1 - done / 2)
        expected = line["loss/infonce"] + weight * line["loss/masked_diffusion"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    verify(folder / "joint" / "export")


@pytest.mark.parametrize("loss", ["masked_lm", "masked_next_token"])
def test_other_masked_losses(loss, folder):
    c = get_config("pretrain_decoder")(f"{loss},tiny")
    c.steps, c.log_to, c.export, c.data.cache_dir = 2, (), False, str(folder / "cache")
    c.model.anneal_attention = 2
    c.data.train[0].path = str(folder / "texts.jsonl")
    last = trainer.train(config_lib.load(c), folder / "run")
    assert math.isfinite(last[f"loss/{loss}"])
    assert Embedder.load(folder / "run").blueprint.language.shift == (loss == "masked_next_token")


def test_an_encoder_learns_masked_words(tmp_path):
    """BERT from scratch, on few sentences that repeat: it comes to know them."""
    c = tiny_config(
        tmp_path,
        model__shape=SHALLOW | {"initializer_range": 0.02},
        loss__name="masked_lm",
        loss__mask_rate=0.3,
        steps=60,
        data__positives=0,
        data__negatives=0,
        optimizer__learning_rate=1e-2,
        checkpoint__every=60,
        export=False,
        log_to=(),
    )
    train_on(1, c, tmp_path / "run")
    losses = [line["loss"] for line in read_metrics(tmp_path / "run")]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5


def test_a_run_that_only_masked_has_no_head(folder):
    """Its words were never predicted: neither is it measured, nor does a later run take it for a head."""
    c = get_config("joint_denoising")("tiny")
    c.steps, c.log_to, c.export, c.data.cache_dir = 2, (), False, str(folder / "cache")
    c.model.init, c.model.mask_token = f"hf:{folder / 'base'}", "<|mask|>"
    c.losses = ()
    c.data.train[0].path = str(folder / "pairs.jsonl")
    trainer.train(config_lib.load(c), folder / "run")
    run = Embedder.load(folder / "run")
    assert not run.blueprint.language.predicts and run.blueprint.language.shift
    with pytest.raises(UserError, match="the model predicts no words"):
        require_language(run.blueprint, "--texts")


def test_a_folder_is_measured_before_any_training(folder):
    """A causal decoder as it lies on disk, its words scored by the token table."""
    model = Embedder.load(folder / "base", words=True)
    assert model.blueprint.language.shift and not model.blueprint.language.own_table
    found = evaluate_likelihood(TextsData("few", ["kalo mi", "ru se to ka"]), model, 1)
    assert math.isfinite(found["elbo"]) and found["elbo"] < 0
    with pytest.raises(UserError, match="predicts no words"):
        evaluate_likelihood(TextsData("few", ["kalo"]), Embedder.load(folder / "base"), 1)


@pytest.mark.parametrize("attention", ["native", "bidirectional"])
def test_the_head_of_a_checkpoint_is_read_whichever_way_it_reads(attention, tmp_path):
    """An untied mamba's, as transformers writes it: also where the backbone becomes one that reads both ways."""
    hf = transformers.MambaConfig(
        vocab_size=176, hidden_size=16, num_hidden_layers=1, state_size=4, tie_word_embeddings=False, use_cache=False
    )
    theirs = transformers.MambaForCausalLM(hf)
    theirs.save_pretrained(tmp_path / "base")
    Tokenizer.load(f"file:{write_tokenizer(tmp_path / 'tokenizer.json')}").save(tmp_path / "base", 32)
    loss = "next_token" if attention == "native" else "masked_lm"
    c = tiny_config(
        tmp_path, model__init=f"hf:{tmp_path / 'base'}", model__attention=attention, loss__name=loss, export=False
    )
    c = dataclasses.replace(c, model=dataclasses.replace(c.model, arch="auto", shape={}))
    with jax.set_mesh(sharding.make_mesh(MeshConfig(1), jax.devices()[:1])):
        blueprint, load = model_source.open_source(c, tmp_path / "run")
        params = load(blueprint.factory(model_source.options(c.model)))
    table = np.asarray(params["language"]["table"]["embedding"])[:176]
    np.testing.assert_array_equal(table, theirs.lm_head.weight.detach().numpy())


def test_what_cannot_be(folder):
    c = get_config("pretrain_decoder")("tiny")
    c.log_to, c.data.cache_dir, c.data.train[0].path = (), str(folder / "cache"), str(folder / "texts.jsonl")
    c.tokenizer = f"file:{folder / 'tokenizer.json'}"

    def refused(**changes):
        values = c.to_dict() | {key: value for key, value in changes.items() if not isinstance(value, dict)}
        for key, value in changes.items():
            if isinstance(value, dict):
                values[key] = values[key] | value
        with pytest.raises(UserError) as error:
            trainer.train(config_lib.load(values), folder / "run")
        return str(error.value)

    assert "next_token" in refused(model={"attention": "bidirectional", "pooling": "mean"})
    assert "config.model.anneal_attention" in refused(model={"anneal_attention": 3})
    pairs = {"train": ({"path": str(folder / "pairs.jsonl")},), "positives": 1}
    loss = config_lib.to_json(config_lib.Config())["loss"]
    found = refused(data=pairs, loss=loss, eval={"texts": (str(folder / "texts.jsonl"),), "every": 1})
    assert "config.eval.texts" in found
    assert "in a causal model" in refused(loss=dict(c.loss) | {"name": "masked_diffusion"})
    both = {"attention": "bidirectional", "pooling": "mean"}
    diffusion, masked = ({"loss": dict(c.loss) | {"name": name}} for name in ("masked_diffusion", "masked_lm"))
    data = {"train": c.data.train, "positives": 0}
    stages = ({"name": "a", "data": data, **diffusion}, {"name": "b", "data": data, **masked})
    assert "predicts = 'auto'" in refused(model=both, stages=stages)
    assert not (folder / "run").exists()
