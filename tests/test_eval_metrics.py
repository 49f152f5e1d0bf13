"""The metrics equal those of the libraries; differences, replies and the command are as documented."""

import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import evaluate
import forked
import numpy as np
import pytest
import sacrebleu
import torch
from chat_templates import chat_model
from conftest import make_tokenizer
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

from eval_metrics import (
    Answers,
    DistinctN,
    EvalConfig,
    Evaluation,
    Meteor,
    NGrams,
    Repetition,
    Rouge,
    SacreBleu,
    answer,
    bleu_of,
    bleu_statistics,
    compare,
    evaluate_model,
    format_table,
    meteor_scores,
    paired_difference,
    repetitions,
    rouge_scores,
    run_evaluation,
    score_answers,
    shuffled_replies,
    win_rates,
)
from rewards import words
from support import meteor as meteor_module
from support.data import load_dialogues
from support.errors import UserError
from support.generation import ReplySettings, generate_replies, reply_log_likelihoods
from support.metric_names import BETTER, LABELS, verdict
from support.options import EVAL_SAMPLING
from support.samples import Sample, make_samples
from support.text import DialogueCodec, DialogueFormat
from support.words import word_tokenizer_for

REPOSITORY = Path(__file__).parent.parent
KEYS = [
    *("rouge1", "rouge2", "rougeL", "rougeLsum", "meteor", "sacrebleu"),
    *("intent", "mean_output_length", "distinct1", "distinct2", "repetition", "perplexity"),
]
PREDICTIONS = [
    "I would like a table for two , please .",
    "",
    "Çok güzel — naïve café № 5 “quoted” \U0001f600 日本語",
    "no no\nyes yes yes",
    "Sure . I'll take the 3.5 % off, and the U.S. one .",
    "\u200b...?!",
]
REFERENCES = [
    "I'd like a table for two people , please .",
    "What time is it ?",
    "Çok güzel bir naïve café № 5 “quoted” \U0001f600 日本",
    "yes\nno no",
    "Sure . I will take the 3.5 % off and the U.S. ones .",
    "Really ?!",
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """A second thread only slows models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_download(monkeypatch):
    """METEOR without WordNet, and without a download."""
    monkeypatch.setattr(meteor_module, "_meteor_parts", lambda: (meteor_module._Stemmer(), meteor_module._NoWordNet()))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def random_gpt2(tokenizer, seed=0):
    torch.manual_seed(seed)
    sizes = dict(n_layer=2, n_head=2, n_embd=32, n_positions=512)
    ids = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes, **ids))  # in train mode, with dropout


def save_model(folder: Path, tokenizer, seed: int) -> None:
    random_gpt2(tokenizer, seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    DialogueFormat().save(folder)


@pytest.fixture(scope="module")
def samples(tokenizer):
    codec = DialogueCodec(tokenizer, DialogueFormat(max_prompt_tokens=400))
    return list(make_samples(load_dialogues("builtin", "test"), codec)[:10])


class ActJudge:
    """Replaces IntentJudge: every utterance is an inform."""

    model = torch.nn.Linear(1, 1)
    model.device = torch.device("cpu")

    def acts(self, previous, utterances):
        return [1] * len(utterances)


def evaluation(predictions, references, log_likelihood=-20.0):
    scores = rouge_scores(predictions, references) | {"meteor": meteor_scores(predictions, references)}
    scores["intent"] = np.array([float(bool(p)) for p in predictions])
    scores["mean_output_length"] = np.array([float(len(p.split()) + 1) for p in predictions])
    scores["repetition"] = repetitions(predictions)
    return Evaluation(
        texts=list(predictions),
        references=list(references),
        scores=scores,
        bleu=bleu_statistics(predictions, references),
        ngrams={f"distinct{n}": NGrams(predictions, n) for n in (1, 2)},
        reply_log_likelihoods=np.linspace(log_likelihood, log_likelihood - 5, len(predictions)),
        reply_tokens=np.full(len(predictions), 10.0),
        seconds=1.0,
    )


# --- Metrics


def test_rouge_is_that_of_rouge_score():
    names = ["rouge1", "rouge2", "rougeL", "rougeLsum"]
    rows = [RougeScorer(names).score(r, p) for p, r in zip(PREDICTIONS, REFERENCES)]
    ascii_rows = [row for row, reference in zip(rows, REFERENCES) if "Çok" not in reference]
    expected = {name: np.mean([row[name].fmeasure for row in ascii_rows]) for name in names}
    texts = [p for p in PREDICTIONS if "Çok" not in p], [r for r in REFERENCES if "Çok" not in r]
    assert Rouge().compute(predictions=texts[0], references=texts[1]) == expected
    assert expected["rougeL"] != expected["rougeLsum"]  # the sample with line breaks tells them apart
    # with letters beyond ASCII in one human reply, the others keep their scores to the digit
    scores = rouge_scores(PREDICTIONS, REFERENCES)
    for name in names:
        assert [s for i, s in enumerate(scores[name]) if i != 2] == [row[name].fmeasure for row in ascii_rows]
    # çok güzel (bir) naïve café 5 quoted 日 本 (語): 8 of 9 words on both sides; pairs break at bir and end before 語
    assert scores["rouge1"][2] == pytest.approx(8 / 9) and scores["rouge2"][2] == pytest.approx(6 / 8)


def test_sacrebleu_is_that_of_sacrebleu():
    # sacrebleu's tokenizer for Chinese also sets blanks between ideographs
    texts = [[t.replace("日本", "日 本 ") for t in column] for column in (PREDICTIONS, REFERENCES)]
    expected = sacrebleu.corpus_bleu(texts[0], [texts[1]], tokenize="intl").score / 100
    result = SacreBleu().compute(predictions=PREDICTIONS, references=REFERENCES)
    assert 0.1 < expected < 0.9 and result == {"sacrebleu": expected}
    assert evaluation(PREDICTIONS, REFERENCES).metrics()["sacrebleu"] == expected
    # short replies, where the smoothing of missing 4-grams decides, and replies without any match
    for predictions in (["yes please"] * 6, ["I take it"] + [""] * 5, [""] * 6):
        expected = sacrebleu.corpus_bleu(predictions, [texts[1]], tokenize="intl").score / 100
        assert SacreBleu().compute(predictions=predictions, references=REFERENCES) == {"sacrebleu": expected}


def test_meteor_is_that_of_nltk():
    result = Meteor().compute(predictions=PREDICTIONS, references=REFERENCES)
    expected = [
        single_meteor_score(words(r), words(p), wordnet=meteor_module._NoWordNet())
        for p, r in zip(PREDICTIONS, REFERENCES)
    ]
    assert expected[1] == 0 and result == {"meteor": pytest.approx(np.mean(expected))}


def test_distinct_counts_words_and_pairs_within_replies():
    result = DistinctN().compute(predictions=["Yes yes no", "no yes", "", "no"])
    assert result == {"distinct1": 2 / 6, "distinct2": 3 / 3}  # (yes yes), (yes no), (no yes); none across replies
    assert DistinctN().compute(predictions=["", ""]) == {"distinct1": 0.0, "distinct2": 0.0}


def test_leaving_a_reply_out_of_distinct():
    texts = ["a b a", "b c", "", "a a d", "c c"]
    for n in (1, 2):
        left_out = [NGrams(texts[:i] + texts[i + 1 :], n).distinct(np.ones(4)) for i in range(5)]
        assert NGrams(texts, n).distinct_without(5).tolist() == pytest.approx(left_out)


@pytest.mark.parametrize("metric", [Rouge, Meteor, SacreBleu, DistinctN])
def test_adding_in_batches_is_computing_at_once(metric):
    at_once = metric().compute(predictions=PREDICTIONS, references=REFERENCES)
    added = metric()
    for start in (0, 4):
        added.add_batch(predictions=PREDICTIONS[start : start + 4], references=REFERENCES[start : start + 4])
    assert added.compute() == at_once
    for prediction, reference in zip(PREDICTIONS, REFERENCES):
        added.add(prediction=prediction, reference=reference)
    assert added.compute() == at_once


def test_metrics_combine_without_files_or_words(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path))
    together = evaluate.combine([Rouge(), Meteor(), SacreBleu(), DistinctN(), Repetition()])
    together.add_batch(predictions=PREDICTIONS, references=REFERENCES)
    # a second one at the same time, as in another process
    other = evaluate.combine([SacreBleu(), Rouge()])
    other.add_batch(predictions=REFERENCES, references=REFERENCES)
    result = together.compute()
    assert list(result) == [k for k in KEYS if k not in ("intent", "mean_output_length", "perplexity")]
    assert other.compute()["sacrebleu"] == pytest.approx(1.0)
    expected = evaluation(PREDICTIONS, REFERENCES).metrics()
    assert result == pytest.approx({k: expected[k] for k in result})
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


# --- Differences


def test_identical_evaluations_differ_by_exactly_nothing():
    one, other = evaluation(PREDICTIONS, REFERENCES), evaluation(PREDICTIONS, REFERENCES)
    for difference in paired_difference(one, other, n=50).values():
        assert difference in [{"value": 0.0, "ci95": [0.0, 0.0], "relative": x} for x in (0.0, None)]


def test_scores_that_are_missing_do_not_count():
    """A reward model or judge may score some replies alone. A resample may then hold none of them."""
    one, other = (evaluation(PREDICTIONS[:4], REFERENCES[:4]) for _ in range(2))
    one.scores["reward_model_rm"] = np.array([1.0, 2.0, 3.0, np.nan])
    other.scores["reward_model_rm"] = np.array([0.0, np.nan, np.nan, np.nan])
    difference = paired_difference(one, other, n=50)["reward_model_rm"]
    assert difference["value"] == 2 and np.isfinite(difference["ci95"]).all()
    rate = win_rates(one, other)["rm"]
    assert (rate["wins"], rate["ties"], rate["losses"], rate["value"]) == (1, 0, 0, 1)
    other.scores["reward_model_rm"] = np.full(4, np.nan)
    assert win_rates(one, other) == {} and paired_difference(one, other, n=5)["reward_model_rm"] is None


def test_a_better_model_has_its_interval_above_zero():
    references = REFERENCES * 5
    better, worse = evaluation(references, references, -20), evaluation(PREDICTIONS * 5, references, -30)
    difference = paired_difference(better, worse, n=200)
    assert list(difference) == KEYS == [name for name in LABELS if name != "intent_second_judge"]
    for name in ("rouge1", "rougeL", "meteor", "sacrebleu"):
        low, high = difference[name]["ci95"]
        assert 0 < low < difference[name]["value"] < high
    assert difference["perplexity"]["ci95"][1] < 0
    assert difference["perplexity"]["relative"] == pytest.approx(math.exp(2.25) / math.exp(3.25) - 1)
    assert difference == paired_difference(better, worse, n=200)  # seeded


def test_every_interval_holds_its_value():
    rng = np.random.default_rng(0)
    vocabulary = [f"w{i}" for i in range(60)]

    def replies(size):
        return [" ".join(rng.choice(vocabulary[:size], 8)) for _ in range(80)]

    references = replies(60)
    one, other = evaluation(replies(60), references), evaluation(replies(40), references)
    for difference in paired_difference(one, other).values():
        assert difference["ci95"][0] <= difference["value"] <= difference["ci95"][1]


def test_weights_are_copies_of_samples():
    weights = np.array([2, 0, 1, 3, 0, 1])

    def repeated(texts):
        return [t for t, w in zip(texts, weights) for _ in range(w)]

    weighted, copied = evaluation(PREDICTIONS, REFERENCES), evaluation(repeated(PREDICTIONS), repeated(REFERENCES))
    copied.reply_log_likelihoods = np.repeat(weighted.reply_log_likelihoods, weights)
    assert weighted.metrics(weights) == pytest.approx(copied.metrics())


def test_without_a_judge_intent_is_null_everywhere():
    one, other = evaluation(PREDICTIONS, REFERENCES), evaluation(REFERENCES, REFERENCES)
    del other.scores["intent"]
    result = compare(other, one, n_bootstrap=20, settings={"split": "test"})
    assert list(result) == ["policy", "baseline", "difference", "settings", "win_rate", "by_turn", "shuffled"]
    assert result["policy"]["intent"] is None and result["difference"]["intent"] is None
    assert result["settings"]["samples"] == 6 and result["settings"]["split"] == "test"
    table = format_table(result, headings=("supervised", "PPO")).splitlines()
    assert table[0].split()[:2] == ["supervised", "PPO"] and len(table) == 14
    assert "*" in table[1] and "excludes zero" in table[-1]
    labels = [label for name, label in LABELS.items() if name != "intent_second_judge"]  # no such judge here
    assert [row.split("  ")[0] for row in table[1:-1]] == labels
    alone = compare(other)
    assert alone["baseline"] is alone["difference"] is None
    assert format_table(alone).splitlines()[1].split() == ["ROUGE-1", f"{alone['policy']['rouge1']:.4f}"]


def test_evaluations_of_other_samples_are_refused():
    with pytest.raises(ValueError, match="same samples"):
        paired_difference(evaluation(PREDICTIONS, REFERENCES), evaluation(PREDICTIONS, PREDICTIONS))


# --- Models


def test_replies_do_not_depend_on_batch_or_company(tokenizer, samples):
    model, codec = random_gpt2(tokenizer).eval(), DialogueCodec(tokenizer, DialogueFormat(max_new_tokens=8))
    seen = []
    settings = ReplySettings(codec, seed=3, batch_size=10)
    texts, lengths = generate_replies(model, samples, settings, report=lambda *done: seen.append(done))
    assert seen == [(10, 10)]
    for batch_size in (1, 4):
        assert generate_replies(model, samples, ReplySettings(codec, seed=3, batch_size=batch_size)) == (texts, lengths)
    assert generate_replies(model, samples[:5], ReplySettings(codec, seed=3, batch_size=5)) == (texts[:5], lengths[:5])
    assert generate_replies(model, samples, ReplySettings(codec, seed=4, batch_size=10))[0] != texts
    assert all(EVAL_SAMPLING.min_new_tokens <= length <= codec.format.max_new_tokens for length in lengths)


def test_evaluating_a_model(tokenizer, samples):
    model, codec = random_gpt2(tokenizer), DialogueCodec(tokenizer, DialogueFormat(max_new_tokens=8))
    assert model.training
    result = evaluate_model(model, samples, ActJudge(), ReplySettings(codec, batch_size=8))
    assert model.training  # left as it came, and evaluated without dropout all the same:
    model.eval()
    texts, lengths = generate_replies(model, samples, ReplySettings(codec, batch_size=8))
    metrics = result.metrics()
    assert list(metrics) == KEYS and result.texts == texts
    assert metrics["mean_output_length"] == pytest.approx(np.mean(lengths))
    assert metrics["intent"] == np.mean([bool(t) and s.act == 1 for t, s in zip(texts, samples)])
    sums, counts = reply_log_likelihoods(model, codec, samples)
    assert metrics["perplexity"] == pytest.approx(torch.exp(-sums.sum() / counts.sum()).item(), rel=1e-4)
    unpriced = answer(model, samples, ReplySettings(codec), perplexity=False)
    rest = score_answers(unpriced, samples, ActJudge()).metrics()
    assert rest.pop("perplexity") is None and rest == {k: v for k, v in metrics.items() if k != "perplexity"}
    unlabelled = [dataclasses.replace(s, act=0) for s in samples[:2]]
    assert evaluate_model(model, unlabelled, ActJudge(), ReplySettings(codec)).metrics()["intent"] is None


def test_models_of_different_templates_answer_the_samples_that_both_have(tokenizer, tmp_path, capsys):
    save_model(tmp_path / "joined", tokenizer, 0)
    DialogueFormat(max_prompt_tokens=200, max_new_tokens=7).save(tmp_path / "joined")
    chat_model(tmp_path / "chat")
    settings = dict(data_path="builtin", split="test", bootstrap=5, intent_model="", perplexity=True)
    replies = str(tmp_path / "replies.jsonl")
    config = EvalConfig(model_path=str(tmp_path / "joined"), baseline_path=str(tmp_path / "chat"), limit=6, **settings)
    result = run_evaluation(dataclasses.replace(config, replies=replies))
    printed = capsys.readouterr().out
    assert "samples are used, which both models have" in printed and result["settings"]["samples"] == 6
    assert result["baseline"]["mean_output_length"] <= 7  # the limits of the first
    rows = [json.loads(line) for line in Path(replies).read_text().splitlines()[1:]]
    assert all("<EOU>" in row["prompt"] for row in rows)
    swapped = run_evaluation(dataclasses.replace(config, model_path=str(tmp_path / "chat"), baseline_path=replies))
    assert swapped["baseline"] == pytest.approx(result["policy"], rel=1e-6)
    alone = run_evaluation(EvalConfig(model_path=str(tmp_path / "chat"), limit=40, **settings))
    turns = alone["by_turn"]
    assert sum(row["samples"] for row in turns.values()) == 40 and turns.keys() >= {"1", "2", "3"}
    assert "by turn: METEOR; intent; mean output length" in capsys.readouterr().out
    lengths = [row["samples"] * row["policy"]["mean_output_length"] for row in turns.values()]
    assert sum(lengths) / 40 == pytest.approx(alone["policy"]["mean_output_length"])


def test_without_human_replies_there_is_no_metric_of_them(tmp_path, capsys):
    rows = [json.dumps({"prompt": f"What is {i} and {i} ?"}) for i in range(3)]
    (tmp_path / "test.jsonl").write_text("\n".join(rows))
    model = chat_model(tmp_path / "chat")
    result = run_evaluation(EvalConfig(model_path=model, data_path=str(tmp_path), split="test", bootstrap=5))
    printed = capsys.readouterr().out
    assert "rows of 'prompt' (a prompt alone); there are no human replies" in printed and "METEOR" not in printed
    known = {name for name, value in result["policy"].items() if value is not None}
    assert known == {"mean_output_length", "distinct1", "distinct2", "repetition"}


def test_settings_that_cannot_be_used(tmp_path):
    for settings, words_of_error in (
        (dict(limit=-1), "limit is -1"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(bootstrap=0), "bootstrap is 0"),
        (dict(temperature=0.0), "temperature is 0"),
        (dict(output=str(tmp_path)), "cannot be written"),
        (dict(data_path=str(tmp_path / "none")), "does not exist"),
        (dict(model_path=str(tmp_path / "none")), "does not exist"),
        (dict(model_path=str(tmp_path)), "without config.json"),
    ):
        with pytest.raises(UserError, match=words_of_error):
            run_evaluation(EvalConfig(**{"model_path": "builtin"} | settings))


def test_the_command(tokenizer, tmp_path):
    """A run folder's policy against a plain folder, with a judge of random weights."""
    for folder, seed in ((tmp_path / "run" / "policy", 0), (tmp_path / "sft", 1)):
        save_model(folder, tokenizer, seed)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=4)
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "judge")
    tokenizer.save_pretrained(tmp_path / "judge")
    output = tmp_path / "new" / "metrics.json"
    arguments = f"--model-path {tmp_path}/run --baseline-path {tmp_path}/sft --intent-model {tmp_path}/judge"
    finished = forked.run(
        [sys.executable, "eval_metrics.py", *arguments.split()]
        + f"--data-path builtin --split validation --limit 6 --batch-size 2 --bootstrap 50 --output {output}".split(),
        cwd=REPOSITORY,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "TORCH_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == "" or "WordNet" in finished.stderr
    result = json.loads(output.read_text())
    assert list(result) == ["policy", "baseline", "difference", "settings", "win_rate", "by_turn", "shuffled"]
    assert list(result["policy"]) == list(result["baseline"]) == list(result["difference"]) == KEYS
    assert all(list(d) == ["value", "ci95", "relative"] for d in result["difference"].values())
    assert result["settings"]["samples"] == 6 and result["settings"]["seconds"]["baseline"] > 0
    assert "policy: 2 of 6 replies" in finished.stdout and "baseline: 6 of 6 replies" in finished.stdout
    assert format_table(result) in finished.stdout
    assert format_table(result).splitlines()[0].split()[:3] == ["shuffled", "baseline", "policy"]


def test_replies_that_were_kept_are_a_baseline_and_a_second_judge_is_asked(tokenizer, tmp_path, capsys):
    for folder, seed in ((tmp_path / "a", 0), (tmp_path / "b", 1)):
        save_model(folder, tokenizer, seed)
    a, b, kept = (str(tmp_path / name) for name in ("a", "b", "b.jsonl"))
    settings = dict(split="validation", limit=6, bootstrap=20)
    run_evaluation(EvalConfig(model_path=b, replies=kept, **settings))
    other = dict(intent_model="builtin", second_intent_model="builtin")
    result = run_evaluation(EvalConfig(model_path=a, baseline_path=kept, **settings | other))
    fresh = run_evaluation(EvalConfig(model_path=a, baseline_path=b, **settings | other))
    for part in ("policy", "baseline", "difference"):
        assert result[part] == fresh[part]
    again = run_evaluation(EvalConfig(model_path=kept, baseline_path=kept, **settings | other))  # no model is loaded
    assert again["policy"] == again["baseline"] == result["baseline"]
    assert result["policy"]["intent_second_judge"] == result["policy"]["intent"]
    assert "intent, second judge" in capsys.readouterr().out
    head, *rows = map(json.loads, (tmp_path / "b.jsonl").read_text().splitlines())
    earlier = [{name: value for name, value in row.items() if name != "ended"} for row in rows]
    (tmp_path / "earlier.jsonl").write_text("\n".join(map(json.dumps, [head, *earlier])))
    old, new = (
        run_evaluation(EvalConfig(model_path=str(tmp_path / name), scoring="rl4lms", **settings))["policy"]["meteor"]
        for name in ("earlier.jsonl", "b.jsonl")
    )
    assert old == new  # a reply of fewer tokens than the limit has ended
    with pytest.raises(UserError, match="answer other samples"):
        run_evaluation(EvalConfig(model_path=a, baseline_path=kept, **settings | dict(split="test")))
    (tmp_path / "b.jsonl").write_text("not json")
    with pytest.raises(UserError, match="not a file of replies"):
        run_evaluation(EvalConfig(model_path=a, baseline_path=kept, **settings))


def test_scored_as_rl4lms_a_reply_to_another_prompt_gains_by_its_marker():
    """Texts, stems and the marker of the end are those that its ROUGE, METEOR and SacreBLEU read."""
    samples = [Sample(("Hi .",), "Hi .", reply, 0) for reply in REFERENCES]
    replies = Answers(PREDICTIONS, [5] * 6, [True, True, True, True, False, True], [0.0] * 6, [0] * 6, 0.0, 5)
    plain, scored = (score_answers(replies, samples, scoring=scoring).metrics() for scoring in ("plain", "rl4lms"))
    references = [f"{text} <EOU>" for text in REFERENCES]
    read = [text if i == 4 else f"{text} <EOU>" for i, text in enumerate(PREDICTIONS)]  # the fifth was cut
    unicode = word_tokenizer_for(references)
    assert unicode == "unicode" and scored["meteor"] == pytest.approx(meteor_scores(read, references).mean())
    assert scored["sacrebleu"] == pytest.approx(bleu_of(bleu_statistics(read, references).sum(0)))
    same = ("mean_output_length", "distinct1", "distinct2", "repetition")
    assert {name: scored[name] for name in same} == {name: plain[name] for name in same}
    english = [(p, r) for p, r in zip(read, references) if p.isascii()]
    scorer = RougeScorer(["rouge1"], use_stemmer=True)
    wanted = [scorer.score(reference, prediction)["rouge1"].fmeasure for prediction, reference in english]
    assert rouge_scores(*zip(*english), stems=True)["rouge1"].tolist() == wanted
    assert rouge_scores(["tables"], ["table"], stems=True)["rouge1"].tolist() == [1.0]
    # four human replies, none to its prompt, which share no word: all that they score is the marker
    others = [Sample(("Hi .",), "Hi .", reply, 0) for reply in ("I see .", "Two tickets ?", "Red wine !", "Tomorrow")]
    shuffled = shuffled_replies(others, 20)
    assert shuffled.texts == ["Red wine !", "Tomorrow", "I see .", "Two tickets ?"]
    floors = [score_answers(shuffled, others, scoring=scoring).metrics() for scoring in ("plain", "rl4lms")]
    assert floors[0]["rouge1"] == floors[0]["meteor"] == 0 and floors[1]["rouge1"] > 0.3 and floors[1]["meteor"] > 0.3
    assert floors[0]["mean_output_length"] is None


def test_shuffled_replies_are_cut_and_need_two():
    samples = [Sample(("Hi .",), "Hi .", " ".join(["so"] * n), 0) for n in (3, 30)]
    shuffled = shuffled_replies(samples, 20)
    assert [len(text.split()) for text in shuffled.texts] == [18, 3] and all(shuffled.ended)
    assert shuffled_replies(samples[:1], 20) is None
    assert shuffled_replies([dataclasses.replace(s, reply="") for s in samples], 20) is None


def test_repetition_is_three_words_said_twice():
    texts = [
        "I'll take it. I'll take it.",
        "no no no",
        "no no no no",
        "I see . You see .",
        "",
        "You may go . Can you may go",
        "好的好的好的",
    ]
    assert repetitions(texts).tolist() == [1, 0, 1, 0, 0, 1, 1]


def test_a_change_is_judged_by_what_is_better_for_its_metric():
    assert list(BETTER) == [*LABELS, "turns"]
    assert [name for name in BETTER if BETTER[name] < 1] == ["mean_output_length", "repetition", "perplexity", "turns"]
    up, down, open_, touching = (0.1, 0.3), (-0.3, -0.1), (-0.1, 0.3), (0.0, 0.2)
    assert [verdict(*up, better) for better in (1, -1, 0)] == ["better", "worse", "changed"]
    assert [verdict(*down, better) for better in (1, -1, 0)] == ["worse", "better", "changed"]
    unsure = (open_, touching, (math.nan, math.nan))
    assert {verdict(*interval, better) for interval in unsure for better in (1, -1, 0)} == {""}
