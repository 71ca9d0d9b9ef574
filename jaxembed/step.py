"""One training step: encode, loss, gradient, update. A pure function of state and batch, compiled once per rung."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from jaxembed.config import Config
from jaxembed.data.batch import Batch, PairShape, Rows
from jaxembed.losses.embedded import Embedded
from jaxembed.losses.objective import LossParams, loss_params, objective, terms_of
from jaxembed.losses.router import router_loss
from jaxembed.models.layers.dropout import Noise, step_seed
from jaxembed.models.layers.routing import RouterSums
from jaxembed.models.text_encoder import LANGUAGE, ModelFactory, Params, flatten, join, split
from jaxembed.optimizer import freeze, make_optimizer, rate_factors, schedule
from jaxembed.reading import noised, token_losses
from jaxembed.sharding import BATCH, MICRO_ROWS, batch_shards

Metrics = dict[str, jax.Array]
# Parameters that a step reads and leaves as they are, and that no checkpoint holds: the 'base' that the model's
# adapters stand on, a 'teacher'; each where there is one.
Given = dict[str, Params]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that a step changes and a checkpoint holds. Every leaf, scalars too, has a NamedSharding.

    Attributes:
      step: int32 scalar, optimizer steps done.
      params: {'model': nested dict of the model's trained arrays, 'loss': the loss's own parameters}.
      optimizer: optax state.
      average: exponential moving average of params['model'] in float32, or {} when off.
    """

    step: jax.Array
    params: Params
    optimizer: optax.OptState
    average: Params

    @property
    def served(self) -> Params:
        """The model's trained parameters as they are evaluated and exported."""
        return self.average or self.params["model"]


def init_state(
    config: Config, optimizer: optax.GradientTransformation, model: Params, width: int, teacher_width: int
) -> TrainState:
    """Returns the state before the first step; to be called under jit, so that every leaf is born on its shards.

    Args:
      config: the run's.
      optimizer: the run's.
      model: the model's trained parameters.
      width: E, of its vectors.
      teacher_width: F, of a teacher's; 0 without one.
    """
    params = {"model": model, "loss": loss_params(config, width, teacher_width)}
    # Copies: state leaves are donated, and one buffer cannot be donated twice.
    average = jax.tree.map(lambda x: x.astype(jnp.float32) + 0, model) if config.optimizer.ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def make_loss(
    config: Config, factory: ModelFactory, pair: PairShape, teacher: ModelFactory | None = None, steps: int = 1
) -> Callable[[Params, Batch, jax.Array, Given], tuple[jax.Array, Metrics]]:
    """Returns (params, batch, step, what is given) → (loss, metrics).

    A teacher sees the texts whole, without dropout, and has no gradient. `steps` are those of the stage, over which
    losses' weights may change.
    """
    m = config.model
    drops = max(m.dropout, m.attention_dropout, m.lora.dropout) > 0
    uses_noise = drops or m.anneal_attention > 0 or m.experts.routing == "expert_choice"
    over_vectors, over_tokens = (terms_of(config, over_tokens=x) for x in (False, True))
    of_vectors = _make_vector_loss(config, factory, pair, teacher)
    some_sources = any(len(term.sources) < len(config.data.train) for term in over_tokens)

    def loss(params: Params, batch: Batch, step: jax.Array, given: Given) -> tuple[jax.Array, Metrics]:
        seed, done = step_seed(config.seed, step), jnp.minimum(step / max(steps - 1, 1), 1)
        noise_seed = seed if uses_noise else None
        ahead = jnp.minimum((step + 1) / m.anneal_attention, 1) if m.anneal_attention else None
        model = join(params["model"], given.get("base", {}))
        value, metrics, routers = jnp.zeros(()), {}, None
        if over_vectors:
            value, metrics, routers = of_vectors(params["loss"], model, batch, seed, noise_seed, ahead, done, given)
        if over_tokens:
            rows = _with_sources(batch, pair) if some_sources or m.experts.routing == "source" else batch.rows
            added, said, routed = token_losses(config, factory, model, rows, pair.texts, seed, noise_seed, ahead, done)
            value, metrics = value + added, metrics | said
            routers = routed if routers is None else jax.tree.map(jnp.add, routers, routed)
        if routers is not None:
            added, said = router_loss(routers, config.router)
            value, metrics = value + added, metrics | said
        return value, metrics

    return loss


