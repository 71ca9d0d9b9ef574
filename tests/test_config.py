"""The config: defaults, types, round trip, and every set-up that is refused."""

import dataclasses
import json
import typing

import pytest
from ml_collections import ConfigDict

from jaxembed import config as config_lib
from jaxembed.errors import UserError
from jaxembed.run_folder import differences


def valid(**changes):
    """A config that passes, with changes: fields' paths with dots as '__', 'source__…' for the one source."""
    c = config_lib.default_config()
    c.steps = 10
    c.model.init = "hf:somewhere"
    c.data.train[0].path = "pairs.jsonl"
    values = c.to_dict()
    for name, value in changes.items():
        *parents, leaf = name.split("__")
        node = values
        for parent in parents:
            node = node["data"]["train"][0] if parent == "source" else node[parent]
        node[leaf] = value
    return values


def shared(*shares):
    return tuple({"path": f"{i}.jsonl", "share": share} for i, share in enumerate(shares))


def serving(*losses):
    return tuple({"path": f"{i}.jsonl", "losses": titles} for i, titles in enumerate(losses))


def test_default_config_has_every_field():
    def compare(kind, values):
        types = typing.get_type_hints(kind)
        assert set(values) == set(types)
        for name, inner in types.items():
            if dataclasses.is_dataclass(inner):
                compare(inner, values[name])

    c = config_lib.default_config()
    compare(config_lib.Config, c)
    compare(config_lib.SourceConfig, c.data.train[0])
    assert isinstance(c.data.train[0], ConfigDict)  # so that flags reach into it


def test_no_default_is_none():
    assert "null" not in json.dumps(config_lib.to_json(config_lib.Config()))


def test_defaults_are_refused_for_want_of_a_length_and_data():
    with pytest.raises(UserError, match=r"config\.steps = 0 and config\.epochs = 0"):
        config_lib.load(config_lib.default_config())


WORDS = {"loss__name": "masked_diffusion"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__shape": {"hidden_size": 4}, "optimizer__options": {"b1": 0.8, "nested": {"a": [1, 2]}}},
        {"optimizer__by_regex": (("bias$", 0.0), ("kernel", 2.5)), "eval__sts": ("a", "b"), "data__row_length": "64"},
        {"data__train": shared(0.3, 2.0)},
        {"data__one_source": 0.8, "source__format": "texts", "model__dropout": 0.1},
        {"source__columns": {"query": "title"}, "source__prompt": {"query": "q: ", "document": ""}},
    ],
)
def test_round_trip_through_json(changes):
    config = config_lib.load(valid(**changes))
    assert config_lib.load(json.loads(json.dumps(config_lib.to_json(config)))) == config


def test_a_config_dict_and_its_plain_dict_are_the_same_config():
    values = valid()
    assert config_lib.load(ConfigDict(values)) == config_lib.load(values)


