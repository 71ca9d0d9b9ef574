"""Find hard negatives for training records: documents that a model takes for answers, and that are none.

    python -m jaxembed.mine --model=FOLDER --pairs=pairs.jsonl.gz --out=mined.jsonl.gz --relative_margin=0.05
    python -m jaxembed.mine --model=FOLDER --pairs=PAIRS --corpus=corpus.jsonl.gz --corpus_vectors=VECTORS --out=OUT

Reads records and writes them with `negative` and `scores`, as training takes them (a JSON object per line, or parquet).
The candidates of a record are the documents that the model finds for its query: positives and negatives of all records,
and the texts of --corpus. Never taken, and without a rank: what equals the query or a positive but for case and spaces,
what answers the same query in another record, what is in a record of the same group or label; queries are the same but
for case, spaces and their `instruction`, which fills {instruction} in the model's prompt as in training. Where a record
finds too few candidates for these reasons, the search goes deeper. `negative_query` is left out: negatives that are
found have none. Texts are held in memory. Prints what each rule has dropped, and one JSON line last.

  --model            the model: a run's folder (RUN, RUN@STEP, RUN@best), an exported one, or a name on the hub
  --pairs            records: a file, folder or glob, tfds:NAME:SPLIT, hf:NAME:SPLIT; --format: theirs, as in training
  --out              .jsonl, .jsonl.gz or .parquet; --report: a folder for README.md and a picture, else OUT.report
  --corpus           more documents: as --pairs, rows with `text` (and `title`), else --field; --id_field: their ids
  --corpus_vectors   a folder that jaxembed.encode made of the same --corpus by the same model and --prompt_name
  --prompt_name      the models' prompt that is put before each document; --query_prompt_name: before each query
  --negatives        of a record, those that it has already among them (--replace leaves those out)
  --range            FIRST:LAST: the ranks after FIRST, up to LAST, of the candidates
  --relative_margin  drop what scores above the positive's score less this part of it; 0.05 is TopK-PercPos 95 % of
                     NV-Retriever (arXiv:2407.15831). The lowest score of a query's positives decides
  --absolute_margin  drop what scores above the positive's score less this
  --max_score        drop what scores higher; --min_score: lower
  --sampling         of what is left, the `top` or `random` ones (--seed), drawn by a hash of query and document
  --teacher          a second model, whose scores margins, --max_score and --min_score look at and that are written
  --scores           write `scores`: one for each positive, then for each negative
  --require_full     leave out records that find fewer than --negatives
"""

import json
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxembed import cli
from jaxembed.config import CHOICES, SourceConfig
from jaxembed.data.sources import check_place, parse_spec
from jaxembed.distributed import Peers, connect
from jaxembed.errors import UserError
from jaxembed.host_memory import keep_freed_memory
from jaxembed.mining.settings import SAMPLING, Settings, require
from jaxembed.mining.writing import report_folder, require_out, row_of, write_records
from jaxembed.storage import AnyPath

if TYPE_CHECKING:
    from jaxembed.data.records import Record
    from jaxembed.data.texts import TextReader
    from jaxembed.embedder import Embedder
    from jaxembed.mining.collection import Collection
    from jaxembed.mining.miner import Mined
    from jaxembed.mining.scoring import Scorer
    from jaxembed.vectors.folder import VectorFolder

README, SHOWN = "README.md", 5  # records shown in it


def main() -> None:
    """Runs the command."""
    settings, out = _require_flags()
    keep_freed_memory()
    with connect() as peers:
        _mine(settings, out, peers)


