"""Tokenizers like those of language models, and a tiny BERT folder around one."""

import json
import pathlib

import tokenizers
from tokenizers import models, pre_tokenizers, processors, trainers

WORDS = "low lower newest widest Größe naïve query passage 日本 🙂 the and This sentence means in one word again :"
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
}
VOCAB_SIZE = 400


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE that begins every text with <s> and ends none, as Llama 3's does."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([WORDS, WORDS], trainer)
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 0)]),
        ]
    )
    return backend


def save_tokenizer(folder: pathlib.Path, backend: tokenizers.Tokenizer | None = None, **settings: object) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (backend or byte_level()).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(SETTINGS | settings))


def save_tiny_bert(folder: pathlib.Path, layers: int = 3) -> None:
    """Writes a random BERT of width 16 with that tokenizer, as transformers does; it takes 96 tokens."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=24,
        max_position_embeddings=96,
        initializer_range=0.5,
    )
    transformers.BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
