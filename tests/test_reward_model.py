"""Reward models: reading preferences, training, what is reported, and evaluation by them."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from eval_metrics import EvalConfig, run_evaluation
from reward_model import RewardModelConfig, make_pairs, train_reward_model, whole_lines
from support.data import load_dialogues
from support.errors import UserError
from support.preferences import Pair, load_preferences
from support.reward_model import RewardModel, calibration, describe_report, measure_reward_model, wilson
from support.text import messages_of

ROOT = Path(__file__).parent.parent


def side(text):
    return [{"role": "assistant", "content": text}]


def row(prompt, chosen, rejected, **more):
    return {"prompt": messages_of([prompt]), "chosen": side(chosen), "rejected": side(rejected)} | more


def write(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(path)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize(
    "make",
    [
        lambda i: row(f"Question {i} ?", "Yes .", "No ."),
        lambda i: {"prompt": f"Question {i} ?", "chosen": "Yes .", "rejected": "No ."},
        lambda i: {
            n: [*messages_of([f"Question {i} ?"]), *side(t)] for n, t in (("chosen", "Yes ."), ("rejected", "No ."))
        },
        lambda i: {
            n: f"\n\nHuman: Question {i} ?\n\nAssistant: {t}" for n, t in (("chosen", "Yes ."), ("rejected", "No ."))
        },
    ],
    ids=["messages", "texts", "implicit messages", "transcripts"],
)
def test_all_forms_of_preferences_are_read(make, tmp_path):
    found = load_preferences(write(tmp_path / "rows.jsonl", map(make, range(10))))
    assert len(found.train) == 8 and len(found.held_out) == 2  # a fifth of few pairs
    for pair in (*found.train, *found.held_out):
        assert (pair.chosen, pair.rejected) == ("Yes .", "No .")
        assert re.fullmatch(r"user: Question \d \?", pair.prompt)


def test_messages_beside_a_choice_do_not_hide_it(tmp_path):
    """As in HuggingFaceH4/ultrafeedback_binarized: the whole conversations, and the messages of the chosen one."""
    talk = [{"role": "user", "content": "Is it far ?"}]
    yes, no = ([*talk, {"role": "assistant", "content": text}] for text in ("Two streets .", "No"))
    rows = [dict(prompt="Is it far ?", chosen=yes, rejected=no, messages=yes, score_chosen=8.5, score_rejected=7.0)]
    rows.append(rows[0] | {"prompt": "Is it near ?", "chosen": [dict(talk[0], content="Is it near ?"), yes[1]]})
    rows[1]["rejected"] = [rows[1]["chosen"][0], no[1]]
    (tmp_path / "ultra.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = load_preferences(str(tmp_path / "ultra.jsonl"))
    assert {(p.prompt, p.chosen, p.rejected) for p in (*pairs.train, *pairs.held_out)} == {
        ("user: Is it far ?", "Two streets .", "No"),
        ("user: Is it near ?", "Two streets .", "No"),
    }


def test_rows_without_a_choice_are_counted(tmp_path):
    rows = [row(f"{i} ?", "Yes .", "No .") for i in range(6)]
    rows += [row("a ?", "Yes .", "No .", tie=True), row("b ?", "Yes .", " Yes . "), row("c ?", "Yes .", "")]
    rows += [row("d ?", "Yes .", "No .") | {"rejected": [{"role": "user", "content": "Who ?"}]}]
    for r in rows:
        r.setdefault("tie", False)
    found = load_preferences(write(tmp_path / "rows.jsonl", rows))
    assert len(found.train) + len(found.held_out) == 7
    assert found.describe().split("; ")[1:] == [
        "ties, left out: 1",
        "pairs with equal sides, left out: 1",
        "pairs with an empty side, kept: 1",
        "rows without a readable rejected reply, left out: 1",
    ]


def test_rows_of_the_chat_page_with_replies_without_words(tmp_path):
    silent = [row("a ?", "", "No ."), row("b ?", "\u200b", "No ."), row("c ?", "Yes .", "")]
    talk = messages_of(["d ?", "", "d ?!"])  # the silent reply of the turn before is part of the prompt
    silent += [row("d ?", "Yes .", "No .") | {"prompt": talk}]
    equal = [row("e ?", "", " "), row("f ?", "", "", tie=True), row("g ?", "", "No .", tie=True)]
    found = load_preferences(write(tmp_path / "rows.jsonl", silent + equal))
    pairs = {pair.prompt: (pair.chosen, pair.rejected) for pair in (*found.train, *found.held_out)}
    assert pairs == {
        "user: a ?": ("", "No ."),
        "user: b ?": ("\u200b", "No ."),
        "user: c ?": ("Yes .", ""),
        "user: d ?\nassistant: \nuser: d ?!": ("Yes .", "No ."),
    }
    assert found.left_out == {"ties, left out": 2, "pairs with equal sides, left out": 1, EMPTY: 2}
    with pytest.raises(UserError, match=r"line 1: message 1 of 1 \(assistant\) is empty"):
        load_dialogues(str(tmp_path / "rows.jsonl"), "train")  # a dialogue has no such reply


EMPTY = "pairs with an empty side, kept"


def test_rows_without_a_choice_are_left_out_whatever_their_texts_are(tmp_path):
    q, bad = messages_of(["What ?"]), "caf\ufffd"
    good = [{"chosen": f"Question {i} ? Yes .", "rejected": f"Question {i} ? No ."} for i in range(4)]
    rows = [
        {"chosen": "Say : yes .", "rejected": None},  # the first row
        *good,
        {"chosen": "Say : yes .", "rejected": "Say : yes .\n"},
        {"chosen": bad, "rejected": bad},
        {"chosen": bad, "rejected": "", "tie": True},
        {"chosen": "Say : yes .", "rejected": f"Say : {bad}"},
        {"chosen": [*q, *side("Yes .")], "rejected": [*q, *side(bad)]},
        {"chosen": [*q, *side("")], "rejected": [*q, *side("Six .")]},
        {"chosen": "\n\nHuman: Why ?\n\nAssistant: So .", "rejected": "\n\nHuman: Why ?\n\nAssistant:"},
    ]
    found = load_preferences(write(tmp_path / "rows.jsonl", rows))
    kept = {(pair.chosen, pair.rejected) for pair in (*found.train, *found.held_out)}
    assert kept == {("Yes .", "No ."), ("", "Six ."), ("So .", "")}
    reasons = ["rows without a readable rejected reply, left out", "pairs with equal sides, left out", "ties, left out"]
    assert found.left_out == dict(zip(reasons, (3, 2, 1))) | {EMPTY: 2}


def test_a_file_of_ties_alone_is_not_taken_for_dialogues(tmp_path):
    with pytest.raises(UserError, match="has 0 pairs to learn from, 0 held out; ties, left out: 3; expected pairs"):
        load_preferences(write(tmp_path / "rows.jsonl", [row("a ?", "Yes .", "No .", tie=True)] * 3))


def test_a_split_without_rows_is_said(tmp_path):
    write(tmp_path / "train.jsonl", [row(f"{i} ?", "Yes .", "No .") for i in range(4)])
    write(tmp_path / "validation.jsonl", [])
    with pytest.raises(UserError, match="the validation split of .* has no rows"):
        load_preferences(str(tmp_path))


@pytest.mark.parametrize(
    "rows, fault",
    [
        ([{"dialog": ["Hi .", "Hello ."]}], "are of 'dialog'; expected preferences.*--from-dialogues MODEL"),
        ([row("a ?", "Yes .", "No .")] * 3, "at least two different prompts"),
        ([row("a ?", "caf\ufffd", "No .")] * 3, "not valid UTF-8"),
        ([row("", "Yes .", "No .")] * 3, r"message 1 of 1 \(user\) is empty"),
        ([{"prompt": "a ?", "chosen": None, "rejected": "No ."}], "the column 'chosen' is empty"),
        ([], r"rows.jsonl' has no rows; expected preferences.*chat.py --web writes a row"),
        ([{"chosen": "Yes .", "rejected": "No ."}], "no common beginning that could be the prompt"),
        (
            [{"chosen": [*messages_of(["a ?"]), *side("b")], "rejected": [*messages_of(["c ?"]), *side("d")]}],
            "do not begin",
        ),
    ],
)
def test_data_that_is_refused(rows, fault, tmp_path):
    with pytest.raises(UserError, match=fault):
        load_preferences(write(tmp_path / "rows.jsonl", rows))


def test_halves_share_no_source_and_held_out_prompts_are_not_learned(tmp_path):
    rows = [row(f"{i} ?", "Yes .", "No .", dialogue=i // 2) for i in range(200)]
    write(tmp_path / "train.jsonl", rows)
    write(tmp_path / "validation.jsonl", [row(f"{i} ?", "Yes .", "No .", dialogue=i) for i in range(190, 230)])
    first, second, whole = (load_preferences(str(tmp_path), half=half) for half in ("first", "second", "all"))
    assert [pair.prompt for pair in first.held_out] == [f"user: {i} ?" for i in range(190, 230)]
    assert first.held_out == second.held_out
    sources = [{pair.source for pair in found.train} for found in (first, second)]
    assert not sources[0] & sources[1] and sorted(map(len, sources), reverse=True)[1] > 30
    assert len(first.train) + len(second.train) == len(whole.train) == 190
    assert "pairs with a held-out prompt, left out: 10" in whole.describe()


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def pairs_of_lengths(lengths):
    return [Pair((), "word " * a, "word " * b, "") for a, b in lengths]


def test_the_report_by_hand():
    pairs = pairs_of_lengths([(3, 1), (3, 3), (1, 3), (9, 1), (2, 1)])
    margins = np.array([1.0, -1.0, 2.0, 0.0, 3.0])
    report = measure_reward_model(margins, pairs, pairs_of_lengths([(2, 1)] * 3), other=np.array([1.0, 1, -1, 1, 1]))
    assert report["accuracy"] == pytest.approx(3.5 / 5)
    assert report["loss"] == pytest.approx(np.mean([math.log(1 + math.exp(-m)) for m in margins]))
    assert report["length_alone"]["prefers"] == "longer"
    assert report["length_alone"]["accuracy"] == pytest.approx(3.5 / 5)
    assert report["length_alone"]["gain"] == pytest.approx(0)
    assert [(b["words"], b["pairs"], b["accuracy"]) for b in report["by_length_difference"]] == [
        ("1 to 5 words shorter", 1, 1.0),
        ("as long", 1, 0.0),
        ("1 to 5 words longer", 2, 1.0),
        ("6 or more words longer", 1, 0.5),
    ]
    assert report["other_model"] == {"agreement": pytest.approx(2.5 / 5), "accuracy": pytest.approx(4 / 5)}
    assert "WARNING: on these pairs the model is not shown to be better" in describe_report(report)


def test_equal_scores_count_half_in_every_figure():
    pairs = pairs_of_lengths([(1, 1)] * 4)
    report = measure_reward_model(np.zeros(4), pairs, pairs, other=np.array([0.0, 0.0, 1.0, -1.0]))
    assert report["accuracy"] == report["other_model"]["accuracy"] == 0.5
    assert report["other_model"]["agreement"] == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
    assert report["calibration"]["error"] == 0 and report["calibration"]["bins"][0]["accuracy"] == 0.5
    same = measure_reward_model(np.array([0.0, 2.0, -1.0, 0.0]), pairs, pairs, other=np.array([0.0, 1.0, -3.0, 0.0]))
    assert same["other_model"] == {"agreement": 1.0, "accuracy": same["accuracy"]}


def test_one_pair_gives_no_interval():
    report = measure_reward_model(np.array([1.0]), pairs_of_lengths([(3, 1)]), pairs_of_lengths([(2, 1)]))
    assert report["length_alone"]["gain_ci95"] is None
    said = describe_report(report)
    assert "better by +0.000 (one pair gives no interval)" in said and "nan" not in said and "WARNING" in said


def test_a_model_that_counts_words_gets_a_warning_and_a_better_one_does_not():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 20, (400, 2))
    pairs = pairs_of_lengths(lengths)
    counts = (lengths[:, 0] - lengths[:, 1]).astype(float)
    assert "WARNING" in describe_report(measure_reward_model(counts, pairs, pairs))
    knows = np.where(rng.random(400) < 0.9, 2.0, -2.0)
    assert "WARNING" not in describe_report(measure_reward_model(knows, pairs, pairs))


def test_calibration_of_a_model_that_is_right_as_often_as_it_says():
    rng = np.random.default_rng(1)
    margins = np.abs(rng.normal(0, 2, 20_000))
    right = rng.random(20_000) < 1 / (1 + np.exp(-margins))
    found = calibration(np.where(right, margins, -margins))
    assert found["error"] < 0.01 and sum(b["pairs"] for b in found["bins"]) == 20_000
    assert calibration(np.full(100, -3.0))["error"] == pytest.approx(1 / (1 + math.exp(-3.0)))


def test_wilsons_interval():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-3)  # the published example
    low, high = wilson(0, 30)
    assert low == pytest.approx(0, abs=1e-9) and 0 < high < 0.12


# ---------------------------------------------------------------------------------------------------------------------
# What a model reads


@pytest.mark.parametrize("beginning", [False, True])
def test_a_pair_has_a_boundary_where_the_tokenizer_writes_none(beginning, tiny_plain_tokenizer):
    tokenizer = tiny_plain_tokenizer  # as GPT-2's: no special tokens
    if beginning:  # as some tokenizers of decoders: one at the beginning alone
        ends = [("<EOS>", tokenizer.eos_token_id)]
        processor = TemplateProcessing(single="<EOS> $A", pair="<EOS> $A $B:1", special_tokens=ends)
        tokenizer.backend_tokenizer.post_processor = processor
    scorer = RewardModel("rm", model=SimpleNamespace(config=SimpleNamespace()), tokenizer=tokenizer)
    talks = [messages_of(["hi", "hello", text]) for text in ("is it open?", "is it ope")]
    one, other = (row["input_ids"] for row in scorer.encode(talks, ["yes", "n?yes"]))
    assert one != other
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in (one, other)]
    assert texts == ["hi\nhello\nis it open?\nyes", "hi\nhello\nis it ope\nn?yes"]


def test_a_pair_with_a_token_between_its_texts_stays_as_it_is(tiny_tokenizer):
    scorer = RewardModel("rm", model=SimpleNamespace(config=SimpleNamespace()), tokenizer=tiny_tokenizer)
    [found] = scorer.encode([messages_of(["is it open?"])], ["yes"])
    assert tiny_tokenizer.decode(found["input_ids"]) == "is it open?<EOU>yes<EOU>"


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.fixture(scope="module")
def polite(tmp_path_factory):
    """Choices of somebody who wants to be thanked, and a reward model of them."""
    folder = tmp_path_factory.mktemp("polite")
    rng = np.random.default_rng(0)
    things = ["table", "room", "ticket", "car", "seat", "book", "coat", "bag"]
    rows = []
    for i in range(160):
        thing = things[rng.integers(len(things))]
        ends = ["Here it is .", "It is over there .", "I have none .", "Wait a minute ."]
        a, b = (ends[rng.integers(len(ends))] for _ in range(2))
        rows.append(row(f"I would like a {thing} for {i} .", f"Thank you . {a}", f"{b}"))
    data = write(folder / "preferences.jsonl", rows)
    output = folder / "rm"
    train_reward_model(RewardModelConfig(data_path=data, output_dir=str(output), progress="plain"))
    return data, output


def test_a_reward_model_learns_what_was_chosen(polite):
    data, output = polite
    record = json.loads((output / "reward_model.json").read_text())
    assert record["report"]["pairs"] == 32 and record["report"]["accuracy"] > 0.9
    assert record["config"]["lr"] == 5e-4 and record["config"]["epochs"] == pytest.approx(100 / 8)
    assert record["config"]["warmup_steps"] == 20
    scores = RewardModel(str(output)).scores([messages_of(["A seat , please ."])] * 2, ["Thank you .", "No ."])
    assert scores[0] > scores[1]


@pytest.mark.parametrize("given, expected", [(None, 20), (100, 100), (0, 0)])
def test_warmup_steps_that_are_given_are_kept(given, expected):
    config = RewardModelConfig(data_path="x", warmup_steps=given)
    assert config.fitted(1_000_000, 160).warmup_steps == expected  # a fifth of 100 steps
    assert RewardModelConfig(data_path="x").fitted(1_000_000, 100_000).warmup_steps == 50
    assert config.fitted(1_000_000, 160, processes=2).epochs == 20  # 5 steps in an epoch
    assert config.fitted(1_000_000, 160, processes=2).warmup_steps == expected


def test_a_stopped_run_goes_on_to_the_same_weights(polite, tmp_path, monkeypatch):
    import support.supervised as supervised

    data, output = polite
    config = dict(data_path=data, output_dir=str(tmp_path / "rm"), progress="plain", eval_every=40)
    calls = []
    original = supervised.SupervisedRun.evaluate

    def stop_at_the_second(run):
        original(run)
        calls.append(run.step)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(supervised.SupervisedRun, "evaluate", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        train_reward_model(RewardModelConfig(**config))
    monkeypatch.undo()
    train_reward_model(RewardModelConfig(**config, resume=True))
    train_reward_model(RewardModelConfig(**config | {"output_dir": str(tmp_path / "whole")}))
    one, other = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("rm", "whole"))
    assert one == other


def test_pairs_from_dialogues_are_kept_and_reused(tmp_path, capsys):
    settings = dict(from_dialogues="builtin", pairs=40, output_dir=str(tmp_path / "rm"), progress="plain")
    folder = make_pairs(RewardModelConfig(**settings), tmp_path / "rm")
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 40 and len((folder / "validation.jsonl").read_text().splitlines()) == 100
    assert all(r["chosen"] == side(r["chosen"][0]["content"].strip()) for r in rows)
    assert make_pairs(RewardModelConfig(**settings), tmp_path / "rm") == folder
    assert "has the pairs already" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds pairs of other settings"):
        make_pairs(RewardModelConfig(**settings | {"pairs": 50}), tmp_path / "rm")


def test_sampling_that_was_stopped_goes_on_where_it_stopped(tmp_path, monkeypatch):
    import reward_model

    monkeypatch.setattr(reward_model, "CHUNK", 16)
    settings = dict(from_dialogues="builtin", pairs=40, progress="plain")
    whole = make_pairs(RewardModelConfig(**settings, output_dir=str(tmp_path / "a")), tmp_path / "a")
    generate, calls = reward_model.generate_replies, []

    def stopped(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args)

    config = RewardModelConfig(**settings, output_dir=str(tmp_path / "b"))
    monkeypatch.setattr(reward_model, "generate_replies", stopped)
    with pytest.raises(KeyboardInterrupt):
        make_pairs(config, tmp_path / "b")
    part = tmp_path / "b-pairs/train.jsonl.part"
    part.write_bytes(part.read_bytes() + '{"prompt": ["é'.encode()[:-1])  # a killed process did not finish the letter
    again = make_pairs(config, tmp_path / "b")
    assert len(calls) == 3 + 1 + math.ceil(100 / 16)
    for split in ("train", "validation"):
        assert (again / f"{split}.jsonl").read_bytes() == (whole / f"{split}.jsonl").read_bytes()


def test_whole_chunks_of_lines_are_kept_to_the_byte(tmp_path, monkeypatch):
    import reward_model

    monkeypatch.setattr(reward_model, "CHUNK", 2)
    texts = ["a\u2028b", "c\u2029\u0085d", "é \r\n", "f", "g"]
    lines = [json.dumps(row("Q ?", text, text), ensure_ascii=False).encode() + b"\n" for text in texts]
    part = tmp_path / "train.jsonl.part"
    assert whole_lines(part) == 0 and not part.exists()
    part.write_bytes(b"".join(lines) + '{"prompt": "é'.encode()[:-1])
    assert whole_lines(part) == 4 and part.read_bytes() == b"".join(lines[:4])
    assert whole_lines(part) == 4 and [file.name for file in tmp_path.iterdir()] == [part.name]


def test_other_processes_take_the_number_of_lines_from_the_main_one(tmp_path, monkeypatch):
    import reward_model

    part = tmp_path / "train.jsonl.part"
    part.write_bytes(b"{}\n" * 700)
    monkeypatch.setattr(reward_model, "PartialState", lambda: SimpleNamespace(is_main_process=False))
    monkeypatch.setattr(reward_model, "broadcast_object_list", lambda values: [512])
    assert whole_lines(part) == 512 and part.read_bytes() == b"{}\n" * 700


@pytest.mark.parametrize(
    "settings, fault",
    [
        ({}, "built-in data are dialogues and have no choices"),
        ({"from_dialogues": "builtin", "top_p": 0.0}, "top_p is 0.0"),
        ({"from_dialogues": "./no/model"}, "from dialogues './no/model' does not exist"),
        ({"data_path": "./no/file.jsonl"}, "does not exist"),
    ],
)
def test_settings_that_are_refused_at_once(settings, fault):
    with pytest.raises(UserError, match=fault):
        RewardModelConfig(**settings).check()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


def test_evaluation_has_the_scores_and_the_win_rate(polite, tmp_path, capsys):
    _, output = polite
    file = tmp_path / "metrics.json"
    config = dict(model_path="builtin", baseline_path="builtin", limit=12, perplexity=False, intent_model="")
    run_evaluation(EvalConfig(**config, reward_models=(str(output),), output=str(file), bootstrap=50))
    printed, result = capsys.readouterr().out, json.loads(file.read_text())
    assert result["win_rate"]["rm"] == {"wins": 0, "ties": 12, "losses": 0, "value": 0.5, "ci95": list(wilson(6, 12))}
    assert "win rate by reward model rm: 0.500" in printed and "reward model rm " in printed
    assert result["difference"]["reward_model_rm"]["value"] == 0
    assert result["difference"]["reward_model_rm"]["relative"] is None


def test_the_command_says_what_it_lacks():
    done = subprocess.run([sys.executable, "reward_model.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--from-dialogues MODEL" in done.stderr
