"""Search vectors: each query's best documents, exactly and on all devices, or by an index of faiss or usearch.

    python -m jaxembed.search --corpus=VECTORS --queries=VECTORS --out=run.trec
    python -m jaxembed.search --corpus=VECTORS --queries=queries.jsonl --model=FOLDER --out=run.jsonl.gz
    python -m jaxembed.search --corpus=VECTORS --model=FOLDER --query='how do plants make sugar'

Vectors are folders that `jaxembed.encode` wrote, of any precision; the corpus is read a part at a time and compared as
its model says. Of equal scores the document that comes first in the corpus wins. Signs (binary) are compared with the
queries' floats, what sentence-transformers calls rescoring, for all of them. Prints a table and one JSON line last.

  --queries       vectors, or texts that --model encodes behind its prompt 'query': a file, folder, glob,
                  tfds:NAME:SPLIT, hf:NAME:SPLIT. --field: their column (text), --id_field: of their ids (_id, id);
                  --prompt_name: another of the model's prompts
  --query         one text; prints its best documents
  --out           the run: 'query Q0 document rank score tag' as trec_eval reads it, or of a name with .jsonl
                  {"id", "documents": [{"id", "score"}]}; also .gz
  --model         the corpus's model: a run's folder, an exported one, or a name on the hub
  --any_model     search even if the corpus is of another model, or of the same with other weights
  --recall        on TPUs, find only this part of the best documents, on average, faster; elsewhere search stays exact
  --index         exact, or an index that is built first: faiss, usearch (HNSW). --faiss_factory: any that faiss knows,
                  such as IVF4096,Flat or HNSW32; --usearch_dtype: of its numbers
  --index_file    keep the index there, and take it from there the next time
  --effort        how much an index looks at for a query: clusters of IVF, candidates of HNSW; 0 = as it likes
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from jaxembed import cli
from jaxembed.distributed import Peers, connect
from jaxembed.errors import UserError
from jaxembed.host_memory import keep_freed_memory
from jaxembed.storage import AnyPath, path_of, sizes
from jaxembed.vectors.writing import replacing, text_stream

if TYPE_CHECKING:
    from jaxembed.vectors.exact import Compared
    from jaxembed.vectors.folder import VectorFolder
    from jaxembed.vectors.indexes import Index, Plan

SHOWN = 10  # documents of --query
OF_KIND = {"faiss_factory": ("faiss",), "usearch_dtype": ("usearch",), "recall": ("exact",)}
OF_KIND |= dict.fromkeys(("index_file", "effort"), ("faiss", "usearch"))


@dataclasses.dataclass(frozen=True)
class Queries:
    """What is searched for: ids, and vectors float32 [Q, E]."""

    ids: list[str]
    vectors: np.ndarray


@dataclasses.dataclass(frozen=True)
class Found:
    """What was found for the queries.

    Attributes:
      scores: float32 [Q, k], best first; -inf where no more were found.
      numbers: of the documents, [Q, k]; -1 likewise.
      figures: what was measured, by its name in the JSON line.
    """

    scores: np.ndarray
    numbers: np.ndarray
    figures: dict[str, float]


def main() -> None:
    """Runs the command."""
    _require_flags()
    keep_freed_memory()
    with connect() as peers:
        _search(peers)


def _search(peers: Peers) -> None:
    """Searches, on the devices of all processes; process 0 writes and says what was found."""
    from jaxembed.vectors.exact import Compared
    from jaxembed.vectors.folder import VectorFolder

    flag = flags.FLAGS
    if flag.index != "exact" and peers.count > 1:
        raise UserError(f"--index={flag.index}: runs in one process, start it without others; exact takes them all")
    corpus = VectorFolder.open(flag.corpus, "--corpus")
    if corpus.similarity == "manhattan":
        raise UserError(
            f"--corpus={corpus.path}: its model compares by manhattan distance: no dot product stands for it"
        )
    out = path_of(flag.out) if flag.out else None
    plan = _plan(corpus)
    index = _kept(plan, corpus) if plan else None
    if out and not _is_jsonl(out):
        _require_trec(corpus.ids(), "--corpus")
    queries = _queries(corpus, peers.main)
    if out and not _is_jsonl(out):
        _require_trec(queries.ids, "--queries")
    k = min(SHOWN if flag.query and not flag["k"].present else flag.k, len(corpus))
    asked = {"k": k, "queries": queries.vectors.shape, "corpus": dataclasses.asdict(corpus.manifest)}
    peers.require_same("search", asked)
    documents, figures = Compared(corpus, corpus.similarity), {}
    if plan and not index:
        index = _built(plan, corpus, figures)
    found = _found(documents, queries.vectors, k, index, figures, peers.main)
    if not peers.main:
        return
    ids = _ids(corpus, found.numbers)
    if out:
        write_run(out, queries.ids, ids, found.scores, flag.tag)
    _say(corpus, queries, k, found, ids)


def _queries(corpus: "VectorFolder", bar: bool) -> Queries:
    """Reads the queries' vectors, or encodes their texts."""
    from jaxembed.data.texts import TextReader
    from jaxembed.vectors.folder import MANIFEST, VectorFolder

    flag = flags.FLAGS
    if flag.query:
        return Queries([flag.query], _encode([flag.query], corpus, bar))
    path = path_of(flag.queries)
    if (path / MANIFEST).exists():
        folder = VectorFolder.open(path, "--queries")
        said, wanted = folder.manifest, corpus.manifest
        if not flag.any_model and (said.weights, said.raw) != (wanted.weights, wanted.raw):
            raise UserError(
                f"--queries={path}: vectors of {_model(folder)}, --corpus of {_model(corpus)}: encode both with "
                "one model, or give --any_model if their vectors can be compared"
            )
        _require_width(folder.width, f"--queries={path}", corpus)
        return Queries(list(folder.ids()), folder.vectors())
    if not flag.model:
        raise UserError(
            f"--queries={flag.queries}: no vectors that jaxembed.encode wrote; to encode texts give --model"
        )
    ids, texts = map(list, zip(*TextReader(flag.queries, "--queries", flag.field, flag.id_field)))
    known = set()
    twice = next((key for key in ids if key in known or known.add(key)), None)
    if twice is not None:
        raise UserError(f"--queries={flag.queries}: two of them have the id {twice!r}: ids must differ")
    return Queries(ids, _encode(texts, corpus, bar))


