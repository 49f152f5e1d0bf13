"""`--help` of every script: it works, has the groups of the source, and says a sentence about every option."""

import ast
import dataclasses
import re
import sys
from pathlib import Path

import pytest

import chat
import estimate
import eval_metrics
import intent_classifier
import machines
import ppo_dialog
import report
import reward_model
import sft_dialog
import sweep
import tally
from reproduce import best_of_n, results, small_model
from support.config import command_line

PPO_GROUPS = ["model", "text", "sample", "format", "reward", "partner", "algorithm", "engine", "run"]
SCRIPTS = {  # configuration and the titles of its groups
    ppo_dialog: (ppo_dialog.PPOConfig, PPO_GROUPS),
    estimate: (estimate.EstimateConfig, [*PPO_GROUPS, "launch"]),
    sft_dialog: (sft_dialog.SFTConfig, ["sft", "fit", "text", "sample", "format"]),
    intent_classifier: (intent_classifier.IntentConfig, ["intent", "fit"]),
    reward_model: (reward_model.RewardModelConfig, ["rewardmodel", "pair", "fit", "text", "sample"]),
    eval_metrics: (eval_metrics.EvalConfig, ["eval", "partner", "text", "sample"]),
    chat: (chat.ChatConfig, ["conversation", "text", "agent"]),
    report: (report.ReportConfig, []),
    tally: (tally.TallyConfig, []),
    machines: (machines.MachinesConfig, []),
    sweep: (sweep.SweepConfig, []),
    results: (results.ResultsConfig, []),
    small_model: (small_model.SmallModelConfig, []),
    best_of_n: (best_of_n.BestOfNConfig, ["bestofn", "text", "sample", "format"]),
}
CONFIGS = {script: config for script, (config, _) in SCRIPTS.items()}


@pytest.fixture
def run(monkeypatch, capfd):
    """A function that runs a script, expects status 0, and returns what it prints."""

    def run(script, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert ended.value.code in (0, None)
        return capfd.readouterr().out

    return run


def entries_of(text: str) -> dict[str, tuple[str | None, str]]:
    """Return the heading and the text of each option. A positional argument is named by its metavar."""
    entries, heading, option = {}, None, None
    for line in text.splitlines():
        if found := re.match(r"[├╭]─ (.+?) ─+[┤╮]$", line):
            heading, option = found[1], None
        elif line.startswith("│"):
            if found := re.match(r"│ \[?(--[\w-]+|[A-Z-]+)(?=[] ,])", line):
                option = found[1]
            if option:
                said = entries.get(option, (heading, ""))[1]
                entries[option] = heading, f"{said} {line.strip('│ ')}"
    return entries


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda s: s.__name__)
def test_help_says_a_sentence_about_every_option_under_its_heading(script, run):
    entries = entries_of(run(script, "--help"))
    config, groups = SCRIPTS[script]
    titles = dict.fromkeys(heading for heading, _ in entries.values())
    assert [t.removesuffix(" options") for t in titles if t not in ("options", "positional arguments")] == groups
    for field in dataclasses.fields(config):
        option = f"--{field.name.replace('_', '-')}"
        if "Fixed" in str(field.type):  # a key of a file alone
            assert option not in entries
            continue
        heading, said = entries.get(option) or entries[option.strip("-").upper()]  # a positional argument
        said = re.match(r"(.*) \((?:default: |required)", said)[1]
        assert len(said.split()) >= 4 and said[-1] in ".?])", (option, said)


def test_help_shows_what_the_file_of_settings_gives(tmp_path, run):
    file = tmp_path / "mine.yaml"
    file.write_text("ppo_epoch: 7\n")
    text = run(ppo_dialog, "--config", str(file), "--help")
    assert "usage: ppo_dialog.py [--config FILE.yaml] [-h] [OPTIONS]" in text and "(default: 7)" in text


def test_named_values_are_read_as_yaml_reads_them(capfd):
    def parse(*words):
        return command_line(ppo_dialog.PPOConfig, "", ["--reward-args", *words]).reward_args

    values = dict(weight=2, word="please", words=["a", "b"], deep={"x": True}, address="a=b")
    assert parse("weight=2", "word=please", "words=[a, b]", "deep={x: true}", "address=a=b") == values
    assert parse() == {}
    with pytest.raises(SystemExit) as ended:
        parse("weight")
    assert ended.value.code == 2 and "'weight' is no NAME=VALUE" in capfd.readouterr().err


def test_a_default_that_changes_in_a_subclass_stays_in_its_group(run):
    heading, said = entries_of(run(intent_classifier, "--help"))["--lr"]
    assert heading == "fit options" and "(default: 0.0001)" in said


@pytest.mark.parametrize("shell", ["zsh", "fish"])  # bash: test_docs.py
def test_shell_completion_is_written(shell, tmp_path, run):
    file = tmp_path / "completion"
    run(ppo_dialog, "--tyro-write-completion", shell, str(file))
    assert "kl-target" in file.read_text()


# --- messages: every option that one names exists in the scripts that say it

