"""Rewards: METEOR with and without WordNet, the judge, the weighted sum, own rewards, and the KL penalty."""

import os
import re
import sys
import time
from types import SimpleNamespace

import nltk
import numpy as np
import pytest
import torch
from nltk.translate.meteor_score import single_meteor_score
from transformers import BertConfig, BertForSequenceClassification

import rewards
from intent_classifier import labelled_pairs
from rewards import (
    REWARDS,
    CrossPromptOverlap,
    Intent,
    MBRConsensus,
    Meteor,
    Reward,
    last_utterance,
    make_reward,
    register_reward,
    token_kl,
    words,
)
from support import meteor as meteor_module
from support.controllers import AdaptiveKL, LengthController
from support.data import load_dialogues
from support.errors import UserError
from support.judge import IntentJudge
from support.meteor import meteor, meteor_uses_synonyms
from support.scoring import score_episodes
from support.text import Prompt

RESPONSE = "It is a guide to action which ensures that the military always obeys the commands of the party"
REFERENCE = "It is a guide to action that ensures that the military will forever heed Party commands"
PROMPTS = ["Hello there .<EOU>How are you ? <EOU>", "What time is it ? <EOU>", "Sure . <EOU>", "Good bye ! <EOU>"]
RESPONSES = ["Fine , thanks .", "It is six .", "Could I have a table ?", ""]
REFERENCES = ["Fine . And you ?", "Half past six .", "Please follow me .", "See you soon ."]
ACTS = [1, 2, 3, 4]
EPISODES = PROMPTS, RESPONSES, REFERENCES, ACTS


@pytest.fixture(autouse=True)
def fresh_meteor(monkeypatch, tmp_path):
    """Each test searches for WordNet again, and remembers a failed download in its own folder."""
    monkeypatch.setenv("PPO_DIALOG_CACHE", str(tmp_path / "cache"))
    meteor_module._meteor_parts.cache_clear()
    yield
    meteor_module._meteor_parts.cache_clear()


@pytest.fixture
def no_wordnet(monkeypatch):
    """No data on this machine, and a download that fails at once. The list records its calls."""
    calls = []

    def missing(name, paths=None):
        raise LookupError(name)

    monkeypatch.setattr(nltk.data, "find", missing)
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: calls.append(args) or False)
    return calls


@pytest.fixture
def wordnet(shared, monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [str(shared / "data" / "nltk_data")])


@pytest.fixture
def judge_folder(tmp_path, tiny_tokenizer):
    """A function that makes the folder of a classifier of random weights."""

    def make(name="judge", num_labels=4, **config):
        torch.manual_seed(0)
        sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
        sizes |= dict(vocab_size=len(tiny_tokenizer), pad_token_id=tiny_tokenizer.pad_token_id)
        network = BertConfig(num_labels=num_labels, initializer_range=0.5, **sizes, **config)
        BertForSequenceClassification(network).save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return make


# --- METEOR


def test_meteor_of_the_published_example(wordnet):
    assert meteor_uses_synonyms()
    assert meteor(RESPONSE, REFERENCE) == pytest.approx(0.6944, abs=5e-5)
    assert meteor(REFERENCE, REFERENCE) > 0.999 and meteor("", REFERENCE) == meteor("zebra", "lion tamer") == 0


def test_synonyms_in_one_set_are_those_of_all_synsets(shared, wordnet):
    # NLTK searches synonyms of what is left after stemming: "auto" is found, "automobil" would not be
    assert meteor("the auto", "the car") > 0.4 > meteor("the lion", "the car")
    texts = [u for d in load_dialogues(str(shared / "data" / "dailydialog"), "validation") for u in d.utterances][:120]
    assert any(meteor(a, b) for a, b in zip(texts, texts[3:]))
    for response, reference in [*zip(texts, texts[3:]), *zip(RESPONSES, REFERENCES), (RESPONSE, REFERENCE)]:
        assert meteor(response, reference) == single_meteor_score(words(reference), words(response))


