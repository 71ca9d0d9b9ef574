"""Trains a tokenizer on the texts that a run trains on: `config.tokenizer = 'train:bpe:8192'`.

Byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2) by the library `tokenizers`.
Before it, texts are brought to the form in which a word has the same tokens wherever it stands, since vectors are
compared by what they say: lower case, no spaces kept, camelCase and snake_case cut into words. The result depends on
the texts alone, not on processes, threads or the order of hashes.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator

import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors, trainers

from jaxembed.config import AUTO, Config, SourceConfig
from jaxembed.config_check import trained_vocabulary
from jaxembed.data.cache_writer import INSTRUCTION
from jaxembed.data.records import Record, RecordReader
from jaxembed.data.tokenizer import Tokenizer
from jaxembed.errors import UserError
from jaxembed.stages import stages_of

# BERT's, in the order of its vocabularies: padding is 0. They serve every architecture here.
SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
MAX_RECORDS = 200_000  # of a source, drawn from all of it; more would hardly change the vocabulary
MAX_CHARACTERS = 4_000  # of a text

_CASE_CHANGE = Regex(r"(?<=\p{Ll})(?=\p{Lu})|(?<=\p{Lu})(?=\p{Lu}\p{Ll})")  # parse|HTML, HTML|Parser
_WORD = Regex(r"\p{L}[\p{L}\p{M}]*|\p{N}{1,3}|[^\s\p{L}\p{N}]+")


def train_for(config: Config) -> Tokenizer:
    """Trains the tokenizer that the config asks for on the texts of its sources, those of its stages too.

    Raises:
      UserError: bad sources, or texts too few for a vocabulary.
    """
    return train_tokenizer(training_texts(config), trained_vocabulary(config.tokenizer))


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
            pre_tokenizers.Split(Regex(r"\s+"), "removed"),
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
    """Yields the texts that the run trains on, each with its prompt; of a large source, those of a sample.

    Raises:
      UserError: what `RecordReader` raises.
    """
    places: dict[int, tuple[str, SourceConfig]] = {}
    known: list[SourceConfig] = []
    for n, stage in enumerate(stages_of(config)):
        for i, source in enumerate(stage.config.data.train):
            if source in known:
                continue
            known.append(source)
            where = f"config.data.train[{i}]" if not stage.name else f"config.stages[{n}].data.train[{i}]"
            reader = RecordReader(source, stage.config.data.on_bad_record, where)
            query_prompt, document_prompt = (
                config.prompts.get(name, "") if said == AUTO else said
                for name, said in (("query", source.prompt.query), ("document", source.prompt.document))
            )
            for record in _sample(reader):
                yield _text(query_prompt, record, record.query)
                for document in (*record.positives, *record.negatives):
                    yield _text(document_prompt, record, document)
