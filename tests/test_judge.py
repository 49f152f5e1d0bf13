"""The judge: what its classes mean, how well it does on human replies, and data where some replies have no act."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from test_programs import ROOT, flags, lines
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

import eval_metrics
import ppo_dialog
from eval_metrics import EvalConfig, run_evaluation
from intent_classifier import IntentConfig, train_intent
from rewards import make_reward
from sft_dialog import collate, learned_tokens, window_loss
from support.builtin import builtin_model
from support.data import ACTS, load_dialogues
from support.errors import UserError
from support.judge import (
    IntentJudge,
    acts_of_classes,
    check_judge,
    encode_pairs,
    judge_scores,
    load_classifier,
    measure_judge,
)
from support.models import load_codec
from support.samples import make_samples
from support.supervised import add_gradients, batches_of_steps

QUICK = dict(limit=60, bootstrap=20, perplexity=False, greedy=True)
POSITION = "in this order they stand for inform, question, directive, commissive"


def builtin_codec():
    return load_codec(str(builtin_model("policy")))


def classes(*names: str, first: int = 0) -> BertConfig:
    config = BertConfig(num_labels=len(names))
    config.id2label = dict(enumerate(names, first))
    return config


@pytest.mark.parametrize(
    "names, acts",
    [
        (ACTS, [1, 2, 3, 4]),
        (ACTS[::-1], [4, 3, 2, 1]),
        (("Directives", "INFORM", "commissive ", "__question__"), [3, 1, 4, 2]),
        (("__dummy__", *ACTS), [0, 1, 2, 3, 4]),  # the names of DailyDialog's feature on the hub
        (("greeting", "commissive", "question", "thanks", "inform", "directive"), [0, 4, 2, 0, 1, 3]),
    ],
)
def test_classes_that_are_called_as_acts_are_these_acts(names, acts):
    assert acts_of_classes(classes(*names), "x") == (acts, "")
    assert acts_of_classes(classes(*names, first=1), "x") == (acts, "")  # numbered from 1 by hand


@pytest.mark.parametrize("names", [[f"LABEL_{i}" for i in range(4)], ["1", "2", "3", "4"], ["joy", "fear", "a", "b"]])
def test_four_classes_of_other_names_are_taken_by_position_which_is_said(names):
    acts, note = acts_of_classes(classes(*names), "x")
    assert acts == [1, 2, 3, 4] and f"'x' calls its classes {', '.join(names)}" in note and POSITION in note


@pytest.mark.parametrize(
    "names",
    [
        ["no emotion", "anger", "disgust", "fear", "happiness", "sadness", "surprise"],
        ["a", "b", "c"],
        ["inform", "question", "greeting", "thanks"],  # which of the others is the directive?
        ["inform", "inform", "question", "directive", "commissive"],
        ["inform", "question", "directive"],
        [f"class {i}" for i in range(40)],
    ],
)
def test_any_other_classes_are_refused_with_their_names(names, tmp_path):
    with pytest.raises(UserError, match=rf"tells {len(names)} classes apart \({names[0]}, .*correct id2label"):
        acts_of_classes(classes(*names), "x")
    classes(*names).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="classes apart"):
        check_judge(str(tmp_path))  # without weights: nothing is loaded


def test_a_model_without_a_trained_classifier_is_called_so(tmp_path, tiny_tokenizer):
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=1, intermediate_size=16)
    network = BertForSequenceClassification(BertConfig(vocab_size=len(tiny_tokenizer), **sizes))
    network.bert.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no trained classifier"):
        IntentJudge(str(tmp_path))


def reordered(folder: Path, order: list[int], renamed: bool) -> str:
    """The built-in judge with its classes in another order, whose names tell so, or go on to tell the old one."""
    model = AutoModelForSequenceClassification.from_pretrained(builtin_model("judge"))
    for parameter in model.classifier.parameters():
        parameter.data = parameter.data[order].clone()
    if renamed:
        model.config.id2label = {i: ACTS[k] for i, k in enumerate(order)}
        model.config.label2id = {ACTS[k]: i for i, k in enumerate(order)}
    model.save_pretrained(folder)
    load_classifier(str(builtin_model("judge")))[1].save_pretrained(folder)
    return str(folder)


def evaluated(judge: str, **options) -> dict:
    return run_evaluation(EvalConfig(**QUICK | dict(model_path="builtin", intent_model=judge) | options))


def test_the_order_of_a_judges_classes_changes_no_figure(tmp_path, capsys):
    expected = evaluated("builtin")
    printed = capsys.readouterr().out
    assert "judge: right on 1.000" in printed and "commonest act: 0." in printed and "WARNING" not in printed
    other = evaluated(reordered(tmp_path / "judge", [2, 0, 3, 1], renamed=True))
    assert other["policy"]["intent"] == expected["policy"]["intent"] > 0.3
    assert other["settings"]["judge_measured"] == expected["settings"]["judge_measured"]


def test_a_judge_below_chance_is_said_before_its_figures(tmp_path, capsys):
    wrong = reordered(tmp_path / "judge", [1, 0, 3, 2], renamed=False)
    result = evaluated("builtin", second_intent_model=wrong)
    first, second = [result["settings"][name]["accuracy"] for name in ("judge_measured", "second_judge_measured")]
    printed = capsys.readouterr().out
    assert f"second judge: right on {second:.3f} of 60 human replies of the test split" in printed
    assert second < 0.1 < 0.9 < first and printed.count("no better than chance") == 1
    assert printed.index("no better than chance") < printed.index("METEOR")


def test_chance_is_what_the_commonest_act_would_get():
    samples = make_samples(load_dialogues("builtin", "validation"), builtin_codec())[:200]
    judge = IntentJudge(str(builtin_model("judge")))
    measured = measure_judge(judge, samples)
    acts = [s.act for s in samples]
    assert measured["chance"] == max(acts.count(act) for act in (1, 2, 3, 4)) / 200 and measured["samples"] == 200
    assert measure_judge(judge, samples, 10)["samples"] == 10


# ---------------------------------------------------------------------------------------------------------------------
# Classifiers of decoders


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("pad", [None, "of the tokenizer", "another"])
def test_the_judgement_of_a_decoder_does_not_depend_on_the_batch(family, pad, tmp_path, tiny_tokenizer):
    if pad is None:  # as GPT-2 and Llama come
        tiny_tokenizer.pad_token = None
    ends = dict(bos_token_id=1, eos_token_id=1, pad_token_id={None: None, "another": 1}.get(pad, 0))
    common = dict(vocab_size=len(tiny_tokenizer), num_labels=4, initializer_range=0.5, **ends)
    torch.manual_seed(0)
    if family == "gpt2":
        model = GPT2ForSequenceClassification(GPT2Config(n_layer=1, n_head=2, n_embd=32, **common))
    else:
        sizes = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
        model = LlamaForSequenceClassification(LlamaConfig(**sizes, **common))
    model.eval().save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    judge = IntentJudge(str(tmp_path))
    previous, said = ["Hi .", "How are you ?", ""], ["Hello there , what time is it ?", "Fine .", "See you soon ."]
    alone = [model(**tiny_tokenizer(f"{p} {u}".strip(), return_tensors="pt")).logits for p, u in zip(previous, said)]
    batch = encode_pairs(judge.tokenizer, previous, said, as_pair=False)
    with torch.no_grad():
        assert torch.allclose(judge.model(**batch).logits[:2], torch.cat(alone)[:2], atol=1e-5)
    assert judge.acts(previous, said)[:2] == [int(logits.argmax()) + 1 for logits in alone[:2]]


def test_a_gpt2_without_a_pad_token_becomes_a_judge(tmp_path, tiny_lm, tiny_tokenizer, monkeypatch):
    tiny_tokenizer.pad_token = None
    tiny_tokenizer.save_pretrained(tiny_lm)
    config = AutoConfig.from_pretrained(tiny_lm)
    config.pad_token_id = None
    config.save_pretrained(tiny_lm)
    parts = {split: load_dialogues("builtin", split)[:20] for split in ("train", "validation")}
    monkeypatch.setattr("support.supervised.load_splits", lambda *args: parts)
    folder = train_intent(IntentConfig(model_path=tiny_lm, output_dir=str(tmp_path / "judge"), lr=1e-3, epochs=3))
    accuracy = json.loads((folder / "intent.json").read_text())["validation"]["accuracy"]
    samples = make_samples(parts["validation"], builtin_codec())
    assert measure_judge(IntentJudge(str(folder)), samples)["accuracy"] > 0.3 < accuracy


def test_a_classifier_without_architectures_serves_everywhere(tmp_path, capsys):
    folder = Path(reordered(tmp_path / "judge", [0, 1, 2, 3], renamed=False))
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    from examples.custom_reward import CuriousAndPolite

    assert evaluated(str(folder))["settings"]["judge_measured"]["accuracy"] > 0.9
    own = CuriousAndPolite(str(folder))
    own.setup("cpu", "<EOU>")
    scores, statistics = own(["Hi .<EOU>"] * 2, ["What time is it ?", "Thank you ."], ["", ""], [0, 0])
    assert statistics["question"][0] > statistics["question"][1] and statistics["polite"].tolist() == [0, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Data in which only some replies have an act


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> str:
    """Built-in dialogues; every second one has no acts."""
    folder = tmp_path_factory.mktemp("mixed")
    for split, n in (("train", 200), ("validation", 60), ("test", 60)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for i, d in enumerate(load_dialogues("builtin", split)[:n]):
                file.write(json.dumps({"dialog": d.utterances} | ({"act": d.acts} if i % 2 else {})) + "\n")
    return str(folder)


def test_intent_is_of_the_labelled_replies_alone_and_both_numbers_are_said(mixed, capsys):
    result = evaluated("builtin", data_path=mixed, limit=0)
    samples = make_samples(load_dialogues(mixed, "test"), builtin_codec())
    labelled = sum(bool(s.act) for s in samples)
    assert 0 < labelled < len(samples) and result["settings"]["intent_samples"] == labelled
    assert f"{len(samples)} samples ({labelled} with a dialogue act)" in capsys.readouterr().out

    judge, answers = IntentJudge(str(builtin_model("judge"))), ["Sure ."] * len(samples)

    def made(rows):
        n = len(rows)
        sampled = eval_metrics.Answers(answers[:n], [2] * n, [True] * n, [0.0] * n, [0] * n, 0.0, 20)
        return eval_metrics.score_answers(sampled, rows, judge)

    of_all, of_labelled = made(samples), made([s for s in samples if s.act])
    assert of_all.metrics()["intent"] == pytest.approx(of_labelled.metrics()["intent"]) and len(of_all.texts) > labelled
    difference = eval_metrics.paired_difference(of_all, of_all, n=50)["intent"]
    assert difference["value"] == 0 and difference["ci95"] == [0, 0]


def test_ppo_rewards_intent_where_there_is_an_act(mixed, tmp_path, capsys):
    settings = dict(data_path=mixed, intent_model="builtin", run_dir=str(tmp_path), env_num=16, total_time_steps=400)
    config = ppo_dialog.PPOConfig(**settings, eval_limit=10, validation_limit=0, judge_samples=50)
    run = ppo_dialog.train(config)
    printed = capsys.readouterr().out
    samples = make_samples(load_dialogues(mixed, "train"), builtin_codec())
    assert f"{len(samples)} samples ({sum(bool(s.act) for s in samples)} with a dialogue act)" in printed
    assert "judge: right on 1.000 of 50 human replies" in printed
    for row in lines(run):
        assert row["score"] == pytest.approx(row["reward_intent"] + row["reward_meteor"], abs=1e-6)
        assert row["intent"] > row["reward_intent"]  # of about half of the replies; the reward's mean is of all
    rows = [json.loads(line) for line in (run / "eval_samples.jsonl").read_text().splitlines()]
    assert [row["after"]["intent"] is None for row in rows] == [row["act"] == 0 for row in rows]


def test_a_reply_without_an_act_earns_nothing_for_intent():
    judge = str(builtin_model("judge"))
    reward = make_reward({"intent": 1.0, "meteor": 2.0}, {}, "cpu", "<EOU>", intent_model=judge)
    episodes = ["How are you ?<EOU>"] * 2, ["Fine , thanks ."] * 2, ["Fine , thanks ."] * 2
    scores, statistics = reward(*episodes, [1, 0])
    assert scores == pytest.approx([1 + 2 * statistics["meteor"][0], 2 * statistics["meteor"][1]])
    assert statistics["intent"][0] == 1 and math.isnan(statistics["intent"][1])
    assert statistics["reward_intent"].tolist() == [1, 0]


def test_data_without_any_act_leaves_intent_out_and_says_so(tmp_path, capsys):
    for split in ("train", "validation"):
        rows = [json.dumps({"dialog": d.utterances}) for d in load_dialogues("builtin", split)[:20]]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(rows))
    settings = dict(data_path=str(tmp_path), intent_model="builtin", run_dir=str(tmp_path / "runs"), eval_limit=-1)
    settings |= dict(total_time_steps=60, env_num=8, validation_limit=0, sample_interval=0)
    run = ppo_dialog.train(ppo_dialog.PPOConfig(**settings))
    assert "the data has no dialogue acts: intent is left out" in capsys.readouterr().out
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert row["score"] == pytest.approx(row["reward_meteor"]) and "intent" not in row
    with pytest.raises(UserError, match="nothing of the reward is left .*my_file.py"):
        ppo_dialog.train(ppo_dialog.PPOConfig(**settings, meteor_coef=0.0))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients: each token, or pair, has the same weight, however a step is cut

WINDOWS = [([5 + i] * (1 + 3 * i % 11), [40 + i] * (1 + 7 * i % 5)) for i in range(16)]


def gradient_of(model, batches, loss_of, count_of, accelerator=None) -> torch.Tensor:
    model.zero_grad()
    add_gradients(accelerator or Accelerator(), model, batches, loss_of, count_of)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("loss_on", ["window", "reply"])
def test_a_step_has_the_same_gradient_however_it_is_cut_into_batches(loss_on, tiny_lm):
    model = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    together = collate(WINDOWS, 0, loss_on)
    model(**together).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    for size in (16, 4, 3, 1):
        batches = [collate(rows, 0, loss_on) for rows in batches_of_steps(WINDOWS, size)]
        found = gradient_of(model, batches, window_loss, learned_tokens)
        assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one(tiny_lm, tmp_path):
    """One of them has five windows in two batches, the other eleven in two."""
    worker = Path(__file__).with_name("gradient_worker.py")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, worker, tiny_lm, tmp_path / "gradient.pt"], check=True, cwd=ROOT, env=environment)
    model = AutoModelForCausalLM.from_pretrained(tiny_lm).eval()
    expected = gradient_of(model, [collate(WINDOWS, 0, "reply")], window_loss, learned_tokens)
    found = torch.load(tmp_path / "gradient.pt")
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.slow
def test_several_processes_on_cpus_train_one_judge(tmp_path):
    command = flags(model_path=builtin_model("judge"), output_dir=tmp_path / "judge", epochs=0.02, eval_samples=50)
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    run = subprocess.run([*launch, "intent_classifier.py", *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("judge: step 0/") == run.stdout.count("written to") == 1


def test_an_engine_that_supervised_training_lacks_is_refused(tmp_path, monkeypatch, tiny_lm):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="told to use DeepSpeed; supervised training runs .*ddp.yaml"):
        train_intent(IntentConfig(model_path=str(builtin_model("judge")), output_dir=str(tmp_path / "judge")))


def test_accuracy_and_macro_f1_by_hand():
    # inform: 1 right of 2 labelled and 1 predicted; question: 1 of 1 and 2; directive and commissive: none right
    scores = judge_scores([1, 1, 2, 3], [1, 2, 2, 4])
    assert scores == {"accuracy": 0.5, "macro_f1": pytest.approx((2 / 3 + 2 / 3 + 0 + 0) / 4)}
