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
import ppo_dialog
import report
import sft_dialog
from reproduce import results
from support.config import command_line

GROUPS = {
    ppo_dialog: ("model", "format", "reward", "algorithm", "engine", "run"),
    estimate: ("model", "format", "reward", "algorithm", "engine", "run", "launch"),
    sft_dialog: ("sft", "fit", "format"),
    intent_classifier: ("intent", "fit"),
    eval_metrics: (),
    chat: ("conversation", "agent"),
    report: (),
    results: (),
}
CONFIGS = {
    ppo_dialog: ppo_dialog.PPOConfig,
    estimate: estimate.EstimateConfig,
    sft_dialog: sft_dialog.SFTConfig,
    intent_classifier: intent_classifier.IntentConfig,
    eval_metrics: eval_metrics.EvalConfig,
    chat: chat.ChatConfig,
    results: results.ResultsConfig,
    report: report.ReportConfig,
}


def help_of(script, monkeypatch, capfd) -> str:
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0
    return capfd.readouterr().out


def entries_of(text: str) -> dict[str, tuple[str | None, str]]:
    """Of each option (positional arguments by their metavar) the heading it stands under and what is said of it."""
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


@pytest.mark.parametrize("script", GROUPS, ids=lambda s: s.__name__)
def test_help_says_a_sentence_about_every_option_under_its_heading(script, monkeypatch, capfd):
    entries = entries_of(help_of(script, monkeypatch, capfd))
    groups = dict.fromkeys(heading for heading, _ in entries.values())
    assert [g.removesuffix(" options") for g in groups if g not in ("options", "positional arguments")] == [
        *GROUPS[script]
    ]
    for field in dataclasses.fields(CONFIGS[script]):
        option = f"--{field.name.replace('_', '-')}"
        if "Fixed" in str(field.type):  # a key of a file alone
            assert option not in entries
            continue
        heading, said = entries.get(option) or entries[option.strip("-").upper()]  # a positional argument
        said = re.match(r"(.*) \((?:default: |required)", said)[1]
        assert len(said.split()) >= 4 and said[-1] in ".?])", (option, said)


def test_help_shows_what_the_file_of_settings_gives(tmp_path, monkeypatch, capfd):
    file = tmp_path / "mine.yaml"
    file.write_text("ppo_epoch: 7\n")
    monkeypatch.setattr(sys, "argv", ["ppo_dialog.py", "--config", str(file), "--help"])
    with pytest.raises(SystemExit):
        ppo_dialog.main()
    text = capfd.readouterr().out
    assert "usage: ppo_dialog.py [--config FILE.yaml] [-h] [OPTIONS]" in text and "(default: 7)" in text


def test_named_values_are_read_as_yaml_reads_them(capfd):
    def parse(*words):
        return command_line(ppo_dialog.PPOConfig, "", ["--reward-args", *words]).reward_args

    assert parse("weight=2", "word=please", "words=[a, b]", "deep={x: true}", "address=a=b") == {
        "weight": 2,
        "word": "please",
        "words": ["a", "b"],
        "deep": {"x": True},
        "address": "a=b",
    }
    assert parse() == {}
    with pytest.raises(SystemExit) as ended:
        parse("weight")
    assert ended.value.code == 2 and "'weight' is no NAME=VALUE" in capfd.readouterr().err


def test_a_default_that_changes_in_a_subclass_stays_in_its_group(monkeypatch, capfd):
    heading, said = entries_of(help_of(intent_classifier, monkeypatch, capfd))["--lr"]
    assert heading == "fit options" and "(default: 0.0001)" in said


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_is_written(shell, tmp_path, monkeypatch):
    file = tmp_path / "completion"
    monkeypatch.setattr(sys, "argv", ["ppo_dialog.py", "--tyro-write-completion", shell, str(file)])
    with pytest.raises(SystemExit) as ended:
        ppo_dialog.main()
    assert ended.value.code in (0, None) and "kl-target" in file.read_text()


# --- messages: every option that one names exists in the scripts that say it

PPO, READERS = ("ppo_dialog",), ("ppo_dialog", "sft_dialog", "intent_classifier", "eval_metrics")
SPEAKERS = {  # the scripts whose options a module's messages name; a script speaks for itself, another module for all
    "chat_page": ("chat",),
    "checkpoint": PPO,
    "config": ("ppo_dialog", "estimate"),
    "data_checks": READERS,
    "agent": ("chat",),
    "distributed": PPO,
    "envs": READERS,
    "run": PPO,
    "trackers": PPO,
    "controllers": PPO,
    "options": ("ppo_dialog", "eval_metrics", "chat"),
    "ppo_config": PPO,
    "generation": ("ppo_dialog", "eval_metrics", "chat"),
    "live_display": PPO,
    "models": PPO,
    "report": PPO,  # it names commands that go on with a run
    "results": PPO,
    "rewards": PPO,
    "data": READERS,
    "text": READERS,
    "judge": ("ppo_dialog", "eval_metrics", "chat"),
    "diagnostics": PPO,
    "supervised": ("sft_dialog", "intent_classifier"),
}
ROOT = Path(chat.__file__).parent
SOURCES = [file for folder in ("", "support", "reproduce") for file in sorted((ROOT / folder).glob("*.py"))]
FIELDS = {script.__name__: {f.name for f in dataclasses.fields(config)} for script, config in CONFIGS.items()}
for script in ("ppo_dialog", "estimate"):
    FIELDS[script] |= {"config"}  # which support/config.py reads before the other options


def messages_in(source: str) -> list[str]:
    """The texts in Python code, with {} for what an f-string puts in; without docstrings and options alone."""
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
    """Options in a message that not all of `scripts` have, and settings that none has.

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
    """A module that is not in SPEAKERS is held to the options of all scripts."""
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