def test_meteor_without_wordnet_says_so_once_and_scores_words_and_stems(no_wordnet, capfd):
    score = meteor(RESPONSE, REFERENCE)
    assert 0.6 < score < 0.6945  # synonyms can only add
    assert meteor("running", "run") == meteor("run", "run") > 0  # stems
    assert meteor("auto", "car") == 0 and not meteor_uses_synonyms()
    captured = capfd.readouterr()
    assert len(no_wordnet) == 1 and captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("METEOR: no WordNet data here")
    assert "python -m nltk.downloader wordnet" in captured.err and "NLTK_DATA" in captured.err


def test_a_download_that_hangs_is_given_up(no_wordnet, monkeypatch, capfd):
    monkeypatch.setattr(meteor_module, "DOWNLOAD_SECONDS", 0.1)
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: time.sleep(3))
    start = time.monotonic()
    assert meteor("yes", "yes") > 0
    said = capfd.readouterr().err
    assert time.monotonic() - start < 2 and said.count("\n") == 1 and "no answer within 0.1 s" in said


@pytest.fixture
def start(no_wordnet, monkeypatch, capfd):
    """A function that starts METEOR as a new process does and returns what it prints. `error`: how a download fails."""

    def start(error: Exception | None = None) -> str:
        def download(*args, **kwargs):
            no_wordnet.append(args)
            if error:
                raise error

        monkeypatch.setattr(nltk, "download", download)
        meteor_module._meteor_parts.cache_clear()
        assert meteor("yes", "yes") == 0.5
        return capfd.readouterr().err

    start.downloads = no_wordnet
    return start


def test_a_failed_download_is_remembered_for_a_day(start, tmp_path):
    assert "the download failed (no route to host); the next" in start(ValueError("no route to host\nand more"))
    said = start(ValueError("another reason"))
    assert len(start.downloads) == 1 and said.count("\n") == 1
    assert re.match(
        r"METEOR: no WordNet data here, and the download failed at \d{4}-\d\d-\d\d \d\d:\d\d \(no route to host\); "
        r"the next try is a day later\. So .* python -m nltk\.downloader wordnet",
        said,
    )
    (remembered,) = (tmp_path / "cache").iterdir()
    now = time.time()
    # a minute less than a day; a day; a clock that has been set back since
    for written, tries in ((now - 86_340, 1), (now - 86_401, 2), (now + 3600, 3)):
        os.utime(remembered, (written, written))
        assert "METEOR: no WordNet data here" in start(OSError("disk full"))
        assert len(start.downloads) == tries
    assert "(disk full)" in start() and len(start.downloads) == 3  # the newest reason, written now


def test_wordnet_that_appears_within_the_day_is_used_at_once(start, tmp_path, monkeypatch, capfd):
    start(ValueError("no route"))
    monkeypatch.undo()
    (tmp_path / "corpora" / "wordnet").mkdir(parents=True)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    quick = SimpleNamespace(ensure_loaded=lambda: None)  # reading WordNet takes seconds
    monkeypatch.setattr(meteor_module, "wordnet", quick)
    meteor_module._meteor_parts.cache_clear()
    assert meteor_uses_synonyms() and capfd.readouterr().err == ""


def test_a_cache_that_cannot_be_written_costs_a_try_at_each_start(start, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    for tries in (1, 2):
        assert "(no route); the next start tries again" in start(ValueError("no route"))
        assert len(start.downloads) == tries


def test_a_download_that_works_is_used(shared, monkeypatch, capfd):
    monkeypatch.setattr(nltk.data, "path", [])
    folder = str(shared / "data" / "nltk_data")
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: nltk.data.path.append(folder))
    assert meteor(RESPONSE, REFERENCE) == pytest.approx(0.6944, abs=5e-5)
    assert capfd.readouterr().err == ""


def test_a_torn_download_is_done_without(tmp_path, monkeypatch, capfd):
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "wordnet.zip").write_bytes(b"PK\x03\x04torn")
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    monkeypatch.setattr(nltk, "download", lambda *args, **kwargs: False)
    assert meteor("running fast", "run fast") > 0.9
    assert "WordNet" in capfd.readouterr().err


