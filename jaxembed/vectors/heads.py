"""Linear layers that are fitted to a model's vectors, and what makes them a part of the model.

They act on vectors before the model brings them to length 1, as a Dense module of sentence-transformers does, and are
multiplied into the Dense that a model may already have. Sums over texts are in float64.
"""

import dataclasses

import jax
import numpy as np

from jaxembed.blueprint import Blueprint
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import flatten, unflatten
from jaxembed.sharding import put, to_host
from jaxembed.similarity import unit

FLAT = 1e-9  # part of the largest variance below which a direction's is rounding


@dataclasses.dataclass(frozen=True)
class Affine:
    """The layer x ↦ x K + b.

    Attributes:
      kernel: K, float64 [E, F].
      bias: b, float64 [F], or None.
    """

    kernel: np.ndarray
    bias: np.ndarray | None = None

    def __call__(self, vectors_NxE: np.ndarray) -> np.ndarray:
        """Returns the layer's output, float32 [N, F]."""
        out = vectors_NxE @ self.kernel.astype(np.float32)
        return out if self.bias is None else out + self.bias.astype(np.float32)


class Sums:
    """What pairs of vectors x [E] and y [F] add up to, in float64; y is x itself where there is none."""

    def __init__(self) -> None:
        """Begins with no vectors."""
        self.count = 0
        self._x: np.ndarray | float = 0.0
        self._y: np.ndarray | float = 0.0
        self._xx: np.ndarray | float = 0.0
        self._xy: np.ndarray | float = 0.0

    def add(self, x_NxE: np.ndarray, y_NxF: np.ndarray | None = None) -> None:
        """Counts vectors in."""
        x = np.asarray(x_NxE, np.float64)
        self.count += len(x)
        self._x += x.sum(0)
        self._xx += x.T @ x
        if y_NxF is not None:
            y = np.asarray(y_NxF, np.float64)
            self._y += y.sum(0)
            self._xy += x.T @ y

    @property
    def mean(self) -> np.ndarray:
        """The mean of x, [E]."""
        return self._x / self.count

    @property
    def mean_y(self) -> np.ndarray:
        """The mean of y, [F]."""
        return self._y / self.count

    @property
    def covariance(self) -> np.ndarray:
        """Of x, [E, E], over the count."""
        return self._xx / self.count - np.outer(self.mean, self.mean)

    @property
    def covariance_xy(self) -> np.ndarray:
        """Of x with y, [E, F]."""
        return self._xy / self.count - np.outer(self.mean, self.mean_y)