def _make_vector_loss(
    config: Config, factory: ModelFactory, pair: PairShape, teacher: ModelFactory | None
) -> Callable[..., tuple[jax.Array, Metrics, RouterSums | None]]:
    """Returns what encodes a step's texts and compares their vectors: → (loss, metrics, what the routers did)."""
    m, mask, layers = config.model, config.data.mask, config.matryoshka.layers

    def loss(
        params: LossParams,
        model: Params,
        batch: Batch,
        seed: jax.Array,
        noise_seed: jax.Array | None,
        ahead: jax.Array | None,
        done: jax.Array,
        given: Given,
    ) -> tuple[jax.Array, Metrics, RouterSums | None]:
        n = batch.queries.pair.shape[0]
        rows = _with_sources(batch, pair) if m.experts.routing == "source" else batch.rows
        if mask.query or mask.document:
            rows = noised(rows, mask, factory.language, pair.texts, seed)
        vectors, routers = encode(factory, model, rows, n, pair.texts, noise_seed, layers, ahead)
        taught_queries = taught_documents = None
        if teacher:
            rows = batch.rows if batch.teacher_rows is None else batch.teacher_rows
            taught, _ = jax.lax.stop_gradient(encode(teacher, given["teacher"], rows, n, pair.texts))
            (taught_queries,), (others,) = taught
            taught_documents = others[:, : pair.documents]
        embedded = [
            Embedded(
                queries=queries,
                documents=others[:, : pair.documents],
                query_texts=batch.queries,
                document_texts=batch.documents,
                negative_queries=others[:, pair.documents :] if pair.negative_queries else None,
                teacher_queries=taught_queries,
                teacher_documents=taught_documents,
                seed=seed,
                positives=pair.positives,
            )
            for queries, others in zip(*vectors)
        ]
        return *objective(config, params, embedded, done), routers

    return loss


def _with_sources(batch: Batch, pair: PairShape) -> Rows:
    """Returns the rows, in which every token knows the data source of its text."""
    n = batch.queries.pair.shape[0]
    pairs, sources = (jax.sharding.reshard(x, P(None)) for x in (batch.queries.pair, batch.queries.source))
    by_pair = jnp.zeros(n, jnp.int32).at[jnp.where(pairs < 0, n, pairs)].set(sources, mode="drop")
    numbers = jnp.maximum(batch.rows.segment_ids - 1, 0) // pair.texts
    source = by_pair.at[numbers].get(out_sharding=MICRO_ROWS, mode="promise_in_bounds")
    return dataclasses.replace(batch.rows, source=source)


