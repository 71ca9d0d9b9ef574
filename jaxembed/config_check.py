"""Set-ups that cannot be right, refused before any device starts."""

import dataclasses
import math
import re
from typing import Any

from jaxembed.config import AUTO, MODEL_KINDS, Config, ExpertsConfig, ModelConfig, RouterConfig, SourceConfig
from jaxembed.data.shares import pairs_by_share
from jaxembed.data.sources import DATA_SETS
from jaxembed.data.templates import parse
from jaxembed.errors import UserError, require
from jaxembed.losses.check import check_losses
from jaxembed.losses.table import LOSSES
from jaxembed.losses.token_check import check_token_losses

MAX_LENGTH = 65_535  # lengths are kept as uint16
TRAINED = "train:"  # begins a tokenizer that is made from the training texts
MIN_VOCABULARY = 256 + 5  # bytes and special tokens
LOWER_IS_BETTER = ("perplexity", "elbo_stderr")  # metrics of evaluation


def check(config: Config) -> None:
    """Raises UserError with one line for the first rule that the config breaks."""
    of_losses = check_losses, check_token_losses
    for rule in (_length_of_run, _positive_numbers, _data, _model, *of_losses, _optimizer, _mesh, _evaluation):
        rule(config)


def trained_vocabulary(tokenizer: str) -> int:
    """Returns the size of the vocabulary that 'train:bpe:SIZE' asks for.

    Raises:
      UserError: another kind of tokenizer, or no size that a vocabulary can have.
    """
    match = re.fullmatch(rf"{TRAINED}bpe:(\d+)", tokenizer)
    wanted = f"wants '{TRAINED}bpe:SIZE', such as '{TRAINED}bpe:8192'"
    require(match is not None, f"config.tokenizer = {tokenizer!r}: {wanted}")
    size = int(match[1])
    require(
        size >= MIN_VOCABULARY,
        f"config.tokenizer = {tokenizer!r}: at least {MIN_VOCABULARY} tokens: 256 bytes and 5 special tokens",
    )
    return size


def _length_of_run(c: Config) -> None:
    require(
        (c.steps > 0) != (c.epochs > 0),
        f"config.steps = {c.steps} and config.epochs = {c.epochs:g}: set exactly one of them above 0",
    )


def _positive_numbers(c: Config) -> None:
    for name, value in (
        ("batch_size", c.batch_size),
        ("grad_cache", c.grad_cache),
        ("log_every", c.log_every),
        ("data.prefetch", c.data.prefetch),
        ("checkpoint.every", c.checkpoint.every),
        ("checkpoint.keep", c.checkpoint.keep),
    ):
        require(value >= 1, f"config.{name} = {value}: must be at least 1")
    for name, value in (
        ("stall_seconds", c.stall_seconds),
        ("data.negatives", c.data.negatives),
        ("data.positives", c.data.positives),
        ("model.anneal_attention", c.model.anneal_attention),
        ("eval.every", c.eval.every),
        ("model.projection", c.model.projection),
        ("model.unroll", c.model.unroll),
        ("model.lora.rank", c.model.lora.rank),
        ("optimizer.warmup_steps", c.optimizer.warmup_steps),
        ("optimizer.clip_norm", c.optimizer.clip_norm),
        ("optimizer.weight_decay", c.optimizer.weight_decay),
        ("optimizer.learning_rate", c.optimizer.learning_rate),
    ):
        require(value >= 0, f"config.{name} = {value}: must not be negative")
    require(c.batch_size >= 2, "config.batch_size = 1: in-batch negatives need at least 2 pairs")
    require(0 <= c.seed < 2**32, f"config.seed = {c.seed}: must be in 0 … 2**32 - 1")
    require(
        c.batch_size % c.grad_cache == 0,
        f"config.grad_cache = {c.grad_cache} does not divide config.batch_size = {c.batch_size}",
    )


