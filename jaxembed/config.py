"""What a run is: frozen dataclasses, made from an `ml_collections.ConfigDict` and refused early when wrong.

Config files start from `default_config()`, so that every field exists and can be set by a flag. `load` turns the
ConfigDict into a `Config`; after that nothing in the package reads a ConfigDict. This module imports neither jax nor
any other heavy package: a mistake in a config answers at once.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from jaxembed.errors import UserError

AUTO = "auto"
MODEL_KINDS = ("hf:", "run:")  # what a model's place begins with


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters: the checkpoint's weights stay as they are, small matrices beside some of them are trained."""

    rank: int = 0  # width of the adapters; 0 = off, all weights are trained
    alpha: float = 16.0  # adapters' outputs are scaled by alpha / rank
    targets: str = ""  # regex, found in the checkpoint's names of linear layers ('q_proj|v_proj', 'mlp'); '' = all
    dropout: float = 0.0  # of the adapters' inputs
    rslora: bool = False  # scale by alpha / √rank instead


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """Mixtures of experts: how a dense checkpoint becomes one, which expert a token takes, how they are computed."""

    upcycle: int = 0  # make a dense checkpoint sparse: copies of each feed-forward part; 0 = the model as it is
    top_k: int = 2  # of an upcycled model: experts that a token takes
    every: int = 1  # … which layers become sparse: every N-th, the N-th first; or
    layers: tuple[int, ...] = ()  # … these, counted from 0; () = by `every`
    router_noise: float = 0.02  # … standard deviation of the fresh routers' weights; their mean is zero
    routing: str = "token"  # 'token' takes its experts | 'expert_choice': they take tokens, in training | 'source'
    served: int = 0  # routing 'source': the expert (a place in data.train) of texts outside of training, and of eval
    kernel: str = AUTO  # of the grouped products: 'blocks' | 'ragged'; 'auto' = the device's own
    capacity: float = 1.25  # what a device sends to another at once, as a multiple of the balanced share


@dataclasses.dataclass(frozen=True)
class SsmConfig:
    """State-space layers (mamba, mamba2, falcon_mamba, bamba)."""

    directions: str = "separate"  # of a model made 'bidirectional': weights of the backward mixers, or 'shared'
    kernel: str = AUTO  # form of Mamba's scan: 'associative' | 'steps' (token by token); 'auto' = this on CPU, TPU
    chunk: int = 0  # tokens in a chunk of the recurrence, which the backward pass recomputes; 0 = the usual number


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The encoder: where its weights come from, and how token states become one vector."""

    init: str = "scratch"  # 'hf:FOLDER' | 'hf:ORG/NAME@REVISION' | 'run:DIR[@STEP|@best]' | 'scratch'
    arch: str = AUTO  # the architecture (bert, llama, qwen3, modernbert …); 'auto' = the checkpoint's own
    shape: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for scratch: fields of the Hugging Face config
    attention: str = "native"  # 'native' = the checkpoint's own | 'causal' | 'bidirectional' | 'prefix' (the prompt)
    attention_layers: tuple[str, ...] = ()  # the same, one per layer (BeLLM: only the last 'bidirectional'); () = alike
    anneal_attention: int = 0  # steps in which attention that is not causal grows from causal to what it is; 0 = none
    mask_token: str = ""  # what stands for masked words; added where the tokenizer has no such token; '' = its own
    rope_scaling: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # for longer texts: rope_type, factor …
    pooling: str = AUTO  # 'mean' | 'cls' | 'last' | 'weighted_mean' | 'latent'; 'auto' = the folder's own
    latents: int = 512  # of pooling 'latent': vectors that tokens attend to
    latent_heads: int = 8  # … and heads of that attention
    pool_layers: int = -1  # pool a trained weighted mean of the states of layer N (0 = embeddings) and above; -1 = last
    template: str = ""  # 'prompt_eol', 'echo' or a text with {text} in it (twice: echo); '' = the text alone
    lora: LoraConfig = LoraConfig()
    experts: ExpertsConfig = ExpertsConfig()
    ssm: SsmConfig = SsmConfig()
    moee: str = ""  # vectors of routing weights (MoEE): 'alone', 'concat' or 'sum' with the states'; '' = not used
    moee_weight: float = 1.0  # of the routing weights' similarity in 'sum'
    pool_prompt: bool = True  # False leaves the prompt's tokens out of the pooled vector
    normalize: bool = True  # unit-length vectors
    projection: int = 0  # width of a linear layer after pooling; 0 = the folder's own, or none
    dtype: str = "float32"  # of the computation: 'float32' | 'bfloat16'
    param_dtype: str = "float32"  # of the master weights and the optimizer
    remat: str = "none"  # what the backward pass recomputes: 'none' | 'dots' (keep matmuls) | 'full'
    unroll: int = 0  # layers per iteration of the layer scan; 0 = all on CPU (faster, longer to compile), 1 elsewhere
    dropout: float = 0.0  # after embeddings and sub-layers
    attention_dropout: float = 0.0  # of attention weights; needs attention_kernel 'xla'
    attention_kernel: str = AUTO  # 'xla' | 'pallas' (Triton on GPU, splash on TPU); 'auto' = pallas where it serves


@dataclasses.dataclass(frozen=True)
class PromptConfig:
    """The text put before a source's texts. 'auto' takes the prompt of that name from `prompts`, else none."""

    query: str = AUTO  # before queries
    document: str = AUTO  # before positives and negatives


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """One source of training records."""

    path: str = ""  # a file, a folder of files, or a glob; of 'tfds' and 'hf': a prepared data set's folder
    name: str = ""  # of a 'tfds' or 'hf' data set, instead of `path`
    subset: str = ""  # of an 'hf' data set that has several (its "config name")
    split: str = "train"  # of a 'tfds' or 'hf' data set; slices too, such as 'train[:10%]'
    data_dir: str = ""  # where 'tfds' keeps what it prepared; '' = its own place
    source: str = AUTO  # 'jsonl' | 'parquet' | 'txt' | 'tfds' | 'hf'; 'auto' = by the file's name
    format: str = "jaxembed"  # 'jaxembed' | 'st' | 'flagembedding' | 'tevatron'; 'texts' = each text with itself
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)  # our field → the file's column
    weight: float = 1.0  # how often a record is drawn, relative to records of other sources
    prompt: PromptConfig = PromptConfig()
    share: float = 0.0  # fixed part of every step's pairs, of all sources or of none; 0 = by `weight`
    losses: tuple[str, ...] = ()  # labels of the losses that it trains; () = all
    in_batch: bool = True  # False: only a record's own hard negatives are its negatives
    cross_device: bool = True  # False: in-batch negatives come from one device's share of the batch only
    negatives_from: str = "source"  # in-batch negatives come from the same 'source' or from 'all'
    licence: str = ""  # of the texts, for the model card; '' = what the data set says of itself, else unknown

    def trains(self, loss: "LossConfig") -> bool:
        """Whether the source's records train a loss."""
        return not self.losses or loss.title in self.losses


