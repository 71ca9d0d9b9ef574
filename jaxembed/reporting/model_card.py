"""The model card of an exported folder: its README.md, with the front matter that the Hugging Face hub reads.

It says what is known and says where something is not: a licence is never guessed, and no training text is shown.
"""

import pathlib
import re
from typing import TYPE_CHECKING

import jax
from absl import logging

from jaxembed.errors import UserError
from jaxembed.hf.hub import REPOSITORY
from jaxembed.models.layers.parts import SPARSE
from jaxembed.models.layers.routing import ExpertsShape
from jaxembed.models.lora import is_adapter
from jaxembed.models.mamba import MambaConfig
from jaxembed.models.options import ModelOptions, per_layer
from jaxembed.models.text_encoder import BACKBONE, flatten, split
from jaxembed.reporting import curves
from jaxembed.reporting.history import Scores
from jaxembed.reporting.markdown import code, data_table, duration, score, settings_table, start_of, table
from jaxembed.reporting.record import RunRecord, Source
from jaxembed.reporting.snippets import jax_code, sentence_transformers_code, transformers_code

if TYPE_CHECKING:
    from jaxembed.embedder import Embedder

NAME = "README.md"
TAGS = ["sentence-transformers", "sentence-similarity", "feature-extraction", "jaxembed"]
SPDX = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]*")  # an identifier of the SPDX licence list, by its form
# What sentence-transformers calls the tasks in its cards.
HUB_TASKS = {
    "sts": "semantic-similarity",
    "retrieval": "information-retrieval",
    "pairs": "information-retrieval",
    "classification": "text-classification",
}
POOLING = {
    "mean": "mean of the token states",
    "weighted_mean": "mean of the token states, weighted by their positions",
    "cls": "state of the first token",
    "last": "state of the last token",
    "latent": "mean of the token states after latent attention",
}
READS = {
    "none": "every text forwards: a token's state knows those before it",
    "shared": "every text both ways, with the same weights",
    "separate": "every text both ways, with weights of their own",
}


def card_files(embedder: "Embedder", note: str = "") -> dict[str, bytes]:
    """Returns the card and, for a model out of a run with metrics, the picture of its curves, by name.

    Args:
      embedder: what is exported; its `run` says where scores and data are read.
      note: what else is to be said of the model, Markdown.

    Raises:
      UserError: the run's folder cannot be read.
    """
    run = embedder.run
    record = RunRecord.read(run.workdir, run.step) if run else None
    picture = _picture(record) if record and record.history.series else {}
    return {NAME: model_card(embedder, record, bool(picture), note).encode(), **picture}


def model_card(embedder: "Embedder", record: RunRecord | None, with_curves: bool, note: str = "") -> str:
    """Returns the card as Markdown.

    Args:
      embedder: the model.
      record: of its run, up to the step exported; None for a model that is not out of a run.
      with_curves: whether the picture of its curves lies beside the card.
      note: put behind the introduction.
    """
    known = record is not None and record.history.series
    parts = [
        f"---\n{_front_matter(record)}---\n",
        f"# {record.name if record else 'A text-embedding model'}\n",
        _introduction(embedder, record),
        f"{note}\n" if note else "",
        _properties(embedder, record),
        _usage(embedder),
        _evaluation(record) if known else "",
        f"## Training\n\n{settings_table(record)}" if known else "",
        f"![Curves of the training]({curves.NAME})\n" if with_curves else "",
        _data(record) if record else "",
    ]
    return "\n".join(filter(None, parts))


def licence_of(record: RunRecord) -> str:
    """Returns the licence that the hub is told: the one that all training data share, of a model made from scratch.

    '' where sources differ, where a source's is not known or has no SPDX identifier, and where the weights began with
    those of another model, whose own licence holds too.
    """
    licences = {source.licence for source in record.sources}
    only = licences.pop() if len(licences) == 1 else ""
    return only.lower() if record.config.model.init == "scratch" and SPDX.fullmatch(only) else ""


def _picture(record: RunRecord) -> dict[str, bytes]:
    """Returns the curves by their file's name; nothing where they cannot be drawn, as a model is worth more."""
    try:
        return {curves.NAME: curves.draw(record.history, record.title)}
    except UserError as error:
        logging.warning("The model card is without its picture: %s", error)
        return {}


def _front_matter(record: RunRecord | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    main = _main_scores(record) if record else []
    results = [
        EvalResult(
            task_type=HUB_TASKS[row.task.split("/")[0]],
            dataset_type="unknown",
            dataset_name=row.task.split("/", 1)[1],
            metric_type=row.metric,
            metric_value=round(row.last, 4),
        )
        for row in main
        if row.task.split("/")[0] in HUB_TASKS
    ]
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=TAGS,
        license=(licence_of(record) or None) if record else None,
        base_model=_base_model(record) if record else None,
        model_name=record.name if record else None,
        eval_results=results or None,
    )
    return data.to_yaml() + "\n"


def _base_model(record: RunRecord) -> str | None:
    """Returns ORG/NAME of the hub's model that training began with; None for another beginning."""
    kind, _, where = record.config.model.init.partition(":")
    match = REPOSITORY.fullmatch(where)
    return match["name"] if kind == "hf" and match and not pathlib.Path(where).is_dir() else None


def _introduction(embedder: "Embedder", record: RunRecord | None) -> str:
    said = "Maps texts to vectors, so that texts that belong together lie close. Made with jaxembed"
    if record is None or embedder.run is None:
        return said + ".\n"
    history = record.history
    took = f", {duration(history.seconds())} of training" if history.series else ""
    return f"{said}: trained {start_of(record.config)}, {embedder.run.step:,} steps{took}.\n"