def test_meteor_reward_is_meteor_of_each(no_wordnet):
    scores, statistics = Meteor()(*EPISODES)
    assert scores.tolist() == [meteor(r, ref) for r, ref in zip(RESPONSES, REFERENCES)]
    assert statistics["meteor"] is scores and scores[3] == 0 and 0 < scores[1] < 1


# --- Intent


@pytest.mark.parametrize("config", [{"intent_input": "pair"}, {}], ids=["pair", "one text"])
def test_intent_is_whether_the_judge_hears_the_act(judge_folder, config):
    folder = judge_folder(**config)
    intent = Intent(folder)
    intent.setup("cpu", "<EOU>")
    previous = [last_utterance(prompt, "<EOU>") for prompt in PROMPTS]
    judge = IntentJudge(folder)
    assert judge.as_pair == bool(config)
    heard = judge.acts(previous, RESPONSES)
    assert set(heard) <= {1, 2, 3, 4}
    # a reply's act does not depend on the other replies in the batch, nor on its size
    assert heard == [judge.acts([p], [r])[0] for p, r in zip(previous, RESPONSES)]
    assert heard == judge.acts(previous, RESPONSES, batch_size=3)
    hits, statistics = intent(PROMPTS, RESPONSES, REFERENCES, heard)
    assert hits.tolist() == [1, 1, 1, 0]  # the last reply is empty
    assert statistics["intent"].tolist() == hits.tolist()
    wrong = [act % 4 + 1 for act in heard]
    assert intent(PROMPTS, RESPONSES, REFERENCES, wrong).total.tolist() == [0, 0, 0, 0]


def test_a_judge_reads_as_much_of_a_pair_as_it_has_positions_for(judge_folder):
    judge = IntentJudge(judge_folder(intent_input="pair", max_position_embeddings=12))
    seen = []
    judge.model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    assert judge.acts([PROMPTS[0] * 5], [RESPONSES[0] * 5])[0] in (1, 2, 3, 4) and seen == [(1, 12)]


def test_a_judge_that_is_not_there_is_refused(tmp_path):
    for name, fault in ((tmp_path / "none", "does not exist"), (tmp_path, "without config.json")):
        with pytest.raises(UserError, match=f"intent model '{name}' .*{fault}"):
            IntentJudge(str(name))


def test_last_utterance():
    assert last_utterance("Hi .<EOU>How are you ? <EOU>", "<EOU>") == "How are you ? "
    assert last_utterance("a|b|", "|") == "b"
    written = Prompt.of("<|user|>a<|assistant|>", [{"role": "user", "content": "a"}])
    assert last_utterance(written, "") == "a" and written == "<|user|>a<|assistant|>"
    assert last_utterance(" <EOU>", "<EOU>") == last_utterance("", "<EOU>") == ""


def test_pairs_of_leaves_out_unlabelled_utterances():
    dialogue = SimpleNamespace(utterances=("a", "b", "c"), acts=(1, 0, 3))
    assert labelled_pairs([dialogue]) == [("", "a", 1), ("b", "c", 3)]


# --- The weighted sum


def test_default_reward_is_the_weighted_sum(judge_folder, no_wordnet):
    folder = judge_folder(intent_input="pair")
    reward = make_reward({"intent": 0.25, "meteor": 2.0}, {}, "cpu", "<EOU>", intent_model=folder)
    scores, statistics = score_episodes(reward, *EPISODES)
    intent, meteors = statistics["intent"], statistics["meteor"]
    assert scores == pytest.approx(0.25 * intent + 2.0 * meteors)
    assert statistics["reward_intent"] == pytest.approx(0.25 * intent)
    assert statistics["reward_meteor"] == pytest.approx(2.0 * meteors)
    assert isinstance(reward.judge, IntentJudge)
    alone = Intent(folder)
    alone.setup("cpu", "<EOU>")
    assert intent.tolist() == alone(*EPISODES).total.tolist()


