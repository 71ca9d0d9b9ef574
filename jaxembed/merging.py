"""Several models into one: sums of their weights, and what lies between two of them on a sphere.

Models are read one after another onto the mesh, in float32: a sum holds itself and one model, slerp two models. What
they must have in common is looked at before any weight is read.

A sum is a mean (model soups, Wortsman et al. 2022, arXiv:2203.05482), or what other models have learned since a common
beginning, their task vectors, put on that (task arithmetic, Ilharco et al. 2022, arXiv:2212.04089).
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jaxembed import model_source
from jaxembed.blueprint import Blueprint
from jaxembed.embedder import Embedder
from jaxembed.errors import UserError
from jaxembed.hf.hub import resolve
from jaxembed.model_source import Loader
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import BACKBONE, ModelFactory, Params, flatten, unflatten

PARALLEL = 1e-3  # two tensors at a smaller angle to a line have no arc between them, within float32
NO_MATTER = ("initializer_range",)  # fields of a backbone's config that its vectors do not depend on

Seen = Callable[[str, Embedder], None]  # is shown every model that is read


@dataclasses.dataclass(frozen=True)
class Source:
    """A model whose weights are not read yet.

    Attributes:
      spec: as the user named it.
      blueprint: all of it but its weights; without a head that predicts words.
      load: puts its weights onto the mesh in use.
    """

    spec: str
    blueprint: Blueprint
    load: Loader

    @functools.cached_property
    def factory(self) -> ModelFactory:
        """The model's maker."""
        return self.blueprint.factory(ModelOptions())

    def read(self, mesh: jax.sharding.Mesh, seen: Seen | None = None) -> Params:
        """Returns the weights on the mesh, float32, after showing the model to `seen`."""
        with jax.set_mesh(mesh):
            embedder = Embedder(self.blueprint, self.factory, self.load(self.factory), mesh)
        if seen:
            seen(self.spec, embedder)
        return embedder.params

    def with_params(self, params: Params, mesh: jax.sharding.Mesh) -> Embedder:
        """Returns the model with other weights. It is no run's: scores of the run are not its own."""
        return Embedder(dataclasses.replace(self.blueprint, base=""), self.factory, params, mesh)


def open_sources(specs: Sequence[str], mesh: jax.sharding.Mesh, base: str = "") -> list[Source]:
    """Opens models that are to become one.

    Args:
      specs: what `Embedder.load` takes.
      mesh: where their weights are to lie.
      base: what they began with, '' for none. It may be pooled in another way, as a bare transformer is.

    Returns:
      The models; behind them the base, where there is one.

    Raises:
      UserError: one cannot be opened; or it differs from the first in its architecture, the shape of a leaf, its head
        or its tokenizer, or makes vectors of routing weights.
    """
    sources = [_open(spec) for spec in (*specs, *([base] if base else []))]
    for source in sources:
        if source.blueprint.head.moee:
            raise UserError(
                f"{source.spec}: makes vectors of routing weights, which no folder holds: take another model"
            )
    for number, source in enumerate(sources[1:], 1):
        _require_alike(sources[0], source, mesh, heads=number < len(specs))
    return sources


def _open(spec: str) -> Source:
    if model_source.is_run(spec):
        blueprint, load = model_source.open_run(spec)
    else:
        blueprint, load = model_source.open_folder(resolve(spec))
    return Source(spec, dataclasses.replace(blueprint, language=None), load)


def _require_alike(first: Source, other: Source, mesh: jax.sharding.Mesh, heads: bool) -> None:
    """Refuses two models whose weights, or `heads`, do not stand for the same."""
    a, b = first.blueprint, other.blueprint
    both = f"{first.spec} and {other.spec} cannot become one model"
    if a.architecture.model_type != b.architecture.model_type:
        raise UserError(f"{both}: a {a.architecture.model_type} and a {b.architecture.model_type}")
    with jax.set_mesh(mesh):
        shapes, others = ({path: x.shape for path, x in flatten(s.factory.abstract()).items()} for s in (first, other))
    for path in sorted(shapes.keys() | others.keys()):
        if shapes.get(path) != others.get(path):
            said, instead = (str(x[path]) if path in x else "none" for x in (shapes, others))
            raise UserError(f"{both}: {path} is {said} in the first, {instead} in the other")
    compared = [("backbones", a.backbone, b.backbone), *([("heads", a.head, b.head)] if heads else [])]
    for what, one, two in compared:
        for field in dataclasses.fields(one):
            said, instead = getattr(one, field.name), getattr(two, field.name)
            if said != instead and field.name not in NO_MATTER:
                raise UserError(f"{both}: {field.name} of their {what} differs: {said} and {instead}")
    if a.tokenizer.fingerprint() != b.tokenizer.fingerprint():
        raise UserError(f"{both}: they have different tokenizers, so their tables of words do not fit")