def _data(c: Config) -> None:
    require(len(c.data.train) > 0, "config.data.train is empty: name a source there or with --data=FILE")
    for i, source in enumerate(c.data.train):
        where = f"config.data.train[{i}]"
        _place(source, where)
        require(0 < source.weight < math.inf, f"{where}.weight = {source.weight:g}: must be above 0, and finite")
        require(
            source.in_batch or c.data.negatives > 0,
            f"{where}.in_batch = False and config.data.negatives = 0 leave its pairs without any negative",
        )
        require(
            source.cross_device or source.negatives_from == "source",
            f"{where}.cross_device = False keeps negatives to one device's part of the source: "
            f"it does not go with {where}.negatives_from = 'all'",
        )
        trains = [loss.name for loss in c.all_losses if source.trains(loss)]
        require(
            source.format != "texts"
            or c.model.dropout > 0
            or c.model.attention_dropout > 0
            or (c.model.lora.rank > 0 and c.model.lora.dropout > 0)
            or c.data.mask.query > 0
            or c.data.mask.document > 0
            or all(name in ("match", "spread_out") or LOSSES[name].over_tokens for name in trains),
            f"{where}.format = 'texts' makes a text its own positive: without config.model.dropout, "
            ".attention_dropout or config.data.mask two views of a text would be the same vector",
        )
    _proportions(c)
    for side in ("query", "document"):
        part = getattr(c.data.mask, side)
        require(0 <= part < 1, f"config.data.mask.{side} = {part:g}: must be in [0, 1)")
    row_length = c.data.row_length
    require(
        row_length == "auto" or (row_length.isdecimal() and int(row_length) > 0),
        f"config.data.row_length = {row_length!r}: wants 'auto' or a number of tokens",
    )
    for side in ("query", "document"):
        length = getattr(c.data.max_length, side)
        require(0 <= length <= MAX_LENGTH, f"config.data.max_length.{side} = {length}: must be in 0 … {MAX_LENGTH}")
        require(
            row_length == "auto" or length <= int(row_length),
            f"config.data.max_length.{side} = {length} does not fit config.data.row_length = {row_length}",
        )


def _proportions(c: Config) -> None:
    """Steps have fixed shares of the sources, or a main source, or neither."""
    shares = [source.share for source in c.data.train]
    part = c.data.one_source
    require(0 <= part <= 1, f"config.data.one_source = {part:g}: must be in 0 … 1")
    require(
        part == 0 or round(part * c.batch_size) > 0,
        f"config.data.one_source = {part:g} of config.batch_size = {c.batch_size} is no whole pair: raise one of them",
    )
    for i, source in enumerate(c.data.train):
        where = f"config.data.train[{i}]"
        require(0 <= source.share < math.inf, f"{where}.share = {source.share:g}: must be 0 or above, and finite")
        require(
            source.share > 0 or not any(shares), f"{where}.share = 0, but others have one: give all sources one or none"
        )
        require(
            source.share == 0 or source.weight == 1,
            f"{where}.weight = {source.weight:g} is of no use beside share = {source.share:g}: leave it 1, or leave "
            "all shares 0",
        )
    if any(shares):
        require(part == 0, f"config.data.one_source = {part:g} and fixed shares (config.data.train[].share): set one")
        pairs_by_share(shares, c.batch_size)


def _place(s: SourceConfig, where: str) -> None:
    """A source is either files, or a prepared data set's folder, or a data set's name."""
    is_set = s.source in DATA_SETS
    require(not (s.name and s.path), f"{where}: path = {s.path!r} and name = {s.name!r}: set one of them")
    require(is_set or not s.name, f"{where}.name = {s.name!r}: also set {where}.source, to 'tfds' or 'hf'")
    require(not is_set or bool(s.name or s.path), f"{where}.name and .path are empty: set one of them")
    require(bool(s.name or s.path), f"{where}.path is empty: set it, or give the training pairs with --data=FILE")
    require(bool(s.split), f"{where}.split is empty: name one, such as 'train' or 'train[:10%]'")
    require(
        is_set or s.split == SourceConfig.split,
        f"{where}.split = {s.split!r}: files have no splits; those of data sets do, {where}.source = 'tfds' or 'hf'",
    )
    require(
        not s.subset or (bool(s.name) and s.source == "hf"),
        f"{where}.subset = {s.subset!r} is for a name with {where}.source = 'hf' (for 'tfds', set name to NAME/CONFIG)",
    )
    require(
        not s.data_dir or (bool(s.name) and s.source == "tfds"),
        f"{where}.data_dir = {s.data_dir!r} is for a name with {where}.source = 'tfds'",
    )