def test_consensus_is_meteor_against_the_other_replies_to_the_prompt_and_commonplaces_cost(no_wordnet):
    prompts, references = ["a", "a", "a", "b", "b", "a"], ["x", "x", "x", "y", "y", "x"]
    responses = ["the cat sat", "the cat ran", "a dog", "The cat", "the cat", "the cat"]
    episodes = prompts, responses, references, [0] * 6

    def pair(i, j):
        return rewards.meteor(responses[i], responses[j])

    consensus, statistics = MBRConsensus()(*episodes)
    expected = [(pair(i, j) + pair(i, k)) / 2 for i, j, k in ((0, 1, 2), (1, 0, 2), (2, 0, 1))]
    assert consensus[:3] == pytest.approx(expected)
    assert consensus[0] > consensus[2] == 0  # two agree, the third shares nothing
    assert consensus[3] == consensus[4] == pair(3, 4) > 0.9
    assert consensus[5] == 0  # nothing in common with the others
    assert statistics["consensus"] is consensus
    price, statistics = CrossPromptOverlap()(*episodes)
    # "the cat" is in replies to other prompts, "cat sat" is not
    assert statistics["commonplace"].tolist() == (-price).tolist() == [0.5, 0.5, 0.0, 1.0, 1.0, 0.0]
    for part in (MBRConsensus(), CrossPromptOverlap()):
        assert not part(["a", "a"], ["one", ""], ["x", "x"], [0, 0]).total.any()  # no pairs, no matches

    weights = {"meteor": 0.5, "consensus": 2.0, "commonplace": 0.3}
    total, statistics = make_reward(weights, {}, "cpu", "<EOU>")(*episodes)
    assert total == pytest.approx(0.5 * statistics["meteor"] + 2 * consensus + 0.3 * price)
    assert statistics["reward_consensus"] == pytest.approx(2 * consensus)
    assert statistics["reward_commonplace"] == pytest.approx(0.3 * price)


def test_repetition_and_copying_cost_by_runs_of_three_words():
    prompts = ["May I see your passport ? <EOU>"] * 4
    responses = ["I'll go. I'll go!", "Yes , may I see yours ?", "may i see your passport", "Yes ."]
    repetition, copying = (make_reward({name: 2.0}, {}, "cpu", "<EOU>") for name in ("repetition", "copying"))
    episodes = prompts, responses, [""] * 4, [0] * 4
    total, statistics = repetition(*episodes)
    assert total.tolist() == [-2, 0, 0, 0] and statistics["repetition"].tolist() == [1, 0, 0, 0]
    total, statistics = copying(*episodes)
    assert statistics["copying"].tolist() == [0, 1 / 3, 1, 0] and total.tolist() == [0, -2 / 3, -2, 0]


def test_a_part_with_weight_0_is_measured_alone(no_wordnet):
    reward = make_reward({"meteor": 1.0, "commonplace": 0.0}, {}, "cpu", "<EOU>")
    assert reward.judge is None
    scores, statistics = reward(PROMPTS, RESPONSES, REFERENCES, [0, 0, 0, 0])  # no acts are needed
    assert scores == pytest.approx(statistics["meteor"])
    assert set(statistics) == {"meteor", "reward_meteor", "commonplace"}


# --- Rewards of one's own

OWN = """
import numpy as np
from rewards import Reward


class Polite(Reward):
    def __init__(self, word="please"):
        self.word = word

    def __call__(self, prompts, responses, references, acts):
        polite = np.array([float(self.word in r.lower()) for r in responses])
        return polite, {"polite": polite}


def brevity(prompts, responses, references, acts, scale=1.0):
    return [scale / (1 + len(r.split())) for r in responses]

"""


