"""Attention inside the segments of packed rows.

What may attend to what is a small spec and integer arrays, never a dense mask handed around: a token sees the tokens
of its own segment (its text), in a causal layer only those before it, in a local one only those near it. Padding
(segment 0) sees padding, which keeps every softmax finite.

Implementations: `xla`, everywhere; `pallas`, the kernels that JAX ships and that know segment ids: Triton on GPU
(jax.experimental.pallas.ops.gpu.attention), splash attention on TPU (jax.experimental.pallas.ops.tpu).
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jaxembed.errors import UserError
from jaxembed.models.layers.dropout import Noise, dropout_weights, seen_ahead
from jaxembed.sharding import BATCH, ROWS, platform

MASKED = -1e30  # finite: a row without any allowed key must not become NaN
KERNEL_BLOCK = 128  # the kernels want rows in multiples of this many tokens
# Bytes of one head's vector for which the Triton kernel was compiled, forward and backward, within the shared memory of
# GPUs down to 99 KiB (compute capability 8.9): with blocks of 128 x 128 tokens, and the widest, with 64 x 32.
WIDE_HEAD, WIDEST_HEAD = 256, 512

MODES = ("bidirectional", "causal", "prefix")

Kernel = Callable[..., jax.Array]  # one device's query, key, value, segment_ids, spec, interpret → output

HEADS = P(BATCH, "sequence", "tensor", None)  # queries [R, L, H, K]
WHOLE_HEADS = P(BATCH, None, "tensor", None)  # keys and values: every token of the row


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What a layer's attention may see, and how it scores.

    Attributes:
      mode: 'bidirectional': the whole text; 'causal': tokens at or before the query's position; 'prefix': these and the
        text's prefix, whose tokens so see one another (Raffel et al. 2020, arXiv:1910.10683).
      reach: the farthest distance, in tokens, at which a token is seen, on either side; 0 = any.
      softcap: scores s become softcap · tanh(s / softcap), which bounds them (Gemma 2, arXiv:2408.00118); 0 = off.
      scale: of the scores; 0 = 1 / sqrt(K).
      kernel: 'xla', 'pallas', or 'auto': pallas where it serves.
      dropout: of attention weights (xla only).
    """

    mode: str = "bidirectional"
    reach: int = 0
    softcap: float = 0.0
    scale: float = 0.0
    kernel: str = "auto"
    dropout: float = 0.0

    @property
    def causal(self) -> bool:
        """Whether nothing after a token is seen, whatever the text."""
        return self.mode == "causal"

    def score_scale(self, width: int) -> float:
        """Returns the factor of the scores of heads of this width."""
        return self.scale or 1 / math.sqrt(width)

    def in_rows_of(self, length: int) -> "AttentionSpec":
        """Returns the spec without a reach that no row of this length exceeds."""
        return dataclasses.replace(self, reach=0) if self.reach >= length - 1 else self


