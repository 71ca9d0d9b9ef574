"""How checkpoints predict words: what transformers' classes of language models have beside the backbone."""

import re
from collections.abc import Mapping
from typing import Any

from jaxembed.errors import UserError
from jaxembed.hf import bamba, decoders, mamba
from jaxembed.hf.architectures import architecture_of
from jaxembed.hf.diffusion import DREAM_HEAD, LLADA_HEAD
from jaxembed.hf.fields import read_activation, read_number
from jaxembed.hf.folder import Folder
from jaxembed.hf.rows import linear_rows, norm_rows
from jaxembed.hf.safetensors_io import open_tensors
from jaxembed.hf.table import LazyLeaf, PadRows, Row, Shape, import_leaves
from jaxembed.models.language_head import LanguageConfig

TABLE, BIAS = "language/table/embedding", "language/bias"
DREAM, LLADA = "Dream", "llada"
NEXT_WORD = (*decoders.FAMILIES, bamba.FAMILY.model_type, *mamba.CLASSES, *mamba.KIN, DREAM)  # trained to predict it
GENERATING = (*NEXT_WORD, LLADA)
TIED = ("gemma", "gemma2", "gemma3_text", "mamba", "falcon_mamba", "bimamba", "bifalcon_mamba")  # if nothing is said
SOFTCAPS = {"gemma2": 30.0, "gemma3_text": 0.0}  # where config.json does not say
# The names of encoders' heads: the layer before the product, its norm, the words' table and biases.
_ROBERTA = ("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder.weight", "lm_head.bias")
_BERT = (
    "cls.predictions.transform.dense",
    "cls.predictions.transform.LayerNorm",
    "cls.predictions.decoder.weight",
    "cls.predictions.bias",
)
ENCODERS: dict[str, tuple[str, str, str, str]] = {
    "bert": _BERT,
    "jina_bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "mpnet": _ROBERTA,
    "modernbert": ("head.dense", "head.norm", "decoder.weight", "decoder.bias"),
}
# The words' biases as other versions of transformers call them.
RENAMES = (
    (r"^cls\.predictions\.decoder\.bias$", "cls.predictions.bias"),
    (r"^lm_head\.decoder\.bias$", "lm_head.bias"),
)


def language_of(hf: Mapping[str, Any]) -> LanguageConfig:
    """Returns how a model predicts words, by its config.json: as transformers' class for that does it.

    Those that have none for masked or next words score them by the token table alone.

    Raises:
      UserError: config.json asks for something that the head cannot be.
    """
    name = architecture_of(hf).model_type
    if name == LLADA:
        return LanguageConfig(own_table=not hf.get("weight_tying", True))
    if name in NEXT_WORD:
        softcap = hf.get("final_logit_softcapping", SOFTCAPS.get(name)) if name in SOFTCAPS else None
        return LanguageConfig(
            own_table=not hf.get("tie_word_embeddings", name in TIED), softcap=float(softcap or 0.0), shift=True
        )
    if name not in ENCODERS:
        return LanguageConfig()
    if name == "modernbert":
        biases = bool(hf.get("classifier_bias"))
        if biases != bool(hf.get("norm_bias")):
            raise UserError("config.json: classifier_bias and norm_bias of a modernbert's head: both or none are read")
        act = read_activation(hf, "classifier_activation", "config.json", "gelu")
        eps, words = read_number(hf, "norm_eps", "config.json", 1e-5), bool(hf.get("decoder_bias", True))
    else:
        said = ENCODERS[name] == _BERT  # the others' classes have it fixed
        act = read_activation(hf, "hidden_act", "config.json", "gelu") if said else "gelu"
        biases, words = True, True
        eps = read_number(hf, "layer_norm_eps", "config.json", 1e-12)
    own = not hf.get("tie_word_embeddings", True)
    return LanguageConfig(own_table=own, transform=act, transform_bias=biases, norm_eps=eps, bias=words)


def language_rows(hf: Mapping[str, Any], config: Any) -> tuple[Row, ...]:
    """Returns the table of names of the head, those of the whole model's class; see `jaxembed.hf.table`.

    Args:
      hf: config.json.
      config: the backbone's, which says how many words there are.
    """
    name, language, words = architecture_of(hf).model_type, language_of(hf), PadRows(config.vocab_size)
    if name in GENERATING:
        head = {LLADA: LLADA_HEAD, DREAM: DREAM_HEAD}.get(name, "lm_head.weight")
        return (Row(head, TABLE, words),) if language.own_table else ()
    if name not in ENCODERS:
        return ()
    dense, norm, table, bias = ENCODERS[name]
    return (
        *linear_rows(dense, "language/dense", bias=language.transform_bias),
        *norm_rows(norm, "language/norm", bias=language.transform_bias),
        *((Row(table, TABLE, words),) if language.own_table else ()),
        *((Row(bias, BIAS, words),) if language.bias else ()),
    )


def language_leaves(folder: Folder, shapes: Mapping[str, Shape]) -> dict[str, LazyLeaf]:
    """Finds the weights of the head.

    Args:
      folder: from `read_folder`.
      shapes: path → shape of leaves of the model; those whose paths begin with 'language/' are looked for.

    Returns:
      Path → leaf of those that the folder has. An encoder for embeddings often comes without.

    Raises:
      UserError: a tensor is of another shape, or a model that generates lacks the table of its words.
    """
    rows = [row for row in language_rows(folder.hf_config, folder.config) if row.ours in shapes]
    tensors = {_named(name, folder.architecture.renames): x for name, x in open_tensors(folder.transformer).items()}
    found = [row for row in rows if row.hf in tensors]
    if folder.architecture.model_type in GENERATING and len(found) < len(rows):
        raise UserError(
            f"{folder.transformer}: a loss over words wants the model that predicts them, but this folder has no "
            f"{rows[0].hf}: it was made for embeddings; start from the model that it was made of"
        )
    wanted = {row.ours: shapes[row.ours] for row in found}
    there = {row.hf: tensors[row.hf] for row in found}
    return import_leaves(found, there, wanted, 0, where=str(folder.transformer))


def _named(name: str, renames: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in (*renames, *RENAMES):
        name = re.sub(pattern, replacement, name)
    return name