@pytest.fixture
def own_file(tmp_path, monkeypatch):
    """A user's file in the working directory, outside the repository. Its import is undone afterwards."""
    file = tmp_path / "my_own_rewards.py"
    file.write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    known = set(sys.modules)
    yield file
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and sys.modules[name].__file__.startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize("where", ["my_own_rewards.py", "my_own_rewards", "{folder}/my_own_rewards.py"])
def test_own_class_and_function_by_path(own_file, where):
    where = where.format(folder=own_file.parent)
    replies = ["Please go on .", "No"]
    polite = make_reward({f"{where}:Polite": 1}, {}, "cpu", "<END>")
    assert isinstance(polite, Reward) and (polite.device, polite.eou_marker) == ("cpu", "<END>")
    scores, statistics = score_episodes(polite, ["", ""], replies, ["", ""], [0, 0])
    assert scores.tolist() == statistics["polite"].tolist() == [1, 0]
    curt = make_reward({f"{where}:Polite": 1}, {"word": "no"}, "cpu", "<EOU>")
    assert score_episodes(curt, ["", ""], replies, ["", ""], [0, 0]).total.tolist() == [0, 1]
    brevity = make_reward({f"{where}:brevity": 1}, {"scale": 10}, "cpu", "<EOU>")
    scores, statistics = score_episodes(brevity, ["", ""], replies, ["", ""], [0, 0])
    assert scores.tolist() == statistics["brevity"].tolist() == statistics["reward_brevity"].tolist() == [2, 5]


@pytest.mark.parametrize(
    "name, args, fault",
    [
        ("my_own_rewards:polite", {}, "defines no 'polite'.*Did you mean 'Polite'"),
        ("my_own_rewards.py:Polit", {}, "defines no 'Polit'.*Did you mean 'Polite'"),
        ("my_own_reward:Polite", {}, "no module 'my_own_reward' can be imported from"),
        ("my_own_rewards.Sub:Polite", {}, "no module 'my_own_rewards.Sub' can be imported from"),
        ("other.py:Polite", {}, "there is no file 'other.py'"),
        ("my_own_rewards:", {}, "expected an import path 'module:Name'"),
        (":Polite", {}, "expected an import path 'module:Name'"),
        ("my_own_rewards:Polite", {"wrod": 1}, r"cannot be made from reward_args \{'wrod': 1\}: .*wrod"),
        ("meteor", {"wrod": 1}, "no part of the reward is your own"),
        ("my_own_rewards:brevity", {"scael": 1}, "reward_args .*scael"),
    ],
)
def test_rewards_that_cannot_be_made(own_file, name, args, fault):
    with pytest.raises(UserError, match=fault):
        make_reward({name: 1}, args, "cpu", "<EOU>")


def test_a_missing_import_in_the_users_file_is_no_missing_file(own_file):
    own_file.write_text("import not_installed_anywhere\n")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        make_reward({"my_own_rewards:Polite": 1}, {}, "cpu", "<EOU>")


def test_a_users_file_that_ends_the_process_is_a_sentence(own_file):
    own_file.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(UserError, match="cannot be run: SystemExit: 3"):
        make_reward({f"{own_file}:Polite": 1}, {}, "cpu", "<EOU>")


def test_the_users_file_may_be_called_rewards(own_file, monkeypatch):
    monkeypatch.setitem(sys.modules, "rewards", rewards)  # put back afterwards
    (own_file.parent / "rewards.py").write_text(OWN)
    reward = make_reward({"rewards.py:Polite": 1}, {}, "cpu", "<EOU>")
    assert isinstance(reward, Reward) and sys.modules["rewards"] is rewards


def test_registered_rewards(monkeypatch):
    monkeypatch.setattr(rewards, "REWARDS", dict(REWARDS))

    @register_reward("CustomReward")
    class Custom(Reward):
        def __call__(self, prompts, responses, references, acts):
            return np.ones(len(responses)), {}

    @register_reward("length")
    def length(prompts, responses, references, acts):
        return torch.tensor([len(r) for r in responses]), {"one": 1}

    assert isinstance(make_reward({"CustomReward": 1}, {}, "cpu", "<EOU>").parts["CustomReward"][1], Custom)
    scores, statistics = score_episodes(make_reward({"length": 1}, {}, "cpu", "<EOU>"), *EPISODES)
    assert scores.tolist() == [len(r) for r in RESPONSES] and scores.dtype == np.float64
    assert statistics["one"].tolist() == [1, 1, 1, 1]
    with pytest.raises(UserError, match="expected CustomReward, commonplace, .*Did you mean 'CustomReward'"):
        make_reward({"CustomRewards": 1}, {}, "cpu", "<EOU>")


