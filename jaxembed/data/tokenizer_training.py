"""Trains a tokenizer on the texts that a run trains on: `config.tokenizer = 'train:bpe:8192'`.

Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2) by the library `tokenizers`.
Before it, texts are brought to the form in which a word has the same tokens wherever it stands, since vectors are
compared by what they say: lower case, no spaces kept, camelCase and snake_case cut into words. The result depends on
the texts alone, not on processes, threads or the order of hashes.
"""

import random
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers

from jaxembed.config import AUTO, Config, SourceConfig
from jaxembed.config_check import trained_vocabulary
from jaxembed.data.cache_writer import INSTRUCTION
from jaxembed.data.records import RecordReader
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.stages import stages_of

# BERT's, in the order of its vocabularies: padding is 0. They serve every architecture here.
SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
MAX_TEXTS = 200_000  # drawn from all; more would hardly change the vocabulary, and have to fit into memory
MAX_CHARACTERS = 2_000  # of a text

_CASE_CHANGE = Regex(r"(?<=\p{Ll})(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll})")  # parse|HTML, HTML|Parser
_WORD = Regex(r"\p{L}[\p{L}\p{M}]*|\p{N}{1,3}|[^\s\p{L}\p{N}]+")


def train_for(config: Config) -> Tokenizer:
    """Trains the tokenizer that the config asks for, on a sample of its training texts where they are many.

    Raises:
      UserError: `config.tokenizer` asks for another kind or too few tokens; what `RecordReader` raises.
    """
    return train_tokenizer(_sample(training_texts(config)), trained_vocabulary(config.tokenizer))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer that puts [CLS] before and [SEP] behind a text, as BERT does.

    Args:
      texts: any strings.
      vocab_size: tokens in all, the bytes and the special tokens included; fewer where the texts give no more.
    """
    backend = tokenizers.Tokenizer(models.BPE(unk_token=SPECIAL_TOKENS["unk_token"]))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(_CASE_CHANGE, " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\s_]+"), "removed"),
            pre_tokenizers.Split(_WORD, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    ends = [SPECIAL_TOKENS["cls_token"], SPECIAL_TOKENS["sep_token"]]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in ends],
    )
    return Tokenizer(backend, SPECIAL_TOKENS)


def training_texts(config: Config) -> Iterator[str]:
    """Yields the texts that the run trains on, stages and all, each with its prompt.

    Raises:
      UserError: what `RecordReader` raises.
    """
    for source, on_bad_record, where in _sources(config):
        prompts = {
            side: config.prompts.get(side, "") if said == AUTO else said
            for side, said in (("query", source.prompt.query), ("document", source.prompt.document))
        }
        for record in RecordReader(source, on_bad_record, where):
            yield prompts["query"].replace(INSTRUCTION, record.instruction) + record.query
            before = prompts["document"].replace(INSTRUCTION, record.instruction)
            yield from (before + document for document in (*record.positives, *record.negatives))


def _sources(config: Config) -> list[tuple[SourceConfig, str, str]]:
    """Returns each source once, with what is done about its bad records, and its name in the config."""
    found: list[tuple[SourceConfig, str, str]] = []
    for n, stage in enumerate(stages_of(config)):
        field = f"config.stages[{n}].data.train" if stage.config.data != config.data else "config.data.train"
        for i, source in enumerate(stage.config.data.train):
            if source not in (known for known, *_ in found):
                found.append((source, stage.config.data.on_bad_record, f"{field}[{i}]"))
    return found


def _sample(texts: Iterable[str]) -> list[str]:
    """Draws MAX_TEXTS of any number of texts, each as likely as the others, and the same ones every time.

    Reservoir sampling: Vitter 1985, "Random sampling with a reservoir", algorithm R.
    """
    draw = random.Random(0)
    kept: list[str] = []
    for n, text in enumerate(texts):
        if n < MAX_TEXTS:
            kept.append(text[:MAX_CHARACTERS])
        elif (place := draw.randrange(n + 1)) < MAX_TEXTS:
            kept[place] = text[:MAX_CHARACTERS]
    return kept
