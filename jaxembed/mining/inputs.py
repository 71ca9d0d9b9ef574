"""What mining and cleaning refuse to begin with, and what all processes of one command must have in common."""

from collections.abc import Iterable, Sequence
from typing import Any

from absl import flags

from jaxembed.data.record_formats import Record
from jaxembed.data.rows import RowSource
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.run_folder import differences
from jaxembed.storage import stamp
from jaxembed.vectors.folder import VectorFolder, files_said
from jaxembed.vectors.quantize import PACKED


def asked(sources: Iterable[RowSource]) -> dict[str, Any]:
    """Returns what a command was asked for, to compare it between processes: its flags, and what its inputs are."""
    own = flags.FLAGS.find_module_defining_flag("pairs")
    said = {flag.name: flag.value for flag in flags.FLAGS.get_flags_for_module(own)}
    return {"flags": said, "inputs": {source.title: rows_said(source) for source in sources}}


def rows_said(source: RowSource) -> dict[str, Any]:
    """Returns what changes with a source's rows, wherever its files lie."""
    return {"files": [[file.name, *stamp(file)] for file in source.files], "rows": list(source.identity)}


def require_matches(records: Sequence[Record], said: str) -> None:
    """Refuses pairs that say how alike two texts are, not that they match.

    Args:
      records: all of them.
      said: the flag that names them.

    Raises:
      UserError: all have scores and none a hard negative.
    """
    if records and all(record.scores and not record.negatives for record in records):
        raise UserError(
            f"{said} has graded pairs, each with a score and without a hard negative: an unlike text would count as an "
            "answer; leave the scores out where all pairs match"
        )


def require_stored(
    stored: VectorFolder,
    source: RowSource,
    ids: Sequence[str],
    columns: tuple[str, str],
    embedder: Embedder,
    prompt: str,
    weights: str,
) -> None:
    """Makes sure that the vectors of --corpus_vectors are those that the model would give for --corpus.

    Args:
      stored: the folder.
      source: the corpus's rows.
      ids: of the corpus's texts, in order.
      columns: of its texts and ids, as the user named them.
      embedder: the model.
      prompt: of documents.
      weights: `model_source.fingerprint` of the model.

    Raises:
      UserError: what differs.
    """
    said, manifest = f"--corpus_vectors={stored.path}", stored.manifest
    if manifest.weights != weights:
        raise UserError(f"{said}: vectors of another model ({stored.model}): encode the corpus with --model")
    if stored.dtype in PACKED:
        raise UserError(f"{said}: {stored.dtype} vectors say too little for margins: wants float32, float16 or int8")
    if stored.prompt != prompt:
        raise UserError(f"{said}: encoded with the prompt {stored.prompt!r}, wants that of documents, {prompt!r}")
    width = embedder.blueprint.truncate_dim or embedder.width
    scaled = stored.similarity != "cosine" and stored.normalized != embedder.blueprint.head.unit
    if manifest.raw or manifest.template or stored.width != width or scaled:
        raise UserError(
            f"{said}: encoded with --raw, --normalize, --dims or a template: wants the model's vectors as they are"
        )
    _require_source(stored, source, columns, embedder.blueprint.max_length, said)
    if len(stored) != len(ids):
        raise UserError(f"{said}: {len(stored):,} vectors for {len(ids):,} texts of --corpus")
    for number, (a, b) in enumerate(zip(ids, stored.ids(), strict=True), 1):
        if a != b:
            raise UserError(f"{said}: text {number} is {b!r} there, and {a!r} in --corpus: the order must be the same")


def _require_source(
    stored: VectorFolder, source: RowSource, columns: tuple[str, str], max_length: int, said: str
) -> None:
    """Refuses vectors of other rows, columns or lengths."""
    manifest = stored.manifest
    files = files_said(manifest.files)
    there = {"files": files, "rows": list(manifest.rows), "field": manifest.field, "id_field": manifest.id_field}
    here = {**rows_said(source), "field": columns[0], "id_field": columns[1]}
    different = differences(there | {"max_length": manifest.max_length}, here | {"max_length": max_length})
    if different:
        raise UserError(
            f"{said}: not made of this --corpus in this way ({'; '.join(different[:6])}): encode it again, or give the "
            "same files and flags"
        )
