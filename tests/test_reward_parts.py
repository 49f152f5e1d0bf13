"""The reward as a list of parts: weights, scales, functions of TRL's form, rewards for tokens, reward models."""

import asyncio
import json
import math
import re
import sys

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from envs import DialogueVectorEnv
from ppo_config import PPOConfig
from ppo_dialog import RolloutSettings, collect, join_named, token_rewards, train
from rewards import WeightedSum, distribute_arguments, label_parts, make_reward
from support.builtin import builtin_model
from support.data import load_dialogues
from support.errors import UserError
from support.models import load_codec
from support.options import reward_weights
from support.reward_model import RewardModel, check_reward_model
from support.samples import make_samples
from support.scoring import as_data_has_it, check_reward, checked_scores, score_episodes
from support.text import Prompt, Reply, messages_of

TALK = messages_of(["Is it open ?", "Yes .", "Until when ?"])


def prompt_of(text="Until when ?", messages=TALK, **columns):
    return Prompt.of(text, messages, columns)


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """Write a user's file; its import is undone afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source, name="mine"):
        sys.modules.pop(f"user_file_{name}", None)
        (tmp_path / f"{name}.py").write_text(source)
        return f"{name}.py"

    return write


# ---------------------------------------------------------------------------------------------------------------------
# Names and weights


@pytest.mark.parametrize(
    "given, weights",
    [
        ("meteor", {"meteor": 1}),
        (["intent=0.5", "meteor"], {"intent": 0.5, "meteor": 1}),
        ("intent=0.5 models/my_rm=-2e-1", {"intent": 0.5, "models/my_rm": -0.2}),
        ("my_file.py:polite", {"my_file.py:polite": 1}),
        ({"meteor": 3}, {"meteor": 3}),
        ("a=b=2", {"a=b": 2}),
    ],
)
def test_weights_are_read_in_any_form(given, weights):
    assert reward_weights(given) == weights


@pytest.mark.parametrize("given", ["meteor=much", "=1", "meteor=nan", ["meteor", "meteor=2"]])
def test_words_that_are_no_weights(given):
    with pytest.raises(ValueError, match="NAME=WEIGHT|a name and a finite number"):
        reward_weights(given)


@pytest.mark.parametrize(
    "settings, reward, judge",
    [
        ({}, {"intent": 0.5, "meteor": 0.5}, "builtin"),
        ({"reward": "default"}, {"intent": 0.5, "meteor": 0.5}, "builtin"),
        ({"reward": "default=2 my_rm.yaml=1"}, {"intent": 1, "meteor": 1, "my_rm.yaml": 1}, "builtin"),
        ({"intent_coef": 0.0, "meteor_coef": 2.0}, {"meteor": 2}, ""),
        ({"consensus_coef": 1.0, "samples_per_prompt": 2}, {"intent": 0.5, "meteor": 0.5, "consensus": 1}, "builtin"),
        ({"reward": "meteor", "intent_coef": 0.3}, {"meteor": 1, "intent": 0.3}, "builtin"),
    ],
)
def test_the_earlier_names_of_weights_still_say_the_same(settings, reward, judge):
    config = PPOConfig(**settings)
    assert (config.reward, config.intent_model) == (reward, judge)
    assert PPOConfig(**vars(config)) == config  # as a resumed run reads it


@pytest.mark.parametrize(
    "reward, fault",
    [
        ({"meteor": 0.0}, "nothing is rewarded"),
        ({}, "nothing is rewarded"),
        ({"consensus": 1.0}, "'consensus' needs other replies"),
        ({"no_file.py:f": 1.0}, "there is no file 'no_file.py'"),
        ({"no_judge.yaml": 1.0}, "there is no file 'no_judge.yaml'"),
        ({"./no/model": 1.0}, "reward model './no/model' does not exist"),
    ],
)
def test_rewards_that_are_refused_before_anything_is_loaded(reward, fault):
    with pytest.raises(UserError, match=fault):
        PPOConfig(reward=reward).check()


def test_labels_are_short_different_and_not_those_of_a_run():
    names = ["models/a.b", "other/a.b", "f.py:score", "judge.yaml", "m:Polite", "org/rm-v1.5", "models/reward_model"]
    assert list(label_parts(names).values()) == ["a_b", "a_b_2", "score_part", "judge", "Polite", "rm_v1_5", "model"]


def test_arguments_go_to_the_part_that_they_name():
    assert distribute_arguments({"word": 1}, ["polite"]) == {"polite": {"word": 1}}
    assert distribute_arguments({"a.word": 1, "b.word": 2}, ["a", "b"]) == {"a": {"word": 1}, "b": {"word": 2}}
    with pytest.raises(UserError, match="could be for any of a, b; say for which, as a.word=VALUE"):
        distribute_arguments({"word": 1}, ["a", "b"])
    with pytest.raises(UserError, match="no part of the reward is your own"):
        distribute_arguments({"word": 1}, [])


# ---------------------------------------------------------------------------------------------------------------------
# The sum


class Part:
    """A reward that returns what it was made with."""

    def __init__(self, value, unbounded=False):
        self.value, self.unbounded = value, unbounded

    def __call__(self, prompts, responses, references, acts):
        return self.value


EPISODES = [""] * 3, ["a", "b", "c"], [""] * 3, [0] * 3


def test_parts_are_weighted_and_named():
    two = Part(([1.0, 0.0, 2.0], {"reward_rule": [1.0, 0.0, 1.0], "reward_bonus": [0.0, 0.0, 1.0], "seen": [1, 2, 3]}))
    reward = WeightedSum({"own": (2.0, two), "rule": (-1.0, Part([1.0, 2.0, 3.0])), "idle": (0.0, Part([5.0, 6, 7]))})
    total, statistics = reward(*EPISODES)
    assert total.tolist() == [1, -2, 1]
    assert {name: values.tolist() for name, values in statistics.items()} == {
        "own": [1, 0, 2],
        "seen": [1, 2, 3],
        "rule": [1, 2, 3],  # as the part gave it
        "idle": [5, 6, 7],
        "reward_rule": [2, 0, 2],
        "reward_bonus": [0, 0, 2],
        "reward_rule_rule": [-1, -2, -3],
    }


def test_an_unbounded_part_counts_in_deviations_from_its_mean():
    reward = WeightedSum({"rm": (0.5, Part([10.0, 14.0, 12.0], unbounded=True)), "rule": (1.0, Part([1.0, 1.0, 1.0]))})
    assert reward.unbounded_parts == {"rm"}
    reward.scales = reward.measure_scales(*EPISODES)
    assert reward.scales == {"rm": pytest.approx((12, math.sqrt(8 / 3)))}
    total, statistics = reward(*EPISODES)
    assert total == pytest.approx(1 + 0.5 * np.array([-1, 1, 0]) * math.sqrt(1.5))
    assert statistics["rm"].tolist() == [10, 14, 12]
    assert statistics["reward_rm"].std() == pytest.approx(0.5)
    with pytest.raises(UserError, match="'rm' gives all 3 replies of the model the score 4"):
        WeightedSum({"rm": (1.0, Part([4.0] * 3, unbounded=True))}).measure_scales(*EPISODES)


def test_replies_that_a_part_leaves_out_do_not_count_in_its_scale():
    part = Part([100.0, None, 102.0], unbounded=True)
    assert WeightedSum({"rm": (1.0, part)}).measure_scales(*EPISODES) == {"rm": (101, 1)}
    with pytest.raises(UserError, match="'rm' scores 1 of 3 replies"):
        WeightedSum({"rm": (1.0, Part([None, None, 2.0], unbounded=True))}).measure_scales(*EPISODES)


def test_an_unbounded_part_with_metrics_of_its_own_keeps_its_score_as_one():
    """The final comparison reads it under the part's name."""
    reward = WeightedSum({"own": (1.0, Part(([1.0, 2, 3], {"seen": [4, 5, 6]}), True))})
    reward.scales = reward.measure_scales(*EPISODES)
    assert set(checked_scores(reward(*EPISODES), EPISODES[1]).metrics) == {"own", "seen"}