def _mine(settings: Settings, out: AnyPath, peers: Peers) -> None:
    """Mines, on the devices of all processes; process 0 writes."""
    flag = flags.FLAGS
    from rich.console import Console

    from jaxembed.data.records import RecordReader
    from jaxembed.data.texts import TextReader
    from jaxembed.mining.inputs import asked, require_matches
    from jaxembed.mining.miner import mine
    from jaxembed.mining.report import rich_table

    source = SourceConfig(**parse_spec(flag.pairs), format=flag.format)
    reader = RecordReader(source, "error", "--pairs")
    corpus = TextReader(flag.corpus, "--corpus", flag.field, flag.id_field) if flag.corpus else None
    stored = _stored()
    peers.require_same("command", asked([reader.source, *([corpus.source] if corpus else [])]))
    records = list(reader)
    require_matches(records, f"--pairs={flag.pairs}")
    collection, scorer, teacher = _scorers(records, corpus, stored, peers)
    decisive = teacher or scorer
    mined = mine(collection, scorer.search, decisive.score, settings, rescore=teacher is not None)
    if not peers.main:
        return
    counts = _counts(collection, mined, settings)
    write_records(out, _rows(collection, mined, settings))
    similarity = decisive.embedder.blueprint.similarity
    _write_report(report_folder(out, flag.report), reader.source.label, collection, mined, settings, counts, similarity)
    console = Console()
    console.print(rich_table("Candidates", "became", _became(mined, settings)))
    console.print(rich_table("Records", "with", _fullness(counts)))
    console.print(_scores_line(mined))
    print(json.dumps({"out": str(out), **counts, "dropped": mined.tally.dropped}))


def _stored() -> "VectorFolder | None":
    """Returns --corpus_vectors; None where there are none."""
    from jaxembed.vectors.folder import VectorFolder

    folder = flags.FLAGS.corpus_vectors
    return VectorFolder.open(folder, "--corpus_vectors") if folder else None


def _scorers(
    records: "list[Record]", corpus: "TextReader | None", stored: "VectorFolder | None", peers: Peers
) -> "tuple[Collection, Scorer, Scorer | None]":
    """Loads the models; returns the texts, the model's view of them, and the teacher's."""
    from rich.console import Console

    from jaxembed.mining.collection import Collection
    from jaxembed.mining.inputs import require_stored
    from jaxembed.mining.scoring import Scorer

    flag = flags.FLAGS
    embedder, prompts, weights = _load("model", bool(stored), peers)
    teacher = _load("teacher", False, peers) if flag.teacher else None
    rows = list(corpus) if corpus else []
    if stored:
        ids, columns = [key for key, _ in rows], (flag.field, flag.id_field)
        require_stored(stored, corpus.source, ids, columns, embedder, prompts[1], weights)
    collection = Collection.of(records, (text for _, text in rows), distinct=stored is None)
    found = {"queries": len(collection.queries), "documents": len(collection.documents)}
    peers.require_same("texts", found)
    said = ", ".join(f"{count:,} {name}" for name, count in {"records": len(records), **found}.items())
    Console(stderr=True, quiet=not peers.main).print(said)
    scorer = Scorer(embedder, collection, prompts, stored, bar=peers.main)
    return collection, scorer, Scorer(teacher[0], collection, teacher[1], bar=peers.main) if teacher else None


def _load(name: str, digest: bool, peers: Peers) -> "tuple[Embedder, tuple[str, str], str]":
    """Returns the model that a flag names, its prompts for queries and documents, and a digest of its weights.

    The digest is '' where neither `digest` nor several processes ask for it.
    """
    from jaxembed import model_source
    from jaxembed.embedder import Embedder
    from jaxembed.mining.scoring import prompts_of, require_searchable

    flag, said = flags.FLAGS, f"--{name}={flags.FLAGS[name].value}"
    embedder = Embedder.load(flag[name].value, dtype=flag.dtype)
    require_searchable(embedder, said)
    prompts = prompts_of(embedder, said, flag.query_prompt_name, flag.prompt_name)
    wanted = digest or peers.count > 1
    weights = model_source.fingerprint(flag[name].value, embedder.blueprint) if wanted else ""
    peers.require_same(name, {"weights": weights, "prompts": prompts})
    return embedder, prompts, weights


