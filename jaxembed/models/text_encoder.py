"""A backbone with its head: packed rows in, one float32 vector per text out."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxembed.data.batch import Rows
from jaxembed.models.language_head import LanguageConfig, LanguageHead
from jaxembed.models.latent_attention import LatentAttention
from jaxembed.models.layers.dropout import Noise
from jaxembed.models.layers.linear import Linear
from jaxembed.models.layers.routing import RouterSums
from jaxembed.models.lora import Lora, attach, is_adapter
from jaxembed.models.moee import combine, routing_width
from jaxembed.models.options import ModelOptions, TokenStates
from jaxembed.models.pooling import LayerMean, l2_normalize, pool
from jaxembed.sharding import BATCH

Params = dict[str, Any]  # a nested dict of arrays, the model's or the whole run's
BACKBONE = "backbone/"  # begins the paths of its parameters
LANGUAGE = "language/"  # of its language head's


@dataclasses.dataclass(frozen=True)
class HeadConfig:
    """How token states become a vector.

    Attributes:
      pooling: one of `pooling.MODES`, or 'latent': the mean after latent attention.
      pool_prompt: whether the prompt's tokens are pooled.
      latents: vectors that the tokens attend to, of pooling 'latent'.
      latent_heads: heads of that attention.
      pool_layers: what is pooled: a trained mean of the states of this layer (0 = the embeddings) and those above;
        -1 for the last layer's alone.
      expansion: width of a linear layer after pooling, before the projection; 0 for none (EmbeddingGemma has one).
      expansion_bias: whether it has a bias.
      projection: width E of a linear layer after pooling, 0 for none.
      projection_bias: whether it has a bias.
      normalize: vectors of length 1.
      moee: routing weights in the vectors, see `jaxembed.models.moee`: 'alone', 'concat' with the states' vector, or
        'sum', so that a dot product is the weighted sum of both similarities: `normalize` does not change such vectors.
        '' for none.
      moee_weight: of the routing weights' similarity in 'sum'.
    """

    pooling: str = "mean"
    pool_prompt: bool = True
    latents: int = 0
    latent_heads: int = 0
    pool_layers: int = -1
    expansion: int = 0
    expansion_bias: bool = False
    projection: int = 0
    projection_bias: bool = False
    normalize: bool = True
    moee: str = ""
    moee_weight: float = 1.0

    @property
    def unit(self) -> bool:
        """Whether vectors are brought to length 1 as a whole."""
        return self.normalize and self.moee != "sum"

    def width(self, backbone: Any) -> int:
        """Returns E, the dimensions of a vector, on a backbone with this frozen config."""
        states = self.projection or backbone.width
        if not self.moee:
            return states
        return routing_width(backbone) + (0 if self.moee == "alone" else states)


class TextEncoder(nnx.Module):
    """Backbone, mean of layers, latent attention, pooling, projection, normalisation; not all models have all.

    Args:
      key: PRNG key of fresh weights.
      make_backbone: the backbone's class, called with (key, config, options).
      config: the backbone's frozen config; has `width` and `initializer_range`.
      head: the head's.
      options: how to compute.
      lora: adapters of the backbone; None for none. With them the backbone's other weights and the language head's are
        not trained, so they are held in the dtype of the computation.
      language: how it predicts words; None for a model that only makes vectors.
    """

    def __init__(
        self,
        key: jax.Array,
        make_backbone: Callable[[jax.Array, Any, ModelOptions], nnx.Module],
        config: Any,
        head: HeadConfig,
        options: ModelOptions,
        lora: Lora | None = None,
        language: LanguageConfig | None = None,
    ) -> None:
        backbone_key, head_key = jax.random.split(key)
        of_backbone = dataclasses.replace(options, param_dtype=options.dtype) if lora else options
        if head.moee:
            keeping = dataclasses.replace(options.experts, keep=True)
            of_backbone = dataclasses.replace(of_backbone, experts=keeping)
        self.backbone = make_backbone(backbone_key, config, of_backbone)
        if lora:
            attach(self.backbone, lora, jax.random.fold_in(key, 2))
        dtype = jnp.dtype(options.param_dtype)
        if head.pool_layers >= 0:
            self.layer_mean = LayerMean(config.layers + 1 - head.pool_layers)
        if head.pooling == "latent":
            self.latent_attention = LatentAttention(
                jax.random.fold_in(head_key, 1),
                config.width,
                head.latents,
                head.latent_heads,
                config.initializer_range,
                dtype,
            )
        stddev, width = config.initializer_range, (("embed", config.width),)
        if head.expansion:
            wide = ((None, head.expansion),)
            expansion_key = jax.random.fold_in(head_key, 2)
            self.expansion = Linear(expansion_key, width, wide, stddev, dtype, head.expansion_bias)
            width = wide
        if head.projection:
            narrow = ((None, head.projection),)
            self.projection = Linear(head_key, width, narrow, stddev, dtype, head.projection_bias)
        if language:
            table, held = (config.padded_vocab, config.width), jnp.dtype(of_backbone.param_dtype)
            self.language = LanguageHead(jax.random.fold_in(key, 3), language, *table, stddev, held)
        self.head = head

    def __call__(self, rows: Rows, slots: int, noise: Noise | None = None) -> jax.Array:
        """Returns the vectors of the rows' spans: float32 [S, slots, E] for S batch shards."""
        return self.at_depths(rows, slots, noise, ())[0][0]

    def at_depths(
        self, rows: Rows, slots: int, noise: Noise | None, layers: tuple[int, ...]
    ) -> tuple[jax.Array, RouterSums | None]:
        """Returns the spans' vectors made of the last layer's states, and of those after each of some layers.

        A model cut to its first i layers has the vectors of layer i (2D Matryoshka, Li et al. 2024, arXiv:2402.14776;
        Starbucks, Zhuang et al. 2024, arXiv:2410.13230), so all depths share the head.

        Args:
          rows: arrays [R, L].
          slots: vectors per bin.
          noise: dropout masks; None switches dropout off.
          layers: depths, counted from 1; none where the head mixes layers, or takes routing weights.

        Returns:
          float32 [1 + len(layers), S, slots, E]: the whole model's vectors, then each depth's; and what the routers
          did, stacked over sparse layers, None where there are none.
        """
        depth = self.backbone.config.layers
        if self.head.pool_layers >= 0:
            states = self.backbone(rows, noise, tuple(range(self.head.pool_layers, depth + 1)))
            return self._vectors(self.layer_mean(states.chosen), rows, slots, states)[None], _sums(states)
        states = self.backbone(rows, noise, layers)
        chosen = [
            hidden if i == depth else self.backbone.finish(hidden)
            for i, hidden in zip(layers, states.chosen if layers else ())
        ]
        vectors = jnp.stack([self._vectors(hidden, rows, slots, states) for hidden in (states.last, *chosen)])
        return vectors, _sums(states)

    def word_states(self, rows: Rows, noise: Noise | None = None) -> tuple[jax.Array, RouterSums | None]:
        """Returns what scores of words are made of, [R, L, D] in the compute dtype, and what the routers did."""
        states = self.backbone(rows, noise)
        return self.language(states.last), _sums(states)

    @property
    def word_table(self) -> jax.Array:
        """A vector per word, [V', D]: scores of words are the products with these."""
        if self.language.config.own_table:
            return self.language.table.embedding[...]
        return getattr(self.backbone, "embeddings", self.backbone).token.embedding[...]  # BERT's lies among others

    @property
    def word_bias(self) -> jax.Array | None:
        """What is added to the scores, [V'], None for nothing."""
        return self.language.bias[...] if self.language.config.bias else None

    def _vectors(self, hidden_RxLxD: jax.Array, rows: Rows, slots: int, states: TokenStates) -> jax.Array:
        """Applies the head to token states: float32 [S, slots, E]; `states` has the routing weights."""
        mode = self.head.pooling
        if mode == "latent":
            hidden_RxLxD, mode = self.latent_attention(hidden_RxLxD), "mean"
        vectors = pool(hidden_RxLxD, rows, slots, mode, self.head.pool_prompt)
        if self.head.expansion:
            vectors = self.expansion(vectors, P(BATCH, None, None))
        if self.head.projection:
            vectors = self.projection(vectors, P(BATCH, None, None))
        if self.head.moee:
            vectors = combine(vectors, states.routed.probabilities, rows, self.head)
        return l2_normalize(vectors) if self.head.unit else vectors