def _model(c: Config) -> None:
    m = c.model
    require(
        m.init == "scratch" or (m.init.startswith(MODEL_KINDS) and len(m.init.split(":", 1)[1]) > 0),
        f"config.model.init = {m.init!r}: wants 'hf:FOLDER', 'hf:ORG/NAME@REVISION', 'run:DIR[@STEP|@best]' or "
        "'scratch'",
    )
    if m.init == "scratch":
        require(m.arch != "auto", "config.model.arch: name the architecture (bert, roberta …) when init is 'scratch'")
        require(
            c.tokenizer != "auto",
            "config.tokenizer: name one ('hf:FOLDER', 'file:PATH' or 'train:bpe:SIZE') when init is 'scratch'",
        )
    if c.tokenizer.startswith(TRAINED):
        trained_vocabulary(c.tokenizer)
        require(
            m.init == "scratch",
            f"config.tokenizer = {c.tokenizer!r}: the weights of {m.init} know the tokens of their own tokenizer only; "
            "leave it 'auto', or set config.model.init = 'scratch'",
        )
    require(
        not m.attention_layers or m.attention == "native",
        f"config.model.attention = {m.attention!r} and config.model.attention_layers: set one of them",
    )
    if m.lora.rank:
        _lora(m)
    _experts(c)
    _state_space(c)
    _no_idle_fields(m)
    require(m.latents >= 1, f"config.model.latents = {m.latents}: must be at least 1")
    require(m.latent_heads >= 1, f"config.model.latent_heads = {m.latent_heads}: must be at least 1")
    require(m.pool_layers >= -1, f"config.model.pool_layers = {m.pool_layers}: a layer (0 = embeddings), or -1")
    if m.template:
        parse(m.template, "config.model.template")
    for name, value in (
        ("dropout", m.dropout),
        ("attention_dropout", m.attention_dropout),
        ("lora.dropout", m.lora.dropout),
    ):
        require(0 <= value < 1, f"config.model.{name} = {value:g}: must be in [0, 1)")
    require(
        m.attention_dropout == 0 or m.attention_kernel != "pallas",
        "config.model.attention_dropout needs config.model.attention_kernel = 'xla': the kernels have no dropout",
    )


def _no_idle_fields(m: ModelConfig) -> None:
    """Fields of a part that is off were set by mistake; with pooling 'auto' latent attention may be the folder's."""
    usual = ModelConfig()
    idle: list[tuple[str, Any, Any, str]] = []
    if not m.lora.rank:
        fields = dataclasses.asdict(m.lora).items()
        idle += [(f"lora.{f}", v, getattr(usual.lora, f), "lora.rank = 0: set the rank") for f, v in fields]
    if m.pooling not in (AUTO, "latent"):
        why = f"pooling = {m.pooling!r}: set that to 'latent'"
        idle += [(f, getattr(m, f), getattr(usual, f), why) for f in ("latents", "latent_heads")]
    for name, value, default, why in idle:
        require(value == default, f"config.model.{name} = {value!r} is of no use with config.model.{why}")


def _state_space(c: Config) -> None:
    """State-space layers: how they are computed."""
    chunk = c.model.ssm.chunk
    require(chunk >= 0, f"config.model.ssm.chunk = {chunk}: tokens in a chunk, 0 for the usual number")


def _experts(c: Config) -> None:
    """Mixtures of experts: how many there are, and who picks them."""
    m, e, usual = c.model, c.model.experts, ExpertsConfig()
    where = "config.model.experts"
    finite = 1 <= e.capacity < math.inf
    require(finite, f"{where}.capacity = {e.capacity:g}: must be at least 1, the balanced share, and finite")
    for field in ("balance", "z"):
        value = getattr(c.router, field)
        require(0 <= value < math.inf, f"config.router.{field} = {value:g}: must not be negative, and finite")
    require(
        e.routing != "expert_choice" or c.mesh.sequence == 1,
        f"{where}.routing = 'expert_choice' compares a text's tokens: leave config.mesh.sequence = 1",
    )
    require(
        m.moee_weight > 0 and (m.moee == "sum" or m.moee_weight == ModelConfig().moee_weight),
        f"config.model.moee_weight = {m.moee_weight:g}: is for config.model.moee = 'sum', and above 0",
    )
    moee = f"config.model.moee = {m.moee!r}"
    require(
        not m.moee or not (c.matryoshka.dims or c.matryoshka.layers),
        f"{moee}: vectors of routing weights have no smaller sizes: leave config.matryoshka alone",
    )
    require(
        not m.moee or not c.export,
        f"{moee}: no other program makes vectors of routing weights: set config.export = False; Embedder and "
        "jaxembed.evaluate open the run itself",
    )
    require(
        e.routing != "source" or (c.router.balance in (0, RouterConfig().balance) and c.router.z == 0),
        "config.router: with routing 'source' there is no router: leave its fields alone",
    )
    if not e.upcycle:
        require(
            e.routing != "source" or m.init.startswith("run:"),
            f"{where}.routing = 'source' is for experts made of a dense model: set .upcycle; or go on from a run that "
            "has them, 'run:…'",
        )
        for field in ("top_k", "every", "layers", "router_noise", "served"):
            value = getattr(e, field)
            require(
                value == getattr(usual, field), f"{where}.{field} = {value!r} is of no use with {where}.upcycle = 0"
            )
        return
    require(e.upcycle >= 2, f"{where}.upcycle = {e.upcycle}: at least 2 experts, or 0 for the model as it is")
    require(
        m.init != "scratch",
        f"{where}.upcycle = {e.upcycle} copies trained weights: set config.model.init to a checkpoint, or say how many "
        "experts there are in config.model.shape and leave upcycle 0",
    )
    require(
        not m.lora.rank,
        f"{where}.upcycle and config.model.lora.rank = {m.lora.rank}: adapters stand on a checkpoint; make the model "
        "sparse in a run of its own, then start from that",
    )
    require(1 <= e.top_k <= e.upcycle, f"{where}.top_k = {e.top_k}: must be in 1 … {e.upcycle}, the experts")
    require(
        c.mesh.expert < 1 or e.upcycle % c.mesh.expert == 0,
        f"config.mesh.expert = {c.mesh.expert} does not divide {where}.upcycle = {e.upcycle}",
    )
    require(e.every >= 1, f"{where}.every = {e.every}: must be at least 1")
    require(not e.layers or e.every == 1, f"{where}.every = {e.every} and {where}.layers = {e.layers}: set one of them")
    require(
        len(set(e.layers)) == len(e.layers) and min(e.layers, default=0) >= 0,
        f"{where}.layers = {e.layers}: wants different numbers of layers, the first being 0",
    )
    require(0 <= e.router_noise < math.inf, f"{where}.router_noise = {e.router_noise:g}: must not be negative")
    if e.routing != "source":
        require(e.served == 0, f"{where}.served = {e.served} is for {where}.routing = 'source'")
        return
    require(e.top_k == 1, f"{where}.top_k = {e.top_k}: with routing 'source' a text has one expert: set it to 1")
    require(
        len(c.data.train) <= e.upcycle,
        f"{where}.routing = 'source': {len(c.data.train)} sources (config.data.train) for {e.upcycle} experts "
        f"({where}.upcycle): each source has its own",
    )
    require(0 <= e.served < e.upcycle, f"{where}.served = {e.served}: must be in 0 … {e.upcycle - 1}")