def test_whole_numbers_serve_as_floats_and_as_row_length():
    config = config_lib.load(valid(optimizer__learning_rate=1, data__row_length=128))
    assert config.optimizer.learning_rate == 1.0 and type(config.optimizer.learning_rate) is float
    assert config.data.row_length == "128"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bach_size": 4}, "config.bach_size: no such field, did you mean 'batch_size'?"),
        ({"model__poling": "mean"}, "config.model.poling: no such field, did you mean 'pooling'?"),
        ({"source__wieght": 1.0}, "config.data.train[0].wieght: no such field, did you mean 'weight'?"),
        ({"source__prompt__querry": ""}, "config.data.train[0].prompt.querry: no such field"),
        ({"steps": 1.5}, "config.steps: wants int, got 1.5"),
        ({"steps": True}, "config.steps: wants int, got True"),
        ({"export": 1}, "config.export: wants bool, got 1"),
        ({"optimizer__learning_rate": "fast"}, "config.optimizer.learning_rate: wants float, got 'fast'"),
        ({"optimizer__learning_rate": None}, "config.optimizer.learning_rate: wants float, got None"),
        ({"model": 3}, "config.model: wants a mapping, got 3"),
        ({"prompts": "query"}, "config.prompts: wants a mapping"),
        ({"prompts": {"query": 3}}, "config.prompts.query: wants str, got 3"),
        ({"eval__sts": "file.jsonl"}, "config.eval.sts: wants a tuple, got 'file.jsonl'"),
        ({"eval__sts": (1,)}, "config.eval.sts[0]: wants str, got 1"),
        ({"optimizer__by_regex": (("bias",),)}, "config.optimizer.by_regex[0]: wants 2 values"),
        ({"model__pooling": "maen"}, "config.model.pooling: 'maen' is not one of auto, mean, cls, last"),
        ({"source__format": "csv"}, "config.data.train[0].format: 'csv' is not one of jaxembed, st"),
    ],
)
def test_unknown_fields_wrong_types_and_wrong_choices(changes, message):
    refused(changes, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "set exactly one of them above 0"),
        ({"epochs": 1.0}, "set exactly one of them above 0"),
        ({"batch_size": 0}, "config.batch_size = 0: must be at least 1"),
        ({"grad_cache": 0}, "config.grad_cache = 0: must be at least 1"),
        ({"log_every": 0}, "config.log_every = 0: must be at least 1"),
        ({"data__positives": 0}, "config.data.positives = 0: losses over vectors compare queries with positives"),
        ({"data__positives": -1}, "config.data.positives = -1: must not be negative"),
        ({"data__mask__query": 1.0}, "config.data.mask.query = 1: must be in [0, 1)"),
        ({"loss__mask_rate": 0.2}, "config.loss.mask_rate = 0.2: infonce takes none"),
        ({"loss__weight_end": -0.5}, "config.loss.weight_end = -0.5: must not be negative"),
        ({**WORDS, "loss__mask_least": 0.0}, "config.loss.mask_least = 0: must be above 0"),
        ({**WORDS, "loss__sides": ()}, "config.loss.sides = (): wants 'query', 'document' or both"),
        (
            {**WORDS, "data__positives": 0, "loss__sides": ("document",)},
            "config.data.positives = 0 leaves queries alone",
        ),
        ({**WORDS, "data__mask__query": 0.1}, "config.data.mask is about texts that become vectors"),
        ({**WORDS, "matryoshka__dims": (16,)}, "config.matryoshka is about vectors"),
        ({**WORDS, "loss__temperature": 0.1}, "config.loss.temperature = 0.1: masked_diffusion takes none"),
        (
            {"loss__name": "masked_lm", "loss__random_rate": 0.6, "loss__keep_rate": 0.6},
            "config.loss.random_rate = 0.6, .keep_rate = 0.6: parts, at most 1 together",
        ),
        ({"loss__name": "masked_lm", "loss__mask_rate": 0.0}, "config.loss.mask_rate = 0: must be above 0"),
        (
            {**WORDS, "model__anneal_attention": 5, "model__attention_kernel": "pallas"},
            "config.model.anneal_attention needs config.model.attention_kernel",
        ),
        ({"steps": 4, "model__anneal_attention": 5}, "config.model.anneal_attention = 5, but there are 4 steps"),
        (
            {"checkpoint__best": "eval/texts/x/perplexity", "eval__every": 5, "eval__texts": ("x",)},
            "config.checkpoint.best = 'eval/texts/x/perplexity': the highest is kept",
        ),
        (
            {"loss__name": "next_token", "model__experts__routing": "expert_choice"},
            "config.loss: next_token with config.model.experts.routing = 'expert_choice'",
        ),
        ({"eval__draws": 0}, "config.eval.draws = 0: must be at least 1"),
        ({"data__prefetch": 0}, "config.data.prefetch = 0: must be at least 1"),
        ({"checkpoint__every": 0}, "config.checkpoint.every = 0: must be at least 1"),
        ({"checkpoint__keep": 0}, "config.checkpoint.keep = 0: must be at least 1"),
        ({"loss__tile": 0}, "config.loss.tile = 0: must be at least 1"),
        ({"data__negatives": -1}, "config.data.negatives = -1: must not be negative"),
        ({"eval__every": -1}, "config.eval.every = -1: must not be negative"),
        ({"model__projection": -8}, "config.model.projection = -8: must not be negative"),
        ({"optimizer__warmup_steps": -1}, "config.optimizer.warmup_steps = -1: must not be negative"),
        ({"optimizer__clip_norm": -1.0}, "config.optimizer.clip_norm = -1.0: must not be negative"),
        ({"optimizer__weight_decay": -0.1}, "config.optimizer.weight_decay = -0.1: must not be negative"),
        ({"optimizer__learning_rate": -1.0}, "config.optimizer.learning_rate = -1.0: must not be negative"),
        ({"optimizer__learning_rate": float("nan")}, "config.optimizer.learning_rate = nan"),
        ({"loss__temperature": float("nan")}, "config.loss.temperature = nan"),
        ({"batch_size": 1}, "in-batch negatives need at least 2 pairs"),
        ({"seed": -1}, "config.seed = -1"),
        ({"seed": 2**32}, "config.seed = 4294967296"),
        ({"grad_cache": 3}, "config.grad_cache = 3 does not divide config.batch_size = 128"),
        ({"data__train": ()}, "config.data.train is empty"),
        ({"source__path": ""}, "config.data.train[0].path is empty"),
        ({"source__name": "x"}, "path = 'pairs.jsonl' and name = 'x': set one of them"),
        (
            {"source__name": "x", "source__path": ""},
            "config.data.train[0].name = 'x': also set config.data.train[0].so",
        ),
        ({"source__source": "hf", "source__path": ""}, "config.data.train[0].name and .path are empty: set one"),
        ({"source__split": "test"}, "config.data.train[0].split = 'test': files have no splits"),
        ({"source__split": "", "source__source": "hf"}, "config.data.train[0].split is empty: name one"),
        ({"source__subset": "en", "source__source": "hf"}, "config.data.train[0].subset = 'en' is for a name with"),
        ({"source__data_dir": "x"}, "config.data.train[0].data_dir = 'x' is for a name with"),
        ({"source__weight": 0.0}, "config.data.train[0].weight = 0: must be above 0"),
        ({"source__in_batch": False, "data__negatives": 0}, "leave its pairs without any negative"),
        ({"source__format": "texts"}, "config.data.train[0].format = 'texts' makes a text its own positive: without"),
        ({"data__one_source": 1.5}, "config.data.one_source = 1.5: must be in 0 … 1"),
        ({"data__one_source": 0.001}, "config.data.one_source = 0.001 of config.batch_size = 128 is no whole pair"),
        ({"source__share": -0.5}, "config.data.train[0].share = -0.5: must be 0 or above"),
        ({"source__share": 0.5, "source__weight": 2.0}, "config.data.train[0].weight = 2 is of no use beside share"),
        ({"source__share": 0.5, "data__one_source": 0.5}, "config.data.one_source = 0.5 and fixed shares"),
        ({"data__train": shared(1.0, 0.0)}, "config.data.train[1].share = 0, but others have one"),
        ({"data__train": shared(1.0, 0.001)}, "config.data.train[1].share = 0.001 of 1.001 is no whole pair of config"),
        ({"data__row_length": "long"}, "config.data.row_length = 'long': wants 'auto' or a number of tokens"),
        ({"data__row_length": "0"}, "config.data.row_length = '0'"),
        ({"data__row_length": "²"}, "config.data.row_length = '²'"),
        ({"data__max_length__query": -1}, "config.data.max_length.query = -1: must be in 0"),
        ({"data__max_length__document": 65536}, "config.data.max_length.document = 65536: must be in 0"),
        ({"data__row_length": "64", "data__max_length__query": 65}, "does not fit config.data.row_length = 64"),
        ({"model__init": "bert"}, "config.model.init = 'bert': wants 'hf:FOLDER'"),
        ({"model__init": "hf:"}, "config.model.init = 'hf:': wants 'hf:FOLDER'"),
        ({"model__init": "scratch"}, "config.model.arch: name the architecture"),
        ({"model__init": "scratch", "model__arch": "bert"}, "config.tokenizer: name one"),
        ({"model__dropout": 1.0}, "config.model.dropout = 1: must be in [0, 1)"),
        ({"model__attention_dropout": -0.1}, "config.model.attention_dropout = -0.1: must be in [0, 1)"),
        (
            {"model__attention_dropout": 0.1, "model__attention_kernel": "pallas"},
            "config.model.attention_dropout needs config.model.attention_kernel = 'xla'",
        ),
        ({"loss__name": "tripet"}, "config.loss.name = 'tripet': known losses: infonce, clp, "),
        ({"loss__name": "tripet"}, "did you mean 'triplet'?"),
        ({"loss__name": "triplet"}, "config.loss.margin = 0: a triplet needs one above 0"),
        (
            {"loss__name": "cosent", "loss__margin": 0.1},
            "config.loss.margin = 0.1: cosent takes none; it takes temperature",
        ),
        (
            {"loss__name": "cosine", "loss__learn_temperature": True},
            "config.loss.learn_temperature = True: cosine takes",
        ),
        ({"loss__weight": -1.0}, "config.loss.weight = -1: must not be negative"),
        ({"loss__hardness": -1.0}, "config.loss.hardness = -1: must not be negative"),
        ({"loss__blocks": ()}, "config.loss.blocks = (): wants each block once, at least one"),
        ({"loss__blocks": ("qd", "qd")}, "config.loss.blocks = ('qd', 'qd'): wants each block once"),
        ({"loss__mixed_negatives": 2, "data__negatives": 1}, "config.data.negatives = 1 is too low"),
        (
            {"loss__name": "clp", "data__negatives": 0},
            "config.loss: clp needs hard negatives, but config.data.negatives = 0",
        ),
        ({"loss__name": "match"}, "config.loss: match needs a teacher here: name it in config.teacher.init"),
        ({"loss__false_negatives": "teacher"}, "config.loss: infonce needs a teacher here"),
        ({"teacher__init": "hf:x"}, "config.teacher.init = 'hf:x', but no loss uses a teacher"),
        ({"teacher__init": "x", "loss__name": "match"}, "config.teacher.init = 'x': wants 'hf:FOLDER'"),
        ({"losses": ({}, {})}, "config.losses[0]: there are two losses 'infonce': give each a label"),
        ({"losses": ({"weight": 0.0},)}, "config.losses: all weights are 0"),
        ({"losses": ({},), "loss__temperature": 0.1}, "config.loss and config.losses are both set"),
        ({"losses": ({"name": "spread_out"},)}, "config.losses[0]: spread_out alone drives all texts apart"),
        ({"loss__margin": float("inf")}, "config.loss.margin = inf: must be finite"),
        ({"loss__hardness_of": "all"}, "config.loss.hardness_of = 'all' is of no use while .hardness = 0.0"),
        ({"loss__false_negative_margin": 0.2}, "is of no use while .false_negatives = 'keep'"),
        ({"loss__label": "dim8"}, "config.loss.label = 'dim8' is what a size of the vectors is called"),
        ({"loss__temperature": 0.005, "loss__learn_temperature": True}, "a learned one starts at 0.01 or above"),
        (
            {"source__cross_device": False, "source__negatives_from": "all"},
            "config.data.train[0].cross_device = False keeps",
        ),
        ({"matryoshka__kl": 1.0, "matryoshka__dims": (8,), "loss__name": "cosine"}, "none of the losses has one"),
        ({"losses": ({}, {"name": "cosent", "tile": 64})}, "config.losses[1].tile = 64: cosent takes none"),
        ({"source__losses": ("infonc",)}, "no loss is called 'infonc', did you mean 'infonce'?"),
        (
            {"losses": ({}, {"name": "cosent"}), "data__train": serving(("infonce", "cosnt"), ())},
            "did you mean 'cosent'?",
        ),
        ({"matryoshka__dims": (0,)}, "config.matryoshka.dims = (0,): wants sizes above 0, each once"),
        ({"matryoshka__layers": (2, 2)}, "config.matryoshka.layers = (2, 2): wants sizes above 0, each once"),
        ({"matryoshka__pairs": "zip", "matryoshka__dims": (8,)}, "as many layers as dims, not 0 and 1"),
        (
            {"matryoshka__weights": (1.0,), "matryoshka__dims": (8,)},
            "wants 2 numbers, of the full size, then of the others (1)",
        ),
        ({"matryoshka__kl": -1.0, "matryoshka__dims": (8,)}, "config.matryoshka.kl = -1: must not be negative"),
        ({"matryoshka__kl": 1.0}, "config.matryoshka.kl compares smaller sizes with the full one"),
        ({"loss__temperature": 0.0}, "config.loss.temperature = 0: must be above 0"),
        ({"model__normalize": False}, "config.loss.temperature = 0.05 with config.model.normalize = False"),
        ({"optimizer__ema": 1.0}, "config.optimizer.ema = 1: must be in [0, 1)"),
        ({"optimizer__by_regex": (("a", -1.0),)}, "the factor of 'a' is negative"),
        ({"optimizer__by_regex": (("(", 1.0),)}, "'(' is not a regular expression"),
        ({"mesh__tensor": 0}, "axis sizes are at least 1, or -1 once"),
        ({"mesh__fsdp": -1}, "only one axis may be -1"),
        ({"eval__every": 5}, "config.eval.every is set but config.eval.sts, .retrieval, .pairs, .clas"),
        ({"checkpoint__best": "eval/sts/x"}, "needs config.eval.every and an evaluation set"),
        ({"checkpoint__best": "eval/sts/x", "eval__sts": ("x",)}, "needs config.eval.every and an evaluation set"),
    ],
)
def test_set_ups_that_cannot_be_right(changes, message):
    refused(changes, message)


def refused(changes, message):
    with pytest.raises(UserError) as caught:
        config_lib.load(valid(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_differences_name_the_fields_that_make_another_run():
    old = config_lib.to_json(config_lib.load(valid()))
    assert differences(old, old) == []
    free = valid(steps=20, log_every=5, mesh__fsdp=2, eval__sts=("x",), data__cache_dir="elsewhere", export=False)
    assert differences(old, config_lib.to_json(config_lib.load(free))) == []
    other = config_lib.to_json(config_lib.load(valid(seed=1, model__pooling="cls", source__weight=2.0)))
    named = differences(json.loads(json.dumps(old)), other)
    assert [line.split(":")[0] for line in named] == ["seed", "model.pooling", "data.train[0].weight"]
    assert differences({"a": 1}, {"a": 1, "b": 2}) == ["b: 'absent' → 2"]
