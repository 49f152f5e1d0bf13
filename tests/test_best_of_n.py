"""Best of n, by reproduce/best_of_n.py: preferences that supervised training reads."""

import json

import numpy as np
import pytest

from reproduce.best_of_n import BestOfNConfig, make_preferences, with_blanks_of
from rewards import make_reward
from sft_dialog import SFTConfig, train_sft
from support.data import load_splits
from support.errors import UserError


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """A file of the best and the worst of four replies to 40 built-in prompts, by METEOR."""
    file = tmp_path_factory.mktemp("best") / "best.jsonl"
    written = make_preferences(
        BestOfNConfig(model_path="builtin", output=str(file), reward={"meteor": 1.0}, n=4, prompts=40)
    )
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == written and 20 < written <= 40
    return file, rows


def test_the_chosen_reply_has_more_reward_than_the_rejected_one(best):
    dialogues = load_splits("builtin", ["train"])["train"]
    reward = make_reward({"meteor": 1.0}, {}, "cpu", "<EOU>")
    scores = []
    for row in best[1]:
        context = [message["content"] for message in row["prompt"]]
        utterances = list(dialogues[row["dialogue"]].utterances)
        at = next(i for i in range(len(utterances)) if utterances[:i][-len(context) :] == context)
        replies = [row[side][0]["content"] for side in ("chosen", "rejected")]
        scores.append(reward([""] * 2, replies, [utterances[at]] * 2, [0] * 2).total)
    chosen, rejected = np.array(scores).T
    assert (chosen >= rejected).all() and chosen.mean() > rejected.mean() + 0.2


def test_supervised_training_learns_the_chosen_replies(best, tmp_path, capsys):
    output = tmp_path / "model"
    train_sft(
        SFTConfig(
            model_path="builtin", data_path=str(best[0]), output_dir=str(output), loss_on="reply", epochs=8, lr=1e-3
        )
    )
    assert "the chosen ones are the replies" in capsys.readouterr().out
    history = json.loads((output / "sft.json").read_text())["history"]
    assert history[-1]["loss"] < history[0]["loss"]


def test_a_reply_gets_the_blanks_of_the_human_one():
    """DailyDialog has a blank at both ends of most utterances. Without them a model reads another first token."""
    assert with_blanks_of(" I see . I see . ", "No .") == " No . "
    assert with_blanks_of("I see.", "No.") == "No."
    assert with_blanks_of("", "No.") == "No."


def test_mistakes_are_sentences(tmp_path):
    for changes, sentence in (
        (dict(n=1), "n is 1"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(data_path="./no_such_file.jsonl"), "no_such_file.jsonl"),
        (dict(output=str(tmp_path)), "cannot be written"),
    ):
        with pytest.raises(UserError, match=sentence):
            BestOfNConfig(model_path="builtin", **changes).check()


def test_a_reward_that_the_data_cannot_give_is_said_before_sampling(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Is it {i}?"}) + "\n" for i in range(40)))
    for name, missing in (("meteor", "human replies"), ("intent", "dialogue acts")):
        with pytest.raises(UserError, match=f"has no {missing}; give a reward without {name}"):
            make_preferences(BestOfNConfig(model_path="builtin", data_path=str(prompts), reward={name: 1.0}))


def test_a_reward_of_ones_own_chooses_among_replies_to_prompts_alone(tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "new" / "best.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Hello, is it {i}?"}) + "\n" for i in range(40)))
    own = tmp_path / "own.py"
    own.write_text("def short(prompts, responses, references, acts):\n    return [-float(len(r)) for r in responses]\n")
    options = dict(data_path=str(prompts), output=str(output), reward={f"{own}:short": 1.0}, n=3, prompts=12)
    make_preferences(BestOfNConfig(model_path="builtin", **options))
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    sizes = [[len(row[side][0]["content"]) for side in ("chosen", "rejected")] for row in rows]
    assert sizes and all(chosen < rejected for chosen, rejected in sizes)
