"""Measure a dialogue model, or compare two: how close the replies are to the human ones, how varied, how long.

    python eval_metrics.py --model-path runs/my_run --baseline-path builtin --output metrics.json
    python eval_metrics.py --model-path runs/desk --baseline-path desk --partner desk   # they play conversations
    python eval_metrics.py --model-path FOLDER --baseline-path FOLDER --data-path daily_dialog --split validation \\
        --intent-model FOLDER --limit 500

The metrics are classes with the interface of Hugging Face evaluate, and need no downloads:

    evaluate.combine([Rouge(), Meteor(), SacreBleu(), DistinctN()]).compute(predictions=replies, references=human)

`evaluate_model` measures a model, and `compare` compares two. Each difference has a 95% interval, by the paired
bootstrap (Koehn, 2004). Both models answer the same prompts with the same random numbers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import tyro
from pydantic import NonNegativeInt, PositiveInt

from support.config import check_command_line, command_line, plain_values
from support.errors import UserError, first_line, run_script
from support.options import EVAL_SAMPLING, PartnerOptions, SampleOptions, Sampling, TextOptions, check_values
from support.paths import check_data, check_file_to_write, check_models, check_template

Scoring = Literal["plain", "rl4lms"]


@dataclass
class EvalOptions:
    """Models, data, and how replies are generated."""

    model_path: str = tyro.MISSING
    """Model to evaluate: 'builtin', a run folder of ppo_dialog.py, a Hugging Face folder or a hub name; or a file of
    its --replies, which are scored again."""
    baseline_path: str = ""
    """Model to compare it with, such as the supervised model that PPO started from, or a file of its --replies."""
    data_path: str = "builtin"
    """Dialogues: 'builtin', a hub name, a folder or a file (see docs/data.md)."""
    split: Literal["train", "validation", "test"] = "test"
    """Split of the data."""
    skip_bad_rows: bool = False
    """Leave out malformed rows and count them, rather than stop at the first."""
    limit: NonNegativeInt = 0
    """Use only the first so many samples (0: all), or with --partner so many conversations (0: 600)."""
    intent_model: str = ""
    """Judge of dialogue acts: folder, hub name or 'builtin'; left out, the built-in judge for built-in data alone."""
    second_intent_model: str = ""
    """Another judge, which training did not use. It shows whether a gain in intent holds for more than one judge."""
    reward_models: tuple[str, ...] = ()
    """Reward models, by folder or hub name: each one's mean score, and how often it prefers the model to the baseline.
    One that training did not use shows whether a gain is real."""

    replies: str = ""
    """File for the replies, a line of JSON each. Another evaluation can take it as --baseline-path to save time."""
    output: str = ""
    """JSON file for metrics, differences and settings; the table is printed in any case."""
    perplexity: bool = True
    """Also compute the perplexity of the human replies, which takes about half of the time."""
    bootstrap: PositiveInt = 1000
    """Resamples for the intervals."""
    scoring: Scoring = "plain"
    """What ROUGE, METEOR and SacreBLEU read: 'plain' texts; or texts with the marker that ends an utterance, and ROUGE
    of word stems, as RL4LMs and the tutorial count ('rl4lms', see docs/published_tables.md)."""

    seed: int = 0
    """Seed of the sampling; both models get the same random numbers."""
    temperature: float = EVAL_SAMPLING.temperature
    """Divides the logits before sampling."""
    top_k: int = EVAL_SAMPLING.top_k
    """Sample from so many most likely tokens (0: all)."""
    top_p: float = EVAL_SAMPLING.top_p
    """Sample from the most likely tokens that together have this probability (1: all)."""
    min_new_tokens: int = EVAL_SAMPLING.min_new_tokens
    """A reply cannot end earlier."""
    greedy: bool = EVAL_SAMPLING.greedy
    """Take the most likely token rather than sample."""

    batch_size: PositiveInt = 32
    """Replies written at a time."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """Run the models under autocast to bf16."""


@dataclass
class EvalConfig(EvalOptions, PartnerOptions, TextOptions, SampleOptions):
    """Evaluation of a dialogue model, against a baseline where one is given."""

    def __post_init__(self):
        check_values(self)

    def check(self) -> None:
        """UserError for files that cannot be written and for paths that do not exist."""
        check_file_to_write("output", self.output)
        check_file_to_write("replies", self.replies)
        for name in (self.model_path, self.baseline_path):
            if not Path(name).is_file():
                check_models(model=name)
        check_models(intent_model=self.intent_model, second_intent_model=self.second_intent_model)
        for name in self.reward_models:
            check_models(reward_model=name)
        check_data(self.data_path)
        check_template(self.template)
        self.check_partner()

    def check_partner(self) -> None:
        """UserError for settings that conversations with a partner have no use for."""
        super().check_partner()
        if not self.partner:
            return
        if self.partner == "self":
            raise UserError("partner is 'self', which only a run has; name the model, such as --partner builtin.")
        for name in ("replies", "intent_model", "second_intent_model"):
            if value := getattr(self, name):
                raise UserError(
                    f"{name} is '{value}', and is for replies to recorded dialogues; leave it out with --partner."
                )
        for name in ("model_path", "baseline_path"):
            if (path := Path(getattr(self, name))).is_file():
                raise UserError(f"{name} is the file '{path}'; expected a model, which plays with the partner.")

    @property
    def sampling(self) -> Sampling:
        return Sampling(**{f.name: getattr(self, f.name) for f in dataclasses.fields(Sampling)})


if __name__ == "__main__":  # --help and mistakes are answered before torch is imported
    check_command_line(EvalConfig, __doc__)

import datasets
import evaluate
import numpy as np
import sacrebleu
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from transformers import AutoConfig

from envs import ConversationVectorEnv
from rewards import intent_hits, label_parts, make_reward
from support.builtin import resolve_model
from support.conversations import Conversation, ConversationTask, columns_of, has_room, sample_turn
from support.data import Dialogue, Dialogues, form_sentence, load_dialogues
from support.files import nan_to_none, write_json
from support.generation import ReplySettings, Report, causal_lm_step, generate_replies, reply_log_likelihoods
from support.judge import IntentJudge, check_judge, judge_sentence, measure_judge
from support.libraries import quiet_libraries
from support.live_display import can_draw, show_bar
from support.machine import use_all_cores
from support.meteor import meteor, meteor_uses_synonyms
from support.metric_names import LABELS, OF_REWARD_MODEL, label_of
from support.models import load_causal_lm, load_codec, longest_text
from support.partners import PartnerMaker, Tasks, first_of_dialogues, unread_data
from support.pretrained import check_positions, check_vocabulary, load_pretrained, positions_of
from support.reward_model import RewardModel, check_reward_model, wilson
from support.samples import (
    Sample,
    Samples,
    check_format,
    choose_lengths,
    describe_samples,
    lengths_to_choose,
    lengths_without_data,
    make_samples,
    pick,
    why_no_samples,
)
from support.scoring import Scores
from support.text import FORMAT_FILE, DialogueCodec, DialogueFormat
from support.turn_cache import keep_turns
from support.words import RougeWords, WordTokenizer, describe, repeats, spaced, word_tokenizer_for, words

# ---------------------------------------------------------------------------------------------------------------------
# Metrics of texts. The human replies decide how words are counted (support/words.py)

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge_scores(predictions: Sequence[str], references: Sequence[str], stems: bool = False) -> dict[str, np.ndarray]:
    """Return F-measures (N,) of each ROUGE by rouge_score (Lin, 2004), of words or of the stems of English words."""
    tokenizer = DefaultTokenizer(stems) if word_tokenizer_for(references) == "english" else RougeWords()
    scorer = RougeScorer(ROUGE, tokenizer=tokenizer)  # without a tokenizer it logs a line
    rows = [scorer.score(reference, prediction) for prediction, reference in zip(predictions, references)]
    return {name: np.array([row[name].fmeasure for row in rows]) for name in ROUGE}


def meteor_scores(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return METEOR (N,), as the reward computes it."""
    chosen = word_tokenizer_for(references)
    return np.array([meteor(prediction, reference, chosen) for prediction, reference in zip(predictions, references)])


