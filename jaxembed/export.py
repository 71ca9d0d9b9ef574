"""Write a run's model as a folder that sentence-transformers opens, or check such a folder.

    python -m jaxembed.export --workdir=RUN --out=FOLDER
    python -m jaxembed.export --verify=FOLDER

--workdir takes RUN, RUN@STEP or RUN@best. --verify encodes the folder's 8 fingerprint texts anew, in JAX and, where it
is installed, in sentence-transformers, and compares the vectors with those that were written with it.
"""

import json
import pathlib
from typing import TYPE_CHECKING, Any

from absl import flags

from jaxembed import cli
from jaxembed.errors import UserError

if TYPE_CHECKING:
    from jaxembed.embedder import Embedder

FINGERPRINT = "jaxembed.json"
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


def export_model(embedder: "Embedder", out: pathlib.Path) -> None:
    """Writes the folder, with its model card and fingerprint: all of it, or nothing.

    Args:
      embedder: the model; its parameters are gathered to the host a tensor at a time. Of what run it is, and of which
        step, says its `run`: the card tells of that run's data and scores.
      out: the folder; one that was exported before is replaced.

    Raises:
      UserError: `out` is something else, or cannot be written.
    """
    import jax

    from jaxembed.hf.writer import write_folder
    from jaxembed.models.text_encoder import flatten
    from jaxembed.reporting.model_card import card_files

    blueprint = embedder.blueprint
    projection = embedder.params.get("projection")
    vectors = embedder.encode(list(TEXTS))
    fingerprint = {"texts": TEXTS, "vectors": vectors.tolist()}
    with jax.set_mesh(embedder.mesh):
        write_folder(
            out,
            hf_config=blueprint.hf_config,
            architecture=blueprint.architecture,
            config=blueprint.backbone,
            leaves=flatten(embedder.params["backbone"]),
            tokenizer=blueprint.tokenizer,
            pooling=blueprint.head.pooling,
            pool_prompt=blueprint.head.pool_prompt,
            normalize=blueprint.head.normalize,
            projection=(projection["kernel"], projection.get("bias")) if projection else None,
            max_length=blueprint.max_length,
            prompts=blueprint.prompts,
            default_prompt_name=blueprint.default_prompt_name,
            similarity=blueprint.similarity,
            unused=blueprint.unused,
            extra_files={**card_files(embedder), FINGERPRINT: json.dumps(fingerprint).encode()},
        )


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
    if bool(folder) == bool(workdir) or bool(workdir) != bool(out):
        raise UserError("give either --workdir=RUN and --out=FOLDER, or --verify=FOLDER")
    if folder:
        differences = verify(pathlib.Path(folder))
        for name, value in differences.items():
            print(f"{name}: largest difference {value:.1e}")
        print(json.dumps({"verified": folder, **differences}))
    else:
        from jaxembed.embedder import Embedder

        export_model(Embedder.load(workdir), pathlib.Path(out))
        print(json.dumps({"exported": out}))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", "", "The run to export: DIR, DIR@STEP or DIR@best.")
    flags.DEFINE_string("out", "", "The folder to write.")
    flags.DEFINE_string("verify", "", "An exported folder to check.")
    cli.run(main, __doc__)