def test_an_object_without_setup_will_do(own_file):
    own_file.write_text("class Bare:\n    def __call__(self, *episodes):\n        return [1], {}\n")
    bare = make_reward({"my_own_rewards:Bare": 1}, {}, "cpu", "")
    assert score_episodes(bare, [""], ["a"], [""], [0]).total.tolist() == [1]


@pytest.mark.parametrize(
    "value, fault",
    [
        (([1.0, 2.0], {}), r"scores of shape \(2,\) for 4 replies"),
        ((1.0, {}), r"scores of shape \(\) for 4 replies"),
        ((np.zeros((4, 1)), {}), r"scores of shape \(4, 1\) for 4 replies"),
        (([0, 1, float("nan"), 0], {}), "gave nan for the reply 'Could I have a table"),
        (([0, float("inf"), 0, 0], {}), "gave inf for the reply 'It is six"),
        (np.zeros(3), r"scores of shape \(3,\) for 4 replies"),
        ((np.zeros(4), np.zeros(4)), "gave 2 values for 4 replies"),
        ((np.zeros(4), None), "gave 2 values for 4 replies"),
        ((x for x in (1, 2, 3, 4)), "number"),
        (None, "returned nothing; expected .* scores and statistics"),
        ({"one": [1, 2, 3, 4]}, "returned a dict; expected .* scores and statistics"),
        ("1234", "returned a str; expected .* scores and statistics"),
        (([0, 1, "x", 0], {}), "number"),
        ((np.zeros(4), {"odd": [1, 2]}), "odd"),
    ],
)
def test_scores_that_cannot_be_used(value, fault):
    with pytest.raises(UserError, match=fault):
        score_episodes(lambda *episode: value, *EPISODES)


@pytest.mark.parametrize(
    "value",
    [
        [0.25, 0.5],
        (0.25, 0.5),  # two numbers, no scores with statistics
        np.array([0.25, 0.5]),
        torch.tensor([0.25, 0.5], requires_grad=True),
        torch.tensor([0.25, 0.5], dtype=torch.bfloat16),
        [torch.tensor(0.25, requires_grad=True), torch.tensor([0.5])],
        ([0.25, 0.5], {}),
        [torch.tensor([0.25, 0.5]), {}],
    ],
)
@pytest.mark.parametrize("kind", ["class", "function"])
def test_scores_alone_will_do_in_any_form(kind, value, monkeypatch):
    class Own(Reward):
        def __call__(self, prompts, responses, references, acts):
            return value

    own = Own if kind == "class" else lambda prompts, responses, references, acts: value
    monkeypatch.setitem(REWARDS, "own", own)
    reward = make_reward({"own": 1}, {}, "cpu", "<EOU>")
    scores, statistics = score_episodes(reward, PROMPTS[:2], RESPONSES[:2], REFERENCES[:2], ACTS[:2])
    assert scores.dtype == np.float64 and scores.tolist() == [0.25, 0.5]
    assert {name: values.tolist() for name, values in statistics.items()} == dict.fromkeys(
        ("own", "reward_own"), [0.25, 0.5]
    )


def test_a_reward_reads_as_documented():
    assert re.search(r"class Politeness\(Reward\)", rewards.__doc__)


# --- The KL penalty


@pytest.mark.parametrize(
    "kl, coef",
    [
        (0.1, 0.2 * (1 + 0.1 * 0.2)),  # twice the target: an error of 1, clipped to 0.2
        (0.051, 0.2 * (1 + 0.1 * 0.02)),
        (0.05, 0.2),
        (0.045, 0.2 * (1 - 0.1 * 0.1)),
        (0.0, 0.2 * (1 - 0.1 * 0.2)),
        (-3.0, 0.2 * (1 - 0.1 * 0.2)),  # a sample of the divergence may be negative
    ],
)
def test_adaptive_kl_by_hand(kl, coef):
    controller = AdaptiveKL(coef=0.2, target=0.05, rate=0.1, clip=0.2)
    controller.update(kl)
    assert controller.coef == pytest.approx(coef, rel=1e-12)


