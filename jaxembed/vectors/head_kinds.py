"""What `jaxembed.head` fits: for each kind its texts, the layer, and what the layer does."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxembed import model_source
from jaxembed.data.texts import TextReader
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.storage import path_of
from jaxembed.vectors.encoded import CachedEncoder
from jaxembed.vectors.folder import VectorFolder
from jaxembed.vectors.head_training import HeadSettings, train_head
from jaxembed.vectors.heads import (
    Sums,
    compared,
    fit_drift,
    fit_map,
    fit_pca,
    fit_whitening,
    mean_cosine,
    of_length_1,
    require_plain,
    with_layer,
)
from jaxembed.vectors.quantize import PACKED
from jaxembed.vectors.record_pairs import compares_by_cosine, read_pairs

SAMPLE = 2000  # vectors that figures of a table are made of
EVERY = 10  # of texts in drift and map, each tenth is held out, up to that many
ALL = 1_000_000  # hard negatives of a record


@dataclasses.dataclass(frozen=True)
class Fitted:
    """A model with its layer.

    Attributes:
      model: the model.
      before, after: figures by name, without the layer and with it; before may lack some.
      said: what else there is to say.
    """

    model: Embedder
    before: dict[str, float]
    after: dict[str, float]
    said: dict[str, Any]


def fit(flag: Any) -> Fitted:
    """Fits the layer that the flags of `jaxembed.head` ask for.

    Raises:
      UserError: a model, texts or vectors that do not serve.
    """
    kinds = {"pca": _reduced, "whiten": _reduced, "linear": _trained, "residual": _trained, "drift": _towards}
    return kinds.get(flag.kind, _towards)(flag)


def _open(spec: str, where: str, flag: Any) -> tuple[Embedder, CachedEncoder]:
    """Opens a model; returns it with what encodes texts without bringing vectors to length 1."""
    embedder = Embedder.load(spec)
    require_plain(embedder.blueprint, f"{where}={spec}")
    raw = embedder.raw()
    fingerprint = model_source.fingerprint(spec, raw.blueprint) if flag.cache else ""
    return embedder, CachedEncoder(raw, fingerprint, path_of(flag.cache) if flag.cache else None)


def _texts(spec: str) -> Iterator[str]:
    return (text for _, text in TextReader(spec, "--texts"))


def _reduced(flag: Any) -> Fitted:
    """Fits 'pca' and 'whiten'."""
    folder = VectorFolder.open(flag.vectors, "--vectors") if flag.vectors else None
    embedder, encoder = _open(flag.model, "--model", flag)
    blueprint = embedder.blueprint
    if flag.dim > embedder.width:
        raise UserError(f"--dim={flag.dim}: the model's vectors have {embedder.width} dimensions")
    if folder:
        _require_raw(folder, embedder, flag.model, f"--vectors={flag.vectors}")
    blocks = (block for _, block in folder.blocks()) if folder else _encoded(flag, encoder)
    sums, sample = Sums(), np.zeros((0, embedder.width), np.float32)
    for block in blocks:
        sums.add(block)
        sample = np.concatenate([sample, block[: SAMPLE - len(sample)]])
    where = f"--dim={flag.dim}" if flag.dim else f"--kind={flag.kind}"
    if flag.kind == "pca":
        layer, kept = fit_pca(sums, flag.dim, flag.centre, where)
    else:
        layer, kept = fit_whitening(sums, flag.dim, where)

    def figures(vectors: np.ndarray, part: float) -> dict[str, float]:
        return {"dimensions": vectors.shape[1], "variance kept": part, "mean cosine of two texts": mean_cosine(vectors)}

    model = with_layer(embedder, layer, blueprint.head.normalize, blueprint.similarity)
    return Fitted(model, figures(sample, 1.0), figures(layer(sample), kept), {"texts": sums.count})


def _require_raw(folder: VectorFolder, embedder: Embedder, spec: str, where: str) -> None:
    if folder.normalized:
        raise UserError(f"{where}: these vectors were brought to length 1: encode with jaxembed.encode --raw")
    if folder.dtype in PACKED:
        raise UserError(
            f"{where}: of these vectors only the signs were kept: encode without --precision={folder.dtype}"
        )
    if folder.width != embedder.width or folder.manifest.template:
        raise UserError(
            f"{where}: vectors of {folder.width} dimensions, or in a template: encode with the model as it is"
        )
    if folder.manifest.weights != model_source.fingerprint(spec, embedder.raw().blueprint):
        raise UserError(f"{where}: these are vectors of another model ({folder.model}): encode with this one")


def _encoded(flag: Any, encoder: CachedEncoder) -> Iterator[np.ndarray]:
    """Yields the vectors of all texts of --texts or --pairs."""
    if flag.texts:
        yield from encoder.windows(_texts(flag.texts), flag.prompt or "document")
        return
    pairs = read_pairs(flag.pairs, "--pairs", ALL)
    yield from encoder.windows(pairs.queries, "query")
    yield from encoder.windows(pairs.documents, "document")


def _trained(flag: Any) -> Fitted:
    """Fits 'linear' and 'residual'."""
    from rich.console import Console
    from rich.progress import Progress

    pairs = read_pairs(flag.pairs, "--pairs", flag.negatives)
    embedder, encoder = _open(flag.model, "--model", flag)
    blueprint = embedder.blueprint
    unit = compares_by_cosine(blueprint.similarity, f"--model={flag.model}")
    if max(flag.dim, flag.rank if flag.kind == "residual" else 0) > embedder.width:
        name = "rank" if flag.kind == "residual" else "dim"
        raise UserError(f"--{name}={getattr(flag, name)}: the model's vectors have {embedder.width} dimensions")
    settings = HeadSettings(
        rank=flag.rank if flag.kind == "residual" else 0,
        dim=flag.dim if flag.dim != embedder.width else 0,
        queries_alone=flag.side == "query",
        **{
            name: getattr(flag, name)
            for name in ("epochs", "batch_size", "learning_rate", "temperature", "held_out", "patience", "seed")
        },
    )
    vectors = encoder(pairs.queries, "query"), encoder(pairs.documents, "document")
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("training", total=settings.epochs)

        def done(loss: float) -> None:
            progress.update(task, advance=1, description=f"training, held-out loss {loss:.4f}")

        trained = train_head(pairs, *vectors, settings, unit, "--pairs", done)
    model = with_layer(embedder, trained.layer, blueprint.head.normalize, blueprint.similarity)
    names = ("loss", "mrr")
    before, after = ({f"held-out {name}": getattr(trained, name)[i] for name in names} for i in (0, 1))
    said = {name: getattr(trained, name) for name in ("pairs", "held_out", "epochs", "best")}
    return Fitted(model, before, after, said)


def _towards(flag: Any) -> Fitted:
    """Fits 'drift' and 'map'."""
    new, encode_new = _open(flag.model, "--model", flag)
    old, encode_old = _open(flag.old, "--old", flag)
    if flag.kind == "drift" and new.width != old.width:
        raise UserError(
            f"--kind=drift: vectors of --model have {new.width} dimensions, of --old {old.width}: take --kind=map, "
            "which leads from one to the other"
        )
    sums, of_compared, length, held = Sums(), Sums(), 0.0, []
    for x, y in _side_by_side(flag, encode_new, encode_old):
        y = compared(y, old.blueprint)
        apart = np.arange(len(x)) % EVERY == EVERY - 1
        if sum(len(some) for some, _ in held) >= SAMPLE:
            apart[:] = False
        held.append((x[apart][:SAMPLE], y[apart][:SAMPLE]))
        sums.add(x[~apart], y[~apart])
        if flag.kind == "drift":
            of_compared.add(compared(x[~apart], new.blueprint))
            length += float(np.linalg.norm(x[~apart], axis=1).sum())
    x, y = (np.concatenate(each) for each in zip(*held))
    if len(x) < 2:
        raise UserError(
            f"--{'texts' if flag.texts else 'pairs'}: has {sums.count + len(x)} queries, of which each tenth is held "
            "out: wants 20 or more"
        )
    if flag.kind == "drift":
        usual = length / sums.count if of_length_1(new.blueprint) else 1.0
        layer = fit_drift(of_compared.mean, sums.mean_y, usual)
    else:
        layer = fit_map(sums, flag.ridge, f"--ridge={flag.ridge:g}")
    model = with_layer(new, layer, old.blueprint.head.normalize, old.blueprint.similarity)
    before = _agreement(x, y) if new.width == old.width else {}
    return Fitted(model, before, _agreement(layer(x), y), {"texts": sums.count, "held_out": len(x)})


def _side_by_side(
    flag: Any, encode_new: CachedEncoder, encode_old: CachedEncoder
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the vectors that two models make of the queries, some at a time."""
    queries = () if flag.texts else read_pairs(flag.pairs, "--pairs", 0).queries
    texts = (_texts(flag.texts) if flag.texts else queries for _ in range(2))  # read anew for each
    each = (encoder.windows(some, flag.prompt or "query") for encoder, some in zip((encode_new, encode_old), texts))
    yield from zip(*each, strict=True)


def _agreement(x_NxE: np.ndarray, y_NxE: np.ndarray) -> dict[str, float]:
    """Says how near held-out queries are to what the old model makes of them, and how many find that first."""
    from jaxembed.similarity import unit

    cosines_NxN = unit(x_NxE) @ unit(y_NxE).T
    own_N = np.diag(cosines_NxN)
    ranks_N = (cosines_NxN >= own_N[:, None]).sum(1)
    return {
        "held-out cosine to the old vectors": float(own_N.mean()),
        "held-out queries that find their own first %": 100 * float((ranks_N == 1).mean()),
    }