@dataclasses.dataclass(frozen=True)
class MaxLength:
    """Longest text in tokens, special tokens and prompt included; 0 = the folder's own limit."""

    query: int = 0  # of a query
    document: int = 0  # of a positive or negative


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """Part of a text's words that the losses over vectors see masked, drawn anew in each step: noised views."""

    query: float = 0.0  # of queries
    document: float = 0.0  # of positives and negatives


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Training texts and how they are laid out."""

    train: tuple[SourceConfig, ...] = (SourceConfig(),)
    max_length: MaxLength = MaxLength()
    mask: MaskConfig = MaskConfig()
    row_length: str = AUTO  # tokens in a packed row; 'auto' = the shortest that serves
    positives: int = 1  # positives of a record used in a step (drawn anew where it has more); 0 = queries alone
    negatives: int = 7  # hard negatives of a record used in a step, at the most
    one_source: float = 0.0  # part of each step's pairs that come from one source, in turns; 1 = all of them, 0 = mixed
    cache_dir: str = "~/.cache/jaxembed"  # of tokenised texts
    on_bad_record: str = "error"  # 'error' | 'skip' (they are counted and reported)
    prefetch: int = 4  # batches prepared ahead

    @property
    def used_negatives(self) -> int:
        """Hard negatives of a record used in a step: none where queries stand alone."""
        return self.negatives if self.positives else 0


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """An objective. Each takes some of these fields, and a field that it does not take must be left alone."""

    name: str = "infonce"  # see the table of losses in README.md
    label: str = ""  # what metrics and sources call it; '' = its name
    weight: float = 1.0  # in the sum of several losses
    weight_end: float = -1.0  # … at the last step, to which it goes in a line; -1 = it stays
    temperature: float = 0.05  # divides the similarities; where the learned one starts
    learn_temperature: bool = False  # one scalar, trained with the weights
    blocks: tuple[str, ...] = ("qd",)  # who is compared with whose negatives: 'qd', 'dq', 'qq', 'dd' (query, document)
    partition: str = "joint"  # one sum over all blocks, 'joint', or a loss for each block, averaged, 'separate'
    hard_negatives: str = "all"  # a query meets the hard negatives of 'all' pairs in its scope, or its 'own' only
    false_negatives: str = "keep"  # leave out negatives too like the positive: 'absolute' | 'relative' | by 'teacher'
    false_negative_margin: float = 0.1  # … that score above the positive's score + margin (or · (1 + margin))
    false_negative_blocks: tuple[str, ...] = ("qd", "dq", "qq", "dd")  # where they are left out
    margin: float = 0.0  # infonce: taken off the positive's similarity; triplet: what a negative must stay behind
    hardness: float = 0.0  # weight exp(hardness · similarity) of negatives
    hardness_of: str = "own"  # … of the pair's 'own' hard negatives, of those 'in_batch', or of 'all'
    focal: float = 0.0  # exponent of the weight (1 − probability of the positive)
    mixed_negatives: int = 0  # hard negatives mixed from a pair's own ones, per query
    penalty: float = 0.1  # clp: weight of the penalty
    bias: float = -10.0  # sigmoid: where the learned bias starts
    distance: str = "cosine"  # triplet: 'cosine' | 'euclidean'
    teacher_temperature: float = 0.05  # kl: divides the teacher's scores
    similarity_weight: float = 0.0  # match: weight of the difference between the two similarity matrices
    exchange: str = AUTO  # how devices meet the others' texts: 'gather' | 'ring'; 'auto' = by the memory it needs
    precision: str = "float32"  # of the similarities' products: 'float32' | 'bfloat16' (summed in float32)
    tile: int = 2048  # edge of the tiles of the similarity matrix; of losses over tokens: words in a tile
    mask_rate: float = 0.15  # masked_lm, masked_next_token: part of a text's tokens that are to be predicted
    random_rate: float = 0.0  # … part of these that another word stands for, in place of the mask token
    keep_rate: float = 0.0  # … part of these that stay as they are
    mask_least: float = 0.001  # masked_diffusion: a text's masked part is drawn evenly from here to 1
    mask_draws: str = "low_discrepancy"  # … over the texts of a step, 'low_discrepancy' | 'antithetic' | 'independent'
    predicts: str = AUTO  # … from a token's own state, 'same', or the one before, 'next'; 'auto' = as the model learned
    sides: tuple[str, ...] = ("query", "document")  # losses over tokens: whose texts are predicted

    @property
    def title(self) -> str:
        """What sources, metrics and parameters call it."""
        return self.label or self.name


@dataclasses.dataclass(frozen=True)
class MatryoshkaConfig:
    """Vectors that serve at several widths, and backbones at several depths: the losses' sum over these sizes."""

    dims: tuple[int, ...] = ()  # widths beside the full one
    layers: tuple[int, ...] = ()  # depths beside the full one, in layers from the first
    pairs: str = "all"  # every width at every depth, 'all', or the i-th width at the i-th depth, 'zip' (Starbucks)
    weights: tuple[float, ...] = ()  # of the full size, then of its other widths, then of each depth's; () = 1
    kl: float = 0.0  # weight of the divergence of smaller sizes' similarities from the full size's


