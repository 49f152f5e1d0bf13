"""METEOR of two texts, with WordNet's synonyms if its data can be found or downloaded."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
import zipfile
from functools import cache
from typing import Any

import nltk
from nltk.corpus.reader import CorpusReader, WordNetCorpusReader
from nltk.corpus.util import LazyCorpusLoader
from nltk.stem.porter import PorterStemmer
from nltk.translate.meteor_score import single_meteor_score

from support.errors import first_line
from support.files import cache_dir
from support.words import WordTokenizer, words

DOWNLOAD_SECONDS = 15  # longest wait for WordNet
RETRY_SECONDS = 24 * 60 * 60  # before another try after a download that failed


class _WordNetReader(WordNetCorpusReader):
    """NLTK's reader without its map between versions of WordNet: it takes most of loading, for other languages."""

    def map_wn(self, version: str = "wordnet") -> None:
        return None


_other_languages = LazyCorpusLoader("omw-1.4", CorpusReader, r".*/wn-data-.*\.tab")  # is not read
wordnet = LazyCorpusLoader("wordnet", _WordNetReader, _other_languages)


class _Stemmer:
    """NLTK's Porter stemmer with a cache of words; without it, stemming takes most of METEOR's time."""

    def __init__(self):
        self.stem = cache(PorterStemmer().stem)


class _Synset(tuple):
    """What NLTK's METEOR reads of a synset: its lemmas."""

    def lemmas(self) -> tuple[_Lemma, ...]:
        return self


class _Lemma(str):
    def name(self) -> str:
        return self


class _WordNet:
    """WordNet's synonyms with a cache of words. All synonyms of a word are in one set, each once.

    METEOR unites the sets of a word for every pair of texts, and leaves out names of several words.
    """

    @staticmethod
    @cache
    def synsets(word: str) -> list[_Synset]:
        names = {lemma.name() for synset in wordnet.synsets(word) for lemma in synset.lemmas()}
        return [_Synset(_Lemma(name) for name in sorted(names) if "_" not in name)]


class _NoWordNet:
    """Replaces WordNet if its data is missing: METEOR then matches words and stems alone."""

    @staticmethod
    def synsets(word: str) -> list:
        return []


def _wordnet_found() -> bool:
    for form in ("corpora/wordnet", "corpora/wordnet.zip"):
        with contextlib.suppress(LookupError, zipfile.BadZipFile):
            nltk.data.find(form)
            return True
    return False


def _download_wordnet() -> str:
    """Download WordNet, and return why that failed ("" if it worked).

    A failure is recorded in cache_dir() for a day, so that not every start waits again. Data that appears meanwhile is
    found before this is called.
    """
    failed = cache_dir() / "wordnet_download_failed.txt"
    with contextlib.suppress(OSError, ValueError):
        written = failed.stat().st_mtime
        if 0 <= time.time() - written < RETRY_SECONDS:  # a time in the future is a clock's mistake
            at = time.strftime("%Y-%m-%d %H:%M", time.localtime(written))
            reason = failed.read_text(encoding="utf-8")
            return f"no WordNet data here, and the download failed at {at} ({reason}); the next try is a day later"
    reasons = [f"no answer within {DOWNLOAD_SECONDS:g} s"]

    def download() -> None:
        try:
            nltk.download("wordnet", quiet=True, print_error_to=io.StringIO(), raise_on_error=True)
            reasons.append("it ended without data")
        except Exception as error:  # no network, a folder that cannot be written, ...
            reasons.append(first_line(error))

    # In a thread of its own: without a network, looking up the host alone can take a minute.
    attempt = threading.Thread(target=download, daemon=True)
    attempt.start()
    attempt.join(DOWNLOAD_SECONDS)
    if _wordnet_found():
        return ""
    try:
        failed.parent.mkdir(parents=True, exist_ok=True)
        failed.write_text(reasons[-1], encoding="utf-8")
        then = "the next try is a day later"
    except OSError:
        then = f"the next start tries again, as '{failed}' cannot be written"
    return f"no WordNet data here, and the download failed ({reasons[-1]}); {then}"


@cache
def _meteor_parts() -> tuple[_Stemmer, Any]:
    """Stemmer and WordNet. Missing data is downloaded; if that fails, a notice is printed and synonyms are left out."""
    missing = "" if _wordnet_found() else _download_wordnet()
    if not missing:
        try:
            wordnet.ensure_loaded()
            return _Stemmer(), _WordNet()
        except Exception as error:  # a torn download: zipfile and NLTK raise many kinds
            missing = f"the WordNet data here is damaged ({first_line(error)})"
    print(
        f"METEOR: {missing}. So synonyms do not count (words and stems do). To turn them on: "
        "python -m nltk.downloader wordnet, or set NLTK_DATA to a folder that holds corpora/wordnet.",
        file=sys.stderr,
        flush=True,
    )
    return _Stemmer(), _NoWordNet()


def meteor_uses_synonyms() -> bool:
    return isinstance(_meteor_parts()[1], _WordNet)


def meteor(response: str, reference: str, word_tokenizer: WordTokenizer = "unicode") -> float:
    """NLTK's METEOR of one response against one reference, 0 to 1, with WordNet's synonyms if its data is there.

    Stems and synonyms are English; words of other languages have to be equal.
    """
    stemmer, synonyms = _meteor_parts()
    texts = words(reference, word_tokenizer), words(response, word_tokenizer)
    return float(single_meteor_score(*texts, stemmer=stemmer, wordnet=synonyms))
