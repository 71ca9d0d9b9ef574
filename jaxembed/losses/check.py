"""Set-ups of losses that cannot be right, refused before any device starts. No jax here."""

import dataclasses
import math
import re
from collections.abc import Sequence

from jaxembed.config import MODEL_KINDS, Config, LossConfig, TeacherConfig, nearest
from jaxembed.errors import require
from jaxembed.losses.table import LOSSES, MIN_TEMPERATURE, NEGATIVE_QUERIES, NEGATIVES, SCORES_OR_TEACHER, TEACHER

SIZE = re.compile(r"full|layers\d+|(layers\d+_)?dim\d+")  # names of `jaxembed.losses.objective.Size`
IDLE = (  # fields that do nothing while another is off
    ("false_negative_margin", "false_negatives", "keep"),
    ("false_negative_blocks", "false_negatives", "keep"),
    ("hardness_of", "hardness", 0.0),
)


def check_losses(c: Config) -> None:
    """Raises UserError with one line for the first rule that the config's losses break."""
    losses = [(f"config.losses[{i}]", loss) for i, loss in enumerate(c.losses)] or [("config.loss", c.loss)]
    labels = [loss.title for _, loss in losses]
    require(
        not c.losses or c.loss == LossConfig(),
        "config.loss and config.losses are both set: the losses that are summed are those of config.losses alone",
    )
    for i, source in enumerate(c.data.train):
        for label in source.losses:
            require(
                label in labels,
                f"config.data.train[{i}].losses: no loss is called {label!r}{nearest(label, labels)}; those are "
                f"{', '.join(labels)}",
            )
    for where, loss in losses:
        _one_loss(c, loss, where)
        label = loss.title
        require(labels.count(label) == 1, f"{where}: there are two losses {label!r}: give each a label of its own")
        require(
            any(source.trains(loss) for source in c.data.train),
            f"{where}: no source trains the loss {label!r}: name it in config.data.train[].losses",
        )
    require(sum(loss.weight for _, loss in losses) > 0, "config.losses: all weights are 0")
    require(
        any(loss.name != "spread_out" for _, loss in losses),
        f"{losses[0][0]}: spread_out alone drives all texts apart: put it beside another in config.losses",
    )
    _matryoshka(c)


def check_teacher(teacher: TeacherConfig, losses: Sequence[LossConfig]) -> None:
    """Raises UserError where a run's teacher is none, or one that no loss of any stage uses."""
    require(
        not teacher.init or teacher.init.startswith(MODEL_KINDS),
        f"config.teacher.init = {teacher.init!r}: wants 'hf:FOLDER', 'hf:ORG/NAME@REVISION' or 'run:DIR[@STEP|@best]'",
    )
    require(
        not teacher.init or any(_can_use_teacher(loss) for loss in losses),
        f"config.teacher.init = {teacher.init!r}, but no loss uses a teacher: match and kl do, and infonce with "
        "false_negatives = 'teacher'",
    )


def _can_use_teacher(loss: LossConfig) -> bool:
    return bool({TEACHER, SCORES_OR_TEACHER} & {*LOSSES[loss.name].needs}) or loss.false_negatives == "teacher"


