"""The files in examples/, run as a user runs them: by the commands in their docstrings, with tiny sizes."""

import csv
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
import yaml
from safetensors.torch import load_file

from ppo_dialog import PPOConfig
from support.builtin import builtin_model
from support.config import load_yaml, parse_config
from support.errors import UserError, import_path

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TINY = "--total-time-steps 300 --env-num 16 --eval-limit 8 --validation-limit 0 --judge-samples 20".split()


def run(*command: object, status: int = 0) -> str:
    """What `python COMMAND` prints, from the repository root."""
    done = forked.run(
        [sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=900, env=os.environ
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout + done.stderr


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.py")), ids=lambda f: f.stem)
def test_an_example_is_short_and_tells_its_command(file):
    text = file.read_text()
    assert len(text.splitlines()) <= 60
    assert text.startswith('"""') and f"examples/{file.name}" in text.split('"""')[1]


def test_reward_networks_and_statistics_in_one_run(tmp_path):
    hooks = {
        "--reward": "custom_reward.py:CuriousAndPolite",
        "--policy-class": "custom_network.py:last_layers",
        "--critic-class": "custom_network.py:RecurrentCritic",
        "--stats": "custom_stats.py:Variety",
    }
    options = [part for option, name in hooks.items() for part in (option, f"examples/{name}")]
    run("ppo_dialog.py", *options, "--reward-args", "polite=0.25", "curious=2", *TINY, "--run-dir", tmp_path)
    folder = tmp_path / "ppo_dialog"
    for row in lines(folder):
        assert row["score"] == pytest.approx(2 * row["question"] + 0.25 * row["polite"], abs=1e-5)
        assert row["reward_polite"] == pytest.approx(0.25 * row["polite"], abs=1e-6) and 0 < row["share_question"] < 1
        assert 0 < row["different_replies"] <= 1 and row["best_reply_words"] >= 1
        assert row["score_per_token"] == pytest.approx(row["score"] / row["mean_output_length"])
    kept = yaml.safe_load((folder / "config.yaml").read_text())
    assert kept["reward_args"] == {"polite": 0.25, "curious": 2}

    critic = load_file(folder / "value.safetensors")
    assert {name.split(".")[1] for name in critic} == {"embedding", "memory", "head"}
    start, result = (load_file(f / "model.safetensors") for f in (Path(builtin_model("policy")), folder / "policy"))
    moved = {name for name in result if not torch.equal(start[name], result[name])}
    last = max(int(name.split(".")[2]) for name in result if ".h." in name)
    assert moved and all(name.startswith((f"transformer.h.{last}.", "transformer.ln_f.")) for name in moved)


def test_the_critic_does_not_see_padding():
    config = PPOConfig(model_path=str(builtin_model("policy")))
    critic = import_path(f"{EXAMPLES / 'custom_network.py'}:RecurrentCritic", "critic_class")(config)
    torch.nn.init.normal_(critic.head.weight)
    ids = torch.randint(3, 400, (1, 6))
    alone = critic(ids, torch.ones_like(ids), None)
    wide = torch.cat([torch.zeros(1, 2, dtype=torch.long), ids, torch.zeros(1, 3, dtype=torch.long)], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]])
    assert torch.allclose(critic(wide, mask, None)[:, 2:8], alone, atol=1e-6)


def test_a_label_that_the_classifier_lacks_is_named():
    reward = import_path(f"{EXAMPLES / 'custom_reward.py'}:CuriousAndPolite", "reward")(label="joy")
    with pytest.raises(UserError, match="'joy' is none of the classifier's; expected one of commissive, directive"):
        reward.setup("cpu", "<EOU>")


