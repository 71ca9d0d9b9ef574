"""The tokenizer: text to token ids, exactly those that sentence-transformers gives for the same folder."""

import functools
import hashlib
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import normalizers, processors

from jaxembed.data.templates import Template
from jaxembed.errors import UserError
from jaxembed.storage import local, local_file, path_of

_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_EXTRA = ("additional_special_tokens", "extra_special_tokens")
# The files beside a tokenizer.json that are honoured.
_SETTINGS = ("tokenizer_config.json", "special_tokens_map.json", "sentence_bert_config.json")
# Customary spellings, for a tokenizer whose files do not say which of its special tokens is which.
_CUSTOMARY = {
    "unk_token": ("[UNK]", "<unk>"),
    "pad_token": ("[PAD]", "<pad>"),
    "cls_token": ("[CLS]", "<s>"),
    "sep_token": ("[SEP]", "</s>"),
    "mask_token": ("[MASK]", "<mask>"),
}
# Tokenizers that are code on the hub, which is not run → the class of transformers that does the same.
_KIN = {"DreamTokenizer": "Qwen2TokenizerFast"}
_MASK_WORD = "jaxembed_mask_word"  # in tokenizer_config.json, see `Tokenizer.with_mask`
_OTHER_FILES = ("vocab.txt", "vocab.json", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model")


class Tokenizer:
    """A fast tokenizer with its special tokens. Immutable: threads may share it.

    Attributes:
      pad_id, cls_id, sep_id, eos_id, mask_id: ids of the special tokens, -1 where there is none.
      n_suffix: special tokens behind a text (usually one, the closing separator).
      n_special: special tokens that every text gets, those of a template included.
      copies: how often a text is repeated: 1, or 2 in an echo template.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str],
        extra_special_tokens: Sequence[str] = (),
        truncation_side: str = "right",
        mask_word: str = "",
    ) -> None:
        """Takes over `backend`, whose padding and truncation are switched off.

        Args:
          backend: the Rust tokenizer, its post-processor adding the special tokens.
          special_tokens: 'pad_token', 'cls_token' … → token. Those absent from the vocabulary are dropped.
          extra_special_tokens: further special tokens, without a role.
          truncation_side: 'right' or 'left', where a text that is too long is cut.
          mask_word: a word of the vocabulary that stands for masked ones, in place of a special token; '' for none.
        """
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self._special = {
            role: special_tokens[role]
            for role in _SPECIAL
            if role in special_tokens and backend.token_to_id(special_tokens[role]) is not None
        }
        self._extra = tuple(token for token in extra_special_tokens if backend.token_to_id(token) is not None)
        self._truncation_side = truncation_side
        self.pad_id, self.cls_id, self.sep_id, self.eos_id, self.mask_id = (
            self._id(role) for role in ("pad_token", "cls_token", "sep_token", "eos_token", "mask_token")
        )
        self._mask_word = mask_word
        if mask_word:
            self.mask_id = backend.token_to_id(mask_word)
        # What the post-processor adds, seen on a text: the marks of the text's own tokens are 0. `_frame` counts the
        # special tokens before each copy of the text and behind the last.
        processor, backend.post_processor = backend.post_processor, None
        once = len(backend.encode("a").ids)
        backend.post_processor = processor
        example = backend.encode("a")
        starts = [i for i, special in enumerate(example.special_tokens_mask) if not special][:: max(once, 1)]
        ends = [start + once for start in starts]
        self.n_special = backend.num_special_tokens_to_add(False)
        self.copies = max(len(starts), 1)
        self._frame = [start - end for start, end in zip([*starts, len(example.ids)], [0, *ends])]
        if not starts:
            self._frame = [self.n_special, 0]
        self.n_suffix = self._frame[-1]
        self._prefix_ids = example.ids[: self._frame[0]]
        self._suffix_ids = example.ids[len(example.ids) - self.n_suffix :]
        self._added_ids = {i for i, special in zip(example.ids, example.special_tokens_mask) if special}

    @classmethod
    def load(cls, spec: str) -> "Tokenizer":
        """Loads a tokenizer from disk.

        Reads JSON (or, in a folder without tokenizer.json, vocabulary files through transformers); no code of the
        folder is ever run.

        Args:
          spec: 'hf:FOLDER', or 'file:PATH' of a tokenizer.json; configuration files beside it are honoured.

        Raises:
          UserError: a file is missing or broken.
        """
        kind, _, path = spec.partition(":")
        if kind not in ("hf", "file") or not path:
            raise UserError(f"config.tokenizer = {spec!r}: wants 'hf:FOLDER' or 'file:PATH/tokenizer.json'")
        file = path_of(path)
        if kind == "hf":
            if not file.is_dir():
                raise UserError(f"tokenizer: there is no folder {file}")
            file = local(file)
            if not (file / "tokenizer.json").is_file():
                return _convert(file)
            file = file / "tokenizer.json"
        elif not file.is_file():
            raise UserError(f"tokenizer: there is no file {file}")
        else:
            file = local_file(file, _SETTINGS)
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust library raises plain Exception
            raise UserError(f"tokenizer: {file} is not a tokenizer.json: {error}") from error
        return _with_settings(backend, file.parent, {}, ())

    def tokenize(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the whole texts' token ids with the special tokens, uint32 arrays of any length."""
        encodings = self._backend.encode_batch_fast(list(texts))
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def truncate(self, ids: np.ndarray, max_length: int) -> np.ndarray:
        """Returns `ids` [n] cut to `max_length`: the special tokens stay, the text between is cut, each copy alike.

        `max_length` counts one copy of the text, as the `tokenizers` library does, which cuts before it repeats: see
        `longest`.
        """
        room, own = max_length - self.n_special, (len(ids) - self.n_special) // self.copies
        if own <= room:
            return ids
        parts, start = [], 0
        for n_special in self._frame[:-1]:
            end = start + n_special + own
            kept = slice(end - room, end) if self._truncation_side == "left" else slice(end - own, end - own + room)
            parts += [ids[start : start + n_special], ids[kept]]
            start = end
        return np.concatenate([*parts, ids[start:]])

    def longest(self, max_length: int) -> int:
        """Returns the most tokens of a text that was cut to `max_length`: more than that where texts are repeated."""
        return self.n_special + self.copies * (max_length - self.n_special)

    def fitting(self, tokens: int) -> int:
        """Returns the greatest `max_length` whose `longest` is at most `tokens`."""
        return self.n_special + (tokens - self.n_special) // self.copies

    def encode(self, texts: Sequence[str], max_length: int, prompt: str = "") -> list[np.ndarray]:
        """Tokenises texts as a model sees them.

        Args:
          texts: any strings, empty ones too.
          max_length: the most tokens of a text, prompt and special tokens included, one copy of it counted.
          prompt: a string put before each text, before tokenising.

        Returns:
          A uint32 array of token ids per text, at most `longest(max_length)` long.

        Raises:
          UserError: `max_length` leaves no room for text.
        """
        if max_length <= self.n_special:
            raise UserError(f"a text of {max_length} tokens has no room beside {self.n_special} special tokens")
        return [self.truncate(ids, max_length) for ids in self.tokenize([prompt + text for text in texts])]

    def prompt_length(self, prompt: str) -> int:
        """Returns how many tokens before a text belong to the prompt, special tokens before it included.

        Counted as sentence-transformers 6.2 does (`Transformer._get_prompt_length`): tokens of the prompt alone, less
        one if the last is a special token. Where the prompt's last characters merge with the text's first ones into
        one token, the count may be off by a token; but exported folders are evaluated there, so training counts alike.
        There a template's words behind the text would count too; here all words of the template before the text do.
        """
        if self.in_template:
            copied = len(self._backend.encode(prompt, add_special_tokens=False).ids)
            return sum(self._frame[:-1]) + copied // self.copies
        if not prompt:
            return 0
        ids = self.tokenize([prompt])[0]
        return len(ids) - int(len(ids) > 0 and int(ids[-1]) in self._special_ids)

    def keeps(self, prompt: str) -> bool:
        """Whether a prompt's own tokens begin every text behind it: none of them merges with the text's first word."""
        alone, *together = (
            self._backend.encode(prompt + text, add_special_tokens=False).ids for text in ("", "word", "The", "7", "é")
        )
        return all(ids[: len(alone)] == alone for ids in together)

    def prompt_lengths(self, prompt_length: int | np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Returns how many leading tokens of texts are left out where prompts are not pooled.

        Of an echoed text those are all before its second copy, and the prompt in that (Springer et al. 2024,
        arXiv:2402.15449). A text cut short may be all prompt; as in sentence-transformers the closing special token
        then remains, and without one the last token does, so that there is always something to pool.

        Args:
          prompt_length: the `prompt_length` of their prompt, or of each one's [n].
          lengths: tokens of each text [n], all of them.

        Returns:
          int64 [n].
        """
        copies_before = (self.copies - 1) * ((lengths - self.n_special) // self.copies)
        return np.maximum(0, np.minimum(prompt_length + copies_before, lengths - max(1, self.n_suffix)))

    def with_end_token(self, where: str) -> "Tokenizer":
        """Returns the tokenizer that ends every text with its end-of-sequence token, also one that is cut.

        Raises:
          UserError: it has no such token; `where` says what asked for it.
        """
        if self.eos_id < 0:
            raise UserError(f"{where}: the tokenizer has no end token (eos_token) to put behind every text and pool")
        return self._framed([self._prefix_ids], [*self._suffix_ids, self.eos_id])

    def with_mask(self, token: str) -> "Tokenizer":
        """Returns the tokenizer whose mask token this is.

        One that it does not know comes behind its others, as a special token. A word of its vocabulary stays one: as a
        special token it would be cut out of texts, also by transformers, for which it has no role therefore.

        Raises:
          UserError: a token that cannot be it: blank, or one with another role; or no number is free for a new one.
        """
        others = {name: role for role, name in self._special.items() if role != "mask_token"}
        if not token.strip() or token in others:
            why = f"is the tokenizer's {others[token]}" if token in others else "is blank"
            raise UserError(f"config.model.mask_token = {token!r} {why}: name another, such as '<|mask|>'")
        known = self._backend.token_to_id(token)
        if known is not None and known == self.mask_id:
            return self
        settings = (self._extra, self._truncation_side)
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        if known is None:
            backend.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
            if taken := self.token(backend.token_to_id(token)):
                raise UserError(
                    f"config.model.mask_token = {token!r}: the tokenizer's numbers have gaps, so a new token would get "
                    f"that of {taken!r}: name one of its own tokens"
                )
        if known is None or known in backend.get_added_tokens_decoder():
            return Tokenizer(backend, {**self._special, "mask_token": token}, *settings)
        return Tokenizer(backend, self._special, *settings, token)

    def token(self, token_id: int) -> str:
        """Returns the token of an id, '' where there is none."""
        return (self._backend.id_to_token(token_id) if token_id >= 0 else None) or ""

    @functools.cached_property
    def framing_ids(self) -> tuple[int, ...]:
        """The ids of what is no word: of special tokens with a role but the unknown word's, and of what texts get."""
        roles = {self._id(role) for role in self._special if role != "unk_token"}
        added = self._added_ids & self.special_ids  # a template's words are words
        return tuple(sorted((roles | added | {self.mask_id}) - {-1}))

    @functools.cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of all tokens that the tokenizer calls special."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset((*self._special_ids, *(i for i, token in added.items() if token.special)))

    def with_template(self, template: Template, where: str) -> "Tokenizer":
        """Returns the tokenizer that puts every text into a template.

        The tokenizer's own special tokens stay at both ends; but where the template has words behind the text, their
        last token is the one to pool, and nothing follows it.

        Raises:
          UserError: the tokenizer has a template already; `where` says what asked for one.
        """
        if self.in_template:
            raise UserError(f"{where}: the tokenizer has a template already; ask for none")
        first, *others = ([*self._backend.encode(words, add_special_tokens=False).ids] for words in template.before)
        after = self._backend.encode(template.after, add_special_tokens=False).ids
        return self._framed([[*self._prefix_ids, *first], *others], after or self._suffix_ids)

    def words(self, text: str) -> list[str]:
        """Returns the words into which a text is cut before the vocabulary is looked into."""
        normalizer, cut = self._backend.normalizer, self._backend.pre_tokenizer
        text = normalizer.normalize_str(text) if normalizer else text
        return [word for word, _ in cut.pre_tokenize_str(text)] if cut else [text]

    @functools.cached_property
    def vocab_size(self) -> int:
        """The largest token id + 1."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @property
    def appends_eos(self) -> bool:
        """Whether every text ends with the end-of-sequence or separator token."""
        return bool({*self._suffix_ids} & ({self.eos_id, self.sep_id} - {-1}))

    def fingerprint(self) -> str:
        """Returns a sha256 (hexadecimal) of all that decides the ids that this tokenizer gives."""
        settings = json.dumps([self._special, self._extra, self._truncation_side])
        return hashlib.sha256(f"{self._backend.to_str()}\n{settings}".encode()).hexdigest()

    def save(self, folder: str | pathlib.Path, max_length: int) -> None:
        """Writes the files from which transformers and sentence-transformers load the same tokenizer.

        Lower-casing that sentence_bert_config.json asked for is part of the tokenizer.json written, so the exported
        sentence_bert_config.json says `do_lower_case: false`.

        Args:
          folder: made if need be.
          max_length: written as `model_max_length`.
        """
        folder = pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        special: dict[str, Any] = dict(self._special)
        if "pad_token" not in special and special:
            # Batches are padded there; the mask hides the padding, so that any token serves.
            special["pad_token"] = next(
                special[r] for r in ("eos_token", "sep_token", "unk_token", *special) if r in special
            )
        if self._extra:
            special["additional_special_tokens"] = list(self._extra)
        # Without a class, or with a model's own, transformers 5 would build a tokenizer of its own; the name of
        # version 5's generic class is unknown to version 4.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "padding_side": "right",
            "truncation_side": self._truncation_side,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            **special,
            **({_MASK_WORD: self._mask_word} if self._mask_word else {}),
        }
        self._backend.save(str(folder / "tokenizer.json"))
        for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special)):
            (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _framed(self, before: Sequence[Sequence[int]], after: Sequence[int]) -> "Tokenizer":
        """Returns the tokenizer that puts these ids before each copy of a text, and behind the last."""
        backend = tokenizers.Tokenizer.from_str(self._backend.to_str())
        single, pieces = [], []
        for i, ids in enumerate((*before, after)):
            name = f"frame_{i}"
            if ids:
                single.append(name)
                pieces.append({"id": name, "ids": list(ids), "tokens": [backend.id_to_token(j) for j in ids]})
            if i < len(before):
                single.append("$A")
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=pieces)
        return Tokenizer(backend, self._special, self._extra, self._truncation_side, self._mask_word)

    @functools.cached_property
    def in_template(self) -> bool:
        """Whether what every text gets is more than special tokens."""
        return self.copies > 1 or not self.special_ids.issuperset((*self._prefix_ids, *self._suffix_ids))

    def _id(self, role: str) -> int:
        return self._backend.token_to_id(self._special[role]) if role in self._special else -1

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(self._backend.token_to_id(token) for token in (*self._special.values(), *self._extra))


def _convert(folder: pathlib.Path) -> Tokenizer:
    """Lets transformers make a fast tokenizer from the vocabulary files of a folder without tokenizer.json."""
    if not any((folder / name).is_file() for name in _OTHER_FILES):
        raise UserError(f"tokenizer: {folder} holds no tokenizer.json and none of {', '.join(_OTHER_FILES)}")
    import transformers  # seconds to import, and rarely needed

    named = str(_read_json(folder / _SETTINGS[0]).get("tokenizer_class"))
    kind = getattr(transformers, _KIN.get(named, "AutoTokenizer"))
    try:
        converted = kind.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        backend = tokenizers.Tokenizer.from_str(converted.backend_tokenizer.to_str())
    except Exception as error:  # whatever a broken vocabulary leads to
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"tokenizer: cannot make one from the vocabulary files in {folder}: {reason}") from error
    special = {role: str(token) for role, token in converted.special_tokens_map.items() if role in _SPECIAL}
    extra = [token for token in converted.all_special_tokens if token not in special.values()]
    return _with_settings(backend, folder, special, extra)


def _with_settings(
    backend: tokenizers.Tokenizer, folder: pathlib.Path, special: Mapping[str, str], extra: Sequence[str]
) -> Tokenizer:
    """Completes a backend with what the configuration files beside it say; `special` and `extra` win over them."""
    config, special_map, sentence_config = (_read_json(folder / name) for name in _SETTINGS)
    found = {"pad_token": (backend.padding or {}).get("pad_token", "")}
    for role in _SPECIAL:
        named = special.get(role) or _content(config.get(role)) or _content(special_map.get(role)) or found.get(role)
        customary = (token for token in _CUSTOMARY.get(role, ()) if backend.token_to_id(token) is not None)
        found[role] = named or next(customary, "")
    further = (_contents(file.get(key)) for file in (config, special_map) for key in _EXTRA)
    extra = [*extra, *itertools.chain.from_iterable(further)]
    if sentence_config.get("do_lower_case") is True:
        _lower_case(backend)
    truncation_side = config.get("truncation_side") or (backend.truncation or {}).get("direction") or "right"
    if truncation_side not in ("right", "left"):
        raise UserError(
            f"{folder / 'tokenizer_config.json'}: truncation_side = {truncation_side!r}, wants right or left"
        )
    word = config.get(_MASK_WORD)
    word = word if isinstance(word, str) and backend.token_to_id(word) is not None else ""
    return Tokenizer(backend, found, tuple(dict.fromkeys(extra)), truncation_side, word)


def _lower_case(backend: tokenizers.Tokenizer) -> None:
    """Puts lower-casing before the normalizer, where and how sentence-transformers does it."""
    present = backend.normalizer
    steps = list(present) if isinstance(present, normalizers.Sequence) else [present] if present else []
    if not any(isinstance(step, normalizers.Lowercase) for step in steps):
        backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), *steps])


def _content(token: Any) -> str:
    """Returns the text of a special token, which files write as a string or as an object."""
    token = token.get("content") if isinstance(token, Mapping) else token
    return token if isinstance(token, str) else ""


def _contents(value: Any) -> list[str]:
    items = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else []
    return [text for text in map(_content, items) if text]


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: wants a JSON object, has {type(value).__name__}")
    return value