def test_metrics_that_only_some_rounds_have_are_nan_in_the_others():
    joined = join_named([{"a": torch.tensor([1.0, 2.0])}, {"b": torch.tensor([3.0])}], [2, 1], math.nan)
    assert torch.equal(joined["a"].isnan(), torch.tensor([False, False, True]))
    assert joined["b"].isnan().tolist() == [True, True, False] and joined["b"][2] == 3


def test_a_fault_names_its_part():
    reward = WeightedSum({"fine": (1.0, Part([1.0] * 3)), "odd": (1.0, Part([1.0] * 2))})
    with pytest.raises(UserError, match=r"^odd: .*shape \(2,\) for 3 replies"):
        score_episodes(reward, *EPISODES)


# ---------------------------------------------------------------------------------------------------------------------
# Functions as TRL's GRPOTrainer has them

TRL = """
def length(completions, **kwargs):
    return [float(len(c[0]["content"])) for c in completions]

def right(prompts, completions, answer, level=0, **kwargs):
    return [None if a is None else float(c == a) for c, a in zip(completions, answer)]

async def late(completions, completion_ids, trainer_state, log_metric=None):
    log_metric("calls", trainer_state.global_step)
    return [float(len(ids)) for ids in completion_ids]

class Repeats:
    def __call__(self, completion_ids, **kwargs):
        return [-float(len(ids) - len(set(ids))) for ids in completion_ids]

repeats = Repeats()

class Model:
    unbounded = True

    def setup(self, device, eou_marker):
        self.models = ["a network"]

    def __call__(self, prompts, completions, log_metric, **kwargs):
        log_metric(name="reward_std", value=2.0)
        return [10.0 + len(c) for c in completions]

def strict(completions, difficulty):
    return [1.0 for _ in completions]
"""


