"""The weights of a folder, by our names, still on disk."""

from collections.abc import Mapping

import numpy as np

from jaxembed.hf.folder import Dense, Folder
from jaxembed.hf.safetensors_io import open_tensors
from jaxembed.hf.table import Flat, LazyLeaf, Linear, Row, Shape, import_leaves

DENSE_WEIGHT = Row("linear.weight", "projection/kernel", Linear())
DENSE_BIAS = Row("linear.bias", "projection/bias")
LAYER_WEIGHTS = Row("layer_weights", "layer_mean/scale")
LATENT_ROWS = (
    Row("latents", "latent_attention/latents"),
    *(
        Row(f"{norm}.{theirs}", f"latent_attention/{norm}/{ours}")
        for norm in ("query_norm", "latent_norm", "mlp_norm")
        for theirs, ours in (("weight", "scale"), ("bias", "bias"))
    ),
    *(Row(f"{name}.weight", f"latent_attention/{name}/kernel", Linear()) for name in ("query", "key", "value")),
    Row("out.weight", "latent_attention/out/kernel", Linear(inputs=2)),
    Row("up.weight", "latent_attention/up/kernel", Linear()),
    Row("up.bias", "latent_attention/up/bias", Flat()),
    Row("down.weight", "latent_attention/down/kernel", Linear()),
    Row("down.bias", "latent_attention/down/bias"),
)


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
        architecture.unpacked(open_tensors(folder.transformer)),
        shapes,
        folder.config.layers,
        where=str(folder.transformer),
        ignored=architecture.ignored,
        prefixes=architecture.prefixes,
        renames=architecture.renames,
    )


def projection_leaves(dense: Dense, name: str = "projection") -> dict[str, LazyLeaf]:
    """Finds the weights of a Dense module: NAME/kernel [D, E] and, where it has one, NAME/bias [E].

    Raises:
      UserError: the file is damaged, or its tensors do not fit what the module's config.json says.
    """
    shapes: dict[str, Shape] = {DENSE_WEIGHT.ours: (dense.in_features, dense.out_features)}
    if dense.bias:
        shapes[DENSE_BIAS.ours] = (dense.out_features,)
    leaves = import_leaves(dense_rows(dense.bias), open_tensors(dense.path), shapes, 0, where=str(dense.path))
    return {path.replace("projection", name): leaf for path, leaf in leaves.items()}


def head_leaves(folder: Folder, shapes: Mapping[str, Shape]) -> dict[str, LazyLeaf]:
    """Finds the weights of the modules behind the backbone that a model has too.

    Args:
      folder: from `read_folder`.
      shapes: path → shape of every leaf of the model.

    Raises:
      UserError: a file is damaged, or its tensors do not fit.
    """
    leaves = projection_leaves(folder.dense) if folder.dense else {}
    if folder.expansion:
        leaves |= projection_leaves(folder.expansion, "expansion")
    modules = ((folder.layer_pooling, (LAYER_WEIGHTS,)), (folder.latent, LATENT_ROWS))
    for module, rows in modules:
        wanted = {row.ours: shapes[row.ours] for row in rows if row.ours in shapes}
        if module and wanted:
            leaves |= import_leaves(rows, open_tensors(module.path), wanted, 0, where=str(module.path))
    return leaves


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
