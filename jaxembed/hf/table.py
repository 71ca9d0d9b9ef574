"""One table of names per architecture, used in both directions.

A `Row` says which tensor of a Hugging Face checkpoint is which leaf of ours, and how its axes are turned. Import gives
`LazyLeaf`s, which read from the memory-mapped file only what is asked of them, so that weights go straight onto their
shards; export walks the same rows backwards.
"""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from jaxembed.errors import UserError
from jaxembed.sharding import to_host

Shape = tuple[int, ...]
Index = tuple[slice, ...]
LISTED = 200  # problems in one message: a model of many experts has thousands of tensors


class Transform(Protocol):
    """How a tensor's axes are turned, both ways, without copying. Shapes are those of one tensor."""

    def hf_shape(self, shape: Shape) -> Shape:
        """Returns the shape of the checkpoint's tensor for a leaf of this shape."""

    def to_ours(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        """Returns the tensor as a view in our axes; it may have fewer rows than `shape`, the rest being zeros."""

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""


@dataclasses.dataclass(frozen=True)
class Same:
    """The tensor as it is."""

    def hf_shape(self, shape: Shape) -> Shape:
        return shape

    def to_ours(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array


@dataclasses.dataclass(frozen=True)
class Flat:
    """[H * K] ↔ [H, K]."""

    def hf_shape(self, shape: Shape) -> Shape:
        return (math.prod(shape),)

    def to_ours(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor.reshape(shape)

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(-1)


@dataclasses.dataclass(frozen=True)
class Linear:
    """torch's [out, in] ↔ our [in, out], the first `inputs` dimensions of ours being the input's: [H, K, D] has 2."""

    inputs: int = 1

    def hf_shape(self, shape: Shape) -> Shape:
        return math.prod(shape[self.inputs :]), math.prod(shape[: self.inputs])

    def to_ours(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor.T.reshape(shape)  # splits axes only: a view

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array.reshape(math.prod(array.shape[: self.inputs]), -1).T


@dataclasses.dataclass(frozen=True)
class PadRows:
    """[rows, …] ↔ the same with zero rows behind: a vocabulary padded to a round size."""

    rows: int

    def hf_shape(self, shape: Shape) -> Shape:
        return (self.rows, *shape[1:])

    def to_ours(self, tensor: np.ndarray, shape: Shape) -> np.ndarray:
        return tensor

    def to_hf(self, array: np.ndarray) -> np.ndarray:
        return array[: self.rows]


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf of ours and the tensors it is made of.

    Attributes:
      hf: the tensor's name; with '{i}' in it a tensor per layer, stacked on our leaf's axis 0, and with '{x}' too one
        per layer and expert, stacked on its axes 0 and 1.
      ours: the leaf's path, joined by '/'.
      transform: how a tensor's axes are turned.
      first: the first layer that has the tensor; the leaf of those before is zero, and not used.
      at: the numbers of the layers that have the tensor, the leaf being stacked over these alone; () = all layers.
      experts: X, where there is one per expert.
      full_precision: whether it is written in float32 whatever the dtype of the others.
    """

    hf: str
    ours: str
    transform: Transform = Same()
    first: int = 0
    at: tuple[int, ...] = ()
    experts: int = 0
    full_precision: bool = False

    @property
    def parts(self) -> tuple[tuple[str, Transform], ...]:
        """The leaves in each tensor, with how their axes are turned."""
        return ((self.ours, self.transform),)

    @property
    def stacked(self) -> int:
        """How many of the leaf's first axes run over tensors: layers, and experts."""
        return ("{i}" in self.hf) + ("{x}" in self.hf)

    def lead(self, layers: int) -> Shape:
        """Returns the lengths of these axes, of a model with so many layers."""
        return (len(self.at) or layers, self.experts)[: self.stacked]

    def places(self, layers: int) -> list[tuple[str, tuple[int, ...]]]:
        """Returns the names of the tensors, each with its index on these axes, in their order."""
        if not self.stacked:
            return [(self.hf, ())]
        numbers = enumerate(self.at or range(self.first, layers), self.first)
        experts = range(self.experts or 1)
        return [(self.hf.format(i=i, x=x), (place, x)[: self.stacked]) for place, i in numbers for x in experts]

    def names(self, layers: int) -> list[str]:
        """Returns the names of the tensors, in their order."""
        return [name for name, _ in self.places(layers)]

    def tensor_shape(self, shape: Shape) -> Shape:
        """Returns what of a leaf of this shape belongs to one tensor."""
        return shape[self.stacked :]


@dataclasses.dataclass(frozen=True)
class Fused(Row):
    """Several leaves that lie in one tensor, one behind the other on its axis 0: a fused query, key and value.

    Attributes:
      hf: the tensor's name, as in a Row.
      ours: the first leaf's path.
      transform: the first leaf's.
      others: path and transform of the leaves behind it.
    """

    others: tuple[tuple[str, Transform], ...] = ()

    @property
    def parts(self) -> tuple[tuple[str, Transform], ...]:
        """The leaves in each tensor, with how their axes are turned."""
        return ((self.ours, self.transform), *self.others)


def leaves_of(rows: Sequence[Row]) -> set[str]:
    """Returns the paths of the leaves that the rows make."""
    return {ours for row in rows for ours, _ in row.parts}


def first_layers(rows: Sequence[Row], leaves: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """Returns the leaves of a model that is cut to its first layers.

    Args:
      rows: the table of the smaller model.
      leaves: path → array of the whole model, of one axis at least.
      layers: how many there are left.
    """
    lengths = {ours: row.lead(layers)[:1] for row in rows for ours, _ in row.parts}
    return {ours: leaves[ours][tuple(map(slice, length))] for ours, length in lengths.items()}


@dataclasses.dataclass(frozen=True)
class LazyLeaf:
    """A leaf that is still on disk. `leaf[index]` reads a part of it.

    Attributes:
      shape: of the whole leaf.
      dtype: the checkpoint's.
      parts: a view for each place on the stacked axes, those of the last axis one behind the other; else one.
      stacked: how many of the first axes run over the parts.
    """

    shape: Shape
    dtype: np.dtype
    parts: tuple[np.ndarray, ...]
    stacked: int

    def __getitem__(self, index: Index) -> np.ndarray:
        """Reads the slices `index` (the missing ones at the end are whole) in the checkpoint's dtype."""
        return self.read(index, self.dtype)

    def read(self, index: Index, dtype: np.dtype) -> np.ndarray:
        """Reads the slices `index` as `dtype`, into memory of its own."""
        whole = (*index, *(slice(None),) * (len(self.shape) - len(index)))
        ranges = [range(*s.indices(n)) for s, n in zip(whole, self.shape)]
        out = np.zeros([len(r) for r in ranges], dtype)
        within = tuple(slice(r.start, r.stop, r.step) for r in ranges[self.stacked :])
        for target in np.ndindex(*map(len, ranges[: self.stacked])):
            number = 0
            for r, i, n in zip(ranges, target, self.shape):
                number = number * n + r[i]
            values = self.parts[number][within]
            # numpy clips at the end of a part that has fewer rows than the leaf
            out[(*target, *(slice(n) for n in values.shape))] = values
        return out


def import_leaves(
    rows: Sequence[Row],
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, Shape],
    layers: int,
    *,
    where: str,
    ignored: Sequence[str] = (),
    prefixes: Sequence[str] = ("",),
    renames: Sequence[tuple[str, str]] = (),
) -> dict[str, LazyLeaf]:
    """Finds the tensors of every leaf.

    Args:
      rows: the architecture's table.
      tensors: the checkpoint's, by name.
      shapes: path → shape of every leaf that the model has.
      layers: n, the length of stacked leaves.
      where: the folder, for messages.
      ignored: patterns (fnmatch) of names without prefix that an embedding model has no use for.
      prefixes: what may stand before all names; the first one that fits is taken off.
      renames: (regex, replacement) from old names to those of the table.

    Returns:
      A LazyLeaf for every path of `shapes`.

    Raises:
      UserError: lists every tensor that is missing, unknown, misshaped or not floating point, and every leaf that no
        row fills, LISTED of these at most.
    """
    named, problems = _normalise(tensors, rows, prefixes, renames)
    leaves: dict[str, LazyLeaf] = {}
    for row in rows:
        absent = [ours for ours, _ in row.parts if ours not in shapes]
        problems += [f"the model has no leaf {ours} for the tensors {row.hf}" for ours in absent]
        if absent:
            continue
        lead = row.lead(layers)
        if tuple(shapes[row.ours][: row.stacked]) != lead:
            raise ValueError(f"leaf {row.ours} of shape {shapes[row.ours]} is not stacked over {lead}")
        wanted = {ours: t.hf_shape(row.tensor_shape(tuple(shapes[ours]))) for ours, t in row.parts}
        first, *others = wanted.values()
        whole = (first[0] + sum(shape[0] for shape in others), *first[1:]) if others else first
        found = {name: named.pop(name, None) for name in row.names(layers)}
        faults = [fault for name, tensor in found.items() if (fault := _fault(name, tensor, whole, ", ".join(wanted)))]
        problems += faults
        if not faults:
            leaves |= _cut(row, list(found.values()), wanted, shapes)
    filled = leaves_of(rows)
    problems += [f"nothing fills {path} {list(shapes[path])}" for path in shapes if path not in filled]
    for name, tensor in named.items():
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in ignored):
            problems.append(f"unknown tensor {name} {list(tensor.shape)}")
    if problems:
        every = "; ".join(problems[:LISTED]) + (f"; and {len(problems) - LISTED:,} more" * (len(problems) > LISTED))
        raise UserError(f"{where}: the weights do not fit the model: {every}")
    return leaves


def _cut(
    row: Row, tensors: Sequence[np.ndarray], wanted: Mapping[str, Shape], shapes: Mapping[str, Shape]
) -> dict[str, LazyLeaf]:
    """Returns the leaves of a row, views of its tensors, each from its own place on axis 0."""
    leaves, start = {}, 0
    for ours, transform in row.parts:
        shape = tuple(shapes[ours])
        one = row.tensor_shape(shape)
        pieces = tensors
        if len(row.parts) > 1:
            pieces = [tensor[start : start + wanted[ours][0]] for tensor in tensors]
            start += wanted[ours][0]
        parts = [transform.to_ours(piece, one) for piece in pieces]
        dtype = tensors[0].dtype if tensors else np.dtype(np.float32)  # a stack may end before `first`
        nothing = np.zeros((0, *one[1:]), dtype)
        absent = math.prod(shape[: row.stacked]) - len(parts)
        leaves[ours] = LazyLeaf(shape, dtype, (*[nothing] * absent, *parts), row.stacked)
    return leaves


def _normalise(
    tensors: Mapping[str, np.ndarray], rows: Sequence[Row], prefixes: Sequence[str], renames: Sequence[tuple[str, str]]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Takes off the prefix and applies the renames; returns the tensors by their new names, and what went wrong."""
    tops = [row.hf for row in rows if not row.stacked]
    prefix = next((p for p in prefixes if any(p + name in tensors for name in tops)), "")
    named: dict[str, np.ndarray] = {}
    problems = []
    for original, tensor in tensors.items():
        name = original.removeprefix(prefix)
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        if name in named:
            problems.append(f"tensor {original} is there twice, under another name too")
        named[name] = tensor
    return named, problems


def _fault(name: str, tensor: np.ndarray | None, wanted: Shape, ours: str) -> str:
    if tensor is None:
        return f"missing tensor {name} {list(wanted)} (for {ours})"
    if tensor.shape != wanted:
        return f"tensor {name} has shape {list(tensor.shape)}, wants {list(wanted)} (for {ours})"
    if not jnp.issubdtype(tensor.dtype, jnp.floating):
        return f"tensor {name} is {tensor.dtype}, wants floating point (quantised weights are not read)"
    return ""


def export_tensors(rows: Sequence[Row], leaves: Mapping[str, Any], layers: int) -> Iterator[tuple[str, np.ndarray]]:
    """Walks the table backwards: yields every tensor of the checkpoint with its name, as a view.

    Only one leaf at a time is brought to the host; of several processes all walk, and process 0 gets the tensors.

    Args:
      rows: the architecture's table.
      leaves: path → np.ndarray or jax.Array.
      layers: n, the length of stacked leaves.

    Raises:
      ValueError: leaves and rows are not the same, or a leaf is not stacked over `layers`. Nothing was yielded then.
    """
    if leaves_of(rows) != set(leaves):
        odd = sorted(leaves_of(rows) ^ set(leaves))
        raise ValueError(f"leaves without a row of the table, or rows without a leaf: {', '.join(odd)}")
    if any(leaves[ours].shape[: row.stacked] != row.lead(layers) for row in rows for ours, _ in row.parts):
        raise ValueError(f"stacked leaves do not hold {layers} layers")
    return _export(rows, leaves, layers)


def _export(rows: Sequence[Row], leaves: Mapping[str, Any], layers: int) -> Iterator[tuple[str, np.ndarray]]:
    for row in rows:
        wholes = [(to_host(leaves[ours]), transform) for ours, transform in row.parts]
        for name, place in row.places(layers):
            pieces = [transform.to_hf(leaf[place]) for leaf, transform in wholes]
            yield name, pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