def bleu_statistics(predictions: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """Return counts (N, 10) to add up over replies: length, reference length, matches and n-grams for n = 1 to 4."""
    bleu = sacrebleu.BLEU(tokenize="intl", effective_order=True)  # the flag changes only the score, which is not used
    chosen = word_tokenizer_for(references)
    pairs = [(spaced(p, chosen), spaced(r, chosen)) for p, r in zip(predictions, references)]
    scores = [bleu.sentence_score(prediction, [reference]) for prediction, reference in pairs]
    return np.array([[s.sys_len, s.ref_len, *s.counts, *s.totals] for s in scores]).reshape(-1, 10)


def bleu_of(statistics: np.ndarray) -> float:
    """Return corpus BLEU, 0 to 1, of summed statistics (10,), smoothed as sacrebleu.corpus_bleu does (Post, 2018)."""
    sys_len, ref_len, *counts = (int(s) for s in statistics)
    return sacrebleu.BLEU.compute_bleu(counts[:4], counts[4:], sys_len, ref_len, smooth_method="exp").score / 100


class NGrams:
    """The lowercased word n-grams of texts, numbered, each with the number of its text."""

    def __init__(self, texts: Sequence[str], n: int, word_tokenizer: WordTokenizer = "unicode"):
        numbers: dict[tuple[str, ...], int] = {}
        ids, owners = [], []
        for owner, text in enumerate(texts):
            tokens = [word.lower() for word in words(text, word_tokenizer)]
            for ngram in zip(*(tokens[k:] for k in range(n))):
                ids.append(numbers.setdefault(ngram, len(numbers)))
                owners.append(owner)
        self.ids, self.owners = np.array(ids, dtype=int), np.array(owners, dtype=int)
        self.word_tokenizer = word_tokenizer

    def distinct(self, weights: np.ndarray) -> float:
        """Return different n-grams / all n-grams (Li et al., 2016), with text i counted weights[i] times; 0 if none."""
        counts = np.bincount(self.ids, weights=weights[self.owners])
        return float(np.count_nonzero(counts) / max(1, counts.sum()))

    def distinct_without(self, size: int) -> np.ndarray:
        """Return `distinct` of the corpus without text i, for each of its `size` texts: (size,)."""
        everywhere = np.bincount(self.ids)
        (ids, owners), here = np.unique([self.ids, self.owners], axis=1, return_counts=True)
        lost = np.bincount(owners[here == everywhere[ids]], minlength=size)  # n-grams that only this text has
        return (len(everywhere) - lost) / np.maximum(1, len(self.ids) - np.bincount(self.owners, minlength=size))


def repetitions(texts: Sequence[str], word_tokenizer: WordTokenizer = "unicode") -> np.ndarray:
    """Return for each text (N,) whether it says the same three words in a row twice: 1 or 0."""
    return np.array([float(repeats(text, word_tokenizer)) for text in texts])


class ReplyMetric(evaluate.Metric):
    """Strings as predictions and references. Data stays in memory, so that processes cannot use the same file."""

    columns = ("predictions", "references")

    def __init__(self, **kwargs: Any):
        super().__init__(**{"keep_in_memory": kwargs.get("num_process", 1) == 1} | kwargs)

    def _info(self):
        features = datasets.Features({column: datasets.Value("string") for column in self.columns})
        return evaluate.MetricInfo(
            description=self.__doc__, citation="", inputs_description=ReplyMetric.__doc__, features=features
        )


class Rouge(ReplyMetric):
    """rouge1, rouge2, rougeL and rougeLsum: mean F-measures, 0 to 1."""

    def _compute(self, predictions, references):
        return {name: float(scores.mean()) for name, scores in rouge_scores(predictions, references).items()}


class Meteor(ReplyMetric):
    """meteor: mean METEOR, 0 to 1."""

    def _compute(self, predictions, references):
        return {"meteor": float(meteor_scores(predictions, references).mean())}


class SacreBleu(ReplyMetric):
    """sacrebleu: corpus BLEU with the `intl` tokenizer, 0 to 1 (sacrebleu itself gives 0 to 100)."""

    def _compute(self, predictions, references):
        return {"sacrebleu": bleu_of(bleu_statistics(predictions, references).sum(0))}


class DistinctN(ReplyMetric):
    """distinct1 and distinct2: the share of different words and word pairs in the predictions, 0 to 1."""

    columns = ("predictions",)

    def _compute(self, predictions):
        return {f"distinct{n}": NGrams(predictions, n).distinct(np.ones(len(predictions))) for n in (1, 2)}


class Repetition(ReplyMetric):
    """repetition: the share of predictions that say the same three words in a row twice, 0 to 1."""

    columns = ("predictions",)

    def _compute(self, predictions):
        return {"repetition": float(repetitions(predictions).mean())}


@dataclass
class Evaluation:
    """The results of one model on N samples, from which metrics and their bootstrap are computed."""

    texts: list[str]  # the model's replies
    references: list[str]  # the human replies
    # (N,) each: ROUGE, meteor, mean_output_length (NaN if not known), repetition, intent with a judge (NaN if the human
    # reply has no act), and the scores of reward models
    scores: dict[str, np.ndarray]
    bleu: np.ndarray | None  # (N, 10), see bleu_statistics; None without human replies
    ngrams: dict[str, NGrams]  # distinct1 and distinct2
    reply_log_likelihoods: np.ndarray  # (N,) of each human reply with its marker, in nats
    reply_tokens: np.ndarray  # (N,) tokens of each human reply with its marker
    seconds: float  # wall time of generation and metrics together
    turns: np.ndarray | None = None  # (N,) which reply of its conversation each is, counted from 1

    def metrics(self, weights: np.ndarray | None = None) -> dict[str, float | None]:
        """Return every metric of LABELS, in that order, and those of reward models.

        With `weights` (N,), sample i counts weights[i] times.
        `mean_output_length` counts sampled tokens, with the one that ends the reply (EOS, or the last of the marker).
        `perplexity` is exp(-log-likelihood / tokens) of the human replies with their marker. Perplexities of models
        with different tokenizers cannot be compared. A metric that was not computed is None; intent_second_judge is
        then left out.
        """
        weights = np.ones(len(self.texts)) if weights is None else weights
        values: dict[str, float | None] = {}
        for name, scores in self.scores.items():
            counted = weights * ~np.isnan(scores)
            values[name] = float(counted @ np.nan_to_num(scores) / counted.sum()) if counted.any() else None
        if self.bleu is not None:
            values["sacrebleu"] = bleu_of(weights @ self.bleu)
        values |= {name: ngrams.distinct(weights) for name, ngrams in self.ngrams.items()}
        if tokens := weights @ self.reply_tokens:
            loss = -(weights @ self.reply_log_likelihoods) / tokens
            values["perplexity"] = math.exp(loss) if loss < 700 else math.inf
        known = {name: values.get(name) for name in LABELS if name in values or name != "intent_second_judge"}
        return known | {name: value for name, value in values.items() if name not in LABELS}  # of reward models


@dataclass
class Answers:
    """A model's answers to N samples, before they are scored."""

    texts: list[str]  # the replies
    lengths: list[float]  # tokens sampled for each, with the one that ended it; NaN if not known
    ended: list[bool]  # whether the model ended it, rather than the limit of tokens
    reply_log_likelihoods: list[float]  # of each human reply with its marker, in nats
    reply_tokens: list[int]  # of each human reply with its marker
    seconds: float
    max_new_tokens: int  # the limit of tokens

    def save(self, file: Path, samples: Sequence[Sample], fmt: DialogueFormat) -> None:
        """Write the lengths of the format and a line of JSON for each sample. The file appears when it is complete."""
        columns = self.texts, self.lengths, self.ended, self.reply_log_likelihoods, self.reply_tokens
        names = "text", "length", "ended", "reply_log_likelihood", "reply_tokens"
        lines = [
            json.dumps(
                {"dialogue": s.key[0], "utterance": s.key[1], "prompt": s.prompt, "messages": list(s.messages)}
                | {"reply": s.reply, "act": s.act}
                | dict(zip(names, row)),
                ensure_ascii=False,
            )
            for s, row in zip(samples, zip(*columns))
        ]
        file.parent.mkdir(parents=True, exist_ok=True)
        aside = file.with_name(file.name + ".part")
        lengths = {"max_prompt_tokens": fmt.max_prompt_tokens, "max_new_tokens": fmt.max_new_tokens}
        head = json.dumps({"seconds": self.seconds, "format": lengths})
        aside.write_text("\n".join([head, *lines]) + "\n", encoding="utf-8")
        aside.replace(file)

    @classmethod
    def load(cls, file: Path, dialogues: Sequence[Dialogue]) -> tuple[Answers, list[Sample]]:
        """Read the answers in a file, and the samples that they answer. UserError unless `dialogues` has these."""
        try:
            first, *rows = [json.loads(line) for line in file.read_text(encoding="utf-8").rstrip("\n").split("\n")]
            limit = first["format"]["max_new_tokens"]
            rows = [{"ended": row["length"] < limit} | row for row in rows]  # earlier files do not say it
            names = "text", "length", "ended", "reply_log_likelihood", "reply_tokens"
            answers = cls(*([row[name] for row in rows] for name in names), first["seconds"], limit)
            samples = [
                Sample(tuple(r["messages"]), r["prompt"], r["reply"], r["act"], key=(r["dialogue"], r["utterance"]))
                for r in rows
            ]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"'{file}' is not a file of replies written by --replies ({first_line(error)}).") from error
        for sample in samples:
            number, at = sample.key
            known = dialogues[number].utterances if number < len(dialogues) else ()
            if (known[at] if at < len(known) else "") != sample.reply:
                raise UserError(f"the replies in '{file}' answer other samples; use the same data, split and limit.")
        return answers, samples

    def of(self, indices: Sequence[int]) -> Answers:
        """Return the answers to some of the samples."""
        columns = self.texts, self.lengths, self.ended, self.reply_log_likelihoods, self.reply_tokens
        return Answers(*([column[i] for i in indices] for column in columns), self.seconds, self.max_new_tokens)