PPO, READERS = ("ppo_dialog",), ("ppo_dialog", "sft_dialog", "intent_classifier", "eval_metrics")
SPEAKERS = {  # the scripts whose options a module's messages name: of a script itself, of any other module all
    "chat_page": ("chat",),
    "chat_panels": ("chat",),
    "checkpoint": PPO,
    "config": ("ppo_dialog", "estimate"),
    "data_checks": READERS,
    "agent": ("chat",),
    "distributed": PPO,
    "envs": READERS,
    "run": PPO,
    "trackers": PPO,
    "controllers": PPO,
    "options": ("ppo_dialog", "eval_metrics"),
    "ppo_config": PPO,
    "generation": ("ppo_dialog", "eval_metrics", "chat"),
    "live_display": PPO,
    "models": PPO,
    "partners": PPO,
    "peers": ("ppo_dialog", "sft_dialog", "intent_classifier", "reward_model"),
    "preferences": ("reward_model",),
    "report": PPO,  # it names commands that go on with a run
    "results": PPO,
    "rewards": PPO,
    "data": READERS,
    "samples": ("ppo_dialog", "sft_dialog", "eval_metrics", "estimate"),
    "text": ("ppo_dialog", "sft_dialog", "eval_metrics", "chat", "estimate"),
    "paths": ("ppo_dialog", "sft_dialog", "eval_metrics", "chat", "estimate"),
    "judge": ("ppo_dialog", "eval_metrics", "chat"),
    "diagnostics": PPO,
    "supervised": ("sft_dialog", "intent_classifier", "reward_model"),
    "tally": ("chat",),  # it names the command that writes its file
}
ROOT = Path(chat.__file__).parent
SOURCES = [file for folder in ("", "support", "reproduce") for file in sorted((ROOT / folder).glob("*.py"))]
FIELDS = {script.__name__: {f.name for f in dataclasses.fields(config)} for script, config in CONFIGS.items()}
for script in ("ppo_dialog", "estimate"):
    FIELDS[script] |= {"config"}  # which support/config.py reads before the other options


def messages_in(source: str) -> list[str]:
    """Find the texts in Python code, with {} for the values of f-strings, without docstrings and single words."""
    nodes = list(ast.walk(ast.parse(source)))
    parts = {id(part) for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    parts |= {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    texts = []
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            texts.append("".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            texts.append(node.value)
    return [text for text in texts if " " in text.strip()]


def unknown_options(message: str, scripts: tuple[str, ...]) -> list[str]:
    """Find options in a message that not all of `scripts` have, and settings that none has.

    `name.py --option` is checked in that script. Commands of other programs are left out.
    """
    message = re.sub(r"\b(tensorboard|trackio|wandb|accelerate|pip) [^.;,()]*", "", message)
    unknown = []
    for found in re.finditer(r"(?:(\w+)\.py [^.;,()]*?)?(?<![\w-])--([a-z][a-z-]*)", message):
        name = found[2].removeprefix("no-").replace("-", "_")
        named = (found[1],) if found[1] in FIELDS else scripts
        unknown += [f"--{found[2]} in {script}.py" for script in named if name not in FIELDS[script]]
    every = set().union(*FIELDS.values())
    for name in re.findall(r"(?<![\w./{-])[a-z]+(?:_[a-z]+)+(?![\w(./])", message):
        if name in every and not any(name in FIELDS[script] for script in scripts):
            unknown.append(f"{name} in none of {', '.join(scripts)}")
    return unknown


def test_every_option_that_a_message_names_exists_in_the_scripts_that_say_it():
    """A module that is not in SPEAKERS may only name options that all scripts have."""
    wrong, checked = [], 0
    for file in SOURCES:
        scripts = (file.stem,) if file.stem in FIELDS and file.stem not in SPEAKERS else SPEAKERS.get(file.stem, FIELDS)
        for message in messages_in(file.read_text(encoding="utf-8")):
            checked += "--" in message
            wrong += [f"{file.name}: {option}: {message!r}" for option in unknown_options(message, tuple(scripts))]
    assert not wrong, "\n".join(wrong)
    assert checked > 40
    assert SPEAKERS.keys() <= {file.stem for file in SOURCES}


@pytest.mark.parametrize(
    ("message", "scripts", "wrong"),
    [
        ("no tokenizer; give --tokenizer-path.", ("ppo_dialog", "chat"), []),
        ("no tokenizer; give --tokenizer-path.", ("chat", "eval_metrics"), ["--tokenizer-path in eval_metrics.py"]),
        ("Run chat.py {} --web, or give --eou-marker.", ("sft_dialog",), []),
        ("Run chat.py {} --weights.", ("ppo_dialog",), ["--weights in chat.py"]),
        ("tensorboard --logdir {}", ("ppo_dialog",), []),
        ("give --no-perplexity or lower model_path", ("eval_metrics",), []),
        ("lower lora_rank or x.model_path", ("eval_metrics",), ["lora_rank in none of eval_metrics"]),
    ],
)
def test_an_option_that_a_script_lacks_is_found(message, scripts, wrong):
    assert unknown_options(message, scripts) == wrong