def test_messages_are_given_where_the_data_has_messages(own_file):
    reward = make_reward({f"{own_file(TRL)}:length": 1}, {}, "cpu", "")
    total, statistics = score_episodes(reward, [prompt_of()] * 2, ["Six .", "At seven ."], [""] * 2, [0] * 2)
    assert total.tolist() == statistics["length_part"].tolist() == [5, 10]


def test_texts_columns_and_none(own_file):
    reward = make_reward({f"{own_file(TRL)}:right": 2}, {}, "cpu", "")
    prompts = [prompt_of(prompt="2 + 2 ?", answer=a) for a in ("4", None, "5")]
    total, statistics = score_episodes(reward, prompts, ["4", "4", "4"], [""] * 3, [0] * 3)
    assert total.tolist() == statistics["reward_right"].tolist() == [2, 0, 0]
    assert statistics["right"][[0, 2]].tolist() == [1, 0] and np.isnan(statistics["right"][1])


def test_an_async_function_gets_token_ids_and_logs(own_file):
    reward = make_reward({f"{own_file(TRL)}:late": 1}, {}, "cpu", "")
    replies = [Reply.of("a b", (5, 6, 0)), Reply.of("a", (5, 0))]
    for call in range(2):
        total, statistics = score_episodes(reward, [prompt_of()] * 2, replies, [""] * 2, [0] * 2)
        assert total.tolist() == [3, 2] and statistics["calls"].tolist() == [call] * 2
    repeats = make_reward({f"{own_file(TRL)}:repeats": 1}, {}, "cpu", "")
    total, _ = score_episodes(
        repeats, [prompt_of()] * 2, [Reply.of("", (1, 1, 1)), Reply.of("", (1,))], [""] * 2, [0] * 2
    )
    assert total.tolist() == [-2, 0]


def test_a_class_in_that_form_has_what_a_reward_has(own_file):
    reward = make_reward({f"{own_file(TRL)}:Model": 1}, {}, "cpu", "")
    assert reward.unbounded_parts == {"Model"} and reward.models == ["a network"]
    _, statistics = score_episodes(reward, ["a", "b"], ["x", "yy"], [""] * 2, [0] * 2)
    assert {n: v.tolist() for n, v in statistics.items()} == {
        "Model": [11, 12],
        "logged_reward_std": [2, 2],
        "reward_Model": [11, 12],
    }


def test_an_async_function_runs_where_an_event_loop_runs_already(own_file):
    reward = make_reward({f"{own_file(TRL)}:late": 1}, {}, "cpu", "")

    async def notebook():
        return score_episodes(reward, ["a"], [Reply.of("a", (5, 0))], [""], [0]).total.tolist()

    assert asyncio.run(notebook()) == [2]