def answer(
    model: torch.nn.Module,
    samples: Sequence[Sample],
    settings: ReplySettings,
    report: Report | None = None,
    perplexity: bool = True,
) -> Answers:
    """Let the model, with dropout off, answer every sample and score the human replies.

    Without `perplexity` the scores of the human replies are zeros. The model stays on its device.
    """
    started, training, samples = time.perf_counter(), model.training, list(samples)
    model.eval()
    texts, lengths = generate_replies(model, samples, settings, report)
    log_likelihoods = tokens = torch.zeros(len(samples))
    if perplexity and any(s.reply for s in samples):
        scoring = settings.batch_size, settings.share
        log_likelihoods, tokens = reply_log_likelihoods(model, settings.codec, samples, *scoring)
    model.train(training)
    ended = [settings.codec.ended(text.token_ids) for text in texts]
    scores = log_likelihoods.double().tolist(), tokens.long().tolist()
    limit = settings.codec.format.max_new_tokens
    return Answers(texts, lengths, ended, *scores, time.perf_counter() - started, limit)


def shuffled_replies(samples: Sequence[Sample], max_new_tokens: int) -> Answers | None:
    """Return the human replies in another order: to each sample the reply that belongs half of the samples further on.

    They are what a model scores that says something human to every prompt, without reading it. Long ones are cut to
    0.9 words for each token that a model may sample, and count as ended. None without two human replies.
    """
    half, most = len(samples) // 2, max(1, round(0.9 * max_new_tokens))
    said = [s.reply.split() for s in [*samples[half:], *samples[:half]]]
    if not half or not any(said):
        return None
    texts, unknown, none = [" ".join(reply[:most]) for reply in said], [math.nan] * len(said), [0] * len(said)
    return Answers(texts, unknown, [True] * len(said), none, none, 0.0, max_new_tokens)


