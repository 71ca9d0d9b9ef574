"""Set-ups that cannot be right, refused before any device starts."""

import math
import re

from jaxembed.config import Config, SourceConfig
from jaxembed.data.sources import DATA_SETS
from jaxembed.errors import UserError

MAX_LENGTH = 65_535  # lengths are kept as uint16
TRAINED = "train:"  # begins a tokenizer that is made from the training texts
MIN_VOCABULARY = 256 + 5  # bytes and special tokens


def check(config: Config) -> None:
    """Raises UserError with one line for the first rule that the config breaks."""
    for rule in (_length_of_run, _positive_numbers, _data, _model, _loss, _optimizer, _mesh, _evaluation):
        rule(config)


def trained_vocabulary(tokenizer: str) -> int:
    """Returns the size of the vocabulary that 'train:bpe:SIZE' asks for.

    Raises:
      UserError: another kind of tokenizer, or no size that a vocabulary can have.
    """
    match = re.fullmatch(rf"{TRAINED}bpe:(\d+)", tokenizer)
    wanted = f"wants '{TRAINED}bpe:SIZE', such as '{TRAINED}bpe:8192'"
    _require(match is not None, f"config.tokenizer = {tokenizer!r}: {wanted}")
    size = int(match[1])
    _require(
        size >= MIN_VOCABULARY,
        f"config.tokenizer = {tokenizer!r}: at least {MIN_VOCABULARY} tokens: 256 bytes and 5 special tokens",
    )
    return size


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(message)


def _length_of_run(c: Config) -> None:
    _require(
        (c.steps > 0) != (c.epochs > 0),
        f"config.steps = {c.steps} and config.epochs = {c.epochs:g}: set exactly one of them above 0",
    )


def _positive_numbers(c: Config) -> None:
    for name, value in (
        ("batch_size", c.batch_size),
        ("grad_cache", c.grad_cache),
        ("log_every", c.log_every),
        ("data.positives", c.data.positives),
        ("data.prefetch", c.data.prefetch),
        ("checkpoint.every", c.checkpoint.every),
        ("checkpoint.keep", c.checkpoint.keep),
        ("loss.tile", c.loss.tile),
    ):
        _require(value >= 1, f"config.{name} = {value}: must be at least 1")
    for name, value in (
        ("data.negatives", c.data.negatives),
        ("eval.every", c.eval.every),
        ("model.projection", c.model.projection),
        ("model.unroll", c.model.unroll),
        ("optimizer.warmup_steps", c.optimizer.warmup_steps),
        ("optimizer.clip_norm", c.optimizer.clip_norm),
        ("optimizer.weight_decay", c.optimizer.weight_decay),
        ("optimizer.learning_rate", c.optimizer.learning_rate),
    ):
        _require(value >= 0, f"config.{name} = {value}: must not be negative")
    _require(c.batch_size >= 2, "config.batch_size = 1: in-batch negatives need at least 2 pairs")
    _require(0 <= c.seed < 2**32, f"config.seed = {c.seed}: must be in 0 … 2**32 - 1")
    _require(
        c.batch_size % c.grad_cache == 0,
        f"config.grad_cache = {c.grad_cache} does not divide config.batch_size = {c.batch_size}",
    )


def _data(c: Config) -> None:
    _require(len(c.data.train) > 0, "config.data.train is empty: name a source there or with --data=FILE")
    for i, source in enumerate(c.data.train):
        where = f"config.data.train[{i}]"
        _place(source, where)
        _require(0 < source.weight < math.inf, f"{where}.weight = {source.weight:g}: must be above 0, and finite")
        _require(
            source.in_batch or c.data.negatives > 0,
            f"{where}.in_batch = False and config.data.negatives = 0 leave its pairs without any negative",
        )
    row_length = c.data.row_length
    _require(
        row_length == "auto" or (row_length.isdecimal() and int(row_length) > 0),
        f"config.data.row_length = {row_length!r}: wants 'auto' or a number of tokens",
    )
    for side in ("query", "document"):
        length = getattr(c.data.max_length, side)
        _require(0 <= length <= MAX_LENGTH, f"config.data.max_length.{side} = {length}: must be in 0 … {MAX_LENGTH}")
        _require(
            row_length == "auto" or length <= int(row_length),
            f"config.data.max_length.{side} = {length} does not fit config.data.row_length = {row_length}",
        )