def test_a_column_that_the_data_lacks_is_named(own_file):
    reward = make_reward({f"{own_file(TRL)}:strict": 1}, {}, "cpu", "")
    with pytest.raises(UserError, match=r"parameter 'difficulty', .*\(columns: answer\).*difficulty=VALUE"):
        score_episodes(reward, [prompt_of(answer=1)], ["a"], [""], [0])
    easy = make_reward({f"{own_file(TRL)}:strict": 1}, {"difficulty": 3}, "cpu", "")
    assert score_episodes(easy, [prompt_of()], ["a"], [""], [0]).total.tolist() == [1]


def test_columns_come_from_the_rows_of_the_data(tmp_path):
    rows = [
        {"prompt": f"{i} + 1 ?", "completion": str(i + 1), "answer": i + 1, "tags": ["sum", str(i)], "_seen": 1}
        for i in range(3)
    ]
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    codec = load_codec(str(builtin_model("policy")))
    samples = make_samples(load_dialogues(str(tmp_path), "train"), codec.with_format(context_utterances=1))
    assert [dict(s.prompt.columns) for s in samples] == [
        {"answer": i + 1, "tags": ["sum", str(i)], "prompt": f"{i} + 1 ?"} for i in range(3)
    ]


def test_a_prompt_beside_a_whole_conversation_does_not_replace_it(tmp_path):
    talk = messages_of(["One ?", "Two .", "Three ?", "Four ."])
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"messages": talk, "prompt": "One ?", "id": 7}) + "\n")
    [dialogue] = load_dialogues(str(tmp_path), "train")
    assert dialogue.columns == {"id": 7}
    assert as_data_has_it(Prompt.of("", talk[:3], dialogue.columns)) == talk[:3]


# ---------------------------------------------------------------------------------------------------------------------
# Rewards for tokens


def test_numbers_of_tokens_are_the_total_and_keep_their_place():
    replies = [Reply.of("a b c", (1, 2, 3, 0)), Reply.of("d", (4, 0)), Reply.of("e", (5, 0))]
    scores = checked_scores([[0.5, 0.0, 1.0, 0.25], np.array([1.0, 2.0]), 7.0], replies)
    assert scores.total.tolist() == [1.75, 3, 7]
    assert scores.by_token.tolist() == [[0.5, 0, 1, 0.25], [1, 2, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(UserError, match="gave 3 numbers for the 4 tokens of the reply 'a b c'"):
        checked_scores([[1.0, 2.0, 3.0]], replies[:1])
    assert checked_scores([[1.0, 2.0, 3.0]], ["plain text"]).total.tolist() == [6]


def test_spans_are_earned_at_the_token_that_completes_them():
    codec = load_codec(str(builtin_model("policy")))
    reply = codec.as_reply("I would like a table , please .")
    pieces = [codec.tokenizer.decode(reply.token_ids[:n]) for n in range(1, len(reply.token_ids) + 1)]
    for start, end in ((0, 1), (2, 7), (15, 20), (8, 30), (30, 31)):
        at = next(n for n, text in enumerate(pieces) if len(text) >= end)  # nothing stands before this reply
        found = checked_scores([[(start, end, 2.0), (0, len(reply), -1.0)]], [reply]).by_token[0]
        expected = np.zeros(len(reply.token_ids))
        expected[at] += 2
        expected[next(n for n, text in enumerate(pieces) if len(text) >= len(reply))] -= 1
        assert found.tolist() == expected.tolist()
    for span in ((3, 3, 1.0), (0, 99, 1.0), (-1, 2, 1.0)):
        with pytest.raises(UserError, match="expected 0 <= start < end <= 31"):
            checked_scores([[span]], [reply])
    with pytest.raises(UserError, match="as a span; expected"):
        checked_scores([[(0, 1)]], [reply])


def test_a_span_counts_from_the_first_letter_and_not_from_the_blanks_before_it():
    reply = Reply.of("ab c", (1, 2, 3, 4), lambda ids: ["  ", "  ab", "  ab c", "  ab c"][len(ids) - 1])
    assert [reply.token_at(end) for end in (1, 2, 3, 4)] == [1, 1, 2, 2]


def test_token_rewards_by_hand():
    from types import SimpleNamespace

    rollout = SimpleNamespace(
        kl=torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.0]]),
        mask=torch.tensor([[True, True, True], [True, True, False]]),
        token_scores=torch.tensor([[1.0, 0.0, -0.5], [0.0, 0.0, 0.0]]),
    )
    rewards = token_rewards(rollout, 0.5, torch.tensor([2.0, 3.0]))
    assert rewards.tolist() == [pytest.approx([0.95, -0.1, 0.85]), pytest.approx([-0.2, 2.75, 0.0])]