def _one_loss(c: Config, loss: LossConfig, where: str) -> None:
    name = loss.name
    require(name in LOSSES, f"{where}.name = {name!r}: known losses: {', '.join(LOSSES)}{nearest(name, LOSSES)}")
    entry, plain = LOSSES[name], LossConfig()
    takes = {"name", "label", "weight", "weight_end", *entry.takes} | (
        {"learn_temperature"} if "temperature" in entry.takes else set()
    )
    for field in dataclasses.fields(loss):
        value = getattr(loss, field.name)
        require(
            field.name in takes or value == getattr(plain, field.name),
            f"{where}.{field.name} = {value!r}: {name} takes none; it takes {', '.join(entry.takes) or 'nothing'}",
        )
        require(not isinstance(value, float) or math.isfinite(value), f"{where}.{field.name} = {value}: must be finite")
    for field, switch, off in IDLE:
        require(
            getattr(loss, field) == getattr(plain, field) or getattr(loss, switch) != off,
            f"{where}.{field} = {getattr(loss, field)!r} is of no use while .{switch} = {off!r}",
        )
    require(
        not SIZE.fullmatch(loss.label),
        f"{where}.label = {loss.label!r} is what a size of the vectors is called: take another",
    )
    require(
        not loss.learn_temperature or loss.temperature >= MIN_TEMPERATURE,
        f"{where}.temperature = {loss.temperature:g}: a learned one starts at {MIN_TEMPERATURE} or above, its bound",
    )
    require(loss.weight >= 0, f"{where}.weight = {loss.weight:g}: must not be negative")
    require(loss.tile >= 1, f"{where}.tile = {loss.tile}: must be at least 1")
    for field in ("temperature", "teacher_temperature"):
        value = getattr(loss, field)
        require(value > 0, f"{where}.{field} = {value:g}: must be above 0")
    for field in ("hardness", "focal", "mixed_negatives", "penalty", "margin", "similarity_weight"):
        value = getattr(loss, field)
        require(value >= 0, f"{where}.{field} = {value:g}: must not be negative")
    require(
        c.model.normalize or loss.temperature == 1 or "temperature" not in entry.takes,
        f"{where}.temperature = {loss.temperature:g} with config.model.normalize = False: "
        "scale unbounded scores with temperature 1, or normalize",
    )
    for field in ("blocks", "false_negative_blocks"):
        blocks = getattr(loss, field)
        require(
            0 < len(blocks) == len(set(blocks)), f"{where}.{field} = {blocks!r}: wants each block once, at least one"
        )
    require(
        name != "triplet" or loss.margin > 0,
        f"{where}.margin = {loss.margin:g}: a triplet needs one above 0, such as 0.2 of cosine distance",
    )
    require(
        loss.mixed_negatives == 0 or c.data.negatives >= 2,
        f"{where}.mixed_negatives mixes a pair's hard negatives: config.data.negatives = {c.data.negatives} is too low",
    )
    needs_negatives = NEGATIVES in entry.needs or NEGATIVE_QUERIES in entry.needs
    require(
        not needs_negatives or c.data.negatives > 0,
        f"{where}: {name} needs hard negatives, but config.data.negatives = 0",
    )
    needs_teacher = TEACHER in entry.needs or loss.false_negatives == "teacher"
    require(
        not needs_teacher or bool(c.teacher.init),
        f"{where}: {name} needs a teacher here: name it in config.teacher.init, such as 'hf:FOLDER'",
    )


def _matryoshka(c: Config) -> None:
    m = c.matryoshka
    for name, sizes in (("dims", m.dims), ("layers", m.layers)):
        require(
            all(size > 0 for size in sizes) and len(set(sizes)) == len(sizes),
            f"config.matryoshka.{name} = {sizes!r}: wants sizes above 0, each once",
        )
    require(
        m.pairs == "all" or len(m.dims) == len(m.layers) > 0,
        f"config.matryoshka.pairs = 'zip' goes with as many layers as dims, not {len(m.layers)} and {len(m.dims)}",
    )
    others = len(m.dims) if m.pairs == "zip" else (1 + len(m.dims)) * (1 + len(m.layers)) - 1
    require(
        not m.weights or (len(m.weights) == 1 + others and min(m.weights) >= 0 and sum(m.weights) > 0),
        f"config.matryoshka.weights = {m.weights!r}: wants {1 + others} numbers, of the full size, then of the others "
        f"({others}); none negative, not all 0",
    )
    require(m.kl >= 0, f"config.matryoshka.kl = {m.kl:g}: must not be negative")
    require(
        m.kl == 0 or others > 0, "config.matryoshka.kl compares smaller sizes with the full one: name .dims or .layers"
    )
    require(
        m.kl == 0 or any("temperature" in LOSSES[loss.name].takes for loss in c.all_losses),
        "config.matryoshka.kl takes the temperature of a loss, and none of the losses has one",
    )
