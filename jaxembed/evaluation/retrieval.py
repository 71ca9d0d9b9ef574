"""Retrieval in the form of BEIR (Thakur et al. 2021, arXiv:2104.08663): find the documents that answer a query."""

import dataclasses
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator

import numpy as np
from absl import logging

from jaxembed.errors import UserError
from jaxembed.evaluation.lines import id_of, read_lines, read_objects, text_of
from jaxembed.evaluation.sets import retrieval_files
from jaxembed.evaluation.vectors import Encode, finite_vectors
from jaxembed.similarity import centre_of, for_search
from jaxembed.storage import AnyPath

DEPTH = 100  # documents ranked per query

# search(queries_QxE, documents_NxE, k) → scores and document numbers, each [Q, k], best first: see `exact.top_k`
Search = Callable[[np.ndarray, np.ndarray, int], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class RetrievalData:
    """Queries, documents, and which document answers which query.

    Attributes:
      name: the folder's name.
      query_ids, queries: the ids and texts of the queries with an answer.
      document_ids, documents: ids and texts, in the order of the ids: a search that ranks equal scores by document
        number then ranks them by id, as sentence-transformers does.
      gains: per query, gain by document id: above 0 for answers, one at least, 0 for documents that are known to be
        none. Ids that the corpus lacks count as answers that are never found.
      left_out: per query, sets of document ids (the queries may share them) that are neither right nor wrong: not
        ranked for it, unless `gains` names them.
    """

    name: str
    query_ids: list[str]
    queries: list[str]
    document_ids: list[str]
    documents: list[str]
    gains: list[dict[str, float]]
    left_out: list[tuple[frozenset[str], ...]]


def read_retrieval(folder: str | pathlib.Path) -> RetrievalData:
    """Reads a BEIR folder: corpus.jsonl, queries.jsonl, and qrels.tsv or qrels/test.tsv, each also as .gz.

    A document's text is its title, a space and its text, stripped, as in BEIR and sentence-transformers. Judgements of
    queries that queries.jsonl lacks are left out, as are queries without a document of score > 0.

    Raises:
      UserError: no such folder or file, a bad row (named FILE:LINE), an id given twice, or no query to evaluate.
    """
    corpus_path, queries_path, qrels_path = retrieval_files(str(folder))
    documents = dict(sorted(_read_texts(corpus_path, titled=True).items()))
    all_queries, qrels = _read_texts(queries_path, titled=False), _read_qrels(qrels_path)
    queries = {query: text for query, text in all_queries.items() if query in qrels}
    if not queries:
        raise UserError(f"{qrels_path}: no query of {queries_path} has a document of score > 0 here")
    gains = [qrels[query] for query in queries]
    wanted = set().union(*gains)
    unknown = len(wanted - documents.keys())
    if unknown == len(wanted):
        raise UserError(f"{qrels_path}: none of its documents is in {corpus_path}; do these files belong together?")
    if unknown:
        logging.warning("%s: %d of %d documents are not in the corpus: never found", qrels_path, unknown, len(wanted))
    return RetrievalData(
        corpus_path.parent.resolve().name,
        query_ids=list(queries),
        queries=list(queries.values()),
        document_ids=list(documents),
        documents=list(documents.values()),
        gains=gains,
        left_out=[()] * len(queries),
    )


def rank_by_vectors(data: RetrievalData, encode: Encode, search: Search, similarity: str) -> np.ndarray:
    """Ranks documents for each query by a model.

    Queries are encoded with the prompt 'query', documents with 'document'. A document whose id equals the query's is
    ranked like any other.

    Args:
      data: what to search for, and where.
      encode: the model.
      search: e.g. `exact.top_k`.
      similarity: 'cosine', 'dot' or 'euclidean'.

    Returns:
      Per query the numbers of `ranking_depth` documents, of all where there are fewer, best first: int [Q, n].

    Raises:
      UserError: the model's vectors are not finite, or compared in a way that the search cannot.
    """
    queries_QxE = finite_vectors(encode, data.queries, "query")
    documents_NxE = finite_vectors(encode, data.documents, "document")
    compared = for_search(queries_QxE, documents_NxE, similarity, centre_of(documents_NxE))
    return search(*compared, ranking_depth(data))[1]


def ranking_depth(data: RetrievalData) -> int:
    """Returns how many documents to rank, so that `DEPTH` are left whichever are left out."""
    return DEPTH + max(sum(map(len, sets)) for sets in data.left_out)


def score_rankings(data: RetrievalData, rankings: Iterable[np.ndarray]) -> dict[str, float]:
    """Scores the first `DEPTH` documents of each query's ranking that are not left out for it.

    The formulas are those of sentence-transformers' InformationRetrievalEvaluator, but for nDCG's gains: here they are
    the judgements' scores, as in trec_eval and BEIR, there 1 for every relevant document, so the two differ where
    judgements are graded.

    Args:
      data: what is right.
      rankings: per query, numbers of documents, best first; fewer than `DEPTH` where nothing more was found.

    Returns:
      Means over the queries, times 100: 'ndcg@10', 'mrr@10', 'recall@1', 'recall@10', 'recall@100', 'map@100'.
    """
    found_QxK = np.zeros((len(data.queries), DEPTH))
    for found, ranking, gains in zip(found_QxK, kept(data, rankings), data.gains, strict=True):
        found[: len(ranking)] = [gains.get(data.document_ids[number], 0.0) for number in ranking]
    return _metrics(found_QxK, data.gains)


def kept(data: RetrievalData, rankings: Iterable[np.ndarray]) -> Iterator[list[int]]:
    """Yields the first `DEPTH` documents of each query's ranking that are not left out for it."""
    for ranking, gains, left_out in zip(rankings, data.gains, data.left_out, strict=True):
        ids = ((number, data.document_ids[number]) for number in map(int, ranking))
        counted = (number for number, key in ids if key in gains or not any(key in keys for keys in left_out))
        yield list(itertools.islice(counted, DEPTH))


def _metrics(found_QxK: np.ndarray, gains: list[dict[str, float]]) -> dict[str, float]:
    """Scores rankings given as the gain at each rank.

    nDCG: sum of gain / log2(1 + rank), over that of the best ranking there is (Järvelin & Kekäläinen 2002).
    MAP: mean precision at the ranks of relevant documents, those beyond the depth counting 0.
    """
    ranks_K = np.arange(1, found_QxK.shape[1] + 1)
    discounts_10 = 1 / np.log2(1 + ranks_K[:10])
    ideal_Qx10 = np.zeros((len(gains), 10))
    for ideal, gain in zip(ideal_Qx10, gains):
        best = sorted(gain.values(), reverse=True)[:10]
        ideal[: len(best)] = best
    relevant_Q = np.array([sum(value > 0 for value in gain.values()) for gain in gains])
    hits_QxK = found_QxK > 0
    precision_QxK = hits_QxK.cumsum(1) / ranks_K
    metrics_Q = {
        "ndcg@10": (found_QxK[:, :10] @ discounts_10) / (ideal_Qx10 @ discounts_10),
        "mrr@10": (hits_QxK / ranks_K)[:, :10].max(1),
        "recall@1": hits_QxK[:, 0] / relevant_Q,
        "recall@10": hits_QxK[:, :10].sum(1) / relevant_Q,
        "recall@100": hits_QxK[:, :100].sum(1) / relevant_Q,
        "map@100": (precision_QxK * hits_QxK)[:, :100].sum(1) / np.minimum(relevant_Q, 100),
    }
    return {name: 100 * float(values_Q.mean()) for name, values_Q in metrics_Q.items()}


def _read_texts(path: AnyPath, titled: bool) -> dict[str, str]:
    """Returns text by id, in the file's order; with the title, where there is one, if `titled`."""
    texts: dict[str, str] = {}
    for where, row in read_objects(path):
        key = id_of(row, "_id", where)
        if key in texts:
            raise UserError(f"{where}: the _id {key!r} was given to an earlier row; ids must differ")
        texts[key] = text_of(row, "text", where)
        if titled:
            title = text_of(row, "title", where) if row.get("title") is not None else ""
            texts[key] = f"{title} {texts[key]}".strip()
    if not texts:
        raise UserError(f"{path}: the file is empty")
    return texts


def _read_qrels(path: AnyPath) -> dict[str, dict[str, float]]:
    """Returns the gains > 0 by query and document. Columns: query id, document id, score; the first line names them."""
    qrels: dict[str, dict[str, float]] = {}
    for number, (where, line) in enumerate(read_lines(path)):
        columns = [column.strip() for column in line.split("\t")]
        score = _integer(columns[2]) if len(columns) == 3 else None
        if score is None and (number or len(columns) != 3):
            raise UserError(f"{where}: wants query-id, corpus-id and an integer score, with tabs between; has {line!r}")
        if score is not None and score > 0:
            qrels.setdefault(columns[0], {})[columns[1]] = float(score)
    return qrels


def _integer(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None
