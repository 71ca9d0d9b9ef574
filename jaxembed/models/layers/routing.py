"""Which experts a token goes to, and what is counted of it.

Routers are linear, their softmax in float32. Each token takes its k likeliest experts (token choice: Shazeer et al.
2017, arXiv:1701.06538; Mixtral, arXiv:2401.04088), or in training each expert its likeliest tokens of a text (expert
choice: Zhou et al. 2022, arXiv:2202.09368; within a text, so that a text's vector does not depend on its neighbours),
or the source of a text decides (Hallee et al. 2024, arXiv:2401.15713). Padding goes nowhere and counts nowhere.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxembed.data.batch import Rows
from jaxembed.hashing import mix
from jaxembed.sharding import BATCH, STATES

NOWHERE = -1  # the expert of what goes to none


@dataclasses.dataclass(frozen=True)
class ExpertsShape:
    """The shape of a sparse feed-forward part: part of a backbone's config.

    Attributes:
      count: X, the experts.
      top_k: k, those that a token takes.
      width: F of each expert.
      normalize: whether a token's k weights are made to sum to 1; else they are the softmax's over all experts.
      activation: a key of `jaxembed.models.layers.mlp.ACTIVATIONS`.
      gated: whether experts have gates.
      up_bias: whether each expert has a bias into its hidden layer. out_bias: one bias behind all experts.
      shared_width: F of the expert that all tokens take; 0 for none.
      shared_gate: whether its output is scaled by the sigmoid of a linear map.
      by_source: whether a text's source says which expert its tokens go to; there is no router then.
      served: the expert of texts without a source, where `by_source`.
    """

    count: int
    top_k: int
    width: int
    normalize: bool
    activation: str = "silu"
    gated: bool = True
    up_bias: bool = False
    out_bias: bool = False
    shared_width: int = 0
    shared_gate: bool = False
    by_source: bool = False
    served: int = 0


@dataclasses.dataclass(frozen=True)
class ExpertOptions:
    """How experts are computed.

    Attributes:
      expert_choice: in training, experts choose tokens.
      kernel: of the grouped products, 'auto' | 'blocks' | 'ragged'; see `jaxembed.models.layers.grouped`.
      capacity: what a device sends to another in one round, as a multiple of the balanced share.
      keep: whether the routers' probabilities of every token are returned too.
    """

    expert_choice: bool = False
    kernel: str = "auto"
    capacity: float = 1.25
    keep: bool = False


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterSums:
    """What routers did, summed over the real tokens of all devices; float32. Over micro-batches they add up.

    Only `probability` and `z` have gradients.

    Attributes:
      load: [X], how many times each expert was taken.
      probability: [X], the router's probabilities; None where there is no router, as the next two.
      z: [], squares of the log-sum-exp of the logits.
      entropy: [], of the probabilities, in nats.
      tokens: [], how many tokens there were.
      dropped: [], how many of these no expert took.
    """

    load: jax.Array
    probability: jax.Array | None
    z: jax.Array | None
    entropy: jax.Array | None
    tokens: jax.Array
    dropped: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routed:
    """What a sparse layer says of its router.

    Attributes:
      sums: over the tokens.
      probabilities: float32 [R, L, X], those of each token, 0 on padding; None unless asked for.
    """

    sums: RouterSums
    probabilities: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Choice:
    """Where tokens go.

    Attributes:
      experts: int32 [R, L, K], distinct numbers of experts, or NOWHERE; K is k where tokens choose, X where experts do.
      weights: float32 [R, L, K], by which their outputs are summed.
      per_token: k, at most so many experts a token on average over the tokens of a device's rows.
    """

    experts: jax.Array
    weights: jax.Array
    per_token: int


def choose(
    probabilities_RxLxX: jax.Array | None, rows: Rows, shape: ExpertsShape, expert_choice: bool = False
) -> Choice:
    """Says where each token goes.

    Args:
      probabilities_RxLxX: float32, the router's; None where there is no router.
      rows: arrays [R, L].
      shape: the experts'.
      expert_choice: whether experts choose tokens.
    """
    real = (rows.segment_ids > 0)[..., None]
    if shape.by_source:
        source = jnp.full_like(rows.segment_ids, shape.served) if rows.source is None else rows.source
        experts = jnp.where(real, source[..., None] % shape.count, NOWHERE)
        return Choice(experts, real.astype(jnp.float32), 1)
    if expert_choice:
        taken = _taken_by_experts(jax.lax.stop_gradient(probabilities_RxLxX), rows, shape)
        numbers = jax.lax.broadcasted_iota(jnp.int32, taken.shape, 2, out_sharding=STATES)
        experts, weights = jnp.where(taken, numbers, NOWHERE), jnp.where(taken, probabilities_RxLxX, 0)
    else:
        weights, experts = jax.lax.top_k(probabilities_RxLxX, shape.top_k)
        experts, weights = jnp.where(real, experts, NOWHERE), jnp.where(real, weights, 0)
    if shape.normalize:
        total = weights.sum(-1, keepdims=True)
        weights = weights / jnp.where(total > 0, total, 1)
    return Choice(experts, weights, shape.top_k)


def sums_of(
    logits_RxLxX: jax.Array | None, probabilities_RxLxX: jax.Array | None, choice: Choice, rows: Rows, count: int
) -> RouterSums:
    """Counts what a router did.

    Args:
      logits_RxLxX: float32, the router's; None where there is no router.
      probabilities_RxLxX: their softmax, 0 on padding; None where there is no router.
      choice: where tokens went.
      rows: arrays [R, L].
      count: X.
    """
    real = rows.segment_ids > 0
    taken = (choice.experts[..., None] == jnp.arange(count)).astype(jnp.float32)
    dropped = jnp.where(real & (choice.experts == NOWHERE).all(-1), 1.0, 0.0)
    probability = z = entropy = None
    if logits_RxLxX is not None:
        probability = probabilities_RxLxX.sum((0, 1))
        z = jnp.where(real, jnp.square(jax.nn.logsumexp(logits_RxLxX, -1)), 0).sum()
        fixed = jax.lax.stop_gradient(probabilities_RxLxX)
        entropy = -(fixed * jnp.log(jnp.maximum(fixed, 1e-30))).sum()
    tokens = real.astype(jnp.float32).sum()
    return RouterSums(taken.sum((0, 1, 2)), probability, z, entropy, tokens, dropped.sum())


def _taken_by_experts(probabilities_RxLxX: jax.Array, rows: Rows, shape: ExpertsShape) -> jax.Array:
    """Returns whether an expert takes a token, bool [R, L, X]: its likeliest ones of each text.

    A text of n tokens has n k seats, which differ by one at most between experts; where they cannot be equal, the
    text's number says whose are more.
    """
    n_experts, by_row = shape.count, P(BATCH, None)
    segments = jax.sharding.reshard(rows.segment_ids, by_row)
    length = segments.shape[1]
    places = jax.lax.broadcasted_iota(jnp.int32, segments.shape, 1, out_sharding=by_row)
    edge = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = jax.lax.cummax(jnp.where(edge, places, 0), axis=1)
    following = jnp.pad(jnp.where(edge, places, length)[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    tokens = jax.lax.cummin(following, axis=1, reverse=True) - first
    # The place of each token in its text, by each expert's probability: texts lie in a row one behind the other.
    shaped = (segments.shape[0], n_experts, length)
    spread = [jnp.broadcast_to(x[:, None], shaped, out_sharding=P(BATCH, None, None)) for x in (first, places)]
    scores = jax.sharding.reshard(probabilities_RxLxX, P(BATCH, None, None)).transpose(0, 2, 1)
    ordered_first, _, at = jax.lax.sort((spread[0], -scores, spread[1]), num_keys=2)
    _, rank = jax.lax.sort((at, spread[1] - ordered_first), num_keys=1)
    turn = (mix(segments.astype(jnp.uint32)) % n_experts).astype(jnp.int32)
    turned = (jnp.arange(n_experts) + turn[..., None]) % n_experts
    seats = tokens[..., None] * shape.top_k
    seats = (turned + 1) * seats // n_experts - turned * seats // n_experts
    taken = (rank.transpose(0, 2, 1) < seats) & (segments > 0)[..., None]
    return jax.sharding.reshard(taken, STATES)