def encode(
    factory: ModelFactory,
    model: Params,
    rows: Rows,
    n_pairs: int,
    texts_per_pair: int,
    seed: jax.Array | None = None,
    layers: tuple[int, ...] = (),
    ahead: jax.Array | None = None,
) -> tuple[tuple[jax.Array, jax.Array], RouterSums | None]:
    """Encodes a batch, one micro-batch at a time.

    With several micro-batches this is gradient caching (Gao et al. 2021, arXiv:2101.06983): each is checkpointed, so
    activations of one exist at a time, while the loss still sees all texts.

    Args:
      factory: the model's.
      model: its parameters.
      rows: the texts' tokens, arrays [M, R, L].
      n_pairs: N, pairs of the global batch.
      texts_per_pair: T, a query and what comes with it.
      seed: of the dropout masks; None for none.
      layers: depths at which vectors are wanted too.
      ahead: how far attention has grown from causal, with a seed; None where it does not.

    Returns:
      float32 vectors of the queries [1 + depths, N, E] and of what comes with each [1 + depths, N, T - 1, E], sharded
      by pair, in the order of the batch's Texts: the full backbone's first, then those of `layers`. Beside these, what
      the routers of sparse layers did with all texts, None where there are none.
    """
    micro_batches = rows.tokens.shape[0]
    n_queries = n_pairs // (batch_shards(jax.sharding.get_abstract_mesh()) * micro_batches)

    def encode_rows(rows: Rows) -> tuple[jax.Array, RouterSums | None]:
        noise = None if seed is None else Noise(seed, rows.segment_ids, rows.positions, ahead)
        return factory.bind(model).at_depths(rows, n_queries * texts_per_pair, noise, layers)

    if micro_batches == 1:
        vectors, routers = jax.tree.map(lambda x: x[None], encode_rows(jax.tree.map(lambda x: x[0], rows)))
    else:
        body = jax.checkpoint(encode_rows, prevent_cse=False)
        _, (vectors, routers) = jax.lax.scan(lambda _, rows: (None, body(rows)), None, rows)
    # [M, V, S, slots, E] → [V, S, M, slots, E]: the order of Texts. A bin holds its queries, then what comes with them.
    by_shard = vectors.transpose(1, 2, 0, 3, 4)
    depths, *_, width = by_shard.shape
    queries, others = by_shard[:, :, :, :n_queries], by_shard[:, :, :, n_queries:]
    # Said, because what of several dimensions of size 1 was sharded cannot be told from the shapes.
    by_query = jax.lax.reshape(queries, (depths, n_pairs, width), out_sharding=P(None, BATCH, None))
    others_shape, others_spec = (depths, n_pairs, texts_per_pair - 1, width), P(None, BATCH, None, None)
    by_query = by_query, jax.lax.reshape(others, others_shape, out_sharding=others_spec)
    return by_query, jax.tree.map(lambda x: x.sum(0), routers)


def build(
    config: Config, factory: ModelFactory, pair: PairShape, steps: int, teacher: ModelFactory | None = None
) -> tuple[Callable[[Params], TrainState], Callable[[TrainState, Batch, Given], tuple[TrainState, Metrics]]]:
    """Returns what makes the state before the first step out of the model's trained parameters, and the train step.

    Neither is compiled; `init_state` and `make_step` say more. Needs a mesh set.
    """
    widths = factory.width, teacher.width if teacher else 0
    trained, _ = split(factory.abstract())
    config = _without_idle(config, trained)
    abstract = {"model": trained, "loss": jax.eval_shape(lambda: loss_params(config, *widths))}
    optimizer = make_optimizer(config.optimizer, steps, abstract)

    def first_state(model: Params) -> TrainState:
        return init_state(config, optimizer, model, *widths)

    return first_state, make_step(config, factory, optimizer, pair, steps, teacher)


def _without_idle(config: Config, model: Params) -> Config:
    """Returns the config with those parts of the model frozen that no loss of the stage has a use for.

    Else weight decay would wear down the language head of an adapted model while its vectors are trained.
    """
    idle = () if terms_of(config, over_tokens=True) else (LANGUAGE,)
    idle += () if terms_of(config) else ("projection/", "expansion/", "latent_attention/", "layer_mean/")
    frozen = tuple((f"^model/{part}", 0.0) for part in idle if any(path.startswith(part) for path in flatten(model)))
    by_regex = config.optimizer.by_regex + frozen
    return dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, by_regex=by_regex))


def make_step(
    config: Config,
    factory: ModelFactory,
    optimizer: optax.GradientTransformation,
    pair: PairShape,
    steps: int,
    teacher: ModelFactory | None = None,
) -> Callable[[TrainState, Batch, Given], tuple[TrainState, Metrics]]:
    """Returns the train step: (state, batch, what is given) → (state, metrics).

    A step whose loss or gradient norm is not finite changes nothing but the metrics, so that the last good state is
    never lost to a donated buffer.
    """
    compute_loss = make_loss(config, factory, pair, teacher, steps)
    rate = schedule(config.optimizer, steps)

    def step(state: TrainState, batch: Batch, given: Given) -> tuple[TrainState, Metrics]:
        def loss(params: Params) -> tuple[jax.Array, Metrics]:
            params = freeze(params, rate_factors(config.optimizer, params))
            return compute_loss(params, batch, state.step, given)

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
