"""The benchmarks run, at a size that takes seconds, and count what they say they count. No timing is asserted."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel

from support.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation  # noqa: E402
import agreement  # noqa: E402
import compare  # noqa: E402
import estimators  # noqa: E402
import scaling  # noqa: E402
import throughput  # noqa: E402

TINY = ["--size", "tiny", "--env-num", "8", "--updates", "2", "--ppo-epoch", "1", "--data-path", "builtin", "--json"]


@pytest.mark.slow
@pytest.mark.parametrize("critic", [[], ["--separate-critic"]])
def test_throughput_runs_the_work_and_ends_with_its_figures(critic):
    command = [sys.executable, str(ROOT / "benchmarks" / "throughput.py"), *TINY, *critic]
    done = forked.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    for name in ("steps_per_s", "mfu", "rollout_s", "scoring_s", "update_s", "peak_rss_mb"):
        assert result[name] > 0, name
    assert result["critic"] == ("separate" if critic else "shared")
    assert 0 < result["mfu"] < 1 and 0 <= result["padding_share"] < 0.5 and result["reply_tokens"] <= 20
    assert "update   2" in done.stderr  # the run's own lines go elsewhere than the figures


def test_the_count_of_operations_is_that_of_torch():
    layers, width, tokens = 2, 64, 50
    sizes = dict(vocab_size=100, num_hidden_layers=layers, hidden_size=width, num_attention_heads=2)
    sizes |= dict(attn_implementation="eager")
    judge = BertModel(BertConfig(**sizes, intermediate_size=4 * width), add_pooling_layer=False)
    trunk = throughput.forward_flops(layers, width, tokens)
    for model, expected in ((GPT2LMHeadModel(GPT2Config(**sizes)), trunk + 2 * width * 100 * tokens), (judge, trunk)):
        with FlopCounterMode(display=False) as counted:
            model(input_ids=torch.arange(tokens)[None])
        assert counted.get_total_flops() == pytest.approx(expected)


@pytest.mark.parametrize("separate", [False, True])
def test_the_work_of_a_reply_by_hand(separate):
    config = throughput.ThroughputConfig(size="tiny", ppo_epoch=3, separate_critic=separate)
    layers, width = 2, 64
    trunk = sum(layers * (24 * width**2 + 4 * width * (i + 1)) for i in range(30 + 20 - 1))
    head = 20 * 2 * width * throughput.VOCABULARY
    trained = trunk + head + 20 * 2 * width + trunk * separate
    judge = throughput.forward_flops(1, 32, 25)
    assert throughput.reply_flops(config, 30, 20, 25) == pytest.approx(trained + trunk + head + 9 * trained + judge)


def test_the_benchmarks_tokenizer_has_gpt2s_size_and_loses_no_text():
    dialogues = throughput.load_dialogues("builtin", "train")[:200]
    tokenizer = throughput.train_tokenizer(dialogues)
    assert len(tokenizer) == throughput.VOCABULARY
    text = dialogues[0].utterances[0] + " <EOU>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode([throughput.VOCABULARY - 100]).strip()  # whatever is sampled is text


@pytest.mark.slow
def test_ablation_and_scaling_print_their_tables():
    config = ablation.AblationConfig(size="tiny", rounds=1, updates=2, data_path="builtin")
    lines = ablation.ablate(config).splitlines()
    assert len(lines) == 2 + 1 + len(throughput.MEASURES) + 1 and lines[2].startswith("| all measures |")
    config = scaling.ScalingConfig(size="tiny", prompts=(32, 64), rollouts=(16,), replies=(20,), data_path="builtin")
    tables = scaling.scale(config).split("\n\n")
    assert [len(t.splitlines()) for t in tables] == [4, 3, 3]


def test_compare_takes_ratios_round_by_round(tmp_path, monkeypatch):
    config = compare.CompareConfig(systems=("shared", "trl"), inputs=str(tmp_path), peers=str(tmp_path), rounds=3)
    config.envs, config.log = str(tmp_path), str(tmp_path / "log.jsonl")
    speeds = iter([10.0, 2.0, 30.0, 5.0, 8.0, 2.0])

    def run(system, config, data):
        rss = 600 if system == "shared" else 1000
        return {"steps_per_s": next(speeds), "peak_rss_mb": rss, "rollout_s": 1.0, "update_s": 2.0, "mfu": 0.5}

    monkeypatch.setattr(compare, "run_once", run)
    text = compare.compare(config)
    assert "| ours, shared trunk over TRL 1.12 | 5.00 (4.00 to 6.00) | 0.60 |" in text
    assert "| ours, shared trunk | 10 (8 to 30) |" in text
    assert compare.compare(config) == text  # from the log: nothing runs again
    assert len(Path(config.log).read_text().splitlines()) == 6


@pytest.mark.slow
def test_compare_says_what_is_missing_and_passes_a_failure_on(tmp_path):
    with pytest.raises(UserError, match="--inputs is ''"):
        compare.compare(compare.CompareConfig(systems=("shared",)))
    with pytest.raises(UserError, match="sizes S and M"):
        folder = str(tmp_path)
        compare.compare(compare.CompareConfig(work="tiny", inputs=folder, envs=folder, peers=folder))
    with pytest.raises(UserError, match="ended with status 2.*\n.*does not exist"):
        compare.compare(compare.CompareConfig(work="tiny", systems=("shared",), inputs=str(tmp_path), prompts=8))


def test_agreement_tells_signal_from_noise():
    generator = torch.Generator().manual_seed(0)
    signal, noise = torch.randn(10_000, generator=generator), torch.randn(4, 10_000, generator=generator)
    found = [{"same": signal, "half": signal + n, "none": n} for n in noise]
    rows = [line.split(" | ") for line in agreement.agreement(found).splitlines()[2:]]
    assert [row[0] for row in rows] == ["| same", "| half", "| none"]
    assert [float(row[1]) for row in rows] == pytest.approx([1, 0.5, 0], abs=0.02)


@pytest.mark.parametrize("top_k", [0, 5])
def test_agreement_measures_each_part_of_the_reward(tiny_lm, top_k):
    config = agreement.AgreementConfig(
        model_path=tiny_lm,
        intent_coef=0.0,
        consensus_coef=1.0,
        env_num=16,
        samples_per_prompt=4,
        length_rate=1.0,
        top_k=top_k,
        rollouts=2,
        progress="plain",
    )
    rows = [line.split(" | ") for line in agreement.measure(config).splitlines()[2:]]
    assert [row[0] for row in rows] == ["| meteor", "| consensus", "| length"]
    assert all(-1 <= float(row[1]) <= 1 for row in rows)
    with pytest.raises(UserError, match="rollouts is 1; expected at least 2"):
        agreement.measure(agreement.AgreementConfig(rollouts=1))


@pytest.mark.slow
def test_engines_are_compared_with_one_process():
    command = [sys.executable, "benchmarks/engines.py", *"--size tiny --rounds 1 --updates 2 --engines ddp".split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" |")[0] for row in rows] == ["| one process", "| ddp, 2 processes"]
    assert "| 1.00 (1.00 to 1.00) |" in rows[0]


OVEROPTIMISATION = [sys.executable, str(ROOT / "benchmarks/overoptimisation.py")]


@pytest.fixture
def run_of_two_reward_models(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints" / "update-000004").mkdir(parents=True)
    scales = {"reward_scales": {"rm_a": [10.0, 2.0], "rm_b": [0.0, 0.5]}}
    (folder / "checkpoints" / "update-000004" / "progress.json").write_text(json.dumps(scales))
    rows = [(0.4, 14, 0.5), (0.0, 10, 0.0), (0.9, 16, 0.25), (0.1, 12, 0.5)]
    lines = [
        dict(update=i, kl_div=kl, mean_output_length=10, rm_a=a, rm_b=b) for i, (kl, a, b) in enumerate(rows, start=1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.slow
def test_the_curve_of_two_reward_models_is_in_deviations_and_sorted_by_distance(run_of_two_reward_models, tmp_path):
    folder, picture = run_of_two_reward_models, tmp_path / "new" / "curve.png"
    with (folder / "metrics.jsonl").open("a") as file:  # a score that was not finite, and a line of a killed run
        file.write(json.dumps(dict(update=5, kl_div=9.0, mean_output_length=9, rm_a=None, rm_b=1.0)) + '\n{"upd')
    command = [*OVEROPTIMISATION, str(folder), "--bins", "4"]
    done = forked.run([*command, "--output", str(picture)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.split("|")[1:4] for line in done.stdout.splitlines()[2:6]] == [
        [" 0.00 ", " +0.00 ", " +0.00 "],
        [" 1.00 ", " +1.00 ", " +1.00 "],
        [" 2.00 ", " +2.00 ", " +1.00 "],
        [" 3.00 ", " +3.00 ", " +0.50 "],
    ]
    assert picture.stat().st_size > 5000


@pytest.mark.parametrize(
    "arguments, fault",
    [
        (["RUN", "--unseen", "rm_c"], "has no reward model 'rm_c'; it has rm_a, rm_b"),
        ([], "no run was given"),
        (["RUN", "--bins", "0"], "bins is 0; expected a number greater than 0"),
        (["RUN", "--output", "RUN"], "cannot be written"),
        (["RUN", "--output", "RUN/metrics.jsonl/curve.png"], "cannot be written"),
        (["RUN", "EMPTY"], "has no update with finite rm_a, rm_b"),
    ],
    ids=lambda value: None if isinstance(value, list) else value[:20],
)
def test_what_no_curve_can_be_made_of_is_said(arguments, fault, run_of_two_reward_models, tmp_path, monkeypatch):
    import overoptimisation

    empty = tmp_path / "empty"
    shutil.copytree(run_of_two_reward_models, empty)
    (empty / "metrics.jsonl").write_text("")
    words = [w.replace("RUN", str(run_of_two_reward_models)).replace("EMPTY", str(empty)) for w in arguments]
    monkeypatch.setattr(sys, "argv", [*OVEROPTIMISATION[1:], *words])
    with pytest.raises(UserError, match=fault):
        overoptimisation.main()


def test_estimators_are_compared_over_the_runs_that_are_complete(tmp_path, capsys):
    rows = [dict(env_steps=n, fps=100.0 * n, kl_div=0.1 * n, peak_memory_mb=10.0 * n) for n in (1, 2, 3)]
    for seed, after in enumerate((0.5, 0.7)):
        run = tmp_path / f"gae-seed{seed}"
        run.mkdir()
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        models = dict(policy={"meteor": 0.3, "intent": None}, baseline={"meteor": 0.2, "intent": None})
        result = dict(reward={"baseline": 0.4, "policy": after}) | models
        (run / "eval.json").write_text(json.dumps(result))
    assert estimators.run_once(tmp_path / "gae-seed0", ["--no-such-option"])  # complete, so nothing is run
    figures = estimators.figures_of(tmp_path / "gae-seed0")
    assert figures["seconds"] == pytest.approx(1 / 100 + 1 / 200 + 1 / 300)
    assert (
        figures["MiB"] == 30 and figures["KL"] == pytest.approx(0.3) and figures["meteor, change"] == pytest.approx(0.5)
    )
    estimators.show("here", {"gae": [tmp_path / f"gae-seed{n}" for n in range(3)], "rloo": [tmp_path / "rloo"]})
    printed = capsys.readouterr().out
    assert "| gae | 2 | 0.400 [0.400, 0.400] | 0.600 [0.500, 0.700] | +50.0% [+50.0%, +50.0%] |" in printed
    assert "rloo" not in printed
    assert estimators.without(["--a", "1", "--b", "2"], "--a") == ["--b", "2"]


def test_the_curve_of_the_desk_is_drawn(tmp_path):
    import desk_curve

    run = tmp_path / "runs" / "desk"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("partner: desk\n")
    rows = [dict(update=n, env_steps=100 * n, partner=n / 10) for n in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "desk_curve.py"),
        str(run),
        "--output",
        str(tmp_path / "a.png"),
    ]
    assert forked.run(command, capture_output=True, text=True).returncode == 0
    assert (tmp_path / "a.png").stat().st_size > 3000 and desk_curve.CurveConfig
    (run / "metrics.jsonl").write_text(json.dumps(dict(update=1, env_steps=1)) + "\n")
    done = forked.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "expected one with --partner desk" in done.stderr


def test_habits_of_replies_are_counted_beside_those_of_humans(tmp_path):
    head = {"format": {"max_new_tokens": 9}}
    said = ["Oh , no !", "Oh , yes .", "a b c a b c", ""]
    rows = [dict(text=text, ended=i > 0, reply="Fine .") for i, text in enumerate(said)]
    (tmp_path / "one.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (head, *rows)))
    command = [sys.executable, str(ROOT / "benchmarks" / "habits.py"), str(tmp_path / "one.jsonl")]
    done = forked.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[2:] == [
        "| one | oh 50%, a 25% | 25.0% | 25.0% | 25.0% |",
        "| human | fine 100% | 0.0% | | |",
    ]
    missing = forked.run([*command, "no.jsonl"], capture_output=True, text=True)
    assert missing.returncode == 2 and "there is no file 'no.jsonl'" in missing.stderr


@pytest.mark.slow
def test_kept_turns_are_timed_on_the_same_conversations():
    options = ["desk", "--conversations", "8", "--repeats", "1"]
    command = [sys.executable, str(ROOT / "benchmarks" / "kept_turns.py"), *options]
    done = forked.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    without, kept = re.findall(r"\(([\d,]+) tokens\)", done.stdout)
    assert without == kept and "ratio" in done.stdout  # in fp32 the texts are the same
