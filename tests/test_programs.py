"""The programs as a user runs them, on the built-in corpus: train, read the results, use own parts."""

import atexit
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from functools import cache
from pathlib import Path
from unittest import mock

import forked
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ppo_dialog import PPOConfig, train
from support.builtin import builtin_model
from support.builtin_corpus import generate_corpus
from support.config import load_yaml
from support.errors import UserError, import_path
from support.metric_names import LABELS

ROOT = Path(__file__).parents[1]
SHORT = dict(total_time_steps=1500, env_num=32, num_mini_batch=2, eval_limit=40, judge_samples=100)


def run(*command: str, cwd: Path = ROOT, **options) -> subprocess.CompletedProcess:
    start = forked.run if command[0] == sys.executable else subprocess.run
    return start(command, cwd=cwd, capture_output=True, text=True, timeout=900, **options)


def flags(**settings) -> list[str]:
    return [part for k, v in settings.items() for part in (f"--{k.replace('_', '-')}", str(v))]


def trained(report: bool = False, **settings) -> Path:
    """Call `train` in this process. The report takes as long as the rest of a short run, so it is left out."""
    with contextlib.nullcontext() if report else mock.patch("ppo_dialog.show_results"):
        return train(PPOConfig(**SHORT | settings))


def write_corpus(folder: Path, train: int, others: int) -> None:
    """Write the first of the built-in dialogues, so many of the training split and of each other split."""
    corpus = generate_corpus()
    for split, n in (("train", train), ("validation", others), ("test", others)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus[split][:n]))


@cache
def small_corpus() -> str:
    """A folder with a few of the built-in dialogues: to make samples of all takes longer than a short run."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, True)
    write_corpus(folder, 200, 40)
    return str(folder)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def timeless(rows: list[dict]) -> list[dict]:
    """Remove the metrics that depend on the machine's speed and on what else the process has loaded."""
    moving = ("fps", "rollout_s", "scoring_s", "update_s", "peak_memory_mb")
    return [{k: v for k, v in row.items() if k not in moving} for row in rows]


