"""Attention inside the segments of packed rows.

What may attend to what is a small spec and two integer arrays, never a dense mask handed around: a token sees the
tokens of its own segment (its text), in a causal model only those before it. Padding (segment 0) sees padding, which
keeps every softmax finite.

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
from jaxembed.models.layers.dropout import Noise, dropout_weights
from jaxembed.sharding import BATCH, ROWS

MASKED = -1e30  # finite: a row without any allowed key must not become NaN
KERNEL_BLOCK = 128  # the kernels want rows in multiples of this many tokens
# Bytes of one head's vector for which the Triton kernel was compiled, forward and backward, within the shared memory of
# GPUs down to 99 KiB (compute capability 8.9): with blocks of 128 x 128 tokens, and the widest, with 64 x 32.
WIDE_HEAD, WIDEST_HEAD = 256, 512

Kernel = Callable[..., jax.Array]  # one device's query, key, value, segment_ids, causal, interpret → output

HEADS = P(BATCH, "sequence", "tensor", None)  # queries [R, L, H, K]
WHOLE_HEADS = P(BATCH, None, "tensor", None)  # keys and values: every token of the row


@dataclasses.dataclass(frozen=True)
class AttentionSpec:
    """What a layer's attention may see.

    Attributes:
      causal: only tokens at or before the query's position.
      kernel: 'xla', 'pallas', or 'auto': pallas where it serves.
      dropout: of attention weights (xla only).
    """

    causal: bool = False
    kernel: str = "auto"
    dropout: float = 0.0


def attention(
    query_RxLxHxK: jax.Array,
    key_RxLxHxK: jax.Array,
    value_RxLxHxK: jax.Array,
    segment_ids_RxL: jax.Array,
    spec: AttentionSpec,
    noise: Noise | None = None,
    place: jax.typing.ArrayLike = 0,
) -> jax.Array:
    """Scaled dot-product attention (Vaswani et al. 2017, arXiv:1706.03762), restricted to segments.

    Args:
      query_RxLxHxK: queries, any float dtype; key and value the same.
      key_RxLxHxK: keys.
      value_RxLxHxK: values.
      segment_ids_RxL: int32, the text of each token, 0 for padding.
      spec: what may be seen.
      noise: dropout of attention weights is off when None.
      place: number of the call's place in the model, for the dropout mask.

    Returns:
      [R, L, H, K] in the queries' dtype, sharded as the queries.

    Raises:
      UserError: `spec` insists on a kernel that cannot serve here.
    """
    key_RxLxHxK = jax.sharding.reshard(key_RxLxHxK, WHOLE_HEADS)
    value_RxLxHxK = jax.sharding.reshard(value_RxLxHxK, WHOLE_HEADS)
    if _use_kernel(query_RxLxHxK, spec, noise):
        kernel = KERNELS[jax.default_backend()]
        return kernel_attention(query_RxLxHxK, key_RxLxHxK, value_RxLxHxK, segment_ids_RxL, spec.causal, kernel)
    return _xla_attention(query_RxLxHxK, key_RxLxHxK, value_RxLxHxK, segment_ids_RxL, spec, noise, place)


def _xla_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    spec: AttentionSpec,
    noise: Noise | None,
    place: jax.typing.ArrayLike,
) -> jax.Array:
    whole_ids = jax.sharding.reshard(segment_ids, P(BATCH, None))
    allowed = segment_ids[:, :, None] == whole_ids[:, None, :]
    if spec.causal:
        # Texts lie in order inside a row, so the place in the row decides; no positions are needed.
        place_in_row = jnp.arange(segment_ids.shape[1])
        ahead = jax.sharding.reshard(place_in_row[:, None] < place_in_row[None, :], P("sequence", None))
        allowed &= ~ahead
    query = query * (1 / math.sqrt(query.shape[-1]))  # cheaper than scaling the scores, L / K times as many
    scores = jnp.einsum("rlhk,rmhk->rhlm", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(allowed[:, None], scores, MASKED)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    # The softmax's division comes after the product with the values, K / L times as much to divide.
    total = weights.sum(-1).swapaxes(1, 2)[..., None]
    weights = dropout_weights(weights, spec.dropout, noise, jnp.asarray(place, jnp.uint32))
    out = jnp.einsum("rhlm,rmhk->rlhk", weights.astype(value.dtype), value, preferred_element_type=jnp.float32)
    return (out / total).astype(query.dtype)


def _use_kernel(query: jax.Array, spec: AttentionSpec, noise: Noise | None) -> bool:
    if spec.kernel == "xla" or (spec.dropout > 0 and noise is not None):
        return False
    obstacle = _obstacle(query, jax.default_backend())
    if obstacle and spec.kernel == "pallas":
        raise UserError(f"config.model.attention_kernel = 'pallas': {obstacle}; or take 'xla'")
    return not obstacle


def _obstacle(query: jax.Array, backend: str) -> str:
    """Says why the backend's kernel cannot serve these queries; '' where it can."""
    length, head_bytes = query.shape[1], _padded_width(query.shape[-1]) * query.dtype.itemsize
    if backend not in KERNELS:
        return f"there are kernels for GPU and TPU, not for {backend}"
    if length % KERNEL_BLOCK:
        return f"rows of {length} tokens, the kernels want a multiple of {KERNEL_BLOCK}: set config.data.row_length"
    if jax.sharding.get_abstract_mesh().shape["sequence"] > 1:
        return "the kernels want whole rows: set config.mesh.sequence = 1"
    if backend == "gpu" and head_bytes > WIDEST_HEAD:
        return f"heads of {head_bytes} bytes do not fit a GPU's shared memory (at most {WIDEST_HEAD})"
    return ""