RL4LMS_MARKER = " <EOU>"


def scored_texts(answers: Answers, samples: Sequence[Sample], scoring: Scoring) -> tuple[list[str], list[str]]:
    """Return the N replies and the N human replies that ROUGE, METEOR and SacreBLEU compare.

    RL4LMs' references are utterance + "<EOU>" (`DailyDialog.prepare`). In its replies the marker stays as well: it is
    plain text for GPT-2, and decoding drops special tokens only (github.com/allenai/RL4LMs, commit 0839060). A reply
    that the limit of tokens has cut has no marker.
    """
    texts, references = list(answers.texts), [s.reply for s in samples]
    if scoring == "rl4lms":
        texts = [text + RL4LMS_MARKER * ended for text, ended in zip(texts, answers.ended)]
        references = [reference + RL4LMS_MARKER for reference in references]
    return texts, references


def score_answers(
    answers: Answers,
    samples: Sequence[Sample],
    judge: IntentJudge | None = None,
    second_judge: IntentJudge | None = None,
    reward_models: Mapping[str, RewardModel] | None = None,
    scoring: Scoring = "plain",
) -> Evaluation:
    """Compute every metric of these answers. `scoring` is for ROUGE, METEOR and SacreBLEU, see scored_texts.

    Intent is computed as in the reward: the share of replies whose act, by the judge, is that of the human reply. An
    empty reply counts as wrong. Samples without an act do not count, and without a judge there is no intent. Without
    human replies there is no ROUGE, METEOR and SacreBLEU.
    """
    started, texts, references = time.perf_counter(), answers.texts, [s.reply for s in samples]
    scores, has_references, word_tokenizer = {}, any(references), word_tokenizer_for(references)
    compared = scored_texts(answers, samples, scoring)
    if has_references:
        scores = rouge_scores(*compared, stems=scoring == "rl4lms") | {"meteor": meteor_scores(*compared)}
    scores["mean_output_length"] = np.array(answers.lengths, dtype=float)
    scores["repetition"] = repetitions(texts, word_tokenizer)
    for name, reward_model in (reward_models or {}).items():
        scores[OF_REWARD_MODEL + name] = reward_model.scores([s.messages for s in samples], texts)
    for name, asked in (("intent", judge), ("intent_second_judge", second_judge)):
        if asked is not None and any(s.act for s in samples):
            scores[name] = intent_hits(asked, [s.context[-1] for s in samples], texts, [s.act for s in samples])
    return Evaluation(
        texts,
        references,
        scores,
        bleu_statistics(*compared) if has_references else None,
        {f"distinct{n}": NGrams(texts, n, word_tokenizer) for n in (1, 2)},
        np.array(answers.reply_log_likelihoods),
        np.array(answers.reply_tokens, dtype=float),
        answers.seconds + time.perf_counter() - started,
        np.array([s.turn for s in samples]),
    )


def evaluate_model(
    model: torch.nn.Module,
    samples: Sequence[Sample],
    judge: IntentJudge | None,
    settings: ReplySettings,
    report: Report | None = None,
) -> Evaluation:
    """`answer`, then `score_answers`. Raises ValueError if there is no sample."""
    if not samples:
        raise ValueError("there is no sample to evaluate on")
    return score_answers(answer(model, samples, settings, report), samples, judge)


# ---------------------------------------------------------------------------------------------------------------------
# Two models


def paired_difference(
    policy: Evaluation, baseline: Evaluation, n: int = 1000, seed: int = 0
) -> dict[str, dict[str, Any] | None]:
    """Return for each metric {"value": policy - baseline, "ci95": [low, high], "relative": value / baseline}.

    Intervals are percentiles over `n` resamples of the samples, the same for both models (Koehn, 2004). For distinct-n
    they are value +- 1.96 standard errors of the paired jackknife, which is somewhat wide: a resample repeats texts,
    and repetition lowers distinct-n. A metric that one of the two lacks is None, as is "relative" for a baseline of 0
    and for the scores of a reward model. Raises ValueError for different references.
    """
    if policy.references != baseline.references:
        raise ValueError("the two evaluations are not of the same samples")
    size, rng = len(policy.references), np.random.default_rng(seed)
    resampled = []
    for _ in range(n):
        weights = np.bincount(rng.integers(size, size=size), minlength=size).astype(float)
        resampled.append((policy.metrics(weights), baseline.metrics(weights)))
    ours, theirs = policy.metrics(), baseline.metrics()
    result: dict[str, dict[str, Any] | None] = {}
    for name in ours:
        if ours[name] is None or theirs.get(name) is None:
            result[name] = None
            continue
        value = ours[name] - theirs[name]
        if name in policy.ngrams:
            without = policy.ngrams[name].distinct_without(size) - baseline.ngrams[name].distinct_without(size)
            error = math.sqrt((size - 1) * without.var())
            interval = [value - 1.96 * error, value + 1.96 * error]
        else:
            drawn = [p[name] - b[name] for p, b in resampled if p[name] is not None and b[name] is not None]
            interval = np.percentile(drawn or [np.nan], [2.5, 97.5]).tolist()
        has_zero = not name.startswith(OF_REWARD_MODEL)  # a reward model's scores have no natural zero
        relative = value / theirs[name] if theirs[name] and has_zero else None
        result[name] = {"value": value, "ci95": interval, "relative": relative}
    return result