@pytest.fixture(scope="session")
def first_run(tmp_path_factory) -> tuple[Path, str]:
    """`accelerate launch ppo_dialog.py`, shortened: the run's folder and what was printed."""
    runs = tmp_path_factory.mktemp("runs")
    command = ["accelerate", "launch", "ppo_dialog.py", *flags(run_dir=runs, **SHORT)]
    result = run(*command, env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert result.returncode == 0, result.stderr[-3000:]
    return runs / "ppo_dialog", result.stdout + result.stderr


def test_the_first_command_shows_progress_and_ends_with_the_table(first_run):
    folder, printed = first_run
    assert re.search(r"judge: right on (0\.9|1\.0)", printed)
    assert "update   1  steps" in printed and "tokens/s" in printed and "peak memory" in printed
    assert len(re.findall(r"^update +\d+  steps ", printed, re.M)) == len(lines(folder)) and "\x1b" not in printed
    for row in ("ROUGE-1", "ROUGE-Lsum", "METEOR", "SacreBLEU", "intent", "mean output length"):
        assert row in printed
    assert "test reward:" in printed and "python chat.py" in printed
    assert "Warning" not in printed and "WARNING" not in printed and not (folder / "warnings.jsonl").exists()


def test_what_a_run_leaves_behind(first_run):
    folder, _ = first_run
    rows = lines(folder)
    assert [row["update"] for row in rows] == list(range(1, len(rows) + 1))
    wanted = (
        "fps episode_reward intent meteor kl_div alpha approx_kl clipfrac entropy policy_loss value_loss "
        "explained_variance mean_output_length lr critic_lr rollout_s scoring_s update_s peak_memory_mb "
        "share_intent share_meteor share_kl"
    )
    assert set(wanted.split()) <= set(rows[0])
    assert rows[-1]["env_steps"] >= SHORT["total_time_steps"] > rows[-2]["env_steps"]
    assert sum(rows[0][f"share_{part}"] for part in ("intent", "meteor", "kl")) == pytest.approx(1, abs=1e-5)
    assert rows[-1]["share_kl"] > 0  # the penalty counts once the policy has moved

    result = json.loads((folder / "eval.json").read_text())
    for part in ("policy", "baseline", "difference"):
        assert list(result[part]) == [name for name in LABELS if name != "intent_second_judge"]
    assert result["reward"]["standard_error"] > 0 and result["settings"]["samples"] == 40

    files = {p.name for p in (folder / "policy").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "dialogue_format.json"} <= files
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    start = AutoModelForCausalLM.from_pretrained(builtin_model("policy"))
    moved = [not torch.equal(a, b) for a, b in zip(model.parameters(), start.parameters())]
    assert all(moved)  # every weight was trained
    assert AutoTokenizer.from_pretrained(folder / "policy")("Hi.<EOU>").input_ids[-1] == 2
    assert set(load_file(folder / "value.safetensors")) == {"value_head.weight", "value_head.bias"}


def test_config_yaml_repeats_the_run_to_the_digit(first_run, tmp_path):
    folder, _ = first_run
    values, notes = load_yaml(PPOConfig, str(folder / "config.yaml"))
    assert notes == [] and PPOConfig(**values).env_num == 32
    # in a separate process, as the first: the number of threads changes the last digits of a sum
    command = [sys.executable, "ppo_dialog.py", "--config", str(folder / "config.yaml"), "--run-dir", str(tmp_path)]
    assert run(*command, "--eval-limit", "-1").returncode == 0
    assert timeless(lines(tmp_path / "ppo_dialog")) == timeless(lines(folder))
    again, first = (load_file(f / "policy" / "model.safetensors") for f in (tmp_path / "ppo_dialog", folder))
    assert all(torch.equal(again[k], first[k]) for k in first)


def test_each_run_of_a_process_has_its_own_precision_and_is_as_the_first(tmp_path):
    """Other settings, mistakes and failed runs in between leave nothing behind, as in a notebook."""
    short = dict(run_dir=str(tmp_path), total_time_steps=1, env_num=8, eval_limit=-1, validation_limit=0)
    short |= dict(intent_coef=0.0)
    half = short | dict(mixed_precision="bf16", micro_batch_tokens=300)

    def made(**settings) -> dict:
        environment = dict(os.environ)
        folder = trained(**settings)
        assert os.environ == environment
        return load_file(folder / "policy" / "model.safetensors") | {"rows": timeless(lines(folder))}

    first = made(experiment_name="first", **half)
    for name, value, said in (("stats", "absent:x", "absent"), ("mixed_precision", "fp16", "fp16"), ("lr", -1, "lr")):
        with pytest.raises(UserError, match=said):
            trained(**short | {name: value})
    accelerator = Accelerator(mixed_precision="no")  # the caller's own
    other = made(experiment_name="other", **short)
    again = made(experiment_name="first", **half)  # the lock of its folder is free again
    assert accelerator.mixed_precision == "no" and accelerator.gradient_accumulation_steps == 1
    assert all(torch.equal(first[n], again[n]) for n in first if n != "rows") and first["rows"] == again["rows"]
    assert not all(torch.equal(first[n], other[n]) for n in first if n != "rows")


@pytest.mark.slow
def test_reinforcement_after_supervised_training_in_one_process_is_as_in_a_fresh_one(tmp_path):
    short = flags(total_time_steps=200, env_num=8, eval_limit=-1, validation_limit=0, intent_coef=0.0, run_dir=tmp_path)
    code = """
        import os, sys
        from support.libraries import quiet_libraries
        from support.config import parse_config
        from ppo_dialog import PPOConfig, train
        from sft_dialog import SFTConfig, train_sft

        quiet_libraries()
        *ppo, both = sys.argv[1:]
        sft = SFTConfig(model_path="builtin", output_dir=both, mixed_precision="no", max_minutes=0.02)
        half = parse_config(PPOConfig, [*ppo, "--mixed-precision", "bf16"], "")[0]
        if os.path.basename(both) == "both":
            train(parse_config(PPOConfig, [*ppo, "--mixed-precision", "no"], "")[0])
            train_sft(sft)
        train(half)
    """
    script = tmp_path / "trains.py"
    script.write_text(textwrap.dedent(code))
    rows = []
    for name in ("both", "alone"):
        settings = [*short, "--experiment-name", name, str(tmp_path / "models" / name)]
        done = run(sys.executable, str(script), *settings)
        assert done.returncode == 0, done.stderr[-3000:]
        rows.append(timeless(lines(tmp_path / name)))
    assert rows[0] == rows[1] and rows[0]


def test_a_second_run_of_the_same_name_keeps_the_first(tmp_path, capsys):
    settings = dict(run_dir=str(tmp_path), total_time_steps=200, eval_limit=-1)
    trained(**settings)
    (tmp_path / "ppo_dialog" / "my_notes.txt").write_text("mine")
    trained(**settings)
    assert (tmp_path / "ppo_dialog-1" / "my_notes.txt").read_text() == "mine"
    assert (tmp_path / "ppo_dialog" / "metrics.jsonl").exists()
    assert "kept as" in capsys.readouterr().out


OWN_PARTS = """
    from ppo_dialog import ActorCritic, load_causal_lm
    from rewards import Reward
    from support.builtin import resolve_model

    class Brevity(Reward):
        def __call__(self, prompts, responses, references, acts):
            assert len(prompts) == len(acts) and all(p.endswith(self.eou_marker) for p in prompts)
            return [1 / (1 + len(r.split())) for r in responses]

    class Shared(ActorCritic):
        def __init__(self, config):
            super().__init__(load_causal_lm(resolve_model(config.model_path)))
"""


def test_own_reward_and_own_model_of_policy_and_value(tmp_path):
    """test_examples.py has separate networks, statistics and arguments of a reward."""
    own = tmp_path / "own_parts.py"
    own.write_text(textwrap.dedent(OWN_PARTS))
    own_parts = dict(reward=f"{own}:Brevity", model_class=f"{own}:Shared")
    folder = trained(**own_parts, run_dir=str(tmp_path), eval_limit=-1)
    assert 0 < lines(folder)[-1]["score"] < 1 and "intent" not in lines(folder)[-1]
    assert (folder / "policy" / "model.safetensors").exists()


def test_two_models_accumulation_sampling_and_bf16_together(tmp_path):
    settings = dict(
        run_dir=str(tmp_path), use_share_model=False, mixed_precision="auto", track=("tensorboard",), eval_limit=-1
    )
    settings |= dict(micro_batch_tokens=300, top_k=20, temperature=0.9, entropy_coef=0.01, lr=1e-6)
    # one update: bf16 is slow where the hardware lacks it
    folder = trained(total_time_steps=600, episode_length=40, **settings)
    rows = lines(folder)
    # at this learning rate only bf16's rounding separates the sampled from the recomputed probabilities
    assert rows[0]["approx_kl"] < 1e-3 and rows[0]["episodes"] == 64
    assert "critic.value_head.weight" in load_file(folder / "value.safetensors")
    assert list(folder.rglob("events.out.tfevents*"))


def test_a_longer_run_raises_the_reward(tmp_path):
    """A cheap test of learning: brevity is easy to reward, and replies get shorter."""
    own = tmp_path / "short.py"
    own.write_text("def brevity(prompts, responses, references, acts):\n    return [-len(r) / 50 for r in responses]\n")
    settings = dict(kl_coef=0.0, total_time_steps=6000, lr=5e-4, eval_limit=-1)
    folder = trained(run_dir=str(tmp_path), reward=f"{own}:brevity", **settings)
    rows = lines(folder)
    first, last = (sum(r["score"] for r in part) / len(part) for part in (rows[:3], rows[-3:]))
    assert last > first + 0.1 and rows[-1]["mean_output_length"] < 0.7 * rows[0]["mean_output_length"]


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        (["ppo_dialog.py", "--env-num", "0"], "env_num is 0"),
        (["sft_dialog.py", "--model-path", "not-on-the-hub"], "neither a folder on this machine nor a model"),
    ],
)
def test_mistakes_end_in_a_sentence_and_status_2(arguments, sentence, tmp_path):
    result = run(sys.executable, *arguments, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert result.returncode == 2, result.stderr
    assert sentence in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("from words import words", "What 'words' held is in support.words now."),
        ("from envs import load_dialogues", "What 'envs' held is in support.data and support.text now."),
    ],
)
def test_a_file_that_imports_from_where_something_was_is_told_where_it_is(line, place, tmp_path):
    (tmp_path / "own_reward.py").write_text(f"{line}\n\ndef reward(*args):\n    return []\n")
    with pytest.raises(UserError, match=re.escape(place)):
        import_path(f"{tmp_path / 'own_reward.py'}:reward", "reward")
