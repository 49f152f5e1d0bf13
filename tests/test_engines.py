"""Every engine with real processes, two on the CPU with gloo between them, by the files in configs/accelerate."""

import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_distributed import ended, launched
from test_programs import ROOT, flags, lines, run

CONFIGS = ROOT / "configs" / "accelerate"
RUN = dict(total_time_steps=1, env_num=8, num_mini_batch=2, ppo_epoch=2, save_interval=1, judge_samples=40)
RUN |= dict(eval_limit=-1, validation_limit=8, lr=1e-3, lr_schedule="constant", max_new_tokens=12)
# engine -> what is asked of it beside the equality
ENGINES = {
    "ddp": dict(micro_batch_tokens=100, ref_placement="offloaded"),
    "zero1": {},
    "zero2": dict(micro_batch_tokens=100, intent_placement="offloaded"),
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
    settings = RUN | settings
    gather = [] if settings.pop("gather", True) else ["--no-gather"]
    process = launched(*gather, *flags(**settings), launch=launch_by(engine, processes), program=program)
    printed = ended(process)
    assert process.returncode == 0, printed[-3000:]
    return printed


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run by one process, which no launcher started."""
    runs = tmp_path_factory.mktemp("whole")
    process = launched(*flags(**RUN | dict(run_dir=runs)), launch=[sys.executable])
    printed = ended(process)
    assert process.returncode == 0, printed[-3000:]
    return runs / "ppo_dialog"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "policy" / "model.safetensors") | load_file(run / "value.safetensors")


# the others do less than one of these two, or the same with memory elsewhere; test_distributed.py runs DDP
QUICK = ("zero3", "fsdp2")


@pytest.mark.parametrize("engine", [pytest.param(e, marks=() if e in QUICK else pytest.mark.slow) for e in ENGINES])
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


def test_dialogues_that_cannot_be_shared_out_are_refused_before_anything_is_loaded(tmp_path):
    process = launched(*flags(env_num=3, model_path="nowhere/at/all"), launch=launch_by("ddp"))
    printed = ended(process)
    assert process.returncode != 0 and "error: env_num is 3; expected a multiple of the 2 processes." in printed
    assert "does not exist" not in printed and 'Traceback (most recent call last):\n  File "ppo' not in printed


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_networks_that_are_gathered_layer_by_layer_learn_the_same(engine, whole, tmp_path):
    """Replies of other lengths in each process do not make one wait for another."""
    run_by(engine, run_dir=tmp_path, gather=False, ref_placement="sharded", intent_placement="sharded")
    (expected,), (found,) = lines(whole), lines(tmp_path / "ppo_dialog")
    for name in NUMBERS:
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    assert found["validation_reward"] == pytest.approx(expected["validation_reward"], abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "advantage"), [("ddp", "gae"), ("zero3", "gae"), ("ddp", "rloo"), ("ddp", "grpo"), ("ddp", "reinforce")]
)
def test_replies_to_one_prompt_are_learned_from_alike(engine, advantage, tmp_path):
    settings = dict(samples_per_prompt=2, advantage=advantage)
    process = launched(*flags(**RUN | settings, run_dir=tmp_path / "alone"), launch=[sys.executable])
    printed = ended(process)
    assert process.returncode == 0, printed[-3000:]
    run_by(engine, run_dir=tmp_path / "two", ref_placement="sharded", **settings)
    (expected,), (found,) = (lines(tmp_path / name / "ppo_dialog") for name in ("alone", "two"))
    for name in NUMBERS if advantage == "gae" else NUMBERS[:-1]:  # others have no values to explain anything
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3", "fsdp2"])
def test_an_adapter_is_trained_by_every_engine(engine, tmp_path):
    settings = dict(lora_rank=4, lr=1e-2)
    process = launched(*flags(**RUN | settings | dict(run_dir=tmp_path / "alone")), launch=[sys.executable])
    printed = ended(process)
    assert process.returncode == 0, printed[-3000:]
    run_by(engine, run_dir=tmp_path / "two", **settings)
    (expected,), (found,) = (lines(tmp_path / name / "ppo_dialog") for name in ("alone", "two"))
    for name in NUMBERS:
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    ours, theirs = (
        load_file(tmp_path / name / "ppo_dialog" / "policy" / "adapter_model.safetensors") for name in ("two", "alone")
    )
    assert ours.keys() == theirs.keys()
    far = sum((~torch.isclose(ours[n], theirs[n], rtol=1e-3, atol=1e-4)).sum().item() for n in theirs)
    assert far / sum(w.numel() for w in theirs.values()) < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_a_run_by_an_engine_goes_on_from_its_checkpoint(engine, tmp_path):
    settings = dict(total_time_steps=500, save_interval=2)  # three updates, of two rounds each
    run_by(engine, run_dir=tmp_path, experiment_name="whole", **settings)
    run_by(engine, run_dir=tmp_path, experiment_name="cut", **settings | dict(total_time_steps=150))
    again = launched("--resume", *flags(run_dir=tmp_path, experiment_name="cut", **settings), launch=launch_by(engine))
    printed = ended(again)
    assert again.returncode == 0 and "resumed after update" in printed, printed[-3000:]
    whole, cut = lines(tmp_path / "whole"), lines(tmp_path / "cut")
    assert len(whole) == len(cut) > 2
    for expected, found in zip(whole, cut):
        for name in NUMBERS:
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), (name, found["update"])
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert all(torch.allclose(ours[n], theirs[n], atol=1e-4) for n in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_a_process_that_fails_takes_the_others_along(engine, tmp_path):
    (tmp_path / "one_fails.py").write_text(
        "import os\n"
        "def reward(prompts, responses, references, acts):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise RuntimeError('the scoring server is gone')\n"
        "    return [0.0] * len(responses)\n"
    )
    settings = RUN | dict(run_dir=tmp_path, reward=f"{tmp_path}/one_fails.py:reward")
    process = launched(*flags(**settings), launch=launch_by(engine))
    printed = ended(process, seconds=120)
    assert process.returncode != 0 and "the scoring server is gone" in printed


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16"])
@pytest.mark.parametrize("engine", ["ddp", "zero2", "zero3", "fsdp2"])
def test_mixed_precision_trains(engine, precision, whole, tmp_path):
    launch = [precision if part == "no" else part for part in launch_by(engine)]
    process = launched(*flags(**RUN | dict(run_dir=tmp_path)), launch=launch)
    printed = ended(process)
    assert process.returncode == 0 and f"mixed precision {precision}" in printed, printed[-3000:]
    (found,) = lines(tmp_path / "ppo_dialog")
    assert 0 < found["grad_norm"] < 100 and found["skipped_steps"] == 0
    (full,) = lines(whole)  # the same, but for rounding
    for name in ("score", "value_loss", "mean_output_length"):
        assert found[name] == pytest.approx(full[name], rel=0.2, abs=0.05), name


@pytest.mark.slow
def test_the_tutorials_deepspeed_form_runs_as_printed(tmp_path, shared):
    """Both JSON files cut out of the tutorial's text, one process, no launcher."""
    text = (shared / "reference" / "openrl_dialogue_tutorial.txt").read_text()
    for name, first in (("ds_config.json", "# ds_config.yaml"), ("eval_ds_config.json", "# eval_ds_config.yaml")):
        block = text[text.index(first) :]
        (tmp_path / name).write_text(block[: block.index("\n}\n") + 3])
    keys = "{ref_ds_config: eval_ds_config.json, intent_ds_config: eval_ds_config.json}"
    (tmp_path / "nlp_ppo_ds.yaml").write_text(
        f"use_deepspeed: true\nuse_fp16: false\ndeepspeed_config: ds_config.json\nreward_class: {{args: {keys}}}\n"
    )
    done = run(
        sys.executable,
        str(ROOT / "ppo_dialog.py"),
        "--config",
        "nlp_ppo_ds.yaml",
        *flags(**RUN | dict(run_dir="runs")),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = lines(tmp_path / "runs" / "ppo_dialog")
    assert found["grad_norm"] > 0