def _sums(states: TokenStates) -> RouterSums | None:
    return None if states.routed is None else states.routed.sums


@dataclasses.dataclass(frozen=True)
class ModelFactory:
    """Makes models and joins them with parameters; everything static about a model.

    Attributes:
      make: returns a fresh model; to be called under `jax.jit` or `jax.eval_shape` inside `jax.set_mesh`.
    """

    make: Callable[[], TextEncoder]

    @property
    def width(self) -> int:
        """E, the dimensions of a vector; needs a mesh set."""
        model = jax.eval_shape(self.make)
        return model.head.width(model.backbone.config)

    @property
    def language(self) -> LanguageConfig | None:
        """How the model predicts words; needs a mesh set."""
        model = jax.eval_shape(self.make)
        return model.language.config if hasattr(model, "language") else None

    @property
    def depth(self) -> int:
        """The layers of the backbone; needs a mesh set."""
        return jax.eval_shape(self.make).backbone.config.layers

    def abstract(self) -> Params:
        """Returns the parameters as ShapeDtypeStructs with shardings; needs a mesh set."""
        return _pure(nnx.state(jax.eval_shape(self.make)))

    def fresh(self) -> Params:
        """Returns fresh parameters; to be called under jit, so that each is born on its shards."""
        return _pure(nnx.state(self.make()))

    def bind(self, params: Params) -> TextEncoder:
        """Returns the model with these parameters."""
        graphdef, state = nnx.split(jax.eval_shape(self.make))
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state)

    @functools.cached_property
    def encoder(self) -> Callable[[Params, Rows, int], jax.Array]:
        """(params, rows, slots) → float32 [S, slots, E] on every device; compiled once per shape."""

        def encode(params: Params, rows: Rows, slots: int) -> jax.Array:
            return jax.sharding.reshard(self.bind(params)(rows, slots), P(None, None, None))

        return jax.jit(encode, static_argnums=2)


def _pure(state: nnx.State) -> Params:
    return nnx.to_pure_dict(state)


def split(params: Params) -> tuple[Params, Params]:
    """Cuts a model's parameters into those that are trained and those that are not.

    Returns:
      The adapters with the head, and the rest of the backbone with the language head; all of them and {} where there
      are no adapters.
    """
    leaves = flatten(params)
    base: Params = {}
    if any(map(is_adapter, leaves)):
        held = (BACKBONE, LANGUAGE)
        base = {path: x for path, x in leaves.items() if path.startswith(held) and not is_adapter(path)}
    return unflatten({path: x for path, x in leaves.items() if path not in base}), unflatten(base)


def join(trained: Params, base: Params) -> Params:
    """The inverse of `split`."""
    return unflatten(flatten(trained) | flatten(base))


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turns nested dicts into one dict of '/'-joined paths."""
    flat = {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, path + "/") if isinstance(value, Mapping) else {path: value}
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    nested: Params = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return nested