def _rows(collection: "Collection", mined: "Mined", settings: Settings) -> Iterator[dict[str, Any]]:
    """Yields the rows that are written."""
    flag, documents = flags.FLAGS, collection.documents
    for number, record in enumerate(collection.records):
        given = () if settings.replace else record.negatives
        new = [documents[i] for i in mined.negatives[number]]
        if flag.require_full and len(given) + len(new) < settings.negatives:
            continue
        scores: list[float] = []
        if flag.scores:
            span = collection.positives.start[number : number + 2]
            scores += mined.positive_scores[slice(*span)].tolist()
            if given:
                scores += mined.given_scores[slice(*collection.negatives.start[number : number + 2])].tolist()
            scores += mined.scores[slice(*mined.negatives.start[number : number + 2])].tolist()
        yield row_of(record, [*given, *new], scores)


def _counts(collection: "Collection", mined: "Mined", settings: Settings) -> dict[str, int]:
    """Returns what the JSON line counts."""
    found = mined.negatives.counts + (0 if settings.replace else collection.negatives.counts)
    short = int((found < settings.negatives).sum())
    return {
        "records": len(found) - (short if flags.FLAGS.require_full else 0),
        "records_read": len(found),
        "short": short,
        "without": int((found == 0).sum()),
        "queries": len(collection.queries),
        "documents": len(collection.documents),
        "candidates": mined.tally.candidates,
        "negatives": len(mined.negatives.values),
    }


def _became(mined: "Mined", settings: Settings) -> list[tuple[str, str, int, int]]:
    """Returns the table of what became of the candidates."""
    tally = mined.tally
    said = {
        "before the window": f"--range={settings.first}:{settings.last}",
        "absolute margin": f"{settings.absolute_margin}",
        "relative margin": f"{settings.relative_margin}",
        "above --max_score": f"{settings.max_score}",
        "below --min_score": f"{settings.min_score}",
    }
    rows = [(f"dropped: {name}", said.get(name, ""), count, tally.candidates) for name, count in tally.dropped.items()]
    rows.append(("left over", "", tally.left - tally.chosen, tally.candidates))
    return [*rows, ("taken", f"{settings.sampling} {settings.negatives}", tally.chosen, tally.candidates)]


def _fullness(counts: dict[str, int]) -> list[tuple[str, str, int, int]]:
    """Returns the table of how many negatives records have."""
    total, what = counts["records_read"], "left out" if flags.FLAGS.require_full else "kept"
    asked = f"--negatives={flags.FLAGS.negatives}"
    return [
        ("all negatives", asked, total - counts["short"], total),
        ("fewer", what, counts["short"] - counts["without"], total),
        ("none", what, counts["without"], total),
    ]


def _scores_line(mined: "Mined") -> str:
    means = {name: mined.tally.mean(name) for name in ("positives", "negatives", "dropped")}
    return "Mean scores: " + ", ".join(f"{name} {mean:.3f}" for name, mean in means.items() if not math.isnan(mean))


def _write_report(
    folder: AnyPath,
    label: str,
    collection: "Collection",
    mined: "Mined",
    settings: Settings,
    counts: dict[str, int],
    similarity: str,
) -> None:
    """Writes README.md and the picture."""
    from jaxembed.mining import report

    unit = {"cosine": "cosine", "dot": "dot product", "euclidean": "-distance"}[similarity]
    read = f"{counts['records_read']:,} records, {counts['queries']:,} queries, {counts['documents']:,} documents"
    text = f"# Hard negatives of {label}\n\n{read}; {counts['negatives']:,} negatives were found.\n\n"
    text += "## Candidates\n\n" + report.markdown("became", _became(mined, settings))
    text += "\n## Records\n\n" + report.markdown("with", _fullness(counts))
    text += f"\n## Scores ({unit})\n\n{_scores_line(mined)}.\n\n![Scores]({report.PICTURE})\n"
    text += report.examples("Examples", _examples(collection, mined))
    picture = report.draw(mined.tally, f"Hard negatives of {label}", unit)
    report.write(folder, {README: text.encode(), report.PICTURE: picture})


