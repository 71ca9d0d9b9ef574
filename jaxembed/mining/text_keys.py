"""When two texts count as the same, and what they have in common."""

import hashlib
import re
import unicodedata
import zlib
from collections.abc import Iterable

import numpy as np

_EAST = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # written without spaces: each letter is a word
_WORD = re.compile(rf"[{_EAST}]|[^\W_{_EAST}]+")


def normalised(text: str) -> str:
    """Returns a text in NFKC, case folded, every run of white space one space: what differs only so is the same."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def words(text: str) -> list[str]:
    """Returns a text's runs of letters and digits, lower case, in NFKC; of Chinese and Japanese each letter."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def letters(text: str) -> str:
    """Returns a text's letters and digits only, lower case, in NFKC: what differs only so is the same text."""
    return "".join(words(text))


def shingles(text: str, length: int) -> np.ndarray:
    """Returns the distinct runs of so many words, of a shorter text all of it, as rising CRC-32 sums: uint32 [n].

    Of a text without letters and digits, such as emoji, each character is a word.
    """
    found = words(text) or list(normalised(text).replace(" ", ""))
    starts = range(max(1, len(found) - length + 1))
    return np.unique(np.fromiter((zlib.crc32(" ".join(found[i : i + length]).encode()) for i in starts), np.uint32))


def hashes(texts: Iterable[str]) -> np.ndarray:
    """Returns a hash of each text, uint32 [n], the same in every process and on every machine (BLAKE2b)."""
    digests = b"".join(hashlib.blake2b(text.encode(), digest_size=4).digest() for text in texts)
    return np.frombuffer(digests, "<u4").astype(np.uint32)
