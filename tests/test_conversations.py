"""Conversations of several turns: the environment, partners, rewards, the rollout, and runs that are stopped."""

import json
import random
import signal
import sys
import textwrap
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from test_engines import ENGINES, run_by
from test_programs import flags, lines, run, timeless, trained

from envs import ConversationVectorEnv
from eval_metrics import (
    EvalConfig,
    compare,
    open_dialogues,
    openings_for_all,
    play,
    run_evaluation,
    score_conversations,
)
from ppo_config import PPOConfig
from ppo_dialog import (
    ActorCritic,
    Critic,
    RolloutSettings,
    RunningMoments,
    TrainState,
    check_partner,
    checked_reward,
    collect,
    gae,
    make_batch,
    measure_scales,
    rollout_metrics,
    token_rewards,
    try_rewards_of_conversations,
)
from rewards import label_parts, make_reward
from support.builtin import builtin_model
from support.conversations import (
    Conversation,
    ConversationTask,
    columns_of,
    prompt_of,
    score_replies,
    turn_uniforms,
)
from support.desk import Customer
from support.errors import UserError
from support.generation import ReplySettings, token_log_probs
from support.models import load_causal_lm, load_codec, load_trunk
from support.options import Sampling
from support.partners import (
    ModelPartners,
    PartnerMaker,
    ScriptedPartners,
    Tasks,
    first_of_dialogues,
    opening_of,
    unread_data,
)
from support.scoring import Reward, Scores
from support.signals import StopSignals
from support.text import DialogueCodec, DialogueFormat, Prompt, Reply
from support.timeouts import call_own
from support.words import describe

CHATML = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '<EOU>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


class Counting:
    """Says where the conversation is; hangs up after a number of replies that its random numbers decide."""

    def __init__(self, most: int = 4):
        self.most = most

    def reset(self, rng):
        self.rng, self.left = rng, rng.randrange(1, self.most + 1)
        self.name = rng.choice(["Ann", "Ben", "Cem", "Dua"])
        return f"{self.name} wants {self.left}."

    def reply(self, messages):
        self.left -= 1
        return f"{self.left} to go, {self.rng.randrange(100)}." if self.left else None

    def score(self, messages):
        return float(len(messages))


@pytest.fixture(scope="module")
def codec():
    return load_codec(str(builtin_model("policy")))


@pytest.fixture(scope="module")
def policy():
    return load_causal_lm(str(builtin_model("policy")))


