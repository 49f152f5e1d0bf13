"""sweep.py: what it plans and refuses, and real sweeps of the built-in models: beside each other, stopped, by Slurm."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_examples import TINY, lines

from ppo_config import PPOConfig
from support.config import parse_config
from support.errors import UserError
from sweep import SweepConfig, parse_sweep, places_of, plan

ROOT = Path(__file__).parents[1]


def sweep(*options: object, **how) -> subprocess.Popen:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    return subprocess.Popen([sys.executable, "sweep.py", *map(str, options)], cwd=ROOT, **pipes | how)


def said(process: subprocess.Popen, status: int = 0) -> str:
    printed = process.communicate(timeout=900)[0]
    assert process.returncode == status, printed[-3000:]
    return printed


def test_every_combination_is_a_setting_and_each_seed_makes_the_round(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("plain:\nfirm: {kl_coef: 0.4, gradient_checkpointing: true, reward: {intent: 1, meteor: 2}}\n")
    config = SweepConfig(
        grid=("lr=1e-4,2e-4",), settings=file, seeds=(3, 4), output=tmp_path, of_runs=("--ppo-epoch", "2")
    )
    config.check()
    runs = plan(config)
    names = ["plain-lr1e-4", "plain-lr2e-4", "firm-lr1e-4", "firm-lr2e-4"]
    assert [run.name for run in runs] == [f"{name}-seed{seed}" for seed in (3, 4) for name in names]
    made = parse_config(PPOConfig, runs[-1].words(tmp_path), "")[0]
    assert (made.lr, made.kl_coef, made.seed, made.ppo_epoch, made.gradient_checkpointing) == (2e-4, 0.4, 4, 2, True)
    assert made.reward == {"intent": 1, "meteor": 2} and made.run_folder == tmp_path / "firm-lr2e-4-seed4"


@pytest.mark.parametrize(
    "words, expected",
    [
        (["--grid", "lr"], "grid has 'lr'; expected NAME=VALUE,VALUE"),
        (["--grid", "lr=,"], "grid has 'lr=,'"),
        (["--grid", "learning_rate=1"], "is no option of ppo_dialog.py"),
        (["--grid", "seed=1,2"], "use --seeds"),
        (["--grid", "lr=1e-4", "lr=2e-4"], "grid has lr twice"),
        (["--grid", "lr=1e-4", "--", "--lr", "1e-3"], "--lr stands after `--`, and the sweep sets it too"),
        (["--", "--run-dir=x"], "--run-dir stands after `--`"),
        (["--grid", "lr=1e-4,-1"], "lr is -1.0; expected a number greater"),
        (["--grid", "model_path=./nowhere"], "./nowhere"),
        (["--settings", "nowhere.yaml"], "settings is 'nowhere.yaml', which cannot be read"),
        (["--", "--push-to-hub", "me/talker"], "an upload of every run would go to one name"),
        (["--only", "3"], "only is 3; the sweep has 3 runs"),
        (["--jobs", "0"], "jobs is 0"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences_before_any_run(words, expected, tmp_path):
    own = words.index("--") if "--" in words else len(words)
    config, _ = parse_sweep(SweepConfig, [*words[:own], "--output", str(tmp_path), *words[own:]], "")
    with pytest.raises(UserError, match=re.escape(expected)):
        config.check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["lr: 1e-4", "- lr", "", "a: {lrr: 1}", "a: [1]", "a: {b"])
def test_a_file_of_settings_that_cannot_be_used_is_named(text, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match="settings.yaml"):
        SweepConfig(settings=file, output=tmp_path).check()


def test_runs_at_a_time_share_the_cores_or_take_gpus_in_turn(monkeypatch):
    monkeypatch.delenv("TORCH_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8), raising=False)
    assert places_of(SweepConfig(jobs=4)) == [{"TORCH_NUM_THREADS": "2"}] * 4
    assert places_of(SweepConfig()) == [{}]
    assert places_of(SweepConfig(gpus=("0", "3"), jobs=2)) == [{"CUDA_VISIBLE_DEVICES": n} for n in "0303"]


@pytest.mark.slow
def test_two_runs_beside_each_other_and_the_page_of_both(tmp_path):
    command = ["--seeds", "0", "1", "--jobs", 2, "--output", tmp_path, "--", *TINY]
    printed = said(sweep(*command))
    assert printed.count("is done") == 2 and "2 seeds" in printed
    rows = [lines(tmp_path / f"seed{seed}") for seed in (0, 1)]
    assert rows[0][0]["score"] != rows[1][0]["score"]
    gains = [
        json.loads((tmp_path / f"seed{seed}" / "eval.json").read_text())["reward"]["difference"] for seed in (0, 1)
    ]
    assert f"{sum(gains) / 2:+.4f}" in printed
    page = (tmp_path / "comparison.html").read_text(encoding="utf-8")
    assert "<h1>2 runs of one setting</h1>" in page
    printed = said(sweep(*command))  # all is done
    assert "==" not in printed and "comparison.html" in printed
    assert "holds the run seed0 with other options" in said(sweep(*command, "--ppo-epoch", 1), status=2)


# --- longer


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_sweep_saves_and_the_same_command_continues(number, tmp_path):
    longer = ["--total-time-steps", 3000, *TINY[2:]]
    command = ["--grid", "lr=1e-4", "--seeds", 0, 1, "--output", tmp_path, "--", *longer]
    process = sweep(*command)
    first = tmp_path / "lr1e-4-seed0"
    while not (first / "metrics.jsonl").exists() or len(lines(first)) < 2:
        time.sleep(0.1)
        assert process.poll() is None
    # Ctrl-C reaches the sweep and its runs, SIGTERM of a scheduler the sweep alone
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert "Traceback" not in said(process, status=128 + number)
    done = len(lines(first))
    assert list(first.glob("checkpoints/update-*")) and not (tmp_path / "lr1e-4-seed1").exists()
    printed = said(sweep(*command))
    assert "== lr1e-4-seed0 resumes" in printed and len(lines(first)) > done
    assert printed.index("lr1e-4-seed0") < printed.index("== lr1e-4-seed1")


@pytest.mark.slow
def test_what_fails_is_named_and_the_rest_goes_on(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text("def broken(samples):\n    raise RuntimeError('no score today')\n")
    file = tmp_path / "settings.yaml"
    file.write_text(f"good:\nbad: {{reward: ['{reward}:broken']}}\n")
    out = tmp_path / "runs"
    printed = said(sweep("--settings", file, "--seeds", 0, "--output", out, "--", *TINY), status=1)
    assert "== bad-seed0 failed with status" in printed and "failed: bad-seed0" in printed
    assert (out / "good-seed0" / "eval.json").exists() and (out / "comparison.html").exists()


@pytest.mark.slow
def test_the_script_for_slurm_makes_each_run_and_the_same_command_the_page(tmp_path):
    out = tmp_path / "of a sweep"
    command = ["--grid", "lr=1e-4,2e-4", "--seeds", 5, "--output", out, "--", *TINY]
    printed = said(sweep("--slurm", *command))
    script = out / "sweep.sbatch"
    assert str(script) in printed and "#SBATCH --array=0-1\n" in script.read_text()
    assert {file.name for file in out.iterdir()} == {"sweep.json", "sweep.sbatch"}
    for task in "01":  # what slurm starts for a task
        subprocess.run(["bash", script], env=os.environ | {"SLURM_ARRAY_TASK_ID": task}, check=True, cwd=tmp_path)
    assert len(list(out.glob("*/eval.json"))) == 2 and not (out / "comparison.html").exists()
    printed = said(sweep(*command))
    assert "==" not in printed and (out / "comparison.html").exists()
