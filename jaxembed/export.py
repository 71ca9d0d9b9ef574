"""Write a run's model as a folder that sentence-transformers opens, or check such a folder.

    python -m jaxembed.export --workdir=RUN --out=FOLDER [--layers=N] [--dim=N]
    python -m jaxembed.export --verify=FOLDER

--workdir takes RUN, RUN@STEP or RUN@best. --layers and --dim write a smaller model: the first N layers, vectors cut to
their first N dimensions; config.matryoshka trains models that bear it. --verify encodes the folder's 8 fingerprint
texts anew, in JAX and, where it is installed, in sentence-transformers, and compares the vectors with those that were
written with it.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxembed import cli
from jaxembed.errors import UserError

if TYPE_CHECKING:
    from jaxembed.embedder import Embedder
    from jaxembed.losses.objective import Size

FINGERPRINT = "jaxembed.json"
WIDTHS = "matryoshka_dimensions"  # in config.json: programs that serve the folder let vectors be cut to these only
TOLERANCE = 1e-5  # largest absolute difference of a vector's component

# Short and long, several scripts, odd characters: what a wrong tokenizer, mask or pooling would show on.
TEXTS = (
    "A man is eating food.",
    "a",
    "The stock market fell today, and analysts blamed rising interest rates for the decline in technology shares.",
    "Wie komme ich am schnellsten zum Bahnhof?",
    "東京は日本の首都です。",
    "مرحبا بالعالم",
    "def add(a, b):\n    return a + b  # 🎉",
    "long " * 300,
)


def export_model(embedder: "Embedder", out: pathlib.Path, layers: int = 0, dim: int = 0) -> None:
    """Writes the folder, with its model card and fingerprint: all of it, or nothing.

    Args:
      embedder: the model; its parameters are gathered to the host a tensor at a time. Of what run it is, and of which
        step, says its `run`: the card tells of that run's data and scores.
      out: the folder; one that was exported before is replaced.
      layers: only the first so many; 0 = all.
      dim: vectors are cut to their first dimensions, after all else; 0 = as the model says.

    Raises:
      UserError: `out` is something else, or cannot be written; the model is smaller than what is asked for.
    """
    import jax

    from jaxembed import run_folder
    from jaxembed.hf.writer import write_folder
    from jaxembed.losses.objective import sizes_of
    from jaxembed.models.text_encoder import flatten
    from jaxembed.reporting.model_card import card_files
    from jaxembed.stages import stages_of

    small = _smaller(embedder, layers, dim)
    layers = 0 if layers == embedder.blueprint.backbone.layers else layers
    blueprint, hf_config = small.blueprint, small.blueprint.hf_config
    sizes: tuple[Size, ...] = ()
    if small.run:
        sizes = sizes_of(stages_of(run_folder.read_config(small.run.workdir))[-1].config.matryoshka)
        hf_config = _with_widths(hf_config, sizes, layers, small.width)
    projection = small.params.get("projection")
    vectors = small.encode(list(TEXTS))
    fingerprint = {"texts": TEXTS, "vectors": vectors.tolist()}
    note = _note(embedder, sizes, layers, dim)
    with jax.set_mesh(small.mesh):
        write_folder(
            out,
            hf_config=hf_config,
            architecture=blueprint.architecture,
            config=blueprint.backbone,
            leaves=flatten(small.params["backbone"]),
            tokenizer=blueprint.tokenizer,
            pooling=blueprint.head.pooling,
            pool_prompt=blueprint.head.pool_prompt,
            normalize=blueprint.head.normalize,
            projection=(projection["kernel"], projection.get("bias")) if projection else None,
            max_length=blueprint.max_length,
            prompts=blueprint.prompts,
            default_prompt_name=blueprint.default_prompt_name,
            similarity=blueprint.similarity,
            truncate_dim=blueprint.truncate_dim,
            unused=blueprint.unused,
            extra_files={**card_files(small, note), FINGERPRINT: json.dumps(fingerprint).encode()},
        )


def _smaller(embedder: "Embedder", layers: int, dim: int) -> "Embedder":
    """Returns the model with its first layers only, its vectors cut to their first dimensions."""
    import jax

    from jaxembed.embedder import Embedder
    from jaxembed.hf.table import leaves_of
    from jaxembed.models.options import ModelOptions
    from jaxembed.models.text_encoder import flatten, unflatten

    blueprint = embedder.blueprint
    for flag, asked, full in (("layers", layers, blueprint.backbone.layers), ("dim", dim, embedder.width)):
        if not 0 <= asked <= full:
            raise UserError(f"--{flag}={asked}: the model has {full}; wants 1 … {full}, or 0 for all")
    if not layers and not dim:
        return embedder
    stacked = leaves_of(blueprint.architecture.rows(blueprint.backbone), stacked_only=True)
    layers = layers or blueprint.backbone.layers
    blueprint = dataclasses.replace(
        blueprint,
        hf_config=blueprint.hf_config | {"num_hidden_layers": layers},
        truncate_dim=dim or blueprint.truncate_dim,
    )
    with jax.set_mesh(embedder.mesh):
        leaves = flatten(embedder.params["backbone"])
        cut = {path: leaf[:layers] if path in stacked else leaf for path, leaf in leaves.items()}
    params = embedder.params | {"backbone": unflatten(cut)}
    return Embedder(blueprint, blueprint.factory(ModelOptions()), params, embedder.mesh, embedder.run)


def _with_widths(hf_config: dict[str, Any], sizes: Sequence["Size"], layers: int, full: int) -> dict[str, Any]:
    """Returns config.json with the widths that vectors of this depth were trained at, and without another run's."""
    widths = {size.width for size in sizes if size.layers == layers and size.width}
    others = {key: value for key, value in hf_config.items() if key != WIDTHS}
    return others | ({WIDTHS: sorted({*widths, full})} if widths else {})


