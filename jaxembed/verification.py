"""Does an exported folder give, in other programs, the vectors that the model gives?

Every exported folder carries the vectors of a few texts, its fingerprint. They are computed anew in JAX and, where it
is installed, in sentence-transformers, which must also find every weight, see as far as the model is said to see, and
not be moved by padding.
"""

import importlib.util
import json
import pathlib
from typing import Any

import numpy as np

from jaxembed.errors import UserError

FINGERPRINT = "jaxembed.json"
TOLERANCE = 1e-5  # largest difference of a vector's component; of vectors longer than 1, relative to their length
FELT = 1e-4  # a first token's state that sees the last token moves by more, relative to its largest entry

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


def verify(folder: pathlib.Path) -> dict[str, float]:
    """Checks a folder.

    Returns:
      'jax': the largest difference (see TOLERANCE) of its vectors from the fingerprint; and where torch and
      sentence-transformers are installed, and the class is transformers' own or ours, 'sentence_transformers': the same
      there, and 'padded': the largest difference between texts encoded together and each alone.

    Raises:
      UserError: the folder has no fingerprint; its vectors differ by more than TOLERANCE; transformers finds weights
        missing, unexpected or of another shape; or attention sees more or less of a text than config.json says.
    """
    import jax

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
        embedder = Embedder.load(folder)
        differences = {"jax": _difference(embedder.encode(texts), vectors)}
    code = read_json(folder / "config.json").get("auto_map")  # where the class is, if not in transformers
    if code in _our_auto_maps() and not _only_ours(folder):
        raise UserError(f"{folder}: its config.json leads to code that jaxembed did not write, and which is not run")
    if importlib.util.find_spec("sentence_transformers") and code in (None, *_our_auto_maps()):
        differences |= _verify_in_torch(folder, texts, vectors, embedder.blueprint.backbone.attention)
    wrong = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    if wrong:
        said = ", ".join(f"{name} by {value:.1e}" for name, value in wrong.items())
        raise UserError(f"{folder}: vectors differ from the fingerprint: {said} (allowed: {TOLERANCE:g})")
    return differences


def write_fingerprint(vectors: np.ndarray) -> bytes:
    """Returns the content of the fingerprint, `vectors` being those of TEXTS."""
    return json.dumps({"texts": TEXTS, "vectors": vectors.tolist()}).encode()


def _verify_in_torch(
    folder: pathlib.Path, texts: list[str], vectors: np.ndarray, attention: tuple[str, ...]
) -> dict[str, float]:
    import transformers
    from sentence_transformers import SentenceTransformer

    transformers.utils.logging.disable_progress_bar()
    model = SentenceTransformer(
        str(folder),
        device="cpu",
        local_files_only=True,
        trust_remote_code=_only_ours(folder),
        model_kwargs={"dtype": "float32"},
    )
    backbone = model[0].auto_model
    _check_loading(folder, type(backbone))
    _check_reach(folder, backbone, attention)
    together = model.encode(texts, show_progress_bar=False)
    alone = model.encode(texts, batch_size=1, show_progress_bar=False)
    return {"sentence_transformers": _difference(together, vectors), "padded": _difference(together, alone)}


def _our_auto_maps() -> list[dict[str, str]]:
    """What `auto_map` says where it leads to a class of ours in the same folder."""
    from jaxembed.hf import mamba, nomic_moe

    return [nomic_moe.AUTO_MAP, *mamba.AUTO_MAPS.values()]


def _only_ours(folder: pathlib.Path) -> bool:
    """Whether there is code in the folder, all of it what our writer puts there, so that it may run.

    An `auto_map` that is not our own could name code that lies elsewhere, a link could lead to it.
    """
    from jaxembed.hf import mamba, nomic_moe
    from jaxembed.hf.writer import LATENT_CODE

    files = list(folder.rglob("*"))
    if any(path.is_symlink() for path in files):
        return False
    content = {path: json.loads(path.read_bytes()) for path in files if path.suffix == ".json"}
    config = content.get(folder / "config.json", {})
    if config.get("auto_map") in _our_auto_maps():
        del config["auto_map"]
    if any(map(_maps_code, content.values())):
        return False
    ours = {code.name: code.read_bytes() for code in (LATENT_CODE, nomic_moe.CODE, mamba.CODE)}
    codes = [path for path in files if path.suffix == ".py"]
    return bool(codes) and all(path.read_bytes() == ours.get(path.name) for path in codes)


def _maps_code(content: Any) -> bool:
    """Whether the key `auto_map` stands anywhere in what a JSON file says."""
    if isinstance(content, dict):
        return "auto_map" in content or any(map(_maps_code, content.values()))
    return isinstance(content, list) and any(map(_maps_code, content))


def _check_loading(folder: pathlib.Path, kind: type) -> None:
    """transformers fills what is missing with random numbers, and says so only where it is asked."""
    _, info = kind.from_pretrained(str(folder), local_files_only=True, output_loading_info=True)
    problems = [f"{what}: {', '.join(sorted(map(str, names)))}" for what, names in info.items() if names]
    if problems:
        raise UserError(f"{folder}: transformers does not load it whole: {'; '.join(problems)}")


def _check_reach(folder: pathlib.Path, backbone: Any, attention: tuple[str, ...]) -> None:
    """Changes a text's last token and sees whether its first token's state moves, alone and beside a longer text."""
    import torch

    n_tokens, n_padded = 5, 8
    tokens = torch.arange(10, 10 + n_padded).repeat(2, 1) % backbone.config.vocab_size
    mask = torch.ones_like(tokens)
    mask[0, n_tokens:] = 0
    changed = tokens.clone()
    changed[0, n_tokens - 1] = (changed[0, n_tokens - 1] + 7) % backbone.config.vocab_size
    wanted = "bidirectional" in attention
    for many in (slice(0, 1), slice(0, 2)):
        length = n_tokens if many.stop == 1 else n_padded
        with torch.no_grad():
            states = [
                backbone(input_ids=x[many, :length], attention_mask=mask[many, :length]).last_hidden_state[0, 0]
                for x in (tokens, changed)
            ]
        moved = bool((states[0] - states[1]).abs().max() > FELT * states[0].abs().max())
        if moved != wanted:
            sees = "sees" if moved else "does not see"
            raise UserError(
                f"{folder}: in transformers a text's first token {sees} its last one, but the model is "
                f"{'bidirectional' if wanted else 'causal'}"
            )


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    lengths = np.maximum(1, np.linalg.norm(b, axis=-1, keepdims=True))
    return float((np.abs(a - b) / lengths).max()) if a.shape == b.shape else float("inf")