def test_adaptive_kl_over_rollouts():
    controller = AdaptiveKL()
    for _ in range(10):
        controller.update(1.0)
    assert controller.coef == pytest.approx(0.2 * 1.02**10)
    for _ in range(10):
        controller.update(0.0)
    assert controller.coef == pytest.approx(0.2 * 1.02**10 * 0.98**10)
    fixed, none = AdaptiveKL(rate=0.0), AdaptiveKL(coef=0.0)
    fixed.update(9.0), none.update(9.0)
    assert (fixed.coef, none.coef) == (0.2, 0.0)


def test_token_kl_by_hand_and_0_where_masked():
    logprobs = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, -9.0, -9.0]])
    reference = torch.tensor([[-1.5, -1.0, -3.0], [-1.0, -1.0, -1.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert token_kl(logprobs, reference, mask).tolist() == [[0.5, -1.0, 0.0], [0.5, 0.0, 0.0]]


def test_token_kl_is_the_divergence_on_average():
    torch.manual_seed(0)
    policy, reference = torch.randn(5).log_softmax(-1), torch.randn(5).log_softmax(-1)
    tokens = torch.multinomial(policy.exp(), 200_000, replacement=True)
    kl = token_kl(policy[tokens], reference[tokens], torch.ones(200_000))
    exact = (policy.exp() * (policy - reference)).sum()
    assert kl.mean().item() == pytest.approx(exact.item(), rel=0.02)


def test_the_length_penalty_removes_the_reward_of_length_itself():
    lengths = torch.tensor([3, 5, 10, 8, 12, 10])
    of_prompt = torch.tensor([1.0, 1.0, 1.0, 7.0, 7.0, 7.0])  # independent of length
    scores = of_prompt + 0.25 * lengths
    net = scores - LengthController(1.0, start=8.0).penalty(lengths, scores, 3)
    assert net.view(2, 3).std(-1).tolist() == pytest.approx([0, 0], abs=1e-6)
    random = torch.randn(6, generator=torch.Generator().manual_seed(0))
    net = random - LengthController(1.0, start=8.0).penalty(lengths, random, 3)
    apart = [(x.view(2, 3) - x.view(2, 3).mean(-1, keepdim=True)).flatten() for x in (net, lengths.float())]
    assert apart[0] @ apart[1] == pytest.approx(0, abs=1e-5) and not torch.allclose(net, random)
    same = torch.tensor([4, 4])
    assert not LengthController(1.0, start=8.0).penalty(same, torch.tensor([0.0, 1.0])).any()  # lengths do not differ
    # the sums of two processes give the penalty of one
    halves = []
    LengthController(1.0, start=8.0).penalty(lengths[:3], random[:3], 3, lambda x: halves.append(x) or x)
    penalty = LengthController(1.0, start=8.0).penalty(lengths[3:], random[3:], 3, lambda x: x + halves[0])
    assert torch.allclose(penalty, LengthController(1.0, start=8.0).penalty(lengths, random, 3)[3:])


def test_the_length_penalty_keeps_the_mean_at_its_target():
    controller = LengthController(rate=2.0, start=12.0)

    def of(length):
        return controller.penalty(torch.tensor([length]), torch.tensor([1.0])).item()

    controller.update(12.0)
    assert of(3) == of(20) == 0
    # a policy whose replies grow by themselves, and grow more slowly under a larger penalty
    length, lengths = 12.0, []
    for _ in range(40):
        length += 0.1 - 2 * controller.correction
        controller.update(length)
        lengths.append(length)
    assert max(lengths) < 13 and max(lengths[20:]) - min(lengths[20:]) < 0.1  # no oscillation
    assert of(24) == pytest.approx(controller.correction) and controller.correction > 0
    for _ in range(40):  # and replies that shrink by themselves: then the penalty is negative
        length += -0.1 - 2 * controller.correction
        controller.update(length)
    assert 11 < length < 12 and controller.correction < 0
    given = LengthController(rate=0.5, ratio=1.25, start=8.0)
    given.update(12.0)
    assert given.target == 10 and given.correction == pytest.approx(0.4 * 0.5 * 0.2)