@pytest.mark.slow
def test_from_a_csv_of_chats_to_a_reply(tmp_path):
    said = run("examples/own_dataset.py", "examples/chats.csv", "--output", tmp_path, *TINY)
    assert said.split("\n== chat.py ")[1].splitlines()[1].strip()  # the reply, after the command
    with open(EXAMPLES / "chats.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    splits = {s: (tmp_path / "data" / f"{s}.jsonl").read_text().splitlines() for s in ("train", "validation", "test")}
    assert sum(map(len, splits.values())) == len({row["conversation_id"] for row in rows})
    dialogues = [json.loads(line)["dialog"] for part in splits.values() for line in part]
    assert all(len(d) == 6 for d in dialogues)  # two messages of seven are one customer's, in a row
    assert "Hi. Can you repair" in dialogues[0][1]

    looks = json.loads(next(tmp_path.glob("sft-*/sft.json")).read_text())["history"]
    assert min(look["perplexity"] for look in looks) < 3 < looks[0]["perplexity"]  # it learned them
    assert len(lines(tmp_path / "ppo")) >= 1 and (tmp_path / "ppo" / "eval.json").exists()


@pytest.mark.parametrize(
    "options, folder",
    [
        ([], "{out}/ppo"),
        (["--experiment-name", "own"], "{out}/own"),
        (["--experiment_name=own"], "{out}/own"),
        (["--run-dir", "elsewhere", "--experiment-name", "own", "--lr", "1e-5"], "elsewhere/own"),
        (["--run_dir=elsewhere"], "elsewhere/ppo"),
        (["--config", "other.yaml"], "{out}/ppo"),  # whatever name and folder the file gives
    ],
)
def test_the_chat_is_with_the_run_that_was_made(options, folder, tmp_path, monkeypatch):
    made, status = [], {}

    def called(command, **_):
        made.append(command[1:])
        return subprocess.CompletedProcess(command, status.get(command[1], 0))

    monkeypatch.setattr(subprocess, "run", called)
    argv = ["examples/own_dataset.py", str(EXAMPLES / "chats.csv"), "--output", str(tmp_path / "out"), *options]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(EXAMPLES / "own_dataset.py"), run_name="__main__")
    sft, ppo, chat = made
    config, _ = parse_config(PPOConfig, [o for o in ppo[1:] if o not in ("--config", "other.yaml")], "")
    expected = Path(folder.format(out=tmp_path / "out"))
    assert chat[:2] == ["chat.py", str(expected)] and config.run_folder == expected
    made.clear()
    status["ppo_dialog.py"] = 2  # a training that fails
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / "own_dataset.py"), run_name="__main__")
    assert ended.value.code == 2 and [command[0] for command in made] == ["sft_dialog.py", "ppo_dialog.py"]


def test_a_chat_that_occurs_twice_is_in_one_split(tmp_path):
    rows = [f"{i},{speaker},{text} {i % 20}\n" for i in range(60) for speaker, text in (("a", "Hi"), ("b", "Hello"))]
    (tmp_path / "mine.csv").write_text("conversation_id,speaker,text\n" + "".join(rows))
    convert = runpy.run_path(str(EXAMPLES / "own_dataset.py"))["convert"]
    convert(str(tmp_path / "mine.csv"), tmp_path / "data")
    splits = [(tmp_path / "data" / f"{s}.jsonl").read_text().splitlines() for s in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [16, 2, 2] and len(set(sum(splits, []))) == 20


def test_a_csv_without_the_columns_is_refused_in_a_sentence(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("id,text\n1,Hello\n")
    said = run("examples/own_dataset.py", file, "--output", tmp_path, status=1)
    assert "has no column conversation_id and no speaker; it has ['id', 'text']" in said and "Traceback" not in said


@pytest.mark.slow
def test_the_tutorials_file_trains_where_models_and_data_are_at_hand(tmp_path):
    here = {"--model-path": "builtin", "--data-path": "builtin", "--intent-model": "builtin", "--ref-model": ""}
    here |= {"--tokenizer-path": "", "--run-dir": tmp_path, "--lr": "1e-6"}
    said = run(
        "ppo_dialog.py", "--config", EXAMPLES / "openrl_config.yaml", *TINY, *(x for o in here.items() for x in o)
    )
    assert "use_recurrent_policy" in said and "has no meaning here" in said
    values, _ = load_yaml(PPOConfig, str(tmp_path / "train_nlp" / "config.yaml"))
    assert values["ppo_epoch"] == 5 and values["num_mini_batch"] == 20 and lines(tmp_path / "train_nlp")
