"""Every engine with real processes, two on the CPU with gloo between them, by the files in configs/accelerate."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import ended, launched
from test_programs import ROOT, flags, lines

from builtin_models import builtin_model

CONFIGS = ROOT / "configs" / "accelerate"
RUN = dict(total_time_steps=1, env_num=8, num_mini_batch=2, ppo_epoch=2, save_interval=1, judge_samples=40)
RUN |= dict(eval_limit=-1, validation_limit=8, lr=1e-3, lr_schedule="constant", max_new_tokens=12)
# engine -> what is asked of it beside the equality
ENGINES = {
    "ddp": dict(gradient_accumulation_steps=2, ref_placement="offloaded"),
    "zero1": {},
    "zero2": dict(gradient_accumulation_steps=2, intent_placement="offloaded"),
    "zero2_offload": {},
    "zero3": dict(ref_placement="sharded"),
    "zero3_offload": {},
    "fsdp2": dict(ref_placement="sharded", intent_placement="sharded"),
    "fsdp2_offload": {},
}
NUMBERS = "score intent meteor reward_intent reward_meteor kl_div episode_reward mean_output_length alpha".split()
NUMBERS += "policy_loss value_loss approx_kl clipfrac grad_norm explained_variance".split()


def launch_by(engine: str, processes: int = 2) -> list[str]:
    """A user's command, with processes and device overridden."""
    file = str(CONFIGS / f"{engine}.yaml")
    settings = ["--num_processes", str(processes), "--mixed_precision", "no", "--main_process_port", "0"]
    return ["accelerate", "launch", "--config_file", file, *settings]


def run_by(engine: str, program: str = "ppo_dialog.py", processes: int = 2, **settings) -> str:
    """What a run by an engine printed."""
    process = launched(*flags(**RUN | settings), launch=launch_by(engine, processes), program=program)
    printed = ended(process)
    assert process.returncode == 0, printed[-3000:]
    return printed


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run by one process, which no launcher started."""
    builtin_model("policy")
    runs = tmp_path_factory.mktemp("whole")
    process = launched(*flags(**RUN | dict(run_dir=runs)), launch=[sys.executable])
    printed = ended(process)
    assert process.returncode == 0, printed[-3000:]
    return runs / "ppo_dialog"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "policy" / "model.safetensors") | load_file(run / "value.safetensors")


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_learns_what_one_process_learns(engine, whole, tmp_path):
    printed = run_by(engine, "tests/engine_worker.py", run_dir=tmp_path, **ENGINES[engine])
    run = tmp_path / "ppo_dialog"
    assert "2 process(es)" in printed and printed.count("update   1 ") == 1
    (expected,), (found,) = lines(whole), lines(run)
    for name in NUMBERS:
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    assert found["validation_reward"] == pytest.approx(expected["validation_reward"], abs=0.05)  # a token may turn
    theirs, ours = weights(whole), weights(run)
    assert theirs.keys() == ours.keys()
    # Adam's first steps are signs: where a gradient is nothing but rounding (a key's bias), they may differ
    far = sum((~torch.isclose(ours[n], theirs[n], rtol=1e-3, atol=1e-5)).sum().item() for n in theirs)
    assert far / sum(w.numel() for w in theirs.values()) < 2e-3
    # a sharded network is gathered once for a rollout: a tensor at a time at most, and not for each token
    counts = [int(n) for n in re.findall(r"gathers in a block: (\d+)", printed)]
    assert counts and max(counts) <= len(theirs)