def kernel_attention(
    query_RxLxHxK: jax.Array,
    key_RxLxHxK: jax.Array,
    value_RxLxHxK: jax.Array,
    segment_ids_RxL: jax.Array,
    causal: bool,
    kernel: Kernel,
    interpret: bool = False,
) -> jax.Array:
    """Runs a kernel on every device's rows and heads; arguments and result as for `attention`.

    Args:
      query_RxLxHxK: queries, L a multiple of KERNEL_BLOCK; the mesh does not split L.
      key_RxLxHxK: keys.
      value_RxLxHxK: values.
      segment_ids_RxL: int32, the text of each token.
      causal: only tokens at or before the query's position are seen.
      kernel: one of KERNELS.
      interpret: emulate the kernel, on any platform.
    """
    local = jax.shard_map(
        functools.partial(kernel, causal=causal, interpret=interpret),
        in_specs=(HEADS, WHOLE_HEADS, WHOLE_HEADS, ROWS),  # `sequence` has size 1: all rows are whole
        out_specs=HEADS,
        check_vma=False,  # pallas_call does not say how its outputs vary
    )
    return local(query_RxLxHxK, key_RxLxHxK, value_RxLxHxK, segment_ids_RxL)


def _triton(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, causal: bool, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.gpu import attention as gpu

    width = query.shape[-1]
    padding = ((0, 0), (0, 0), (0, 0), (0, _padded_width(width) - width))
    query, key, value = (jnp.pad(x, padding) for x in (query, key, value))
    blocks = gpu.BlockSizes.get_default()
    if query.shape[-1] * query.dtype.itemsize > WIDE_HEAD:
        blocks = dataclasses.replace(blocks, block_q=64, block_k=32)
    out = gpu.mha(query, key, value, segment_ids, 1 / math.sqrt(width), causal, blocks, interpret=interpret)
    return out[..., :width]


def _padded_width(width: int) -> int:
    """The head width as Triton computes it: tensor cores take powers of 2 from 16 on."""
    return max(16, 1 << (width - 1).bit_length())


def _splash(
    query: jax.Array, key: jax.Array, value: jax.Array, segment_ids: jax.Array, causal: bool, interpret: bool
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    _, length, n_heads, width = query.shape
    mask = (masks.CausalMask if causal else masks.FullMask)((length, length))
    attend = splash.make_splash_mha_single_device(masks.MultiHeadMask([mask] * n_heads), interpret=interpret)
    query = query / math.sqrt(width)  # splash does not scale
    query, key, value = (x.transpose(0, 2, 1, 3) for x in (query, key, value))
    segments = splash.SegmentIds(q=segment_ids, kv=segment_ids)
    return jax.vmap(attend)(query, key, value, segments).transpose(0, 2, 1, 3)


KERNELS: dict[str, Kernel] = {"gpu": _triton, "tpu": _splash}  # by jax.default_backend()
