"""The embedded corpus: its size, its reproducibility, and that what is said hangs together."""

import random
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from support.builtin_corpus import (
    COMMON,
    COPIES,
    MISTAKES,
    PROMPT,
    SITUATIONS,
    SPLIT_SIZES,
    draw_corpus,
    generate_corpus,
    generate_mistakes,
    parse_situation,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from ceiling import oracle  # noqa: E402

EVERY_SITUATION = "\n".join(SITUATIONS.values())


@pytest.fixture(scope="module")
def corpus():
    return generate_corpus(seed=0)


@pytest.fixture(scope="module")
def rows(corpus):
    return [row for split in corpus.values() for row in split]


def turns(rows):
    """Each utterance with the reply to it and the act of that reply."""
    return [turn for row in rows for turn in zip(row["dialog"], row["dialog"][1:], row["act"][1:])]


def texts_of(rows):
    return {"\n".join(row["dialog"]) for row in rows}


def test_splits_have_their_sizes_and_share_no_dialogue(corpus, rows):
    assert {split: len(part) for split, part in corpus.items()} == SPLIT_SIZES
    assert len(texts_of(rows)) == len(rows)


def test_rows_are_aligned_and_in_range(rows):
    for row in rows:
        assert len(row["dialog"]) == len(row["act"]) == len(row["emotion"])
        assert 6 <= len(row["dialog"]) <= 12
        assert set(row["act"]) <= {1, 2, 3, 4} and set(row["emotion"]) <= set(range(7))


def test_same_seed_same_corpus_and_other_seed_another(corpus):
    assert generate_corpus(seed=0) == corpus
    shared = texts_of(generate_corpus(seed=1)["train"]) & texts_of(corpus["train"])
    assert len(shared) < 0.1 * len(corpus["train"])


def test_every_act_is_common_early_and_late(rows):
    for start in (0, 5):
        acts = Counter(act for row in rows for act in row["act"][start:])
        assert all(acts[act] > 0.12 * acts.total() for act in (1, 2, 3, 4))


def test_an_utterance_has_one_act(rows):
    acts = defaultdict(set)
    for row in rows:
        for text, act in zip(row["dialog"], row["act"], strict=True):
            acts[text].add(act)
    assert not [text for text, labels in acts.items() if len(labels) > 1]


def test_acts_of_replies_follow_from_the_utterance_before_but_not_always(rows):
    after = defaultdict(Counter)
    for before, _, act in turns(rows):
        after[before][act] += 1
    best_guess = sum(max(acts.values()) for acts in after.values()) / sum(acts.total() for acts in after.values())
    assert 0.75 < best_guess < 0.97


def test_utterances_are_short_and_the_vocabulary_modest(rows):
    texts = [text for row in rows for text in row["dialog"]]
    assert max(len(text.split()) for text in texts) <= 16
    assert 500 <= len({word for text in texts for word in re.findall(r"[a-z'-]+", text.lower())}) <= 1000


def test_utterances_are_well_formed(rows):
    for text in {text for row in rows for text in row["dialog"]}:
        assert not re.search(r"[{}<>|]|  ", text), text
        assert re.fullmatch(r"[A-Z].*[.?!]", text), text
        assert not re.search(r"\b[Aa] (?!one)[aeiou]|\b[Aa]n (?!hour)[^aeiou]", text), text


def test_question_marks_agree_with_the_acts(rows):
    for row in rows:
        for text, act in zip(row["dialog"], row["act"], strict=True):
            assert act != 2 or text.endswith("?")
            assert not text.endswith("?") or act in (2, 3)


def test_a_slot_said_again_keeps_its_value(rows):
    name = re.compile(r"My name is (\w+)|The name is (\w+)")
    named = [(match[1] or match[2], reply) for text, reply, _ in turns(rows) if (match := name.search(text))]
    assert len(named) > 100 and all(said in reply for said, reply in named)


def test_no_situation_reuses_a_state_that_all_of_them_share():
    # The lines would be pooled: "Is it good?" could then be answered by a goodbye.
    shared = set(re.findall(r"^\* (\w+)", COMMON, re.MULTILINE))
    assert shared and not shared & set(re.findall(r"^[AB] (\w+)", EVERY_SITUATION, re.MULTILINE))


def test_every_line_of_every_situation_gets_said(rows):
    said = {text for row in rows for text in row["dialog"]}
    assert len(SITUATIONS) >= 10
    for row in re.findall(r"^[AB] \w+ +[1-4]\w? (.+) -> ", EVERY_SITUATION, re.MULTILINE):
        # A {slot} or a <phrase> may be any words; a paraphrase or two of a rare line may go unsaid.
        patterns = [re.sub(r"\\\{\w+\\\}|<\w+>", ".+", re.escape(text)) for text in row.split(" | ")]
        assert any(re.fullmatch(pattern, text, re.IGNORECASE) for pattern in patterns for text in said), row


def test_a_table_with_an_unknown_state_or_row_is_refused():
    with pytest.raises(ValueError, match="no line in state 'nowhere'"):
        parse_situation("A start 2 Where to? -> nowhere")
    with pytest.raises(ValueError, match="neither a slot nor a line"):
        parse_situation("A start 9 Where to? -> end")


def test_changing_ones_mind_changes_the_slot(rows):
    other = re.compile(r"(?:Can I have|Could I get|can I have) an? (.+) instead\?")
    changed = [(match[1], reply) for text, reply, _ in turns(rows) if (match := other.search(text))]
    assert len(changed) > 50 and all(said in reply for said, reply in changed)


def test_absent_minded_people_end_a_dialogue_with_an_utterance_of_another(corpus):
    mistaken = generate_mistakes(seed=0)
    assert {split: len(rows) for split, rows in mistaken.items()} == SPLIT_SIZES | {"train": COPIES * 5000}
    replies = wrong = 0
    for split, rows in mistaken.items():
        said = {text for row in corpus[split] for text in row["dialog"]}
        for number, row in enumerate(rows):
            right = corpus[split][number % len(corpus[split])]
            assert row["dialog"][:PROMPT] == right["dialog"][:PROMPT] and set(row["dialog"]) <= said
            assert len(row["dialog"]) == len(row["act"]) == len(row["emotion"]) > PROMPT
            mistakes = [k for k, (one, other) in enumerate(zip(row["dialog"], right["dialog"])) if one != other]
            assert mistakes in ([], [len(row["dialog"]) - 1])
            ended = bool(mistakes) or len(row["dialog"]) < len(right["dialog"])
            replies, wrong = replies + len(row["dialog"]) - PROMPT, wrong + ended
    assert wrong / replies == pytest.approx(MISTAKES, abs=0.02)
    assert generate_mistakes(seed=0) == mistaken


def test_the_oracle_says_what_the_script_allows_and_often_what_was_said(corpus):
    draws, rng = draw_corpus(seed=0)["test"], random.Random(0)
    assert [draw.row for draw in draws] == corpus["test"]
    texts = [(draw.row["dialog"][turn], oracle(rng, draw, turn)) for draw in draws[:200] for turn in (4, 5)]
    assert 0.1 < sum(said == known for said, known in texts) / len(texts) < 0.6