def compare(
    policy: Evaluation,
    baseline: Evaluation | None = None,
    n_bootstrap: int = 1000,
    settings: dict[str, Any] | None = None,
    shuffled: Evaluation | None = None,
) -> dict[str, Any]:
    """Return the metrics of one or two models as one JSON object: policy, baseline, difference, win_rate, settings.

    Without a baseline, baseline and difference are None, and win_rate is empty. `shuffled` is the evaluation of
    `shuffled_replies`. `settings` also gets the numbers of samples and resamples, the seconds of each model, the
    tokenizer of words, and whether METEOR used synonyms.
    """
    seconds = {"policy": policy.seconds, "baseline": baseline.seconds if baseline else None}
    known = {"samples": len(policy.texts), "bootstrap": n_bootstrap, "seconds": seconds}
    known["word_tokenizer"] = describe(policy.ngrams["distinct1"].word_tokenizer)
    if any(policy.references):
        known["meteor_synonyms"] = meteor_uses_synonyms()
    for name in ("intent", "intent_second_judge"):
        if name in policy.scores:
            known["intent_samples"] = int((~np.isnan(policy.scores[name])).sum())
    return {
        "policy": policy.metrics(),
        "baseline": baseline.metrics() if baseline else None,
        "difference": paired_difference(policy, baseline, n_bootstrap) if baseline else None,
        "settings": (settings or {}) | known,
        "win_rate": win_rates(policy, baseline) if baseline else {},
        "by_turn": metrics_by_turn(policy, baseline),
        "shuffled": shuffled.metrics() if shuffled else None,
    }


def win_rates(policy: Evaluation, baseline: Evaluation) -> dict[str, dict[str, Any]]:
    """Return for each reward model how often it scores the policy's reply higher than the baseline's.

    {"wins", "ties", "losses", "value", "ci95"}: a tie counts as half a win, and the interval is Wilson's.
    """
    found = {}
    for name in policy.scores:
        if not name.startswith(OF_REWARD_MODEL) or name not in baseline.scores:
            continue
        gains = policy.scores[name] - baseline.scores[name]
        gains = gains[~np.isnan(gains)]  # of replies that it scores
        if not len(gains):
            continue
        wins, ties, losses = (int(count.sum()) for count in (gains > 0, gains == 0, gains < 0))
        counts = {"wins": wins, "ties": ties, "losses": losses}
        value = (wins + 0.5 * ties) / len(gains)
        found[name.removeprefix(OF_REWARD_MODEL)] = counts | {
            "value": value,
            "ci95": list(wilson(wins + 0.5 * ties, len(gains))),
        }
    return found


def format_win_rates(result: dict[str, Any]) -> str:
    """Format the win rates as text, a line for each reward model."""
    lines = []
    for name, found in (result.get("win_rate") or {}).items():
        low, high = found["ci95"]
        counts = f"{found['wins']:,} wins, {found['ties']:,} ties, {found['losses']:,} losses"
        lines.append(f"win rate by reward model {name}: {found['value']:.3f} [{low:.3f}, {high:.3f}] ({counts})")
    return "\n".join(lines)


def metrics_by_turn(policy: Evaluation, baseline: Evaluation | None = None, most: int = 10) -> dict[str, Any]:
    """Return the metrics of the first, second, ... replies of conversations, up to `most`; {} if all are the first."""
    if policy.turns is None or policy.turns.max() == 1:
        return {}
    found = {}
    for turn in np.unique(policy.turns)[:most].tolist():
        weights = (policy.turns == turn).astype(float)
        metrics = {"policy": policy.metrics(weights), "baseline": baseline.metrics(weights) if baseline else None}
        found[str(turn)] = {"samples": int(weights.sum())} | metrics
    return found


def format_turns(result: dict[str, Any], names: Sequence[str] = ("meteor", "intent", "mean_output_length")) -> str:
    """Format the metrics by turn as text, a row for each turn; "" if there is one turn only."""
    by_turn = result.get("by_turn") or {}
    models = ("baseline", "policy") if result["baseline"] else ("policy",)
    names = [n for n in names if result["policy"].get(n) is not None]
    if len(by_turn) < 2 or not names:
        return ""
    lines = ["by turn: " + "; ".join(LABELS[n] + (" (baseline, policy)" if len(models) > 1 else "") for n in names)]
    for turn, row in by_turn.items():
        cells = [", ".join("-" if (v := row[m].get(n)) is None else f"{v:.4f}" for m in models) for n in names]
        lines.append(f"  reply {turn} ({row['samples']:,} samples): {'; '.join(cells)}")
    return "\n".join(lines)


OF_REFERENCES = (*ROUGE, "meteor", "sacrebleu", "perplexity")


