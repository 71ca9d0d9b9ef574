"""How transformers cuts texts into words where it does not ask the folder.

For model_type qwen2 (and its variants) transformers 5 builds Qwen's own normalizer and pre-tokenizer, whatever
tokenizer.json says; vocabulary and post-processor it keeps. A folder with another tokenizer would silently get other
ids.
"""

from collections.abc import Callable
from typing import Protocol

from tokenizers import Regex, normalizers, pre_tokenizers

from jaxembed.errors import UserError

# Of the Qwen tokenizers (https://huggingface.co/Qwen/Qwen2-0.5B, tokenizer.json).
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Case, contractions, digits, spaces, lines, punctuation, letters with and without accents of their own.
PROBE = "It's 2,048 words:  naïve\u0301 e\u0301té\n\n\tdef f(x): return x**2  # 東京 🎉  "
Cuts = Callable[[str], list[str]]


class Cutting(Protocol):
    """What is asked of a tokenizer; see `jaxembed.data.tokenizer.Tokenizer.words`."""

    def words(self, text: str) -> list[str]: ...


def qwen_words(text: str) -> list[str]:
    """Returns a text's words as Qwen's tokenizers cut them."""
    rules = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return [word for word, _ in rules.pre_tokenize_str(normalizers.NFC().normalize_str(text))]


def require_cut(cuts: Cuts | None, tokenizer: Cutting, model_type: str) -> None:
    """Refuses a tokenizer whose words transformers would cut otherwise.

    Args:
      cuts: how it does for this architecture; None where it follows the folder.
      tokenizer: the model's.
      model_type: the architecture's name, for the message.

    Raises:
      UserError: it would.
    """
    if cuts and cuts(PROBE) != tokenizer.words(PROBE):
        raise UserError(
            f"config.tokenizer: for a {model_type} transformers cuts texts into words by Qwen's rules, not by this "
            "tokenizer's, and would find other tokens: take a Qwen tokenizer, or config.model.arch qwen3 or llama, or "
            "set config.export = False"
        )