def _properties(embedder: "Embedder", record: RunRecord | None) -> str:
    blueprint, head = embedder.blueprint, embedder.blueprint.head
    backbone = blueprint.backbone
    count = sum(leaf.size for leaf in jax.tree.leaves(embedder.params))
    length = "1 before it is cut" if blueprint.truncate_dim else "1"
    mixed = f", each a trained mean over layers {head.pool_layers} to {backbone.layers}"
    pooling = (
        POOLING[head.pooling]
        + (mixed if head.pool_layers >= 0 else "")
        + ("" if head.pool_prompt else ", the prompt's left out")
    )
    rows = [
        ("architecture", f"`{blueprint.architecture.model_type}`, {backbone.layers} layers of width {backbone.width}"),
        ("parameters", f"{count:,}"),
        *([("reads", READS[backbone.backward])] if isinstance(backbone, MambaConfig) else []),
        *([("experts", _experts(embedder, blueprint.experts, count))] if blueprint.experts else []),
        *([("trained", _adapters(embedder, record))] if record and record.config.model.lora.rank else []),
        ("dimensions of a vector", blueprint.truncate_dim or embedder.width),
        ("pooling", pooling + "".join(f", then a linear layer to {n}" for n in (head.expansion, head.projection) if n)),
        ("length of a vector", length if head.normalize else "not normalised"),
        ("compared by", blueprint.similarity),
        ("longest text", f"{blueprint.max_length:,} tokens"),
    ]
    prompts = [(f"`{name}`", code(text)) for name, text in blueprint.prompts.items()]
    default = f", `{blueprint.default_prompt_name}` where none is named" if blueprint.default_prompt_name else ""
    said = f"Put before a text{default}:\n\n{table(['prompt', 'text'], prompts, left=2)}" if prompts else "None.\n"
    return f"{table(['', ''], rows, left=2)}\n## Prompts\n\n{said}"


def _experts(embedder: "Embedder", shape: ExpertsShape, count: int) -> str:
    """Says how many experts there are, and how few parameters a token meets."""
    backbone = embedder.blueprint.backbone
    stacks = tuple(f"{BACKBONE}{SPARSE}/{name}/" for name in ("up", "gate", "down"))
    each = sum(x.size for path, x in flatten(embedder.params).items() if path.startswith(stacks)) // shape.count
    sparse = sum(per_layer(backbone.sparse, backbone.layers))
    met = count - each * (shape.count - shape.top_k)
    return f"{shape.count} in each of {sparse} layers; a token takes {shape.top_k}, and so {met:,} of the parameters"


def _adapters(embedder: "Embedder", record: RunRecord) -> str:
    """Says which few parameters a run with adapters has trained."""
    blueprint, lora = embedder.blueprint, embedder.blueprint.lora(record.config.model.lora)
    with jax.set_mesh(embedder.mesh):
        trained = flatten(split(blueprint.factory(ModelOptions(), lora=lora).abstract())[0])
    n, head = sum(leaf.size for leaf in trained.values()), not all(map(is_adapter, trained))
    also = ", and the head" if head else ""
    parts = f"low-rank adapters of rank {lora.rank} (scale {lora.scale:g}), merged here{also}"
    return f"{parts}: {n:,} parameters; the others are those that training began with"


def _usage(embedder: "Embedder") -> str:
    head = embedder.blueprint.head
    long = head.pooling == "latent" or head.pool_layers >= 0 or head.expansion > 0  # too long to write out
    pieces = [
        ("sentence-transformers", sentence_transformers_code(embedder)),
        *([] if long else [("transformers", transformers_code(embedder))]),
        ("JAX", jax_code()),
    ]
    only = "which only runs with `trust_remote_code=True`"
    said = f"The latent attention is code of this folder, {only}.\n\n" if head.pooling == "latent" else ""
    arch = embedder.blueprint.architecture
    if arch.code:
        said += f"The model's class is code of this folder (`{arch.code.name}`), {only}. {arch.elsewhere}\n\n"
    return f"## Usage\n\n{said}" + "\n".join(f"With {name}:\n\n```python\n{text}```\n" for name, text in pieces)


def _evaluation(record: RunRecord) -> str:
    rows = [row for task in record.history.tasks for row in record.history.scores(task)]
    if not rows:
        return "## Evaluation\n\nNot evaluated during training.\n"
    baseline = any(row.bm25 is not None for row in rows)
    steps = sorted({row.last_step for row in rows})
    cells = [
        (row.task, row.metric, score(row.last), score(row.first), *([score(row.bm25)] if baseline else []))
        for row in rows
    ]
    header = ["task", "metric", "score", f"at step {min(row.first_step for row in rows):,}"]
    shown = table([*header, *(["BM25"] if baseline else [])], cells, left=2)
    at = ", ".join(f"{step:,}" for step in steps)
    nats = any(task.startswith("texts/") for task in record.history.tasks)
    unit = " (of texts to predict: nats per word)" if nats else ""
    return f"## Evaluation\n\nScores out of 100{unit}, measured in JAX at step {at}.\n\n{shown}"


def _main_scores(record: RunRecord) -> list[Scores]:
    return [record.history.scores(task)[0] for task in record.history.tasks]


def _data(record: RunRecord) -> str:
    if not record.sources:
        return "## Training data\n\nNot recorded; its licences are unknown.\n"
    return f"## Training data\n\n{data_table(record.sources)}{_unknown(record.sources)}"


def _unknown(sources: tuple[Source, ...]) -> str:
    without = sum(not source.licence for source in sources)
    return f"\nThe licence of {without} of {len(sources)} sources is unknown.\n" if without else ""