def attention(
    query_RxLxHxK: jax.Array,
    key_RxLxGxK: jax.Array,
    value_RxLxGxK: jax.Array,
    segment_ids_RxL: jax.Array,
    spec: AttentionSpec,
    noise: Noise | None = None,
    place: jax.typing.ArrayLike = 0,
    *,
    prefix_RxL: jax.Array | None = None,
    bias_HxW: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762), restricted to segments.

    With fewer key heads than query heads, G < H, each serves H / G consecutive query heads (grouped queries, Ainslie et
    al. 2023, arXiv:2305.13245).

    Args:
      query_RxLxHxK: queries, any float dtype; key and value the same.
      key_RxLxGxK: keys.
      value_RxLxGxK: values.
      segment_ids_RxL: int32, the text of each token, 0 for padding.
      spec: what may be seen.
      noise: dropout of attention weights, and attention that grows from causal; both are off when None.
      place: number of the call's place in the model, for the dropout mask.
      prefix_RxL: bool, the tokens of texts' prefixes; wanted by the mode 'prefix' alone.
      bias_HxW: float32, added to the scores by relative position: entry L - 1 + (key - query), W = 2 L - 1. None for no
        bias.

    Returns:
      [R, L, H, K] in the queries' dtype, sharded as the queries.

    Raises:
      UserError: `spec` insists on a kernel that cannot serve here.
    """
    spec = spec.in_rows_of(query_RxLxHxK.shape[1])
    query_RxLxHxK = jax.sharding.reshard(query_RxLxHxK, HEADS)
    key_RxLxHxK, value_RxLxHxK = (_for_each_head(x, query_RxLxHxK.shape[2]) for x in (key_RxLxGxK, value_RxLxGxK))
    if bias_HxW is None and _use_kernel(query_RxLxHxK, spec, noise):
        kernel = KERNELS[platform()]
        return kernel_attention(query_RxLxHxK, key_RxLxHxK, value_RxLxHxK, segment_ids_RxL, spec, kernel)
    allowed = _allowed(segment_ids_RxL, spec, prefix_RxL, noise if _grows(spec, noise) else None)
    return _xla_attention(query_RxLxHxK, key_RxLxHxK, value_RxLxHxK, allowed, spec, noise, place, bias_HxW)


def _for_each_head(x_RxLxGxK: jax.Array, n_heads: int) -> jax.Array:
    """Repeats key or value heads for the query heads that they serve; every token of the row on every device."""
    n = x_RxLxGxK.shape[2]
    if n < n_heads:
        axis = jax.typeof(x_RxLxGxK).sharding.spec[2]  # 'tensor' where it divides G, else each device has them all
        x_RxLxGxK = jax.sharding.reshard(x_RxLxGxK, P(BATCH, None, axis, None))
        x_RxLxGxK = jnp.repeat(x_RxLxGxK, n_heads // n, axis=2, out_sharding=P(BATCH, None, axis, None))
    return jax.sharding.reshard(x_RxLxGxK, WHOLE_HEADS)


def _grows(spec: AttentionSpec, noise: Noise | None) -> bool:
    """Whether attention is on its way from causal to what the spec says."""
    return noise is not None and noise.ahead is not None and not spec.causal


def _allowed(
    segment_ids_RxL: jax.Array, spec: AttentionSpec, prefix_RxL: jax.Array | None, growing: Noise | None
) -> jax.Array:
    """Returns what may be seen: bool [R, query, key]; `growing` says how far attention has grown."""
    whole_ids = jax.sharding.reshard(segment_ids_RxL, P(BATCH, None))
    allowed = segment_ids_RxL[:, :, None] == whole_ids[:, None, :]
    # Texts lie in order inside a row, so the place in the row decides; no positions are needed.
    place = jnp.arange(segment_ids_RxL.shape[1])
    ahead = jax.sharding.reshard(place[None, :] - place[:, None], P("sequence", None))  # key's place - query's
    if spec.mode == "causal":
        allowed &= ahead <= 0
    elif spec.mode == "prefix":
        allowed &= (ahead <= 0) | jax.sharding.reshard(prefix_RxL, P(BATCH, None))[:, None, :]
    if growing is not None:
        allowed &= (ahead <= 0) | seen_ahead(growing)
    return allowed & (jnp.abs(ahead) <= spec.reach) if spec.reach else allowed


def _xla_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    allowed: jax.Array,
    spec: AttentionSpec,
    noise: Noise | None,
    place: jax.typing.ArrayLike,
    bias_HxW: jax.Array | None,
) -> jax.Array:
    query = query * spec.score_scale(query.shape[-1])  # cheaper than scaling the scores, L / K times as many
    # Heads before tokens: on CPU, products over axes that do not lead take half as long again.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    scores = jnp.einsum("rhlk,rhmk->rhlm", query, key, preferred_element_type=jnp.float32)
    if spec.softcap:
        scores = spec.softcap * jnp.tanh(scores / spec.softcap)
    if bias_HxW is not None:
        scores += _by_distance(bias_HxW, scores.shape[-1])
    scores = jnp.where(allowed[:, None], scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    # The softmax's division comes after the product with the values, K / L times as much to divide.
    total = weights.sum(-1, keepdims=True)
    weights = dropout_weights(weights, spec.dropout, noise, jnp.asarray(place, jnp.uint32))
    out = jnp.einsum("rhlm,rhmk->rhlk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return jnp.swapaxes(out / total, 1, 2).astype(query.dtype)


def _by_distance(bias_HxW: jax.Array, length: int) -> jax.Array:
    """Returns the bias of each query and key: [H, query, key]."""
    place = jnp.arange(length)
    index = jax.sharding.reshard(length - 1 + place[None, :] - place[:, None], P("sequence", None))
    bias_HxW = jax.sharding.reshard(bias_HxW, P("tensor", None))
    return bias_HxW.at[:, index].get(out_sharding=P("tensor", "sequence", None), mode="promise_in_bounds")


def _use_kernel(query: jax.Array, spec: AttentionSpec, noise: Noise | None) -> bool:
    if spec.kernel == "xla" or (spec.dropout > 0 and noise is not None) or _grows(spec, noise):
        return False
    obstacle = _obstacle(query, spec, platform())
    if obstacle and spec.kernel == "pallas":
        raise UserError(f"config.model.attention_kernel = 'pallas': {obstacle}; or take 'xla'")
    return not obstacle


def _obstacle(query: jax.Array, spec: AttentionSpec, backend: str) -> str:
    """Says why the backend's kernel cannot serve these queries; '' where it can."""
    length, head_bytes = query.shape[1], _padded_width(query.shape[-1]) * query.dtype.itemsize
    if backend not in KERNELS:
        return f"there are kernels for GPU and TPU, not for {backend}"
    if length % KERNEL_BLOCK:
        return f"rows of {length} tokens, the kernels want a multiple of {KERNEL_BLOCK}: set config.data.row_length"
    if jax.sharding.get_abstract_mesh().shape["sequence"] > 1:
        return "the kernels want whole rows: set config.mesh.sequence = 1"
    if spec.mode == "prefix":
        return "the kernels know bidirectional and causal attention, not that to a prefix"
    if backend == "gpu" and (spec.reach or spec.softcap):
        return "the GPU's kernel knows neither windows nor soft-capped scores"
    if backend == "gpu" and head_bytes > WIDEST_HEAD:
        return f"heads of {head_bytes} bytes do not fit a GPU's shared memory (at most {WIDEST_HEAD})"
    return ""