def _model(folder: "VectorFolder") -> str:
    said = folder.manifest
    return f"{said.model} ({said.weights[:8]}{', raw' * said.raw})"


def _encode(texts: Sequence[str], corpus: "VectorFolder", bar: bool) -> np.ndarray:
    """Encodes queries as the corpus's vectors were made, with the model's prompt for queries: float32 [Q, E]."""
    from jaxembed.embedder import Embedder
    from jaxembed.evaluation.vectors import finite_vectors
    from jaxembed.model_source import fingerprint

    flag, said = flags.FLAGS, corpus.manifest
    embedder = Embedder.load(flag.model, template=said.template, dtype=said.compute_dtype)
    if said.raw:
        embedder = embedder.raw()
    weights = "" if flag.any_model else fingerprint(flag.model, embedder.blueprint)
    if not flag.any_model and weights != said.weights:
        raise UserError(
            f"--model={flag.model} ({weights[:8]}): --corpus is of {_model(corpus)}: take that model, or give "
            "--any_model if their vectors can be compared"
        )
    width = min(embedder.width, said.width)
    _require_width(width, f"--model={flag.model}", corpus)

    def encode(texts: list[str], _: str) -> np.ndarray:
        return embedder.encode(
            texts,
            prompt_name=flag.prompt_name,
            truncate_dim=width,
            normalize_embeddings=said.normalized,
            show_progress_bar=bar,
        )

    return finite_vectors(encode, list(texts), "query")


def _require_width(width: int, where: str, corpus: "VectorFolder") -> None:
    if width != corpus.width:
        raise UserError(
            f"{where}: vectors of {width} dimensions, --corpus={corpus.path} of {corpus.width}: encode both with "
            "the same model and --dims"
        )


def _plan(corpus: "VectorFolder") -> "Plan | None":
    """Returns what index is asked for; None for exact search."""
    from jaxembed.vectors.indexes import Plan

    flag = flags.FLAGS
    if flag.index == "exact":
        return None
    plan = Plan(flag.index, flag.faiss_factory, flag.usearch_dtype, corpus.similarity)
    plan.require(corpus.width)
    return plan


def _kept(plan: "Plan", corpus: "VectorFolder") -> "Index | None":
    """Opens the index that is in the file, where there is one."""
    from jaxembed.vectors import indexes

    file = path_of(flags.FLAGS.index_file) if flags.FLAGS.index_file else None
    return indexes.load(file, plan, len(corpus), _plain(corpus)) if file and file.exists() else None


