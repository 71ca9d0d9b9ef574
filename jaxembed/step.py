"""One training step: encode, loss, gradient, update. A pure function of state and batch, compiled once per rung."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from jaxembed.config import Config
from jaxembed.data.batch import Batch, Rows
from jaxembed.losses.infonce import MIN_TEMPERATURE, infonce
from jaxembed.models.layers.dropout import Noise, step_seed
from jaxembed.models.text_encoder import ModelFactory, Params
from jaxembed.optimizer import freeze, rate_factors, schedule
from jaxembed.sharding import batch_shards

Metrics = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes and a checkpoint holds. Every leaf, scalars too, has a NamedSharding.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: {'model': nested dict of arrays, 'loss': the loss's own parameters}.
      optimizer: optax state.
      average: exponential moving average of params['model'] in float32, or {} when off.
    """

    step: jax.Array
    params: Params
    optimizer: optax.OptState
    average: Params

    @property
    def served(self) -> Params:
        """The model parameters that are evaluated and exported."""
        return self.average or self.params["model"]


def loss_params(config: Config) -> Params:
    """Returns the loss's fresh parameters."""
    if not config.loss.learn_temperature:
        return {}
    return {"log_temperature": jnp.log(jnp.float32(config.loss.temperature))}


def init_state(config: Config, optimizer: optax.GradientTransformation, model: Params) -> TrainState:
    """Returns the state before the first step; to be called under jit, so that every leaf is born on its shards."""
    params = {"model": model, "loss": loss_params(config)}
    # Copies: state leaves are donated, and one buffer cannot be donated twice.
    average = jax.tree.map(lambda x: x.astype(jnp.float32) + 0, model) if config.optimizer.ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def make_loss(config: Config, factory: ModelFactory, n_positives: int) -> Callable[..., tuple[jax.Array, Metrics]]:
    """Returns (params, batch, step) → (loss, metrics); step None switches dropout off."""

    def loss(params: Params, batch: Batch, step: jax.Array | None) -> tuple[jax.Array, Metrics]:
        seed = None if step is None else step_seed(config.seed, step)
        queries, documents = encode(factory, params["model"], batch, seed)
        temperature = jnp.float32(config.loss.temperature)
        if config.loss.learn_temperature:
            temperature = jnp.maximum(jnp.exp(params["loss"]["log_temperature"]), MIN_TEMPERATURE)
        value, metrics = infonce(
            queries,
            documents,
            batch.queries,
            batch.documents,
            temperature,
            n_positives,
            config.loss.symmetric,
            config.loss.tile,
        )
        return value, metrics | {"temperature": temperature}

    return loss


def encode(factory: ModelFactory, model: Params, batch: Batch, seed: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Encodes a batch, one micro-batch at a time.

    With several micro-batches this is gradient caching (Gao et al. 2021, arXiv:2101.06983): each is checkpointed, so
    activations of one exist at a time, while the loss still sees all texts.

    Args:
      factory: the model's.
      model: its parameters.
      batch: see `jaxembed.data.batch.Batch`.
      seed: of the dropout masks; None for none.

    Returns:
      float32 vectors of queries [Nq, E] and documents [Nd, E], in the order of the batch's Texts.
    """
    micro_batches = batch.rows.tokens.shape[0]
    bins = batch_shards(jax.sharding.get_abstract_mesh()) * micro_batches
    n_queries, n_documents = batch.queries.pair.shape[0] // bins, batch.documents.pair.shape[0] // bins

    def encode_rows(rows: Rows) -> jax.Array:
        noise = None if seed is None else Noise(seed, rows.segment_ids, rows.positions)
        return factory.bind(model)(rows, n_queries + n_documents, noise)

    if micro_batches == 1:
        vectors = encode_rows(jax.tree.map(lambda x: x[0], batch.rows))[None]
    else:
        body = jax.checkpoint(encode_rows, prevent_cse=False)
        _, vectors = jax.lax.scan(lambda _, rows: (None, body(rows)), None, batch.rows)
    by_shard = vectors.swapaxes(0, 1)  # [M, S, T, E] → [S, M, T, E]: the order of Texts
    flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
    return flat(by_shard[:, :, :n_queries]), flat(by_shard[:, :, n_queries:])


def make_step(
    config: Config, factory: ModelFactory, optimizer: optax.GradientTransformation, n_positives: int, steps: int
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns the train step.

    A step whose loss or gradient norm is not finite changes nothing but the metrics, so that the last good state is
    never lost to a donated buffer.
    """
    compute_loss = make_loss(config, factory, n_positives)
    rate = schedule(config.optimizer, steps)
    uses_noise = config.model.dropout > 0 or config.model.attention_dropout > 0

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        def loss(params: Params) -> tuple[jax.Array, Metrics]:
            params = freeze(params, rate_factors(config.optimizer, params))
            return compute_loss(params, batch, state.step if uses_noise else None)

        (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
        norm = optax.global_norm(gradients)

        def update(state: TrainState) -> TrainState:
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
            params = optax.apply_updates(state.params, updates)
            decay = config.optimizer.ema
            served = params["model"] if decay else {}
            average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.average, served)
            return TrainState(state.step + 1, params, optimizer_state, average)

        # A branch, and not a select per array: that would read all of the state once more.
        new = jax.lax.cond(jnp.isfinite(value) & jnp.isfinite(norm), update, lambda state: state, state)
        metrics |= {"loss": value, "grad_norm": norm, "learning_rate": rate(state.step)}
        return new, metrics

    return step
