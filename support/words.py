"""The words of a text in any script, as METEOR, ROUGE, BLEU, distinct-n and repetition count them.

NLTK and rouge_score know English words. They leave a Chinese sentence whole, or drop all letters but a to z. If the
human replies have other letters, the text is first cut at Unicode's word boundaries (UAX #29, by the library `regex`).
Chinese, Japanese, Thai, Lao, Khmer and Burmese have no blanks between words: there each character counts as a word (a
run of katakana too). A text whose letters and digits are all ASCII has the same words under both tokenizers.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

import nltk
import regex
from rouge_score.tokenizers import DefaultTokenizer

WordTokenizer = Literal["english", "unicode"]

# A letter, a mark on one, or a digit; but no mark that chooses how an emoji is drawn
BEYOND_ASCII = regex.compile(r"[[\p{L}\p{M}\p{Nd}]--[\p{ASCII}\uFE00-\uFE0F\u20E3]]", regex.V1)
BOUNDARY = regex.compile(r"\b", regex.V1 | regex.WORD)  # UAX #29
PUNCTUATION = string.punctuation + "\u2018\u2019\u201c\u201d\u2026\u3001\u3002\uff01\uff0c\uff1f"
ROUGE_WORD = regex.compile(r"[\p{L}\p{Nd}][\p{L}\p{Nd}\p{M}\u200c\u200d]*")  # with marks and joiners within it


def word_tokenizer_for(references: Iterable[str]) -> WordTokenizer:
    """Choose the tokenizer of a corpus by its human replies: "english" if all their letters and digits are ASCII.

    Replies of a model do not count: one stray character must not change a whole table.
    """
    return "unicode" if any(not r.isascii() and BEYOND_ASCII.search(r) for r in references) else "english"


def describe(word_tokenizer: WordTokenizer) -> str:
    """Name the tokenizer for the settings of an output, with the library's version if the words depend on it."""
    return "english" if word_tokenizer == "english" else f"unicode (UAX #29, regex {regex.__version__})"


def spaced(text: str, word_tokenizer: WordTokenizer = "unicode") -> str:
    """Put blanks around each word or sign that is not ASCII; without letters beyond ASCII the text stays as it is."""
    if word_tokenizer == "english" or text.isascii() or not BEYOND_ASCII.search(text):
        return text
    parts = BOUNDARY.split(unicodedata.normalize("NFC", text))
    return "".join(part if part.isascii() else f" {part} " for part in parts)


@lru_cache(2**14)  # a reply is compared with every other one to its prompt
def words(text: str, word_tokenizer: WordTokenizer = "unicode") -> tuple[str, ...]:
    """Split one text into words and punctuation, by NLTK; `preserve_line` needs no sentence model, so no download."""
    return tuple(nltk.word_tokenize(spaced(text, word_tokenizer), preserve_line=True))


def triples(text: str, word_tokenizer: WordTokenizer = "unicode") -> list[tuple[str, str, str]]:
    """Return the runs of three words of one text, in lower case and without punctuation."""
    said = [bare for word in words(text, word_tokenizer) if (bare := word.lower().strip(PUNCTUATION))]
    return list(zip(said, said[1:], said[2:]))


def repeats(text: str, word_tokenizer: WordTokenizer = "unicode") -> bool:
    """Return whether one text says the same three words in a row twice."""
    found = triples(text, word_tokenizer)
    return len(set(found)) < len(found)


class RougeWords(DefaultTokenizer):
    """rouge_score's tokenizer, which also finds words with letters and digits beyond ASCII. It does not stem."""

    def tokenize(self, text: str) -> list[str]:
        if text.isascii() or not BEYOND_ASCII.search(text):
            return super().tokenize(text)
        return ROUGE_WORD.findall(spaced(text).lower())