@dataclasses.dataclass(frozen=True)
class TeacherConfig:
    """A frozen model whose vectors some losses use: guides (GISTEmbed) and teachers (embedding matching)."""

    init: str = ""  # 'hf:FOLDER' | 'hf:ORG/NAME@REVISION' | 'run:DIR[@STEP|@best]'; '' = none
    dtype: str = "float32"  # of its computation: 'float32' | 'bfloat16'


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """What the routers of a mixture of experts add to the loss."""

    balance: float = 0.01  # weight of the load balance, which is 1 where all experts are taken alike
    z: float = 0.0  # weight of the mean square of the router's log-sum-exp


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Any optax optimizer by name, its schedule, and what it touches."""

    name: str = "adamw"  # any of optax or optax.contrib that takes a learning rate
    learning_rate: float = 2e-5  # the highest
    schedule: str = "linear"  # after the warm-up: 'constant' | 'linear' | 'cosine', to zero at the last step
    warmup_steps: int = 0  # from 0 to the highest
    weight_decay: float = 0.01  # not on norms, biases and the temperature
    clip_norm: float = 1.0  # of the global gradient norm; 0 = off
    ema: float = 0.0  # decay of averaged weights, which are evaluated and exported; 0 = off
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # further arguments of the optax function
    by_regex: tuple[tuple[str, float], ...] = ()  # (regex of parameter path, learning-rate multiplier); 0 freezes


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; -1 (once) = what is left."""

    data: int = -1  # rows; weights are copied
    fsdp: int = 1  # rows; weights and optimizer state are sharded
    tensor: int = 1  # heads and feed-forward width
    expert: int = 1  # rows; and experts, in models that have them
    sequence: int = 1  # tokens of a row


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Evaluation during training: at step 0, every `every` steps and at the end."""

    every: int = 0  # steps; 0 = off
    sts: tuple[str, ...] = ()  # files of sentence1, sentence2, score
    retrieval: tuple[str, ...] = ()  # BEIR folders
    pairs: tuple[str, ...] = ()  # pairs to find each other: files, 'tfds:NAME:SPLIT' or 'hf:NAME:SPLIT'
    classification: tuple[str, ...] = ()  # 'TRAIN_FILE:TEST_FILE' of text, label; or a folder of both
    texts: tuple[str, ...] = ()  # texts to predict, by a model with a loss over tokens: files, as for data.train
    draws: int = 8  # … masks drawn for each of them
    bm25: bool = False  # also score BM25, once, on the retrieval and pairs sets
    hybrid: bool = False  # also score BM25's and the model's rankings fused, on the same sets


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    every: int = 500  # steps
    keep: int = 2  # the newest ones
    best: str = ""  # also keep the best by this metric, e.g. 'eval/sts/stsb-dev'; needs eval


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = 0  # of fresh weights, the order of the data and dropout
    steps: int = 0  # length of the run in optimizer steps; or
    epochs: float = 0.0  # in passes over the data
    batch_size: int = 128  # pairs in the global batch
    log_every: int = 1  # steps from one line of metrics.jsonl to the next
    stall_seconds: float = 600.0  # without progress: all threads' stacks go to WORKDIR/stalls and stderr; 0 = off
    model: ModelConfig = ModelConfig()
    tokenizer: str = AUTO  # 'hf:FOLDER' | 'file:tokenizer.json' | 'train:bpe:8192' (size); 'auto' = model.init's
    data: DataConfig = DataConfig()
    # named texts, put before the model's texts and saved with it; 'query' and 'document' serve training
    prompts: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"query": "", "document": ""})
    loss: LossConfig = LossConfig()
    losses: tuple[LossConfig, ...] = ()  # several, summed by their weights; () = `loss` alone
    matryoshka: MatryoshkaConfig = MatryoshkaConfig()
    teacher: TeacherConfig = TeacherConfig()
    router: RouterConfig = RouterConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    grad_cache: int = 1  # micro-batches per step (GradCache); 1 = off
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    stages: tuple[Mapping[str, Any], ...] = ()  # one after the other: what each changes in this config, and its name
    log_to: tuple[str, ...] = ("tensorboard",)  # beside metrics.jsonl: 'tensorboard', 'wandb'
    export: bool = True  # write WORKDIR/export at the end
    export_dtype: str = "float32"  # of its weights: 'float32' | 'bfloat16'

    @property
    def all_losses(self) -> tuple[LossConfig, ...]:
        """The losses that are summed."""
        return self.losses or (self.loss,)


CHOICES = {
    "model.attention": ("native", "causal", "bidirectional", "prefix"),
    "model.attention_layers[]": ("native", "causal", "bidirectional", "prefix"),
    "model.pooling": (AUTO, "mean", "cls", "last", "weighted_mean", "latent"),
    "model.dtype": ("float32", "bfloat16"),
    "model.param_dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "dots", "full"),
    "model.ssm.directions": ("separate", "shared"),
    "model.ssm.kernel": (AUTO, "associative", "steps"),
    "model.attention_kernel": (AUTO, "xla", "pallas"),
    "model.experts.routing": ("token", "expert_choice", "source"),
    "model.experts.kernel": (AUTO, "blocks", "ragged"),
    "model.moee": ("", "alone", "concat", "sum"),
    "data.on_bad_record": ("error", "skip"),
    "data.train[].source": (AUTO, "jsonl", "parquet", "txt", "tfds", "hf"),
    "data.train[].format": ("jaxembed", "st", "flagembedding", "tevatron", "texts"),
    "data.train[].negatives_from": ("source", "all"),
    **{
        f"{loss}.{field}": choices
        for loss in ("loss", "losses[]")
        for field, choices in {
            "blocks[]": ("qd", "dq", "qq", "dd"),
            "partition": ("joint", "separate"),
            "hard_negatives": ("all", "own"),
            "false_negatives": ("keep", "absolute", "relative", "teacher"),
            "false_negative_blocks[]": ("qd", "dq", "qq", "dd"),
            "hardness_of": ("own", "in_batch", "all"),
            "distance": ("cosine", "euclidean"),
            "exchange": (AUTO, "gather", "ring"),
            "precision": ("float32", "bfloat16"),
            "mask_draws": ("low_discrepancy", "antithetic", "independent"),
            "predicts": (AUTO, "same", "next"),
            "sides[]": ("query", "document"),
        }.items()
    },
    "matryoshka.pairs": ("all", "zip"),
    "teacher.dtype": ("float32", "bfloat16"),
    "export_dtype": ("float32", "bfloat16"),
    "log_to[]": ("tensorboard", "wandb"),
    "optimizer.schedule": ("constant", "linear", "cosine"),
}


def default_config() -> ConfigDict:
    """Returns the defaults as a ConfigDict, for a config file to change."""
    config = ConfigDict(_as_dict(Config()))
    config.data.train = tuple(ConfigDict(source) for source in config.data.train)
    return config


def load(config: ConfigDict | Mapping[str, Any]) -> Config:
    """Turns a ConfigDict into a `Config`.

    Raises:
      UserError: an unknown field, a wrong type, a value outside its choices, or a set-up that cannot be right.
    """
    from jaxembed.config_check import check  # the rules are long enough for a file of their own
    from jaxembed.losses.check import check_teacher
    from jaxembed.stages import stages_of

    resolved = build(config)
    stages = stages_of(resolved)
    for i, stage in enumerate(stages):
        try:
            check(stage.config)
        except UserError as error:
            raise UserError(f"config.stages[{i}] ({stage.name}): {error}" if stage.name else str(error)) from error
    check_teacher(resolved.teacher, [loss for stage in stages for loss in stage.config.all_losses])
    return resolved


def build(config: ConfigDict | Mapping[str, Any]) -> Config:
    """Turns a ConfigDict into a `Config` of the right types; whether its fields go together is for `load` to say.

    Raises:
      UserError: an unknown field, a wrong type, a value outside its choices.
    """
    return _build(Config, config, "")


def to_json(config: Config) -> dict[str, Any]:
    """Returns the config as plain JSON-able dicts; `load` takes it back."""
    return _as_dict(config)


def nearest(word: str, known: typing.Iterable[str]) -> str:
    """Returns ', did you mean X?' for the known word nearest to `word`, or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _as_dict(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _as_dict(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _as_dict(v) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_as_dict(v) for v in value)
    return value


def _build(kind: Any, value: Any, where: str) -> Any:
    """Checks `value` against the type `kind` and returns it in that type. `where` names the field."""
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    if origin is tuple:
        return _build_tuple(kind, value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping | ConfigDict):
            raise _wrong_type(where, "a mapping", value)
        inner = typing.get_args(kind)[1]
        items = value.items(preserve_field_references=False) if isinstance(value, ConfigDict) else value.items()
        return {k: _build(inner, v, f"{where}.{k}") for k, v in items}
    if kind is Any:
        return _plain(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and where == "data.row_length" and isinstance(value, int):
        return str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _wrong_type(where, kind.__name__, value)
    choices = CHOICES.get(_pattern(where))
    if choices and value not in choices:
        known = ", ".join(choice or "''" for choice in choices)
        raise UserError(f"config.{where}: {value!r} is not one of {known}{nearest(value, choices)}")
    return value


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(value) and isinstance(value, kind):
        return value
    if not isinstance(value, Mapping | ConfigDict):
        raise _wrong_type(where, "a mapping", value)
    types = typing.get_type_hints(kind)
    for key in value:
        if key not in types:
            raise UserError(f"config.{_join(where, key)}: no such field{nearest(key, types)}")
    return kind(**{key: _build(types[key], value[key], _join(where, key)) for key in value})


def _build_tuple(kind: Any, value: Any, where: str) -> tuple:
    if isinstance(value, str) or not isinstance(value, tuple | list):
        raise _wrong_type(where, "a tuple", value)
    inner = typing.get_args(kind)
    if inner[-1] is Ellipsis:
        return tuple(_build(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if len(inner) != len(value):
        raise _wrong_type(where, f"{len(inner)} values", value)
    return tuple(_build(t, item, f"{where}[{i}]") for i, (t, item) in enumerate(zip(inner, value)))


def _plain(value: Any) -> Any:
    """Returns a value without ConfigDicts in it."""
    if isinstance(value, Mapping | ConfigDict):
        return {key: _plain(value[key]) for key in value}
    return tuple(map(_plain, value)) if isinstance(value, tuple | list) else value


def _pattern(where: str) -> str:
    return "".join(c for c in where if not c.isdigit())


def _join(where: str, key: str) -> str:
    return ".".join(filter(None, (where, key)))


def _wrong_type(where: str, wanted: str, value: Any) -> UserError:
    return UserError(f"{_join('config', where)}: wants {wanted}, got {value!r}")