def _examples(collection: "Collection", mined: "Mined") -> dict[str, list[str]]:
    """Returns some records with their positives and the negatives that were found."""
    shown: dict[str, list[str]] = {}
    for number in (mined.negatives.counts > 0).nonzero()[0][:: max(1, len(collection.records) // SHOWN)][:SHOWN]:
        record, start = collection.records[number], mined.negatives.start[number]
        first = mined.positive_scores[collection.positives.start[number]]
        lines = [f"query: {record.query}", f"positive, {first:.3f}: {record.positives[0]}"]
        for i, document in enumerate(mined.negatives[number][:3]):
            lines.append(f"negative, {mined.scores[start + i]:.3f}: {collection.documents[document]}")
        shown[f"Record {number + 1}"] = lines
    return shown


def _require_flags() -> tuple[Settings, AnyPath]:
    """Refuses at once what needs no look into the files; returns the rules and where records go to."""
    flag = flags.FLAGS
    if not flag.model:
        raise UserError("--model is missing: name a run's folder, an exported one, or a model on the hub")
    if not flag.pairs:
        raise UserError("--pairs is missing: name the records, as pairs.jsonl.gz")
    out = require_out(flag.out)
    report_folder(out, flag.report)
    check_place(SourceConfig(**parse_spec(flag.pairs)), "--pairs")
    if flag.corpus:
        check_place(SourceConfig(**parse_spec(flag.corpus)), "--corpus")
    if flag.corpus_vectors and not flag.corpus:
        raise UserError("--corpus_vectors are vectors of --corpus: give that too")
    if (flag.field or flag.id_field) and not flag.corpus:
        raise UserError("--field and --id_field are columns of --corpus: give that too")
    if flag["seed"].present and flag.sampling != "random":
        raise UserError("--seed draws negatives by --sampling=random: give that too")
    first, last = _range(flag.range)
    settings = Settings(
        flag.negatives,
        first,
        last,
        flag.absolute_margin,
        flag.relative_margin,
        flag.max_score,
        flag.min_score,
        flag.sampling,
        flag.seed,
        flag.replace,
    )
    require(settings)
    return settings, out


def _range(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise UserError(f"--range={text}: wants FIRST:LAST, as 10:100 for the ranks 11 … 100")
    return int(first), int(last)


if __name__ == "__main__":
    flags.DEFINE_string("model", "", "The model: a run, a folder, or a name on the hub.")
    flags.DEFINE_string("pairs", "", "Records.")
    flags.DEFINE_enum("format", "jaxembed", CHOICES["data.train[].format"], "Of the records.")
    flags.DEFINE_string("out", "", "File of the records with their negatives.")
    flags.DEFINE_string("report", "", "Folder of the report; '' = OUT.report.")
    flags.DEFINE_string("corpus", "", "More documents.")
    flags.DEFINE_string("field", "", "Column of the texts of --corpus; '' = text, with a title before it.")
    flags.DEFINE_string("id_field", "", "Column of their ids; '' = _id or id, else the rows' numbers.")
    flags.DEFINE_string("corpus_vectors", "", "Vectors of --corpus, by jaxembed.encode.")
    flags.DEFINE_string("prompt_name", "document", "The models' prompt for documents by name; '' = none.")
    flags.DEFINE_string("query_prompt_name", "query", "Their prompt for queries by name; '' = none.")
    flags.DEFINE_integer("negatives", 4, "Of a record.", lower_bound=1)
    flags.DEFINE_bool("replace", False, "Leave out the negatives that records have.")
    flags.DEFINE_string("range", "0:100", "Ranks that are skipped, and the last one that is looked at.")
    flags.DEFINE_float("relative_margin", None, "Part of the positive's score.")
    flags.DEFINE_float("absolute_margin", None, "Below the positive's score.")
    flags.DEFINE_float("max_score", None, "Of a negative.")
    flags.DEFINE_float("min_score", None, "Of a negative.")
    flags.DEFINE_enum("sampling", "top", SAMPLING, "Which of those that are left are taken.")
    flags.DEFINE_integer("seed", 0, "Of the draw.", lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_string("teacher", "", "A model whose scores decide.")
    flags.DEFINE_bool("scores", True, "Write scores.")
    flags.DEFINE_bool("require_full", False, "Leave out records that find too few.")
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of the computation.")
    cli.run(main, __doc__)