def principal(sums: Sums, dim: int, where: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Returns the directions in which vectors vary most.

    Args:
      sums: over the vectors.
      dim: how many; 0 = all in which they vary at all.
      where: what messages call the number, '--dim=8'.

    Returns:
      U float64 [E, dim], of orthonormal columns, each's largest entry positive; the variances float64 [dim], the
      largest first; and their part of the whole variance.

    Raises:
      UserError: the vectors do not vary in so many directions.
    """
    variances, directions = np.linalg.eigh(sums.covariance)
    variances, directions = np.maximum(variances[::-1], 0), directions[:, ::-1]
    rank = int((variances > FLAT * variances[0]).sum())
    if not rank or dim > rank:
        raise UserError(
            f"{where}: the {sums.count:,} vectors vary in {rank} directions of {len(variances)} only: give more texts, "
            "or a lower --dim"
        )
    dim = dim or rank
    directions = directions[:, :dim]
    largest = np.abs(directions).argmax(0)
    directions = directions * np.where(directions[largest, np.arange(dim)] < 0, -1, 1)
    return directions, variances[:dim], float(variances[:dim].sum() / variances.sum())


def fit_pca(sums: Sums, dim: int, centre: bool, where: str) -> tuple[Affine, float]:
    """Fits a turn onto the directions of most variance: x U, or (x - mean) U.

    Without the mean taken off, dot products are those of the vectors' parts in these directions, as in
    sentence-transformers' own example of reducing dimensions.

    Returns:
      The layer, and the part of the variance that is kept.

    Raises:
      UserError: see `principal`.
    """
    directions, _, kept = principal(sums, dim, where)
    return Affine(directions, -sums.mean @ directions if centre else None), kept


def fit_whitening(sums: Sums, dim: int, where: str) -> tuple[Affine, float]:
    """Fits (x - mean) U Λ^-1/2, whose outputs have variance 1 in every direction.

    WhiteningBERT (Huang et al. 2021, arXiv:2104.01767) and Su et al. 2021 (arXiv:2103.15316), who keep the first
    dimensions.

    Returns:
      The layer, and the part of the variance that is kept.

    Raises:
      UserError: see `principal`.
    """
    directions, variances, kept = principal(sums, dim, where)
    kernel = directions / np.sqrt(variances)
    return Affine(kernel, -sums.mean @ kernel), kept


def fit_drift(new_mean_E: np.ndarray, old_mean_E: np.ndarray, length: float) -> Affine:
    """Fits the shift that brings a new model's queries to where the old model's were.

    Query drift compensation (Goswami et al. 2025, arXiv:2506.00037) takes the mean of new - old off new vectors. There
    they have length 1; here the layer stands before that is done, so it takes off as much of vectors of the usual
    length: the same where all have that length.

    Args:
      new_mean_E: the mean of the new model's vectors, as they are compared.
      old_mean_E: of the old model's.
      length: the mean length of the new model's vectors where they are brought to length 1 to be compared, else 1.
    """
    return Affine(np.eye(len(new_mean_E)), -length * (new_mean_E - old_mean_E))


def fit_map(sums: Sums, ridge: float, where: str) -> Affine:
    """Fits the linear layer that leads from x to y with the least squares, by ridge regression.

    K = (C + λ t I)^-1 C_xy and b = mean(y) - mean(x) K: C the covariance of x, t its mean variance.

    Args:
      sums: over pairs of vectors.
      ridge: λ.
      where: what messages call it, '--ridge=0'.

    Raises:
      UserError: λ is too small for vectors that do not vary in all directions.
    """
    covariance = sums.covariance
    scale = np.trace(covariance) / len(covariance)
    system = covariance + ridge * scale * np.eye(len(covariance))
    variances = np.linalg.eigvalsh(system)
    if variances[0] <= FLAT * variances[-1]:
        raise UserError(
            f"{where}: the {sums.count:,} vectors do not vary in all directions, so more than one map fits them: give "
            "more texts, or a --ridge such as 0.01"
        )
    kernel = np.linalg.solve(system, sums.covariance_xy)
    return Affine(kernel, sums.mean_y - sums.mean @ kernel)


def mean_cosine(vectors_NxE: np.ndarray) -> float:
    """Returns the mean cosine of two different vectors: near 0 where they point everywhere, 1 where all point alike."""
    units, n = np.asarray(unit(np.asarray(vectors_NxE, np.float32)), np.float64), len(vectors_NxE)
    return float((np.square(units.sum(0)).sum() - np.square(units).sum()) / (n * (n - 1))) if n > 1 else 1.0


def of_length_1(blueprint: Blueprint) -> bool:
    """Whether an index holds a model's vectors at length 1: it makes them so, or compares them by cosine."""
    return blueprint.head.normalize or blueprint.similarity == "cosine"


def compared(vectors_NxE: np.ndarray, blueprint: Blueprint) -> np.ndarray:
    """Returns a model's vectors as an index holds them, float32; see `of_length_1`."""
    return unit(vectors_NxE) if of_length_1(blueprint) else vectors_NxE


def require_plain(blueprint: Blueprint, where: str) -> None:
    """Refuses models whose vectors do not end with a linear layer and their length.

    Raises:
      UserError: they are cut, or have routing weights in them; `where` names the model.
    """
    if blueprint.head.moee:
        raise UserError(f"{where}: its vectors are made of routing weights, behind which no layer can stand")
    if blueprint.truncate_dim:
        raise UserError(
            f"{where}: its vectors are cut to {blueprint.truncate_dim} dimensions, behind which no layer can stand: "
            "take the model that it was made of"
        )


def with_layer(embedder: Embedder, layer: Affine, normalize: bool, similarity: str) -> Embedder:
    """Returns the model with a layer behind it, multiplied into the linear layer that it may end with.

    Args:
      embedder: the model, whether it brings its vectors to length 1 or not.
      layer: of its vectors before that.
      normalize: whether the outputs are brought to length 1.
      similarity: how they are compared.
    """
    blueprint = embedder.blueprint
    leaves = flatten(embedder.params)
    kernel, bias = layer.kernel, layer.bias
    with jax.set_mesh(embedder.mesh):
        if blueprint.head.projection_bias:
            own = to_host(leaves["projection/bias"]).astype(np.float64) @ kernel
            bias = own if bias is None else own + bias
        if blueprint.head.projection:
            kernel = to_host(leaves["projection/kernel"]).astype(np.float64) @ kernel
        head = dataclasses.replace(
            blueprint.head, projection=kernel.shape[1], projection_bias=bias is not None, normalize=normalize
        )
        blueprint = dataclasses.replace(blueprint, head=head, similarity=similarity, base="")
        factory = blueprint.factory(ModelOptions())
        wanted = flatten(factory.abstract())
        for path, values in (("projection/kernel", kernel), ("projection/bias", bias)):
            if values is not None:
                leaves[path] = put(values.astype(np.float32), embedder.mesh, wanted[path].sharding.spec)
        return Embedder(blueprint, factory, unflatten({path: leaves[path] for path in wanted}), embedder.mesh)