def test_a_rollout_has_the_rewards_of_tokens_where_they_were_earned():
    from ppo_dialog import ActorCritic, RunningMoments
    from support.models import load_causal_lm
    from support.options import Sampling

    folder = str(builtin_model("policy"))
    codec, policy = load_codec(folder), load_causal_lm(folder)
    samples = make_samples(load_dialogues("builtin", "train")[:8], codec)

    def each_token(prompts, responses, references, acts):
        return [[float(id % 7) for id in response.token_ids] for response in responses]

    env = DialogueVectorEnv(samples, codec, 4, WeightedSum({"each": (0.5, each_token)}))
    observations, _ = env.reset(seed=0)
    uniforms = torch.rand(2, 4, codec.format.max_new_tokens, generator=torch.Generator().manual_seed(0))
    settings = RolloutSettings(Sampling(), 1024, torch.device("cpu"))
    rollout, _ = collect(ActorCritic(policy), policy, env, observations, uniforms, RunningMoments(), settings)
    expected = 0.5 * (rollout.response_ids % 7) * rollout.mask
    assert torch.equal(rollout.token_scores, expected.float())
    assert torch.allclose(rollout.scores, expected.sum(-1).float())


def test_check_reward_tries_token_functions_on_plain_text():
    samples = make_samples(load_dialogues("builtin", "train")[:4], load_codec(str(builtin_model("policy"))))

    def spans(prompts, responses, references, acts):
        return [[(0, len(r), 1.0)] if r else [] for r in responses]

    check_reward(lambda *episodes: score_episodes(spans, *episodes), samples[0], 2)