def linear(
    sources: Sequence[Source],
    coefficients: Sequence[float],
    mesh: jax.sharding.Mesh,
    seen: Seen | None = None,
) -> Embedder:
    """Returns the sum of the models' weights times their coefficients, as the first model in all else.

    Args:
      sources: from `open_sources`.
      coefficients: of each; models with 0 are only read for `seen`.
      mesh: where to compute.
      seen: is shown each model, before its weights are let go.

    Raises:
      UserError: a model's weights are damaged, or the sum is not finite.
    """
    total: Params | None = None
    for source, coefficient in zip(sources, coefficients, strict=True):
        if not coefficient and not seen:
            continue
        params = source.read(mesh, seen)
        if coefficient:
            with jax.set_mesh(mesh):
                factor = jnp.float32(coefficient)
                total = _scaled(params, factor) if total is None else _add(total, params, factor)
        del params  # before the next one comes
    return _finished(sources[0], total, mesh)


def between(a: Source, b: Source, t: float, mesh: jax.sharding.Mesh, seen: Seen | None = None) -> Embedder:
    """Returns what lies between two models, each tensor turned and scaled evenly from one to the other.

    With the angle θ between two tensors as vectors, sin((1 - t) θ) / sin θ of the first and sin(t θ) / sin θ of the
    second (slerp, Shoemake 1985, "Animating rotation with quaternion curves"). Tensors that are nearly parallel or
    opposite, or zero, are mixed evenly, 1 - t and t. Tensors are those of a folder: one for each layer and expert.

    Args:
      a, b: from `open_sources`.
      t: 0 = the first, 1 = the second.
      mesh: where to compute.
      seen: is shown both.

    Raises:
      UserError: a model's weights are damaged.
    """
    first, second = flatten(a.read(mesh, seen)), flatten(b.read(mesh, seen))
    architecture, backbone = a.blueprint.architecture, a.blueprint.backbone
    lead = {BACKBONE + path: row.stacked for row in architecture.rows(backbone) for path, _ in row.parts}
    with jax.set_mesh(mesh):
        mixed = {path: _slerp(first.pop(path), second.pop(path), t, lead.get(path, 0)) for path in list(first)}
    return _finished(a, unflatten(mixed), mesh)


@jax.jit
def _scaled(params: Params, factor: jax.Array) -> Params:
    return jax.tree.map(lambda x: factor * x, params)


@functools.partial(jax.jit, donate_argnums=0)
def _add(total: Params, params: Params, factor: jax.Array) -> Params:
    return jax.tree.map(lambda y, x: y + factor * x, total, params)


@functools.partial(jax.jit, static_argnums=3)
def _slerp(a: jax.Array, b: jax.Array, t: float, lead: int) -> jax.Array:
    """Slerp over all but the first `lead` axes, of two arrays of one shape."""
    axes = tuple(range(lead, a.ndim))

    def norm(x: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.square(x).sum(axes, keepdims=True))

    tiny = jnp.finfo(jnp.float32).tiny
    unit_a, unit_b = a / jnp.maximum(norm(a), tiny), b / jnp.maximum(norm(b), tiny)
    # Of small angles, an arc cosine would lose half the digits; Kahan's form loses none.
    angle = 2 * jnp.arctan2(norm(unit_a - unit_b), norm(unit_a + unit_b))
    sine = jnp.sin(angle)
    even = (sine < PARALLEL) | (norm(a) == 0) | (norm(b) == 0)
    sine = jnp.where(even, 1, sine)
    of_a = jnp.where(even, 1 - t, jnp.sin((1 - t) * angle) / sine)
    of_b = jnp.where(even, t, jnp.sin(t * angle) / sine)
    return of_a * a + of_b * b


def _finished(first: Source, params: Params | None, mesh: jax.sharding.Mesh) -> Embedder:
    if params is None:
        raise UserError("--weights: all are 0, which leaves nothing of any model")
    with jax.set_mesh(mesh):
        finite = jax.jit(lambda tree: [jnp.isfinite(x).all() for x in jax.tree.leaves(tree)])(params)
    broken = [path for path, good in zip(flatten(params), finite) if not good]
    if broken:
        raise UserError(
            f"the merged weights are not finite, first in {broken[0]}: are those of all models, and --weights?"
        )
    return first.with_params(params, mesh)