def make_env(codec, env_num=4, *where, task=None, **options):
    index, processes = where or (0, 1)
    task = task or ConversationTask(ScriptedPartners(Counting, env_num // processes), **options)
    return ConversationVectorEnv(task, codec, env_num, index, processes)


def finished(env, n, seed=0, say="ok"):
    """Play until n conversations have ended; return them by number."""
    env.reset(seed=seed)
    found = {}
    while len(found) < n:
        env.step([f"{say} {talk.number} {len(talk.replies)}" if talk else "" for talk in env.conversations])
        found |= {talk.number: talk for talk in env.finished}
    return found


def said(talks):
    return {number: [m["content"] for m in talk.messages] for number, talk in talks.items()}


# The environment


def test_an_episode_is_a_conversation_in_gymnasiums_vector_api(codec):
    env = make_env(codec, 3, max_turns=3)
    assert isinstance(env, VectorEnv) and env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    with pytest.raises(gym.error.ResetNeeded):
        env.step(["a", "b", "c"])
    observations, infos = env.reset(seed=1)
    terminated = truncated = 0
    for _ in range(20):
        assert env.observation_space.contains(observations)
        for i, prompt in enumerate(infos["prompt"]):
            mask = observations["attention_mask"][i] > 0
            assert codec.tokenizer.decode(observations["input_ids"][i][mask]) == prompt
        before, talks = observations, list(env.conversations)
        observations, rewards, terminations, truncations, infos = env.step(["Fine."] * 3)
        done = terminations | truncations
        assert not (terminations & truncations).any()
        for i in np.flatnonzero(done):
            talk = infos["final_info"]["conversation"][i]
            assert talk is talks[i] and infos["_final_obs"][i]
            assert (infos["final_obs"]["input_ids"][i] == before["input_ids"][i]).all()
            assert talk.messages[-1]["role"] == ("assistant" if terminations[i] else "user")
            assert env.conversations[i] is not talk and len(env.conversations[i].messages) == 1
        for i in np.flatnonzero(~done):
            assert env.conversations[i] is talks[i] and env.conversations[i].messages[-1]["role"] == "user"
        terminated, truncated = terminated + terminations.sum(), truncated + truncations.sum()
    assert terminated > 5 and truncated > 2 and not rewards.any()


def test_a_conversation_depends_on_its_number_and_the_seed_alone(codec):
    alone = said(finished(make_env(codec, 1), 12))
    together = said(finished(make_env(codec, 6), 12))
    assert all(alone[n] == together[n] for n in range(6))
    of_two = {}
    for index in range(2):
        of_two |= said(finished(make_env(codec, 4, index, 2), 6))
    assert all(of_two[n] == alone[n] for n in of_two.keys() & alone.keys()) and len(of_two.keys() & alone.keys()) > 7
    assert said(finished(make_env(codec, 1), 12, seed=1)) != alone


def test_slots_that_may_have_no_more_conversations_are_idle(codec):
    env = make_env(codec, 4)
    observations, _ = env.reset(seed=3, options={"round": 2, "rounds": 2})
    numbers = []
    while env.active.any():
        idle = ~env.active
        assert not observations["attention_mask"][idle].any() and observations["attention_mask"][~idle].any(-1).all()
        observations, rewards, terminations, *_ = env.step(["ok"] * 4)
        assert not rewards[idle].any() and not terminations[idle].any()
        numbers += [talk.number for talk in env.finished]
    assert sorted(numbers) == list(range(8, 16)) and env.finished_rounds == 2
    env.reset(options={"rounds": 1})
    assert [talk.number for talk in env.conversations] == [16, 17, 18, 19] and env.finished_rounds == 4


def test_neighbours_of_a_group_have_the_same_partner(codec):
    task = ConversationTask(ScriptedPartners(Counting, 4))
    env = ConversationVectorEnv(task, codec, 4, samples_per_prompt=2)
    env.reset(seed=0)
    first = [talk.messages[0]["content"] for talk in env.conversations]
    assert first[0] == first[1] and first[2] == first[3] and first[0] != first[2]


def test_recorded_beginnings_and_messages_as_openings(codec):
    class Silent(Counting):
        def reset(self, rng):
            super().reset(rng)

    from support.data import load_dialogues
    from support.samples import make_samples

    samples = make_samples(load_dialogues("builtin", "train")[:20], codec)
    maker = PartnerMaker("support/partners.py:Nobody", {}, 0)
    tasks = Tasks(PPOConfig(partner="self"), maker, codec, {"train": samples}, (None, None))
    openings = tasks.openings["train"]
    assert len({s.key[0] for s in openings}) == len(openings) == 20 and all(s.key[1] == 5 for s in openings)
    env = make_env(codec, 4, task=ConversationTask(ScriptedPartners(Silent, 4), openings=openings))
    env.reset(seed=0)
    beginnings = {tuple(s.context) for s in openings}
    for talk in env.conversations:
        assert talk.opening == 5 and tuple(m["content"] for m in talk.messages) in beginnings
    nothing = make_env(codec, 4, task=ConversationTask(ScriptedPartners(Silent, 4)))
    with pytest.raises(UserError, match="begins no conversation .* no recorded beginnings: return a text from reset"):
        nothing.reset(seed=0)
    assert (
        opening_of([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi."}])[0]["role"]
        == "system"
    )


def test_the_conversations_of_splits_differ_and_those_of_training_and_of_the_desk_stay():
    def openings(name, split, args=None):
        config = PPOConfig(partner=name, partner_args=args or {})
        task = Tasks(config, PartnerMaker.of(config), None, {}, (None, None))(split, 1)
        return [said[0]["content"] for said in task.partners.begin([0] * 20, range(20), seed=7)]

    of = {split: openings(f"{__file__}:Counting", split) for split in ("train", "validation", "test")}
    assert of["train"] == [Counting().reset(random.Random(f"7/{number}")) for number in range(20)]
    assert of["test"] == [Counting().reset(random.Random(f"7/test/{number}")) for number in range(20)]
    assert len({tuple(said) for said in of.values()}) == 3
    for split in of:  # the desk has the parameter `split`, and goals of each
        assert openings("desk", split) == [Customer(split).reset(random.Random(f"7/{n}")) for n in range(20)]
    assert openings("desk", "test", {"split": "train"}) != openings("desk", "train")


def test_a_partner_that_begins_now_and_then_is_refused(codec, tmp_path):
    (tmp_path / "own.py").write_text(
        "class Sometimes:\n"
        "    def reset(self, rng): return 'Hello.' if rng.random() < 0.5 else None\n"
        "    def reply(self, messages): return None\n"
    )
    heard = [random.Random(f"{seed}/0").random() < 0.5 for seed in range(20)]
    maker = PartnerMaker(f"{tmp_path}/own.py:Sometimes", {}, heard.index(True))
    assert maker.begins and not PartnerMaker(maker.name, {}, heard.index(False)).begins
    env = make_env(codec, 16, task=ConversationTask(maker.partners("train", 16)))
    numbers = (n for n in range(16) if random.Random(f"{maker.seed}/{n}").random() >= 0.5)
    with pytest.raises(UserError, match=f"returned None for conversation {next(numbers)} and a text for the first one"):
        env.reset(seed=maker.seed)


# Rewards


def length_of(prompts, responses, references, acts):
    return [float(len(r.split())) for r in responses]


def per_token(prompts, responses, references, acts):
    return [[1.0] * len(r.token_ids) for r in responses]


def test_rewards_at_the_end_for_each_turn_and_both(codec):
    ends = make_reward({"partner": 0.5}, {}, "cpu", "<EOU>")
    at_end = finished(make_env(codec, 2, reward=ends), 4)
    for talk in at_end.values():
        assert talk.total == 0.5 * len(talk.messages) == 0.5 * 2 * len(talk.replies) and talk.turn_scores == []
    task = ConversationTask(ScriptedPartners(Counting, 2), reward=ends, turn_reward=length_of)
    env = make_env(codec, 2, task=task)
    env.reset(seed=0)
    sums, totals = {}, {}
    for _ in range(12):
        numbers = [talk.number for talk in env.conversations]
        _, rewards, *_ = env.step(["one two three", "one"])
        for number, reward in zip(numbers, rewards):
            sums[number] = sums.get(number, 0.0) + reward
        totals |= {talk.number: talk.total for talk in env.finished}
    assert totals and all(sums[number] == pytest.approx(total) for number, total in totals.items())


def test_a_reward_reads_the_whole_conversation(codec):
    seen = []

    def reward(prompts, responses, references, acts):
        seen.extend((p.messages, p.columns["conversation"], str(r)) for p, r in zip(prompts, responses))
        return [0.0] * len(responses)

    talks = finished(make_env(codec, 1, reward=reward), 3)
    for talk, (before, whole, last) in zip(talks.values(), seen):
        assert list(before) + [{"role": "assistant", "content": last}] == talk.messages == whole
        assert [m["role"] for m in whole] == ["user", "assistant"] * len(talk.replies)


def words_of_the_policy(prompts, responses, references, acts):
    """Fails where the conversation has no reply of the policy."""
    said = [[m["content"] for m in p.columns["conversation"] if m["role"] == "assistant"] for p in prompts]
    assert [texts[-1] for texts in said] == responses
    return [float(len(texts[-1])) for texts in said]


def whole(prompts, responses, references, acts):
    return [float(len(p.columns["conversation"])) for p in prompts]


class Length(Reward):
    """A reward without a scale, of whole conversations that the partner scores."""

    unbounded = True

    def __call__(self, prompts, responses, references, acts):
        assert all(isinstance(response, Reply) and response.token_ids for response in responses)
        return [len(p.columns["conversation"]) + 100 * p.columns["partner_score"] for p in prompts]


class Fails(Length):
    def __call__(self, prompts, responses, references, acts):
        return 1 / 0 if len(responses) > 1 else [0.0]


def parts_of(codec, policy, reward, turn_reward=()):
    """Make what the functions before training read of Parts."""
    names = [{f"{__file__}:{name}" if name != "partner" else name: 1.0 for name in of} for of in (reward, turn_reward)]
    config = PPOConfig(partner=f"{__file__}:Counting", reward=names[0], turn_reward=names[1], max_turns=2)
    rewards = make_reward(config.turn_reward | config.reward, {}, "cpu", "<EOU>")
    parts = SimpleNamespace(config=config, codec=codec, rewards=rewards, policy=policy)
    parts.reward, parts.turn_reward = map(rewards.part_of, (config.reward, config.turn_reward))
    parts.score, parts.turn_score = (checked_reward(r, config, codec) for r in (parts.reward, parts.turn_reward))
    parts.tasks = Tasks(config, PartnerMaker.of(config), codec, {}, (parts.score, parts.turn_score))
    parts.reply_settings = lambda seed, sampling: ReplySettings(codec, sampling, seed)
    return parts


def silent(said=None):
    return SimpleNamespace(stage=lambda *_: None, say=(lambda _: None) if said is None else said.append)


def test_the_trial_before_training_gives_what_training_gives(codec, policy):
    good = parts_of(codec, policy, ["words_of_the_policy", "partner", "whole"], ["length_of"])
    try_rewards_of_conversations(good, silent())
    bad = parts_of(codec, policy, ["partner"], ["whole"])  # the reward of a turn is told no whole conversation
    with pytest.raises(UserError, match=r"raised KeyError.*\(It was tried before training, on two replies.\)"):
        try_rewards_of_conversations(bad, silent())
    seen = []
    task = replace(good.tasks("train", 1), reward=lambda *columns: seen.append(columns) or [0.0] * len(columns[1]))
    good.tasks = lambda split, slots: task
    good.config.samples_per_prompt = 3
    state = random.getstate()
    try_rewards_of_conversations(good, silent())
    ((prompts, replies, references, acts),) = seen
    assert replies == ["Yes.", "", "Yes."] and references == [""] * 3 and acts == [0] * 3
    for prompt, reply in zip(prompts, replies):
        assert prompt.columns["conversation"][-1] == {"role": "assistant", "content": reply}
        assert list(prompt.messages) == prompt.columns["conversation"][:-1] and prompt.columns["partner_score"] == 0.0
    assert random.getstate() == state


def test_the_scale_of_a_reward_of_whole_conversations_is_measured(codec, policy, monkeypatch):
    monkeypatch.setattr("ppo_dialog.START_CONVERSATIONS", 6)
    codec, said = codec.with_format(max_new_tokens=3), []
    parts = parts_of(codec, policy, ["Length"])
    state = TrainState(parts.config)
    measure_scales(parts, parts.config, state, silent(said))
    talks = play(policy, lambda n: parts.tasks("train", n), 6, ReplySettings(codec, parts.config.sampling))
    lengths = np.array([len(talk.messages) for talk in talks])  # which is the score of Counting too
    mean, deviation = state.reward_scales["Length"]
    assert (mean, deviation) == pytest.approx((101 * lengths.mean(), 101 * lengths.std()))
    assert "over 6 replies of the model" in said[0]
    monkeypatch.setattr("ppo_dialog.play_some", lambda *_: talks)
    with pytest.raises(UserError, match="the reward raised ZeroDivisionError"):
        measure_scales(parts_of(codec, policy, ["Fails"]), parts.config, state, silent())


def talk_with(metrics=(), turns=(), parts=()):
    """A conversation whose rewards returned these metrics at its end, and for each turn."""

    def scores(found, parts=()):
        return Scores(np.ones(1), *({name: np.array([x]) for name, x in dict(of).items()} for of in (parts, found)))

    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes no"}]
    talk = Conversation(0, messages, 1, replies=[Reply.of("yes no", [1, 2])] * max(1, len(turns)))
    talk.scores, talk.turn_scores = scores(metrics, parts), [scores(turn, turn if parts else ()) for turn in turns]
    return talk


def test_statistics_of_turns_and_of_the_end():
    nan = float("nan")
    talks = [talk_with({"m": 1.0}, [{"judge": 0.5}, {"judge": nan}, {"judge": 0.7}]), talk_with({}, [{"judge": nan}])]
    found = columns_of(talks, "metrics")
    assert found["judge"] == [pytest.approx(0.6), pytest.approx(nan, nan_ok=True)]
    assert found["m"] == [1.0, pytest.approx(nan, nan_ok=True)]
    both = [talk_with({"judge": 9.0}, [{"judge": 0.5}, {"judge": 0.7}]), talk_with({"judge": 8.0}, [{"judge": 0.2}])]
    expected = {"judge": [9.0, 8.0], "judge_of_turns": [pytest.approx(0.6), pytest.approx(0.2)]}
    assert columns_of(both, "metrics") == expected
    sums = columns_of([talk_with({}, [{"a": 1.0}, {"a": nan}, {"b": 2.0}], parts={"a": 0.5})], "parts")
    assert sums == {"a": [1.5], "b": [2.0]}


def test_a_statistic_with_the_name_of_a_conversations_own_metric_is_refused(codec):
    for name in ("turns", "cut", "mean_output_length"):
        reward = make_reward({f"{__file__}:length_of": 1.0}, {}, "cpu", "")
        reward.parts["length_of"] = 1.0, lambda p, r, *_, name=name: ([0.0] * len(r), {name: [42.0] * len(r)})
        with pytest.raises(UserError, match=f"a statistic '{name}', which conversations have themselves; rename it"):
            finished(make_env(codec, 1, reward=reward), 1)
    assert list(label_parts(["own.py:turns", "own.py:cut"]).values()) == ["turns_part", "cut_part"]
    scores = score_replies(lambda p, r, *_: ([0.0], {"mine": [42.0]}), [Prompt("")], [Reply("a")])
    assert scores.metrics["mine"] == [42.0]


def test_what_does_not_fit_a_partner_is_refused():
    def refused(**settings):
        with pytest.raises(UserError) as error:
            PPOConfig(**settings).check()
        return str(error.value)

    own = {"partner": f"{__file__}:Counting"}
    assert "no --partner" not in refused(turn_reward={"a.py:b": 1}) and "--partner" in refused(
        turn_reward={"a.py:b": 1}
    )
    assert "give --partner as well" in refused(reward={"partner": 1.0})
    for name in ("intent", "meteor", "consensus", "commonplace"):
        assert f"the reward '{name}' compares replies" in refused(**own, reward={name: 1.0})
    assert "--reward, not --turn-reward" in refused(**own, turn_reward={"partner": 1.0})
    assert "'self' is a model, not 'desk' or a class; name another" in refused(partner="self")
    assert "takes none" in refused(partner="self", partner_args={"a": 1}, reward={"models": 1.0})
    assert "no file" in refused(partner="nowhere.py:Customer")
    assert "gather" in refused(**own, gather=False)
    assert "expected" in refused(**own, max_turns=0)
    assert "intent_model is 'models/judge', and intent compares" in refused(**own, intent_model="models/judge")
    two = dict(partner="self", reward={f"{__file__}:whole": 1.0})
    assert "ref_model is 'models/x', another model; leave ref_model out" in refused(**two, ref_model="models/x")
    for same in ("", "builtin"):
        PPOConfig(**two, ref_model=same).check_partner()
    assert "nothing is rewarded" in refused(**own, reward={"a.py:b": 0.0}, turn_reward={"a.py:b": 0.0})
    rewarded = dict(reward={f"{__file__}:whole": 1.0}, turn_reward={f"{__file__}:whole": 0.0})
    PPOConfig(**own, **rewarded).check()
    assert PPOConfig(**own).reward == {"partner": 1.0} and PPOConfig(**own).intent_model == ""
    assert PPOConfig(**own, turn_reward={"x.py:y": 1}).reward == {}


@pytest.mark.parametrize("make", [PPOConfig, EvalConfig])
def test_options_of_partners_that_would_be_ignored_are_refused(make):
    model = {} if make is PPOConfig else {"model_path": "builtin"}

    def refused(**settings):
        with pytest.raises(UserError) as error:
            make(**model, **settings).check_partner()
        return str(error.value)

    for name, value in (
        ("max_turns", 3),
        ("partner_timeout", 5.0),
        ("partner_device", "cpu"),
        ("partner_args", {"a": 2}),
    ):
        assert f"{name} is {value!r}, and is for conversations; give --partner" in refused(**{name: value})
    own, reward = f"{__file__}:Counting", {"reward": {"a.py:b": 1.0}} if make is PPOConfig else {}
    for name in ("desk", own, "self"):
        sentence = f"partner_device is 'cpu', and is for a model that is the partner; '{name}' is none"
        assert sentence in refused(partner=name, partner_device="cpu")
    assert "limits the calls of a class; partner 'builtin' is a model" in refused(
        partner="builtin", partner_timeout=1.0, **reward
    )
    make(**model, partner="builtin", partner_device="cpu", max_turns=3, **reward).check_partner()
    make(**model, partner=own, partner_timeout=1.0, max_turns=3).check_partner()


def test_a_device_that_cannot_be_used_is_refused_before_anything_is_loaded():
    for name in ("nonsense", "cuda:77"):
        config = PPOConfig(partner="builtin", partner_device=name, reward={"a.py:b": 1.0})
        with pytest.raises(UserError, match=f"partner_device is '{name}', which cannot be used"):
            PartnerMaker.of(config)
    assert PartnerMaker.of(replace(config, partner_device="cpu")).name == "builtin"


def test_data_that_is_not_read_is_said():
    own = f"{__file__}:Counting"
    given = PPOConfig(partner=own, data_path="desk", speaker="second", turns="last", skip_bad_rows=True)
    said = unread_data(given, PartnerMaker.of(given))
    assert said.endswith("have no effect: data_path, speaker, turns, skip_bad_rows")
    for config in (PPOConfig(partner=own), EvalConfig(model_path="builtin", partner=own)):
        assert unread_data(config, PartnerMaker.of(config)) == ""
    read = PPOConfig(partner="builtin", data_path="desk", reward={"a.py:b": 1.0})
    assert unread_data(read, PartnerMaker.of(read)) == ""
    for config, phrases in (
        (given, ["settings have no effect: data_path"]),
        (PPOConfig(partner=own, turn_reward={"a.py:b": 1.0}), ["so the partner's score is not rewarded"]),
        (PPOConfig(partner=own), []),
    ):
        heard = []
        check_partner(PartnerMaker.of(config), config, silent(heard))
        assert len(heard) == len(phrases) and all(phrase in text for phrase, text in zip(phrases, heard))


# Partners that misbehave


def partner(**methods):
    """A class with the methods of Counting, some replaced."""
    return type("Bad", (Counting,), {name: staticmethod(f) if name == "score" else f for name, f in methods.items()})


BAD = {
    "raises": (dict(reply=lambda self, m: 1 / 0), "the partner's reply() raised ZeroDivisionError"),
    "bytes": (dict(reply=lambda self, m: b"hello"), "returned bytes b'hello'; expected text, or None to end"),
    "number": (dict(reply=lambda self, m: 3), "returned int 3; expected text"),
    "blank": (dict(reply=lambda self, m: " \n"), "no readable text; expected words"),
    "surrogate": (dict(reply=lambda self, m: "\ud800"), "no readable text"),
    "NUL": (dict(reply=lambda self, m: "a\0b"), "no readable text"),
    "long": (dict(reply=lambda self, m: "word " * 200_000), "1,000,000 characters"),
    "end token": (dict(reply=lambda self, m: "Bye.<EOU>"), "'<EOU>', the text that ends a turn"),
    "opening": (dict(reset=lambda self, rng: 7), "reset() returned int 7; expected text."),
    "opening by the policy": (
        dict(reset=lambda self, rng: [{"role": "assistant", "content": "Hi"}]),
        "do not end with the partner's own",
    ),
    "opening of no messages": (dict(reset=lambda self, rng: ["Hi"]), "returned 'Hi' as a message"),
    "reset raises": (dict(reset=lambda self, rng: {}["x"]), "the partner's reset() raised KeyError"),
    "score": (dict(score=lambda m: "good"), "score() returned 'good'; expected a finite number"),
    "score is NaN": (dict(score=lambda m: float("nan")), "score() returned nan; expected a finite number"),
    "scores": (dict(score=lambda m: np.zeros(2)), "score() returned array([0., 0.]); expected a finite number"),
    "tensor": (dict(score=lambda m: torch.zeros(2)), "score() returned tensor([0., 0.]); expected a finite number"),
    "huge": (dict(score=lambda m: 10**400), "expected a finite number"),
    "no score": (dict(score=lambda m: None), "score() returned None; expected a finite number"),
    "end token at the beginning": (dict(reset=lambda self, rng: "Hi. <EOU> Me too."), "'<EOU>', the text that ends"),
    "end token in messages": (
        dict(reset=lambda self, rng: [{"role": "assistant", "content": "a<EOU>b"}, {"role": "user", "content": "c"}]),
        "'<EOU>', the text that ends a turn for this model ('a<EOU>b')",
    ),
    "exits": (dict(reply=lambda self, m: sys.exit(3)), "the partner's reply() raised SystemExit: 3 (test_conv"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_partner_is_answered_in_a_sentence(name, codec):
    methods, sentence = BAD[name]
    task = ConversationTask(ScriptedPartners(partner(**methods), 2), reward=make_reward({"partner": 1}, {}, "cpu", ""))
    env = make_env(codec, 2, task=task)
    with pytest.raises(UserError) as error:
        finished(env, 3)
    assert sentence in str(error.value)


def test_a_partner_that_hangs_and_one_that_never_stops(codec):
    hanging = partner(reply=lambda self, m: time.sleep(60))
    env = make_env(codec, 1, task=ConversationTask(ScriptedPartners(hanging, 1, timeout=0.2)))
    env.reset(seed=0)
    with pytest.raises(UserError, match=r"reply\(\) did not return within 0.2 s \(partner_timeout\)"):
        env.step(["Hello?"])
    slow = type("Slow", (Counting,), {"reset": lambda self, rng: time.sleep(60)})
    maker = PartnerMaker("own.py:Slow", {}, 0, timeout=0.2)
    vars(maker)["_class"] = slow, None
    with pytest.raises(UserError, match=r"reset\(\) did not return within 0.2 s \(partner_timeout\)"):
        maker.begins  # noqa: B018  asks it to begin a conversation
    assert PartnerMaker.of(PPOConfig(partner="desk", partner_timeout=5)).partners("test", 2).timeout == 5
    endless = make_env(codec, 1, task=ConversationTask(ScriptedPartners(partner(reply=lambda self, m: "And?"), 1), 5))
    talks = finished(endless, 3)
    assert [(talk.end, len(talk.replies)) for talk in talks.values()] == [("truncated", 5)] * 3


@pytest.mark.parametrize("seconds", [0, 30])
def test_an_exit_is_said_and_a_signal_still_ends_the_process(seconds):
    started = time.perf_counter()
    with pytest.raises(UserError, match=r"it raised SystemExit: 3 \(test_conversations.py, line \d+\)."):
        call_own("it", "its_timeout", seconds, lambda: sys.exit(3))
    assert time.perf_counter() - started < 10
    for error in (KeyboardInterrupt, GeneratorExit):

        def interrupted(error=error):
            raise error

        with pytest.raises(error):
            call_own("it", "its_timeout", seconds, interrupted)


@pytest.mark.parametrize("seconds", [0, 30])
def test_a_signal_that_ends_the_process_is_no_fault_of_the_code_that_runs(seconds):
    with StopSignals() as signals, pytest.raises(SystemExit):
        signals.asked, signals.first = 130, signal.SIGINT  # the first Ctrl-C was before
        threading.Timer(0.2, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
        call_own("it", "its_timeout", seconds, time.sleep, 20)


def test_what_a_verdict_does_to_the_messages_it_reads_changes_nothing(codec):
    forgetful = partner()
    forgetful.verdict = lambda self, messages: messages.clear() or "Done."
    ends = make_reward({"partner": 1.0}, {}, "cpu", "")
    talks = finished(make_env(codec, 1, task=ConversationTask(ScriptedPartners(forgetful, 1), reward=ends)), 2)
    assert all(talk.note == "Done." and talk.total == len(talk.messages) >= 2 for talk in talks.values())


def test_a_class_that_cannot_be_made_is_refused(tmp_path):
    def refused(text, name="Mine", **args):
        (tmp_path / "own.py").write_text(textwrap.dedent(text))
        with pytest.raises(UserError) as error:
            ScriptedPartners(PartnerMaker(f"{tmp_path}/own.py:{name}", args, 0).of_split("train"), 1)
        return str(error.value)

    assert "cannot be made from partner_args {'a': 1}" in refused("class Mine: pass", a=1)
    assert "has no method reset()" in refused("class Mine: pass")
    assert "has no method reply()" in refused("class Mine:\n    def reset(self, rng): return 'Hi.'")
    assert "is a int; expected a class" in refused("Mine = 3")
    (tmp_path / "own.py").write_text(
        "class Mine:\n    reset = reply = print\n    def __init__(self, split): self.split = split"
    )
    maker = PartnerMaker(f"{tmp_path}/own.py:Mine", {}, 0)
    assert maker.of_split("test")().split == "test"


# The rollout


def rollout_of(model, ref, codec, sampling, env_num=4, **options):
    torch.manual_seed(0)
    env = make_env(codec, env_num, reward=make_reward({"partner": 1.0}, {}, "cpu", ""), **options)
    observations, _ = env.reset(seed=0, options={"rounds": 2})
    settings = RolloutSettings(sampling, 256, torch.device("cpu"), rounds=2)
    return collect(model, ref, env, observations, torch.zeros(0), RunningMoments(), settings)[0], env


@pytest.fixture(scope="module")
def chat_codec(codec):
    """A codec whose template adds to the conversation, so that a conversation is one text."""
    fmt = DialogueFormat(template=CHATML, max_prompt_tokens=120, max_new_tokens=8)
    return DialogueCodec(codec.tokenizer, fmt)


@pytest.mark.parametrize("own_critic", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, top_k=9, top_p=0.9)], ids=["plain", "candidates"])
@pytest.mark.parametrize("form", ["dialogue", "template"])
def test_a_rollout_has_the_numbers_of_a_plain_pass_over_each_turn(
    form, sampling, own_critic, codec, chat_codec, policy
):
    folder = str(builtin_model("policy"))
    codec = chat_codec if form == "template" else codec.with_format(context_utterances=3, max_new_tokens=8)
    model = ActorCritic(load_causal_lm(folder), Critic(load_trunk(folder)) if own_critic else None).eval()
    torch.nn.init.normal_((model.critic or model).value_head.weight, std=0.3)
    ref = load_causal_lm(folder).eval()
    with torch.no_grad():
        ref.lm_head.weight += 0.01 * torch.randn(ref.lm_head.weight.shape, generator=torch.Generator().manual_seed(0))
    rollout, _ = rollout_of(model, ref, codec, sampling)
    assert len(rollout.mask) == 8 and rollout.turns.sum() > 12
    # one text to a conversation where prompts continue it, more where its window moves on
    texts = torch.tensor(rollout.texts.counts)
    assert ((texts == 1) & (rollout.turns > 1)).any() if form == "template" else (texts > 1).any()
    assert torch.equal(rollout.scores, 2 * rollout.turns)

    talks = {}
    again = make_env(codec, 4, reward=None)
    again.reset(seed=0, options={"rounds": 2})
    while again.active.any():  # the same conversations, a reply at a time, without cache or packing
        actions = [""] * 4
        for slot in np.flatnonzero(again.active):
            talk = again.conversations[slot]
            kept = talks.setdefault(talk.number, [])
            row = talk.number
            tokens = rollout.response_ids[row][rollout.mask[row]].tolist()[sum(len(r) for _, r in kept) :]
            end = next(n for n in range(1, len(tokens) + 1) if codec.ended(tokens[:n]) or n == 8)
            kept.append((prompt_of(talk.messages, codec, "")[1], tokens[:end]))
            actions[slot] = tokens[:end]
        width = codec.format.max_new_tokens
        again.step(np.array([[*a, *[-1] * (width - len(a))] if a else [-1] * width for a in actions]))
    for row, turns in talks.items():
        at = 0
        for prompt, reply in turns:
            ids = torch.tensor([prompt + reply])
            here = slice(len(prompt) - 1, -1)
            with torch.no_grad():
                logits, logits_of_ref = model.policy(ids).logits[0, here], ref(ids).logits[0, here]
                hidden = (model.critic.trunk if own_critic else model.policy.transformer)(ids).last_hidden_state[
                    0, here
                ]
                values = (model.critic or model).value_head(hidden).squeeze(-1)
            tokens, span = torch.tensor(reply), slice(at, at + len(reply))
            candidates = None if rollout.candidates is None else rollout.candidates[row, span]
            logprobs = token_log_probs(logits, tokens, sampling.temperature, candidates)
            full, of_ref = (token_log_probs(x, tokens, sampling.temperature) for x in (logits, logits_of_ref))
            for found, expected in (
                (rollout.logprobs, logprobs),
                (rollout.kl, full - of_ref),
                (rollout.values, values),
            ):
                assert torch.allclose(found[row, span], expected, atol=2e-5)
            at += len(reply)
        assert at == rollout.mask[row].sum()


class Alike(Counting):
    """All its conversations begin alike."""

    def reset(self, rng):
        super().reset(rng)
        return "Hello, who is there?"


def test_new_conversations_that_begin_alike_beside_old_ones_are_read_right(chat_codec, policy):
    task = ConversationTask(ScriptedPartners(Alike, 3), reward=make_reward({"partner": 1.0}, {}, "cpu", ""))
    env = ConversationVectorEnv(task, chat_codec, 3)
    observations, _ = env.reset(seed=0, options={"rounds": 8})
    settings = RolloutSettings(Sampling(), 256, torch.device("cpu"), rounds=8)
    model = ActorCritic(policy).eval()
    rollout, _ = collect(model, policy, env, observations, torch.zeros(0), RunningMoments(), settings)
    with torch.no_grad():
        logits, values = model(rollout.texts.inputs(np.arange(len(rollout.mask)), settings.device))
    logprobs = token_log_probs(logits, rollout.response_ids[rollout.mask], 1.0)
    assert len(rollout.mask) == 24 and torch.allclose(rollout.logprobs[rollout.mask], logprobs, atol=2e-5)
    assert torch.allclose(rollout.values[rollout.mask], values, atol=2e-5)


def test_conversations_of_a_rollout_depend_neither_on_the_batch_nor_on_processes(codec, policy):
    model = ActorCritic(policy).eval()

    def play(env_num, *where):
        env = make_env(codec, env_num, *where)
        observations, _ = env.reset(seed=0, options={"rounds": 8 // env_num})
        settings = RolloutSettings(Sampling(), 256, torch.device("cpu"), rounds=1)
        rollout, _ = collect(model, policy, env, observations, torch.zeros(0), RunningMoments(), settings)
        return rollout.responses

    whole = play(8)
    assert play(2) == whole and play(1) == whole and len(set(whole)) > 4
    halves = [play(4, index, 2) for index in range(2)]
    assert halves[0][:2] == whole[:2] and halves[1][:2] == whole[2:4] and halves[0][2:] == whole[4:6]


def test_a_mean_prompt_is_that_of_the_texts(codec, policy):
    codec = codec.with_format(context_utterances=3, max_prompt_tokens=40, max_new_tokens=4)
    rollout, _ = rollout_of(ActorCritic(policy).eval(), policy, codec, Sampling())
    config = PPOConfig(partner="desk", env_num=8)
    batch = make_batch(rollout, TrainState(config), config, lambda x: x)
    prompts = rollout.prompt_mask.sum(-1)
    assert len(prompts) > len(rollout.mask)  # a conversation has several texts, because its window moves on
    alone = rollout_metrics(batch, 0.2, lambda x: x)["mean_prompt_length"]
    assert alone == pytest.approx(prompts.mean()) and alone <= 40
    assert rollout_metrics(batch, 0.2, lambda x: 2 * x)["mean_prompt_length"] == alone  # as two such processes


def test_advantages_run_across_three_turns():
    """By hand, for turns of 2, 1 and 2 tokens: what follows a turn's last token is the next turn's first value."""
    rewards = torch.tensor([[0.0, 1.0, 2.0, 0.0, 4.0, 0.0]])
    values = torch.tensor([[0.5, 1.0, 1.5, 2.0, 2.5, 9.0]])
    mask = torch.tensor([[True] * 5 + [False]])
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=0.5)
    deltas = [0 + 1.0 - 0.5, 1 + 1.5 - 1.0, 2 + 2.0 - 1.5, 0 + 2.5 - 2.0, 4 - 2.5]
    fifth = deltas[4]
    fourth = deltas[3] + 0.5 * fifth
    third = deltas[2] + 0.5 * fourth
    second = deltas[1] + 0.5 * third
    first = deltas[0] + 0.5 * second
    assert advantages.tolist() == [[pytest.approx(x) for x in (first, second, third, fourth, fifth)] + [0.0]]
    assert returns[0, 0] == pytest.approx(first + 0.5)


def test_rewards_of_turns_are_earned_at_the_ends_of_turns(codec, policy):
    turn_reward = make_reward({f"{__file__}:length_of": 1.0, f"{__file__}:per_token": 0.1}, {}, "cpu", "")
    rollout, _ = rollout_of(ActorCritic(policy).eval(), policy, codec, Sampling(), turn_reward=turn_reward)
    rewards = token_rewards(rollout, 0.0, rollout.scores)
    for row, text in enumerate(rollout.responses):
        ids = rollout.response_ids[row][rollout.mask[row]].tolist()
        expected, start, words = [], 0, [line.split() for line in text.split("\n")]
        for n in range(1, len(ids) + 1):
            expected.append(0.1)
            if codec.ended(ids[start:n]) or n - start == codec.format.max_new_tokens:
                expected[-1] += len(words.pop(0))
                start = n
        expected[-1] += 2 * rollout.turns[row].item()  # the partner's score of the whole
        assert rewards[row][rollout.mask[row]].tolist() == [pytest.approx(x, abs=1e-5) for x in expected]
    assert torch.allclose(
        rollout.parts["length_of"] + rollout.parts["per_token"] + rollout.parts["partner"], rollout.scores
    )


def test_random_numbers_depend_on_conversation_turn_and_speaker():
    one = turn_uniforms(5, [3, 4], [0, 2], seed=1, whose=0)
    assert torch.equal(one[1:], turn_uniforms(5, [4], [2], 1, 0)) and len({tuple(r) for r in one.tolist()}) == 2
    assert not torch.equal(one, turn_uniforms(5, [3, 4], [0, 2], 1, 1))


def test_a_model_as_partner_sees_the_conversation_from_its_own_side(chat_codec, policy):
    partners = ModelPartners(policy, chat_codec)
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hi, who is it?"}]
    prompt = chat_codec.tokenizer.decode(partners._prompt(messages))
    assert prompt == "assistant: Hello.<EOU>user: Hi, who is it?<EOU>assistant: "
    partners.begin([0], [0], seed=0)
    three = partners.reply([0, 1, 2], [messages] * 3, numbers=[0, 1, 0], turns=[1, 1, 1])
    assert three[0] == three[2] != three[1]
    assert partners.reply([0], [messages], numbers=[1], turns=[1]) == [three[1]]


# Runs

RUN = dict(env_num=8, total_time_steps=2000, save_interval=2, validation_limit=6, eval_limit=8, sample_interval=2)
KILLER = """
    import os, pathlib, signal

    class Customer:
        "Kills the run at the reply that a file beside this one names."
        def reset(self, rng):
            self.rng, self.n = rng, 0
            return rng.choice(["Hello.", "Good morning.", "Are you there?"])

        def reply(self, messages):
            fuse = pathlib.Path(__file__).with_name("fuse")
            if fuse.exists():
                left = int(fuse.read_text() or 0) - 1
                fuse.write_text(str(left))
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            self.n += 1
            return None if self.n > self.rng.randrange(1, 5) else self.rng.choice(["Really?", "Why?", "When?"])

        def score(self, messages):
            return sum(len(m["content"]) for m in messages if m["role"] == "assistant") / 100
"""


@pytest.mark.slow
def test_a_run_that_is_killed_in_mid_conversation_goes_on_to_the_digit(tmp_path):
    (tmp_path / "own.py").write_text(textwrap.dedent(KILLER))
    settings = RUN | dict(run_dir=str(tmp_path), partner=f"{tmp_path}/own.py:Customer")
    whole = tmp_path / "whole"
    assert run(sys.executable, "ppo_dialog.py", *flags(experiment_name="whole", **settings)).returncode == 0
    (tmp_path / "fuse").write_text(str(150))
    command = [sys.executable, "ppo_dialog.py", *flags(experiment_name="cut", **settings)]
    assert run(*command).returncode == -signal.SIGKILL
    (tmp_path / "fuse").unlink()
    reached = len(lines(tmp_path / "cut"))
    done = run(*command, "--resume")
    assert done.returncode == 0 and 0 < reached < len(lines(whole)), done.stderr[-2000:]
    assert timeless(lines(tmp_path / "cut")) == timeless(lines(whole))
    for name in ("policy/model.safetensors", "value.safetensors", "eval_samples.jsonl", "samples.jsonl"):
        assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes(), name
    rows = [json.loads(line) for line in (whole / "eval_samples.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and all("partner:" in row["after"]["text"] or row["after"]["turns"] == 1 for row in rows)
    shown = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert shown and all(row["now"].startswith("policy: ") for row in shown)


def test_a_partner_that_fails_loses_no_update(tmp_path):
    text = KILLER.replace("os.kill(os.getpid(), signal.SIGKILL)", "raise RuntimeError('line is dead')")
    (tmp_path / "own.py").write_text(textwrap.dedent(text))
    settings = RUN | dict(
        run_dir=tmp_path, partner=f"{tmp_path}/own.py:Customer", save_interval=100, validation_limit=0
    )
    (tmp_path / "fuse").write_text(str(110))
    command = [sys.executable, "ppo_dialog.py", *flags(**settings)]
    done = run(*command)
    assert (
        done.returncode == 2 and "error: the partner's reply() raised RuntimeError: line is dead (own.py" in done.stderr
    )
    reached = len(lines(tmp_path / "ppo_dialog"))
    (tmp_path / "fuse").unlink()
    again = run(*command, "--resume")
    assert again.returncode == 0 and f"resumed after update {reached}," in again.stdout and reached > 0


def test_self_play_from_recorded_beginnings_with_a_reward_for_turns(tmp_path):
    settings = RUN | dict(run_dir=str(tmp_path), partner="self", max_turns=3, eval_limit=-1, validation_limit=0)
    folder = trained(**settings, turn_reward=f"{__file__}:length_of", samples_per_prompt=2, length_rate=1.0)
    for row in lines(folder):
        assert 1 <= row["turns"] <= 3 and row["reward_length_of"] == pytest.approx(row["score"], abs=1e-5)
        assert "reward_length_price" in row


def test_two_models_play_the_same_conversations_in_an_evaluation(tmp_path, capsys):
    options = dict(partner=f"{__file__}:Counting", partner_args={"most": 4}, limit=12, bootstrap=20, max_turns=3)
    two = dict(model_path="builtin", baseline_path="builtin", skip_bad_rows=True)
    same = EvalConfig(**two, output=str(tmp_path / "out.json"), **options)
    result = run_evaluation(same)
    assert result["policy"] == result["baseline"] and result["settings"]["samples"] == 12
    assert result["policy"]["turns"] == pytest.approx(result["policy"]["partner"] / 2, rel=0.3)
    assert all(found is None or found["value"] == 0 for found in result["difference"].values())
    assert json.loads((tmp_path / "out.json").read_text())["policy"] == result["policy"]
    shown = capsys.readouterr().out
    assert "12 of 12 conversations" in shown and "METEOR" not in shown and "\npartner " in shown
    assert "note: the partner begins conversations itself, so these settings have no effect: skip_bad_rows" in shown
    # a model as partner begins with recorded dialogues and has no score
    friend = run_evaluation(EvalConfig(model_path="builtin", partner="builtin", limit=5, bootstrap=5, max_turns=2))
    assert friend["policy"]["turns"] == 2 and "partner" not in friend["policy"]


def test_no_more_conversations_are_played_than_asked_and_they_stay_the_same(codec, policy):
    codec, sizes, done = codec.with_format(max_new_tokens=3), [], []

    def make_task(slots):
        sizes.append(slots)
        return ConversationTask(ScriptedPartners(Counting, slots), 2)

    def played(n, batch_size):
        settings = ReplySettings(codec, seed=1, batch_size=batch_size)
        talks = play(policy, make_task, n, settings, lambda *counts: done.append(counts))
        return [(talk.number, talk.messages) for talk in talks]

    assert played(9, 3) == played(9, 8) == played(12, 6)[:9]
    assert sizes == [5, 9, 12]  # two rounds of five in place of six
    assert (10, 10) in done and (9, 9) in done


def test_the_settings_of_an_evaluation_name_the_words_that_were_counted():
    talks = [talk_with() for _ in range(3)]
    for talk in talks:
        talk.replies = [Reply.of("你好世界", [1, 2])]
    result = compare(score_conversations(talks, 1.0).evaluation)
    assert result["settings"]["word_tokenizer"] == describe("unicode") and result["policy"]["distinct1"] == 1 / 3


def test_each_model_of_an_evaluation_gets_its_own_system_prompt(chat_codec, tmp_path):
    dialogue = [("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four.")]
    rows = [[("system", "Of the data."), *dialogue] if i % 2 else dialogue for i in range(40)]
    rows = [
        {"messages": [{"role": role, "content": f"{text} {i}"} for role, text in row]} for i, row in enumerate(rows)
    ]
    rows[-2]["messages"][0]["content"] = "word " * 90  # fits alone, and not with the baseline's system prompt
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = EvalConfig(
        model_path="builtin", baseline_path="builtin", partner="builtin", data_path=f"{tmp_path}/chats.jsonl"
    )
    config.split = "train"

    def begun(policy, baseline):
        codecs = {"policy": policy, "baseline": baseline}
        openings = openings_for_all(config, codecs, open_dialogues(config, codecs))
        found = []
        for codec in codecs.values():
            task = ConversationTask(ScriptedPartners(partner(reset=lambda self, rng: None), 8), openings=openings)
            env = make_env(codec, 8, task=task)
            env.reset(seed=0)
            found.append([talk.messages for talk in env.conversations])
        return openings, found

    mine, other = (chat_codec.with_format(system_prompt=text) for text in ("I am the policy.", "Much " * 30 + "more."))
    openings, (first, second) = begun(mine, other)
    assert {talk[0]["content"] for talk in first} == {"I am the policy."}
    assert {talk[0]["content"] for talk in second} == {other.format.system_prompt}
    assert [talk[1:] for talk in first] == [talk[1:] for talk in second]
    assert prompt_of(first[0], mine, "")[0][0]["content"] == "I am the policy."
    assert not any("word word" in opening.messages[-1]["content"] for opening in openings)
    # a model without one keeps the system message of the data
    openings, (first, second) = begun(chat_codec, other)
    systems = [m["content"] for talk in first for m in talk if m["role"] == "system"]
    assert 0 < len(systems) < 8 and all(text.startswith("Of the data.") for text in systems)
    assert first_of_dialogues(openings).keys == openings.keys


def test_data_that_single_replies_refuse_is_refused_with_a_partner_too(tmp_path):
    turns = [("user", "One?"), ("assistant", "Two."), ("user", "Three?"), ("assistant", "Four.")]
    rows = [{"messages": [{"role": r, "content": f"{text} {i}"} for r, text in turns]} for i in range(40)]

    def refused(rows, **options):
        (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
        found = []
        for partner in ("", "builtin"):
            given = dict(model_path="builtin", data_path=f"{tmp_path}/chats.jsonl", template="dialogue", **options)
            with pytest.raises(UserError) as error:
                run_evaluation(EvalConfig(**given, partner=partner))
            found.append(str(error.value))
        assert found[0] == found[1]
        return found[0]

    assert "speaker is 'second', but the rows" in refused(rows, speaker="second")
    rows[3]["messages"][0]["content"] = "So <EOU> I said."
    assert "<EOU>" in refused(rows)


def test_what_does_not_fit_an_evaluation_with_a_partner_is_refused(tmp_path):
    def refused(**options):
        with pytest.raises(UserError) as error:
            EvalConfig(**{"model_path": "builtin", "partner": "desk"} | options).check()
        return str(error.value)

    (tmp_path / "replies.jsonl").write_text("{}")
    assert "expected a model, which plays" in refused(baseline_path=str(tmp_path / "replies.jsonl"))
    assert "give --partner as well" in refused(partner="", partner_args={"a": 1})
    assert "'builtin' takes none" in refused(partner="builtin", partner_args={"a": 1})
    assert "name the model, such as --partner builtin" in refused(partner="self")
    assert "intent_model is 'builtin'" in refused(intent_model="builtin")
    assert "there is no file 'no.py'" in refused(partner="no.py:Friend")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_learn_from_the_same_conversations(engine, tmp_path):
    settings = dict(env_num=8, num_mini_batch=2, total_time_steps=1, save_interval=1, eval_limit=6, validation_limit=5)
    settings |= dict(partner=f"{__file__}:Counting", lr=1e-3, lr_schedule="constant", max_new_tokens=12)
    alone = trained(run_dir=str(tmp_path / "alone"), **settings)
    run_by(engine, run_dir=str(tmp_path / "two"), **settings)
    (expected,), (found,) = lines(alone), lines(tmp_path / "two" / "ppo_dialog")
    for name in ("score", "turns", "kl_div", "policy_loss", "value_loss", "grad_norm", "mean_output_length"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    of_two, of_one = (
        [json.loads(row)["before"]["text"] for row in (folder / "eval_samples.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "two" / "ppo_dialog", alone)
    )
    assert of_two == of_one and len(of_one) == 6