# ---------------------------------------------------------------------------------------------------------------------
# Reward models


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A small random encoder with one label."""
    from support.judge import load_classifier

    _, tokenizer = load_classifier(str(builtin_model("judge")))
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=1)
    model = BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes))
    folder = tmp_path_factory.mktemp("reward_model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_scores_do_not_depend_on_the_batch(encoder):
    model = RewardModel(str(encoder))
    replies = ["Six .", "At six o'clock , I think .", ""]
    together = model.scores([TALK] * 3, replies, batch_size=2)
    alone = [model.scores([TALK], [reply])[0] for reply in replies]
    assert together == pytest.approx(alone, abs=1e-5) and len(set(together.tolist())) == 3
    [row] = model.encode([TALK], ["Six ."])
    pair = model.tokenizer("Is it open ?\nYes .\nUntil when ?", "Six .")
    assert row["input_ids"] == pair["input_ids"]


def test_a_reward_model_is_a_part_with_its_scale(encoder, tmp_path):
    run = train(
        PPOConfig(
            reward={str(encoder): 1.0, "meteor": 0.0},
            intent_coef=0.0,
            total_time_steps=300,
            env_num=8,
            eval_limit=8,
            validation_limit=8,
            sample_interval=1,
            run_dir=str(tmp_path),
        )
    )
    name = label_parts([str(encoder)])[str(encoder)]
    state = json.loads(next(run.glob("checkpoints/*/progress.json")).read_text())
    mean, deviation = state["reward_scales"][name]
    for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        assert row[f"reward_{name}"] == pytest.approx((row[name] - mean) / deviation, abs=1e-4)
        assert row["score"] == pytest.approx(row[f"reward_{name}"], abs=1e-6) and 0 <= row["meteor"] < 1


def test_models_that_are_no_reward_models(encoder, tmp_path):
    with pytest.raises(UserError, match="has 4 labels .*expected one"):
        check_reward_model(str(builtin_model("judge")))
    with pytest.raises(UserError, match="ForCausalLM by its config.json|LMHeadModel by its config.json"):
        check_reward_model(str(builtin_model("policy")))
    damaged = RewardModel(str(encoder))
    damaged.model.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="gives nan for the reply 'Six .'"):
        damaged.scores([TALK], ["Six ."])


@pytest.mark.parametrize(
    "task, labels, fault",
    [
        ("SEQ_CLS", 1, None),
        (None, 1, None),
        ("SEQ_CLS", 3, r"has 3 labels \(LABEL_0, LABEL_1, LABEL_2\); expected one"),
        ("CAUSAL_LM", 1, "is an adapter for CAUSAL_LM by its adapter_config.json; expected one for SEQ_CLS with one"),
    ],
)
def test_an_adapter_is_a_reward_model_if_it_is_a_classifier_with_one_label(task, labels, fault, tiny_lm, tmp_path):
    import peft
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    base = kind.from_pretrained(tiny_lm, **{} if task == "CAUSAL_LM" else {"num_labels": labels})
    lora = dict(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False, task_type=task)
    model = peft.get_peft_model(base, peft.LoraConfig(**lora, modules_to_save=None if task else ["score"])).eval()
    folder = str(tmp_path / "adapter")
    model.save_pretrained(folder)
    if fault:
        with pytest.raises(UserError, match=fault):
            RewardModel(folder)
        return
    check_reward_model(folder)
    reward = RewardModel(folder)
    [row] = reward.encode([TALK], ["Six ."])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, 0].item()
    assert reward.scores([TALK], ["Six ."])[0] == pytest.approx(expected, abs=1e-5) and expected != 0


@pytest.mark.parametrize("template", [False, True], ids=["pair", "chat template"])
def test_a_causal_model_reads_the_conversation_in_its_own_way(template, tmp_path):
    from chat_templates import chat_model

    from support.judge import load_classifier

    folder = tmp_path / "model"
    if template:
        chat_model(folder)
    model, tokenizer = load_classifier(
        str(folder if template else builtin_model("policy")), "model", num_labels=1, ignore_mismatched_sizes=True
    )
    tokenizer.chat_template = tokenizer.chat_template if template else None
    tokenizer.pad_token = None  # as some reward models' tokenizers have none
    for part, name in ((model, "rm"), (tokenizer, "rm")):
        part.save_pretrained(tmp_path / name)
    reward = RewardModel(str(tmp_path / "rm"))
    talk, replies = [{"role": "user", "content": "Is it <|im_end|> open ?"}], ["Yes .", "No , at six o'clock ."]
    rows = reward.encode([talk] * 2, replies)
    text = reward.tokenizer.decode(rows[0]["input_ids"])
    if template:
        whole = reward.tokenizer.apply_chat_template(
            [{"role": "user", "content": "Is it open ?"}, {"role": "assistant", "content": "Yes ."}], tokenize=False
        )
        [row] = reward.encode([[{"role": "user", "content": "Is it open ?"}]], ["Yes ."])
        assert row["input_ids"] == reward.tokenizer(whole, add_special_tokens=False).input_ids
    else:
        assert re.fullmatch(r"Is it <\|im_end\|> open \?(<EOU>)?Yes \.(<EOU>)?", text)
    together, alone = reward.scores([talk] * 2, replies), [reward.scores([talk], [r])[0] for r in replies]
    assert together == pytest.approx(alone, abs=1e-4) and together[0] != together[1]


@pytest.mark.slow
def test_a_resumed_run_keeps_its_scales_and_measures_those_of_a_new_part(encoder, tmp_path, capsys):
    config = dict(intent_coef=0.0, total_time_steps=200, env_num=8, eval_limit=-1, validation_limit=0)
    config |= dict(sample_interval=0, run_dir=str(tmp_path), experiment_name="run")
    train(PPOConfig(**config, reward={str(encoder): 1.0}))
    [name] = label_parts([str(encoder)]).values()
    capsys.readouterr()
    run = train(PPOConfig(**config | {"total_time_steps": 400}, reward={str(encoder): 1.0}, resume=True))
    assert "deviation" not in capsys.readouterr().out
    other = tmp_path / "other"
    other.symlink_to(encoder)
    weights = {str(encoder): 1.0, str(other): 1.0}
    run = train(PPOConfig(**config | {"total_time_steps": 600}, reward=weights, resume=True))
    assert "reward other: mean" in capsys.readouterr().out
    state = json.loads(max(run.glob("checkpoints/*/progress.json")).read_text())
    assert state["reward_scales"].keys() == {name, "other"}
