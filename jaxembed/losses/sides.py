"""The sides of a comparison: queries, positives or all documents of a step, as the engine's rows and columns."""

import dataclasses
from typing import TypeVar

import jax
import jax.numpy as jnp

from jaxembed.data.batch import NO_TEXT, Texts
from jaxembed.losses.contrastive import Side
from jaxembed.losses.embedded import Embedded
from jaxembed.losses.negatives import Identities

Tree = TypeVar("Tree")

BLOCKS = ("qd", "dq", "qq", "dd")  # rows, then columns: q = queries, d = documents (as rows, positives alone)


def rows(e: Embedded, kind: str, guided: bool = False) -> Side:
    """Returns the queries ('q') [N], or the positives ('d') [N · P], as rows; `guided`: with a teacher's vectors."""
    if kind == "q":
        identities = _identities(e.query_texts, e.query_texts.scope)
        return Side(e.queries, identities, e.teacher_queries if guided else None)
    positives = jax.tree.map(lambda x: x[:, : e.positives], e.document_texts)
    # What matches a positive's query is no negative of the positive either.
    query = e.query_texts
    matches = jnp.concatenate([query.text[:, None], query.partners], 1)[:, None]
    matches = jnp.broadcast_to(matches, (*positives.text.shape, matches.shape[-1]))
    texts = flat(dataclasses.replace(positives, partners=matches))
    guide = flat(e.teacher_documents[:, : e.positives]) if guided else None
    return Side(flat(e.documents[:, : e.positives]), _identities(texts, texts.scope), guide)


def columns(e: Embedded, kind: str, row_kind: str, guided: bool = False) -> Side:
    """Returns the queries ('q') [N], or all documents ('d') [N · D], as columns for rows of a kind."""
    if kind == "d":
        texts = flat(e.document_texts)
        guide = flat(e.teacher_documents) if guided else None
        return Side(flat(e.documents), _identities(texts, texts.pool), guide)
    identities = _identities(e.query_texts, e.query_texts.pool)
    if row_kind == "q":  # which of two queries' positives are the same: those of this step are enough
        drawn = jnp.where(e.is_positive, e.document_texts.text, NO_TEXT)[:, : e.positives]
        identities = dataclasses.replace(identities, matches=drawn)
    return Side(e.queries, identities, e.teacher_queries if guided else None)


def flat(tree: Tree) -> Tree:
    """Merges the first two dimensions of all arrays, [N, D, ...] → [N · D, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _identities(texts: Texts, place: jax.Array) -> Identities:
    return Identities(texts.pair, texts.rank, texts.text, texts.partners, texts.group, place)
