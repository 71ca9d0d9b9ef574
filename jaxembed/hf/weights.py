"""The weights of a folder, by our names, still on disk."""

from collections.abc import Mapping

import numpy as np

from jaxembed.hf.folder import Dense, Folder
from jaxembed.hf.safetensors_io import open_tensors
from jaxembed.hf.table import LazyLeaf, Linear, Row, Shape, import_leaves

DENSE_WEIGHT = Row("linear.weight", "projection/kernel", Linear())
DENSE_BIAS = Row("linear.bias", "projection/bias")


def dense_rows(bias: bool) -> tuple[Row, ...]:
    """Returns the table of a Dense module's names."""
    return (DENSE_WEIGHT, DENSE_BIAS) if bias else (DENSE_WEIGHT,)


def backbone_leaves(folder: Folder, shapes: Mapping[str, Shape]) -> dict[str, LazyLeaf]:
    """Finds the backbone's weights.

    Args:
      folder: from `read_folder`.
      shapes: path → shape of every leaf of the backbone.

    Returns:
      Path → leaf, for `jaxembed.hf.loading.load_onto`.

    Raises:
      UserError: the files are damaged, or their tensors do not fit; see `import_leaves`.
    """
    architecture = folder.architecture
    return import_leaves(
        architecture.rows(folder.config),
        open_tensors(folder.transformer),
        shapes,
        folder.config.layers,
        where=str(folder.transformer),
        ignored=architecture.ignored,
        prefixes=architecture.prefixes,
        renames=architecture.renames,
    )


def projection_leaves(dense: Dense) -> dict[str, LazyLeaf]:
    """Finds the weights of a Dense module: projection/kernel [D, E] and, where it has one, projection/bias [E].

    Raises:
      UserError: the file is damaged, or its tensors do not fit what the module's config.json says.
    """
    shapes: dict[str, Shape] = {DENSE_WEIGHT.ours: (dense.in_features, dense.out_features)}
    if dense.bias:
        shapes[DENSE_BIAS.ours] = (dense.out_features,)
    return import_leaves(dense_rows(dense.bias), open_tensors(dense.path), shapes, 0, where=str(dense.path))


def unused_tensors(folder: Folder) -> dict[str, np.ndarray]:
    """Returns the folder's tensors that transformers' class has and embeddings do not use (bert's pooler), by name.

    They are memory-mapped views, for the writer's `unused`; those of another shape or not in the folder are left out.
    """
    tensors = open_tensors(folder.transformer)
    prefixes = folder.architecture.prefixes
    return {
        name: tensors[prefix + name]
        for name, shape in folder.architecture.unused(folder.config).items()
        for prefix in prefixes
        if prefix + name in tensors and tensors[prefix + name].shape == shape
    }