def _note(whole: "Embedder", sizes: Sequence["Size"], layers: int, dim: int) -> str:
    """Returns what the model card says of sizes: those trained, and this one where it is not the whole."""
    depth, width = whole.blueprint.backbone.layers, whole.width
    said = []
    if len(sizes) > 1:
        numbers = [(size.layers or depth, size.width or width) for size in sizes]
        trained = [f"{n} layer{'s' if n > 1 else ''} and {dimensions} dimensions" for n, dimensions in numbers]
        said.append(f"Trained to serve at these sizes: {'; '.join(trained)}.")
    if layers or dim:
        said.append(
            f"This folder holds the first {layers or depth} of {depth} layers, and its vectors are cut to "
            f"{dim or width} of {width} dimensions; scores and curves are those of the whole model."
        )
    return " ".join(said)


def verify(folder: pathlib.Path) -> dict[str, float]:
    """Compares a folder's vectors with its fingerprint.

    Returns:
      The largest absolute difference, in 'jax' and, where it is installed, 'sentence_transformers'.

    Raises:
      UserError: the folder has no fingerprint, or its vectors differ by more than TOLERANCE.
    """
    import importlib.util

    import jax
    import numpy as np

    from jaxembed.embedder import Embedder
    from jaxembed.hf.files import read_json

    if not (folder / FINGERPRINT).is_file():
        raise UserError(f"{folder}: no {FINGERPRINT} in it, so nothing to verify it against")
    fingerprint = read_json(folder / FINGERPRINT)
    try:
        texts, vectors = list(map(str, fingerprint["texts"])), np.array(fingerprint["vectors"], np.float32)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / FINGERPRINT}: wants texts and their vectors: {error!r}") from error
    with jax.default_matmul_precision("float32"):
        differences = {"jax": _difference(Embedder.load(folder).encode(texts), vectors)}
    if importlib.util.find_spec("sentence_transformers"):
        differences["sentence_transformers"] = _difference(_encode_in_torch(folder, texts), vectors)
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    if wrong:
        said = ", ".join(f"{name} by {value:.1e}" for name, value in wrong.items())
        raise UserError(f"{folder}: vectors differ from the fingerprint: {said} (allowed: {TOLERANCE:g})")
    return differences


def _encode_in_torch(folder: pathlib.Path, texts: list[str]) -> Any:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True, model_kwargs={"dtype": "float32"})
    return model.encode(texts, show_progress_bar=False)


def _difference(a: Any, b: Any) -> float:
    import numpy as np

    return float(np.abs(a - b).max()) if a.shape == b.shape else float("inf")


def main() -> None:
    """Runs the command."""
    workdir, out, folder = flags.FLAGS.workdir, flags.FLAGS.out, flags.FLAGS.verify
    layers, dim = flags.FLAGS.layers, flags.FLAGS.dim
    if bool(folder) == bool(workdir) or bool(workdir) != bool(out) or (folder and (layers or dim)):
        raise UserError("give either --workdir=RUN and --out=FOLDER [--layers=N] [--dim=N], or --verify=FOLDER")
    if folder:
        differences = verify(pathlib.Path(folder))
        for name, value in differences.items():
            print(f"{name}: largest difference {value:.1e}")
        print(json.dumps({"verified": folder, **differences}))
    else:
        from jaxembed.embedder import Embedder

        export_model(Embedder.load(workdir), pathlib.Path(out), layers, dim)
        print(json.dumps({"exported": out}))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "The run to export: DIR, DIR@STEP or DIR@best.")
    flags.DEFINE_string("out", "", "The folder to write.")
    flags.DEFINE_integer("layers", 0, "Export the first so many layers only; 0 = all.")
    flags.DEFINE_integer("dim", 0, "Cut vectors to their first so many dimensions; 0 = not.")
    flags.DEFINE_string("verify", "", "An exported folder to check.")
    cli.run(main, __doc__)