def _built(plan: "Plan", corpus: "VectorFolder", figures: dict[str, float]) -> "Index":
    """Builds the index, and keeps it where a file is named."""
    from jaxembed.vectors import indexes

    start = time.perf_counter()
    index = indexes.build(plan, _Shown(corpus, "building the index", True))
    figures["build_seconds"] = time.perf_counter() - start
    if flags.FLAGS.index_file:
        indexes.save(index, path_of(flags.FLAGS.index_file), plan, _plain(corpus))
    return index


def _plain(corpus: "VectorFolder") -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(corpus.manifest)))


def _found(
    documents: "Compared",
    queries_QxE: np.ndarray,
    k: int,
    index: "Index | None",
    figures: dict[str, float],
    bar: bool,
) -> Found:
    """Searches, and adds to the figures how long it takes."""
    from jaxembed.vectors.exact import top_k

    flag, start = flags.FLAGS, time.perf_counter()
    if index:
        scores, numbers = index.search(queries_QxE, k, flag.effort)
    else:
        queries, shown = documents.queries(queries_QxE), _Shown(documents, "searching", bar)
        dots, numbers = top_k(queries, shown, k, recall=flag.recall)
        scores = documents.scores(dots, queries_QxE)
    return Found(scores, numbers, figures | {"seconds": time.perf_counter() - start})


class _Shown:
    """Vectors of a corpus, with a bar that says how far they were read."""

    def __init__(self, vectors: "Compared | VectorFolder", title: str, active: bool) -> None:
        self._vectors, self._title, self._active = vectors, title, active
        self.width = vectors.width

    def __len__(self) -> int:
        return len(self._vectors)

    def blocks(self) -> Iterator[tuple[int, np.ndarray]]:
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True, disable=not self._active) as progress:
            task = progress.add_task(self._title, total=len(self))
            for start, block in self._vectors.blocks():
                yield start, block
                progress.update(task, completed=start + len(block))


def _ids(corpus: "VectorFolder", numbers: np.ndarray) -> list[list[str]]:
    """Returns the ids of the documents that were found, per query, best first."""
    wanted = set(np.unique(numbers).tolist())
    known = {number: key for number, key in enumerate(corpus.ids()) if number in wanted}
    return [[known[number] for number in row if number >= 0] for row in numbers.tolist()]


def write_run(
    path: AnyPath, queries: Sequence[str], documents: Sequence[Sequence[str]], scores: np.ndarray, tag: str
) -> None:
    """Writes what was found, whole or not at all.

    Args:
      path: of a name with '.jsonl', a line of JSON per query; else of TREC's format, a line per document. Also '.gz'.
      queries: ids.
      documents: ids of those that were found for each, best first.
      scores: theirs, [Q, k]; those after a query's last document are not looked at.
      tag: the last column of TREC's format.

    Raises:
      UserError: it cannot be written.
    """
    lines = _jsonl if _is_jsonl(path) else _trec
    with replacing(path, "--out") as part, text_stream(part, path.name.endswith(".gz")) as text:
        text.writelines(lines(queries, documents, scores, tag))


def _jsonl(queries: Sequence[str], documents: Sequence[Sequence[str]], scores: np.ndarray, tag: str) -> Iterator[str]:
    for query, keys, row in zip(queries, documents, scores):
        found = [{"id": key, "score": float(f"{score:.9g}")} for key, score in zip(keys, row)]
        yield json.dumps({"id": query, "documents": found}, ensure_ascii=False) + "\n"


def _trec(queries: Sequence[str], documents: Sequence[Sequence[str]], scores: np.ndarray, tag: str) -> Iterator[str]:
    for query, keys, row in zip(queries, documents, scores):
        for rank, (key, score) in enumerate(zip(keys, row), 1):
            yield f"{query} Q0 {key} {rank} {score:.9g} {tag}\n"


def _is_jsonl(path: AnyPath) -> bool:
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def _require_trec(ids: Iterator[str] | Sequence[str], where: str) -> None:
    """Refuses ids that would be several columns of TREC's format, or none."""
    broken = next((key for key in ids if len(key.split()) != 1 or key != key.strip()), None)
    if broken is not None:
        raise UserError(
            f"{where}: the id {broken!r} has white space, which TREC's format cannot hold: --out=NAME.jsonl"
        )


