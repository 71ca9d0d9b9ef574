"""What tests of models share: a tiny BERT with random weights, rows packed by hand, meshes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxembed import sharding
from jaxembed.config import MeshConfig
from jaxembed.data.batch import Rows
from jaxembed.models.bert import Bert, BertConfig
from jaxembed.models.options import ModelOptions
from jaxembed.models.text_encoder import HeadConfig, ModelFactory, Params, TextEncoder, flatten, unflatten

CONFIG = BertConfig(vocab_size=90, width=32, layers=3, heads=4, mlp_width=48, positions=40)
ONE = MeshConfig(1)
PLAIN = HeadConfig()
MESHES = {
    "data 8": MeshConfig(8),
    "data 2, fsdp 2, tensor 2": MeshConfig(2, 2, 2),
    "tensor 2, expert 2, sequence 2": MeshConfig(1, 1, 2, 2, 2),
}
FIRST_TEXT = 2_000_000_000  # segment ids are large in a large batch


def make_mesh(config: MeshConfig = ONE) -> jax.sharding.Mesh:
    """The mesh over as many devices as the config names."""
    size = int(np.prod([getattr(config, axis) for axis in sharding.AXES]))
    return sharding.make_mesh(config, jax.devices()[:size])


def make_factory(head: HeadConfig = PLAIN, config: BertConfig = CONFIG, **options: Any) -> ModelFactory:
    """A tiny encoder; `options` are fields of ModelOptions."""
    return ModelFactory(lambda: TextEncoder(jax.random.key(0), Bert, config, head, ModelOptions(**options)))


def random_params(factory: ModelFactory) -> Params:
    """Random weights on the mesh in use, the same on every mesh, biases and norms too."""
    mesh = jax.sharding.get_mesh()
    leaves = {}
    for i, (path, leaf) in enumerate(flatten(factory.abstract()).items()):
        noise = np.random.default_rng(i).normal(scale=0.2, size=leaf.shape)
        values = (noise + path.endswith("scale")).astype(leaf.dtype)
        leaves[path] = sharding.put(values, mesh, leaf.sharding.spec)
    return unflatten(leaves)


def random_texts(n: int, seed: int = 0, longest: int = 12, vocab_size: int = CONFIG.vocab_size) -> list[np.ndarray]:
    """Token ids of n texts of 1 to `longest` tokens; the ids 0 … 4 do not occur."""
    rng = np.random.default_rng(seed)
    return [rng.integers(5, vocab_size, rng.integers(1, longest + 1)).astype(np.int32) for _ in range(n)]


@dataclasses.dataclass(frozen=True)
class Packed:
    """Rows, and where each text's vector comes out: [shard, slot] in [S, slots, E]; shard and slot are arrays [n]."""

    rows: Rows
    slots: int
    shard: np.ndarray
    slot: np.ndarray
    row: np.ndarray
    start: np.ndarray


def pack(
    texts: Sequence[np.ndarray], layout: Sequence[Sequence[int]], length: int, shards: int = 1, prompt: int = 0
) -> Packed:
    """Lays texts into rows of `length` tokens.

    Args:
      texts: token ids of each text.
      layout: numbers of the texts in each row, in their order there.
      length: of a row.
      shards: S, consecutive equal parts of the rows.
      prompt: leading tokens of every text that are the prompt's.
    """
    arrays = {name: np.zeros((len(layout), length), np.int32) for name in ("tokens", "segment_ids", "positions")}
    span_ids = np.full((len(layout), length), -1, np.int32)
    prompt_mask = np.zeros((len(layout), length), bool)
    shard, slot, row_of, start_of = (np.zeros(len(texts), np.int64) for _ in range(4))
    used = [0] * shards
    for row, members in enumerate(layout):
        start, owner = 0, row * shards // len(layout)
        for text in members:
            here = slice(start, start + len(texts[text]))
            arrays["tokens"][row, here] = texts[text]
            arrays["segment_ids"][row, here] = FIRST_TEXT + text
            arrays["positions"][row, here] = np.arange(len(texts[text]))
            span_ids[row, here] = used[owner]
            prompt_mask[row, start : start + min(prompt, len(texts[text]))] = True
            shard[text], slot[text], row_of[text], start_of[text] = owner, used[owner], row, start
            used[owner] += 1
            start = here.stop
        assert start <= length
    rows = Rows(**arrays, span_ids=span_ids, prompt_mask=prompt_mask)
    return Packed(rows, max(used), shard, slot, row_of, start_of)


def put_rows(rows: Rows) -> Rows:
    """Lays rows onto the mesh in use."""
    mesh = jax.sharding.get_mesh()
    return jax.tree.map(lambda x: sharding.put(x, mesh, sharding.ROWS), rows)


def alone(texts: Sequence[np.ndarray]) -> list[list[int]]:
    """The layout of one text per row."""
    return [[i] for i in range(len(texts))]