def _place(s: SourceConfig, where: str) -> None:
    """A source is either files, or a prepared data set's folder, or a data set's name."""
    is_set = s.source in DATA_SETS
    _require(not (s.name and s.path), f"{where}: path = {s.path!r} and name = {s.name!r}: set one of them")
    _require(is_set or not s.name, f"{where}.name = {s.name!r}: also set {where}.source, to 'tfds' or 'hf'")
    _require(not is_set or bool(s.name or s.path), f"{where}.name and .path are empty: set one of them")
    _require(bool(s.name or s.path), f"{where}.path is empty: set it, or give the training pairs with --data=FILE")
    _require(bool(s.split), f"{where}.split is empty: name one, such as 'train' or 'train[:10%]'")
    _require(
        is_set or s.split == SourceConfig.split,
        f"{where}.split = {s.split!r}: files have no splits; those of data sets do, {where}.source = 'tfds' or 'hf'",
    )
    _require(
        not s.subset or (bool(s.name) and s.source == "hf"),
        f"{where}.subset = {s.subset!r} is for a name with {where}.source = 'hf' (for 'tfds', set name to NAME/CONFIG)",
    )
    _require(
        not s.data_dir or (bool(s.name) and s.source == "tfds"),
        f"{where}.data_dir = {s.data_dir!r} is for a name with {where}.source = 'tfds'",
    )


def _model(c: Config) -> None:
    m = c.model
    kinds = ("hf:", "run:")
    _require(
        m.init == "scratch" or (m.init.startswith(kinds) and len(m.init.split(":", 1)[1]) > 0),
        f"config.model.init = {m.init!r}: wants 'hf:FOLDER', 'hf:ORG/NAME@REVISION', 'run:DIR[@STEP|@best]' or "
        "'scratch'",
    )
    if m.init == "scratch":
        _require(m.arch != "auto", "config.model.arch: name the architecture (bert, roberta …) when init is 'scratch'")
        _require(
            c.tokenizer != "auto",
            "config.tokenizer: name one ('hf:FOLDER', 'file:PATH' or 'train:bpe:SIZE') when init is 'scratch'",
        )
    if c.tokenizer.startswith(TRAINED):
        trained_vocabulary(c.tokenizer)
        _require(
            m.init == "scratch",
            f"config.tokenizer = {c.tokenizer!r}: the weights of {m.init} know the tokens of their own tokenizer only; "
            "leave it 'auto', or set config.model.init = 'scratch'",
        )
    for name, value in (("dropout", m.dropout), ("attention_dropout", m.attention_dropout)):
        _require(0 <= value < 1, f"config.model.{name} = {value:g}: must be in [0, 1)")
    _require(
        m.attention_dropout == 0 or m.attention_kernel != "pallas",
        "config.model.attention_dropout needs config.model.attention_kernel = 'xla': the kernels have no dropout",
    )


def _loss(c: Config) -> None:
    _require(c.loss.name == "infonce", f"config.loss.name = {c.loss.name!r}: known losses: infonce")
    _require(c.loss.temperature > 0, f"config.loss.temperature = {c.loss.temperature:g}: must be above 0")
    _require(
        c.model.normalize or c.loss.temperature == 1,
        f"config.loss.temperature = {c.loss.temperature:g} with config.model.normalize = False: "
        "scale unbounded scores with temperature 1, or normalize",
    )


def _optimizer(c: Config) -> None:
    _require(0 <= c.optimizer.ema < 1, f"config.optimizer.ema = {c.optimizer.ema:g}: must be in [0, 1)")
    for pattern, factor in c.optimizer.by_regex:
        _require(factor >= 0, f"config.optimizer.by_regex: the factor of {pattern!r} is negative")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"config.optimizer.by_regex: {pattern!r} is not a regular expression: {error}") from error


def _mesh(c: Config) -> None:
    sizes = (c.mesh.data, c.mesh.fsdp, c.mesh.tensor, c.mesh.expert, c.mesh.sequence)
    _require(all(n >= 1 or n == -1 for n in sizes), f"config.mesh = {sizes}: axis sizes are at least 1, or -1 once")
    _require(sizes.count(-1) <= 1, f"config.mesh = {sizes}: only one axis may be -1")


def _evaluation(c: Config) -> None:
    e = c.eval
    tasks = e.sts + e.retrieval + e.pairs + e.classification
    _require(
        e.every == 0 or bool(tasks),
        "config.eval.every is set but config.eval.sts, .retrieval, .pairs and .classification are empty",
    )
    _require(
        not e.bm25 or bool(e.retrieval + e.pairs),
        "config.eval.bm25 searches the sets of config.eval.retrieval and .pairs: both are empty",
    )
    _require(
        not c.checkpoint.best or (e.every > 0 and bool(tasks)),
        f"config.checkpoint.best = {c.checkpoint.best!r} needs config.eval.every and an evaluation set",
    )