def _say(corpus: "VectorFolder", queries: Queries, k: int, found: Found, ids: list[list[str]]) -> None:
    """Prints the table, of one query also what it found, and the JSON line."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    flag, n, console = flags.FLAGS, len(queries.ids), Console()
    seconds, size = found.figures["seconds"], sum(sizes(corpus.path).values())
    said: dict[str, Any] = {"queries": n, "documents": len(corpus), "width": corpus.width, "k": k, "index": flag.index}
    said |= {name: round(value, 4) for name, value in found.figures.items()}
    if flag.query:
        best = [{"id": key, "score": float(f"{score:.9g}")} for key, score in zip(ids[0], found.scores[0])]
        table = Table("rank", "document", "score", box=SIMPLE_HEAD, padding=0, collapse_padding=True)
        for rank, document in enumerate(best, 1):
            table.add_row(str(rank), document["id"], f"{document['score']:.4f}")
        console.print(table)
        said |= {"query": flag.query, "found": best}
    table = Table(box=SIMPLE_HEAD, padding=0, collapse_padding=True)
    cells = {"queries": f"{n:,}", "documents": f"{len(corpus):,}", "dimensions": f"{corpus.width:,}"}
    if "build_seconds" in found.figures:
        cells["built in s"] = f"{found.figures['build_seconds']:.2f}"
    cells |= {"seconds": f"{seconds:.2f}", "queries/s": f"{n / seconds:,.1f}", "MB of vectors": f"{size / 1e6:,.1f}"}
    for name in cells:
        table.add_column(name, justify="right")
    table.add_row(*cells.values())
    console.print(table)
    print(json.dumps(said | {"queries_per_s": round(n / seconds, 2), "bytes": size, "out": flag.out}))


def _require_flags() -> None:
    """Refuses at once what needs no look into the files."""
    flag = flags.FLAGS
    if not flag.corpus:
        raise UserError("--corpus is missing: name a folder of vectors that jaxembed.encode wrote")
    if bool(flag.queries) == bool(flag.query):
        raise UserError("give either --queries, a folder of vectors or texts, or --query, one text")
    if flag.query and not flag.model:
        raise UserError("--query: a text wants the model that encodes it: give --model")
    if flag.queries and not flag.out:
        raise UserError("--out is missing: name a file, such as run.trec or run.jsonl.gz")
    if not 0 < flag.recall <= 1:
        raise UserError(f"--recall={flag.recall}: is a part of the best documents, above 0 and at most 1")
    if len(flag.tag.split()) != 1:
        raise UserError(f"--tag={flag.tag!r}: wants one word")
    if flag.out and path_of(flag.out).is_dir():
        raise UserError(f"--out={flag.out}: is a folder, wants a file")
    for name, kinds in OF_KIND.items():
        if flag[name].present and flag.index not in kinds:
            raise UserError(f"--{name} is of --index={' or '.join(kinds)}: give that too, or leave it out")


if __name__ == "__main__":
    flags.DEFINE_string("corpus", "", "The documents' vectors.")
    flags.DEFINE_string("queries", "", "The queries: vectors, or texts.")
    flags.DEFINE_string("query", "", "One query.")
    flags.DEFINE_string("out", "", "File for what was found.")
    flags.DEFINE_integer("k", 100, "Documents of each query.", lower_bound=1)
    flags.DEFINE_string("model", "", "The model that encodes queries.")
    flags.DEFINE_bool("any_model", False, "Compare vectors of different models.")
    flags.DEFINE_string("field", "", "Column of the queries' texts; '' = text.")
    flags.DEFINE_string("id_field", "", "Column of the queries' ids; '' = _id or id.")
    flags.DEFINE_enum("index", "exact", ["exact", "faiss", "usearch"], "How to search.")
    flags.DEFINE_float("recall", 1.0, "Of exact search on TPUs.")
    flags.DEFINE_string("faiss_factory", "Flat", "The index of faiss, as its index_factory takes it.")
    flags.DEFINE_enum("usearch_dtype", "f32", ["f32", "f16", "i8"], "Of the numbers in an index of usearch.")
    flags.DEFINE_string("index_file", "", "Where the index is kept.")
    flags.DEFINE_integer("effort", 0, "How much an index looks at; 0 = as it likes.", lower_bound=0)
    flags.DEFINE_string("prompt_name", "query", "The model's prompt for queries by name; '' = none.")
    flags.DEFINE_string("tag", "jaxembed", "Name of the run in TREC's format.")
    cli.run(main, __doc__)