def format_table(result: dict[str, Any], headings: tuple[str, str] = ("baseline", "policy")) -> str:
    """Format the result of `compare` as text, a row for each metric. `headings` name the models, the baseline first."""
    two, floor = result["difference"] is not None, ["shuffled"] * bool(result.get("shuffled"))
    rows = [["", *floor, *headings, "difference [95% interval]", "relative"] if two else ["", *floor, headings[1]]]
    models = (*floor, "baseline", "policy") if two else (*floor, "policy")
    names = [*LABELS, *(name for name in result["policy"] if name not in LABELS)]
    for name in names:
        # without human replies there are no metrics of them
        alone = result["policy"]["meteor"] is None and result["policy"].get(name) is None
        if name not in result["policy"] or (name in (*OF_REFERENCES, "intent") and alone):
            continue
        row = [label_of(name)] + ["-" if (v := result[m].get(name)) is None else f"{v:.4f}" for m in models]
        if two and (difference := result["difference"][name]):
            low, high = difference["ci95"]
            star = "*" if low > 0 or high < 0 else " "
            relative = difference["relative"]
            row.append(f"{difference['value']:+.4f} [{low:+.4f}, {high:+.4f}] {star}")
            row.append("-" if relative is None else f"{relative:+.1%}")
        rows.append(row)
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    lines = ["  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(r, widths))) for r in rows]
    note = " * marks an interval that excludes zero." if two else ""
    lines.append(f"{result['settings']['samples']} samples.{note}")
    if floor:
        lines.append("shuffled: human replies, each to another prompt. A model that reads its prompts scores more.")
    return "\n".join(line.rstrip() for line in lines)


# ---------------------------------------------------------------------------------------------------------------------
# During a run of PPO


def reward_of_replies(texts: Sequence[str], samples: Sequence[Sample], score: Callable) -> Scores:
    """Score a reply to each sample with the reward of a run."""
    references = [s.reply.strip() for s in samples]
    return score([s.prompt for s in samples], list(texts), references, [s.act for s in samples])


def sample_conversation(before: str, now: Conversation, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return a line of samples.jsonl: a conversation as it was before training, and as it is now."""
    shown = {"score": now.total} | {name: values[0] for name, values in columns_of([now], "metrics").items()}
    return {
        "update": metrics["update"],
        "env_steps": metrics["env_steps"],
        "context": [m["content"].strip() for m in now.messages[: now.opening]],
        "before": before,
        "now": now.transcript(),
        "human": "",
        "scores": {"before": {}, "now": shown},
    }


def sample_dialogue(sample: Sample, before: str, now: str, score: Callable, metrics: dict[str, Any]) -> dict[str, Any]:
    """Return a line of samples.jsonl: a sample, the replies before training and now, and the scores of both.

    `metrics` gives the update and the environment steps.
    """
    scores = reward_of_replies([before, now], [sample] * 2, score)
    shown = {"score": scores.total} | scores.metrics
    return {
        "update": metrics["update"],
        "env_steps": metrics["env_steps"],
        "context": [utterance.strip() for utterance in sample.context],
        "before": before,
        "now": now,
        "human": sample.reply.strip(),
        "scores": {name: {k: float(v[i]) for k, v in shown.items()} for i, name in enumerate(("before", "now"))},
    }


PLAYED = 600  # conversations, where no number is given: there is no end of them


def play(
    model: torch.nn.Module,
    make_task: Callable[[int], ConversationTask],
    conversations: int,
    settings: ReplySettings,
    report: Report | None = None,
) -> list[Conversation]:
    """Let the model play conversations 0, 1, ... and return them in this order; 0 conversations means PLAYED.

    `make_task` makes the task for a number of conversations at a time. With `settings.share` each process plays a part.
    The conversations, which depend on their numbers alone, are distributed evenly over as few rounds as possible.
    """
    state, conversations = PartialState(), conversations or PLAYED
    index, processes = (state.process_index, state.num_processes) if settings.share else (0, 1)
    rounds = -(-conversations // (processes * 2 * settings.batch_size))
    at_a_time = -(-conversations // (processes * rounds))
    env = ConversationVectorEnv(make_task(at_a_time), settings.codec, at_a_time * processes, index, processes)
    observations, _ = env.reset(seed=settings.seed, options={"rounds": rounds})
    talks, device, step = [], next(model.parameters()).device, keep_turns(causal_lm_step(model), settings.codec)
    while env.active.any():
        observations, *_ = env.step(sample_turn(step, env, observations, settings.sampling, device)[2])
        talks += env.finished
        if report:
            report(len(talks), rounds * at_a_time)
    if processes > 1:
        talks = gather_object(talks)
    return sorted(talks, key=lambda talk: talk.number)[:conversations]


def score_conversations(talks: Sequence[Conversation], seconds: float) -> Scored:
    """Compute the metrics of a run's model over the conversations that it played."""
    scores = {"mean_output_length": np.array([talk.tokens / len(talk.replies) for talk in talks])}
    scores |= {"turns": np.array([len(talk.replies) for talk in talks], float)}
    scores |= {"repetition": np.array([repetitions(talk.replies).mean() for talk in talks])}
    scores |= {name: np.array(values) for name, values in columns_of(talks, "metrics").items()}
    said = ["\n".join(talk.replies) for talk in talks]
    none = np.zeros(len(talks))
    ngrams = {f"distinct{n}": NGrams(said, n) for n in (1, 2)}
    texts = [talk.transcript() for talk in talks]
    evaluation = Evaluation(texts, [""] * len(talks), scores, None, ngrams, none, none, seconds)
    return Scored(evaluation, Scores(np.array([talk.total for talk in talks])))


@dataclass
class Scored:
    """An evaluation with the reward of each reply."""

    evaluation: Evaluation
    scores: Scores


def score_result(
    answers: Answers,
    samples: Sequence[Sample],
    score: Callable,
    judge: IntentJudge | None,
    reward_models: Sequence[str] = (),
) -> Scored:
    """Compute the metrics of a run's model, and the run's reward of each reply.

    `reward_models` names the metrics of the reward that are the scores of a reward model.
    """
    evaluation = score_answers(answers, samples, judge)
    scores = reward_of_replies(answers.texts, samples, score)
    evaluation.scores |= {OF_REWARD_MODEL + name: scores.metrics[name] for name in reward_models}
    return Scored(evaluation, scores)


def write_comparison(
    run: Path, split: str, samples: list[Sample], before: Scored, after: Scored, shuffled: Evaluation | None = None
) -> None:
    """Write eval.json and eval_samples.jsonl (each sample with both replies and their scores); print the table."""
    gains = after.scores.total - before.scores.total
    error = float(gains.std(ddof=1) / len(samples) ** 0.5) if len(samples) > 1 else float("nan")
    gain = float(gains.mean())
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "accelerate")}
    finished = datetime.now(timezone.utc).isoformat(timespec="seconds")
    settings = {"split": split, "sampling": dataclasses.asdict(EVAL_SAMPLING)}
    settings |= {"finished": finished, "versions": {"python": platform.python_version()} | versions}
    result = compare(after.evaluation, before.evaluation, settings=settings, shuffled=shuffled)
    result["reward"] = {
        "policy": float(after.scores.total.mean()),
        "baseline": float(before.scores.total.mean()),
        "difference": gain,
        "standard_error": error,
    }
    with open(run / "eval_samples.jsonl", "w", encoding="utf-8") as file:
        for sample, first, last in zip(samples, sample_scores(before), sample_scores(after)):
            row = {"context": sample.context, "act": sample.act, "human": sample.reply, "before": first, "after": last}
            file.write(json.dumps(nan_to_none(row), ensure_ascii=False) + "\n")
    write_json(run / "eval.json", result)
    print("\n".join(filter(None, [format_table(result, ("supervised", "PPO")), format_win_rates(result)])))
    print(
        f"{split} reward: {before.scores.total.mean():.3f} -> {after.scores.total.mean():.3f}, "
        f"a change of {gain:+.3f} with a standard error of {error:.3f}",
        flush=True,
    )