def _lora(m: ModelConfig) -> None:
    require(
        m.init != "scratch",
        f"config.model.lora.rank = {m.lora.rank}: adapters stand on trained weights; set config.model.init to a "
        "checkpoint, or the rank to 0",
    )
    require(0 < m.lora.alpha < math.inf, f"config.model.lora.alpha = {m.lora.alpha:g}: must be above 0, and finite")
    try:
        re.compile(m.lora.targets)
    except re.error as error:
        said = f"config.model.lora.targets: {m.lora.targets!r} is not a regular expression: {error}"
        raise UserError(said) from error


def _optimizer(c: Config) -> None:
    require(0 <= c.optimizer.ema < 1, f"config.optimizer.ema = {c.optimizer.ema:g}: must be in [0, 1)")
    for pattern, factor in c.optimizer.by_regex:
        require(factor >= 0, f"config.optimizer.by_regex: the factor of {pattern!r} is negative")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"config.optimizer.by_regex: {pattern!r} is not a regular expression: {error}") from error


def _mesh(c: Config) -> None:
    sizes = (c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.mesh.expert, c.mesh.sequence)
    require(all(n >= 1 or n == -1 for n in sizes), f"config.mesh = {sizes}: axis sizes are at least 1, or -1 once")
    require(sizes.count(-1) <= 1, f"config.mesh = {sizes}: only one axis may be -1")


def _evaluation(c: Config) -> None:
    e = c.eval
    tasks = e.sts + e.retrieval + e.pairs + e.classification + e.texts
    require(
        e.every == 0 or bool(tasks),
        "config.eval.every is set but config.eval.sts, .retrieval, .pairs, .classification and .texts are empty",
    )
    require(e.draws >= 1, f"config.eval.draws = {e.draws}: must be at least 1")
    for name, asked in (("bm25", e.bm25), ("hybrid", e.hybrid)):
        require(
            not asked or bool(e.retrieval + e.pairs),
            f"config.eval.{name} searches the sets of config.eval.retrieval and .pairs: both are empty",
        )
    require(
        not c.checkpoint.best.startswith("hybrid/"),
        f"config.checkpoint.best = {c.checkpoint.best!r}: the model's own scores say which is kept: 'eval/…'",
    )
    require(
        c.checkpoint.best.rsplit("/", 1)[-1] not in LOWER_IS_BETTER,
        f"config.checkpoint.best = {c.checkpoint.best!r}: the highest is kept, and of this less is better: take "
        "'eval/texts/NAME', the bound of the likelihood",
    )
    require(
        not c.checkpoint.best or (e.every > 0 and bool(tasks)),
        f"config.checkpoint.best = {c.checkpoint.best!r} needs config.eval.every and an evaluation set",
    )