def kernel_attention(
    query_RxLxHxK: jax.Array,
    key_RxLxHxK: jax.Array,
    value_RxLxHxK: jax.Array,
    segment_ids_RxL: jax.Array,
    spec: AttentionSpec,
    kernel: Kernel,
    interpret: bool = False,
) -> jax.Array:
    """Runs a kernel on every device's rows and heads; arguments and result as for `attention`.

    Args:
      query_RxLxHxK: queries, L a multiple of KERNEL_BLOCK; the mesh does not split L.
      key_RxLxHxK: keys.
      value_RxLxHxK: values.
      segment_ids_RxL: int32, the text of each token.
      spec: what may be seen; its reach is less than the rows' length.
      kernel: one of KERNELS.
      interpret: emulate the kernel, on any platform.
    """
    local = jax.shard_map(
        functools.partial(kernel, spec=spec, interpret=interpret),
        in_specs=(HEADS, WHOLE_HEADS, WHOLE_HEADS, ROWS),  # `sequence` has size 1: all rows are whole
        out_specs=HEADS,
        check_vma=False,  # pallas_call does not say how its outputs vary
    )
    return local(query_RxLxHxK, key_RxLxHxK, value_RxLxHxK, segment_ids_RxL)


def _triton(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, spec: AttentionSpec, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.gpu import attention as gpu

    width = query.shape[-1]
    padding = ((0, 0), (0, 0), (0, 0), (0, _padded_width(width) - width))
    query, key, value = (jnp.pad(x, padding) for x in (query, key, value))
    blocks = gpu.BlockSizes.get_default()
    if query.shape[-1] * query.dtype.itemsize > WIDE_HEAD:
        blocks = dataclasses.replace(blocks, block_q=64, block_k=32)
    scale = spec.score_scale(width)
    out = gpu.mha(query, key, value, segment_ids, scale, spec.causal, blocks, interpret=interpret)
    return out[..., :width]


def _padded_width(width: int) -> int:
    """The head width as Triton computes it: tensor cores take powers of 2 from 16 on."""
    return max(16, 1 << (width - 1).bit_length())


def _splash(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, spec: AttentionSpec, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, length, n_heads, width = query.shape
    if spec.reach:
        mask = masks.LocalMask((length, length), (spec.reach, 0 if spec.causal else spec.reach), offset=0)
    else:
        mask = (masks.CausalMask if spec.causal else masks.FullMask)((length, length))
    attend = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([mask] * n_heads), attn_logits_soft_cap=spec.softcap or None, interpret=interpret
    )
    query = query * spec.score_scale(width)  # splash does not scale
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    segments = splash.SegmentIds(q=segment_ids, kv=segment_ids)
    return jax.vmap(attend)(query, key, value, segments).transpose(0, 2, 1, 3)


KERNELS: dict[str, Kernel] = {"gpu": _triton, "tpu": _splash}  # by platform