def sample_scores(scored: Scored) -> list[dict[str, Any]]:
    """Return for each sample the reply, its length in tokens, its reward and every metric of a single reply."""
    evaluation = scored.evaluation
    columns = scored.scores.metrics | {n: v for n, v in evaluation.scores.items() if not n.startswith(OF_REWARD_MODEL)}
    columns |= {"reward": scored.scores.total, "length": columns.pop("mean_output_length")}
    return [
        {"text": text} | {name: float(column[i]) for name, column in columns.items()}
        for i, text in enumerate(evaluation.texts)
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Command


@contextlib.contextmanager
def progress(label: str, lines: bool = True, main: bool = True, unit: str = "replies") -> Iterator[Report]:
    """Show a bar on a terminal. Elsewhere, with `lines`, print a line for each tenth of the `unit`."""
    started, tenths, draw = time.perf_counter(), 0, can_draw(main=main)
    with show_bar(label, draw, transient=True) as move:

        def report(done: int, total: int) -> None:
            nonlocal tenths
            move(done / total, f"{done:,} of {total:,} {unit}")
            if done * 10 // total > tenths:
                tenths = done * 10 // total
                if lines and not draw:
                    print(f"{label}: {done} of {total} {unit}, {time.perf_counter() - started:.0f} s", flush=True)

        yield report


def find_judges(config: EvalConfig) -> dict[str, str]:
    """Return folder or hub name of the "judge" and the "second judge", as far as given. UserError for a wrong one."""
    names = {"judge": config.intent_model, "second judge": config.second_intent_model}
    if not names["judge"] and config.data_path == "builtin":
        names["judge"] = "builtin"
    names = {what: resolve_model(name, "judge") for what, name in names.items() if name}
    for name in names.values():
        check_judge(name)
    return names


def load_judges(
    names: dict[str, str], samples: Sequence[Sample], split: str, device: torch.device
) -> tuple[dict[str, IntentJudge], dict[str, dict[str, float]]]:
    """Load the judges, and measure and print the accuracy of each on the human replies. Data without acts: none."""
    judges, measured = {}, {}
    if not any(s.act for s in samples):
        print("intent is not computed: the data has no dialogue acts.")
        return {}, {}
    if "judge" not in names:
        print("intent is not computed: no judge was given; name one with --intent-model.")
    for what, name in names.items():
        judges[what] = IntentJudge(name, device)
        if judges[what].note:
            print(f"note: {judges[what].note}")
        measured[what] = measure_judge(judges[what], samples)
        print(judge_sentence(measured[what], split, what), flush=True)
    return judges, measured


def load_reward_models(config: EvalConfig, device: torch.device) -> dict[str, RewardModel]:
    """Load the reward models, each under a short name."""
    return {label: RewardModel(name, device) for name, label in label_parts(config.reward_models).items()}


def run_evaluation(config: EvalConfig) -> dict[str, Any]:
    """Check the settings, evaluate, print the table and write `output`."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config.check()
    for name in config.reward_models:
        check_reward_model(name)
    evaluate_models = evaluate_conversations if config.partner else evaluate_replies
    evaluations, measured = evaluate_models(config, open_codecs(config), device)
    settings = plain_values(config) | {"device": str(device)} | measured
    models = evaluations["policy"], evaluations.get("baseline")
    result = compare(*models, config.bootstrap, settings, evaluations.get("shuffled"))
    print(format_table(result))
    for more in filter(None, (format_win_rates(result), format_turns(result))):
        print(more)
    if config.output:
        write_json(Path(config.output), result)
        print(f"written to {config.output}")
    return result


def evaluate_conversations(
    config: EvalConfig, codecs: dict[str, DialogueCodec], device: torch.device
) -> tuple[dict[str, Evaluation], dict[str, Any]]:
    """Let each model play the same conversations with a partner, whose score of them is a metric, if it gives one.

    Reward models score the last reply of each. The second value has nothing to add to the settings.
    """
    maker = PartnerMaker.of(config)
    if note := unread_data(config, maker):
        print(note, flush=True)
    dialogues = None if maker.begins else open_dialogues(config, codecs)
    for heading in codecs:
        codecs[heading] = with_common_lengths(config, codecs, heading, dialogues)
    openings = {} if dialogues is None else {config.split: openings_for_all(config, codecs, dialogues)}
    reward = make_reward({"partner": 1.0}, {}, device, "") if maker.has_score else None
    models, reward_models, evaluations = load_models(config, codecs), load_reward_models(config, device), {}
    for heading, (model, codec) in models.items():
        started, model = time.perf_counter(), model.eval().to(device)
        tasks = Tasks(config, maker, codec, openings, (reward, None))
        tasks.load(model, device)
        settings = ReplySettings(codec, config.sampling, config.seed, config.batch_size)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            with progress(heading, unit="conversations") as report:
                talks = play(model, partial(tasks, config.split), config.limit, settings, report)
        evaluation = score_conversations(talks, time.perf_counter() - started).evaluation
        ends = [talk.prompts[-1].messages for talk in talks], [talk.replies[-1] for talk in talks]
        evaluation.scores |= {OF_REWARD_MODEL + name: judge.scores(*ends) for name, judge in reward_models.items()}
        evaluations[heading] = evaluation
        model.cpu()
    return evaluations, {}


def evaluate_replies(
    config: EvalConfig, codecs: dict[str, DialogueCodec], device: torch.device
) -> tuple[dict[str, Evaluation], dict[str, Any]]:
    """Let each model answer the same recorded dialogues. Also return what was measured of the judges."""
    judge_names = find_judges(config)
    dialogues = open_dialogues(config, codecs)
    answers, asked = samples_of_all(config, codecs, dialogues)
    samples = asked["policy"]
    models, reward_models = load_models(config, codecs), load_reward_models(config, device)

    judges, measured = load_judges(judge_names, samples, config.split, device)
    for heading, (model, codec) in models.items():
        model.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            with progress(heading) as report:
                settings = ReplySettings(codec, config.sampling, config.seed, config.batch_size)
                answers[heading] = answer(model, asked[heading], settings, report, config.perplexity)
        model.cpu()
    if config.replies and "policy" in codecs:
        answers["policy"].save(Path(config.replies), samples, codecs["policy"].format)
    if shuffled := shuffled_replies(samples, answers["policy"].max_new_tokens):
        answers["shuffled"] = shuffled
    asked_judges = judges.get("judge"), judges.get("second judge"), reward_models
    evaluations = {n: score_answers(a, samples, *asked_judges, config.scoring) for n, a in answers.items()}
    return evaluations, {f"{what.replace(' ', '_')}_measured": metrics for what, metrics in measured.items()}


def open_dialogues(config: EvalConfig, codecs: dict[str, DialogueCodec]) -> Dialogues:
    """Load the recorded dialogues, of which no turn may contain what ends a turn of a model. Say what the data is."""
    markers = dict.fromkeys(codec.stop for codec in codecs.values() if codec.stop)
    dialogues = load_dialogues(config.data_path, config.split, config.skip_bad_rows, list(markers))
    print(form_sentence(config.data_path, dialogues), flush=True)
    return dialogues


def openings_for_all(config: EvalConfig, codecs: dict[str, DialogueCodec], dialogues: Dialogues) -> Samples:
    """Return the beginnings of recorded dialogues that all models have room for, without the models' system prompts.

    UserError if there is none.
    """
    for heading, codec in codecs.items():
        check_format(codec, dialogues, config, model_names(config)[heading])
    plain = codecs["policy"].with_format(system_prompt="")
    made = make_samples(dialogues, plain, config.speaker, config.turns, config.skip_bad_rows)
    print(f"{config.split}: {describe_samples(made)}", flush=True)
    if not len(made):
        raise UserError(why_no_samples(config.split, made))
    first = first_of_dialogues(made)
    fitting = [i for i, opening in enumerate(first) if all(has_room(opening.messages, c) for c in codecs.values())]
    if not fitting:
        raise UserError(
            f"no beginning of a {config.split} dialogue fits into the prompts of all models with their system prompts; "
            "give a shorter one, or raise the length of prompts in dialogue_format.json in the folder of --model-path."
        )
    return first.of(fitting)


def model_names(config: EvalConfig) -> dict[str, str]:
    """Return hub name or folder of the policy and the baseline, as far as they are models and no files of replies."""
    given = {"policy": config.model_path, "baseline": config.baseline_path}
    return {heading: resolve_model(name) for heading, name in given.items() if name and not Path(name).is_file()}


def open_codecs(config: EvalConfig) -> dict[str, DialogueCodec]:
    """Load the tokenizer and chat template of each model.

    A baseline with nothing saved beside it gets the policy's system prompt.
    """
    codecs: dict[str, DialogueCodec] = {}
    for heading, name in model_names(config).items():
        codec = load_codec(name, options=config)
        saved = (Path(name) / FORMAT_FILE).is_file()
        if codecs and codec.format.template and not saved and codecs["policy"].format.system_prompt:
            codec = codec.with_format(system_prompt=codecs["policy"].format.system_prompt)
        codecs[heading] = codec
    return codecs


def samples_of_all(
    config: EvalConfig, codecs: dict[str, DialogueCodec], dialogues: Dialogues
) -> tuple[dict[str, Answers], dict[str, list[Sample]]]:
    """Return the answers that were given as files, and the samples of both models: those that they have in common.

    All models get the lengths of the first one, in `codecs` too. UserError if there is no common sample.
    """
    answers: dict[str, Answers] = {}
    found: dict[str, Samples | list[Sample]] = {}
    for heading, name in (("policy", config.model_path), ("baseline", config.baseline_path)):
        if heading in codecs:
            codecs[heading] = with_common_lengths(config, codecs, heading, dialogues)
            check_format(codecs[heading], dialogues, config, model_names(config)[heading])
            how = config.speaker, config.turns, config.skip_bad_rows
            made = found[heading] = make_samples(dialogues, codecs[heading], *how)
            print(f"{config.split}: {describe_samples(made)}", flush=True)
            if not len(made):
                raise UserError(why_no_samples(config.split, made))
        elif name:
            answers[heading], found[heading] = Answers.load(Path(name), dialogues)
    keys = {heading: keys_of(samples) for heading, samples in found.items()}
    common = [key for key in keys["policy"] if all(key in others for others in keys.values())]
    if not common:
        raise UserError("the two models have no sample in common; give a baseline that answers the same utterances.")
    if len({*map(len, keys.values()), len(common)}) > 1:
        print(f"note: {len(common):,} samples are used, which both models have", flush=True)
    asked = {}
    for heading, samples in found.items():
        chosen = [keys[heading][key] for key in common[: config.limit or None]]
        asked[heading] = pick(samples, chosen)
        if heading in answers:
            answers[heading] = answers[heading].of(chosen)
    return answers, asked


def with_common_lengths(
    config: EvalConfig, codecs: dict[str, DialogueCodec], heading: str, dialogues: Dialogues | None
) -> DialogueCodec:
    """Return a model's codec with the lengths of the first model. UserError for a model with too few positions.

    Lengths that no model's folder has are those of the dialogues, where there are any.
    """
    name, codec, first = model_names(config)[heading], codecs[heading], next(iter(codecs))
    architecture = load_pretrained(AutoConfig, name, "model")
    if heading != first:
        fmt = codecs[first].format
        codec = codec.with_format(max_prompt_tokens=fmt.max_prompt_tokens, max_new_tokens=fmt.max_new_tokens)
    elif dialogues is None:
        codec = lengths_without_data(codec, config, name, positions_of(architecture))
    elif missing := lengths_to_choose(codec, config, name):
        codec = choose_lengths(codec, dialogues, config, missing, positions_of(architecture))
    advice = "lower one of them in dialogue_format.json in the folder of --model-path"
    check_positions(architecture, codec.format, name, advice)
    return codec


def load_models(
    config: EvalConfig, codecs: dict[str, DialogueCodec]
) -> dict[str, tuple[torch.nn.Module, DialogueCodec]]:
    """Load the models, each with its codec."""
    models = {}
    for heading, name in model_names(config).items():
        model = load_causal_lm(name, longest=longest_text(codecs[heading].format))
        check_vocabulary(codecs[heading].tokenizer, model, name)
        models[heading] = model, codecs[heading]
    return models


def keys_of(samples: Samples | Sequence[Sample]) -> dict[tuple[int, int], int]:
    """Return the index of each sample by its dialogue and utterance."""
    keys = samples.keys if isinstance(samples, Samples) else [s.key for s in samples]
    return {key: i for i, key in enumerate(keys)}


def main() -> None:
    quiet_libraries()
    config = command_line(EvalConfig, __doc__)
    use_all_cores()
    run_evaluation(config)


if __name__ == "__main__":
    run_script(main)
