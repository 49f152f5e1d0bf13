"""`--help` of every script: it works, has the groups of the source, and says a sentence about every option."""

import dataclasses
import re
import sys

import pytest

import chat
import estimate
import eval_metrics
import intent_classifier
import ppo_dialog
import report
import results
import sft_dialog
from configuration import command_line, headings

GROUPS = {  # some of each, and all that there are under the headings of the source
    ppo_dialog: ("text format", "what is trained, on what", "rewards", "how much", "PPO", "engine", "results"),
    estimate: ("rewards", "PPO", "engine", "what it would be launched with"),
    sft_dialog: ("text format", "training", "model and data"),
    intent_classifier: ("training", "model and data"),
    eval_metrics: ("models and data", "results", "sampling", "engine"),
    chat: ("model", "sampling", "conversation"),
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
    named = headings(CONFIGS[script])
    assert set(GROUPS[script]) <= set(named.values())
    for field in dataclasses.fields(CONFIGS[script]):
        option = f"--{field.name.replace('_', '-')}"
        heading, said = entries.get(option) or entries[option.strip("-").upper()]  # a positional argument
        if field.name in named:
            assert heading == named[field.name], option
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
    parse = lambda *words: command_line(ppo_dialog.PPOConfig, "", ["--reward-args", *words]).reward_args
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


def test_a_default_that_changes_in_a_subclass_stays_in_its_group():
    assert headings(intent_classifier.IntentConfig)["lr"] == "training"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_is_written(shell, tmp_path, monkeypatch):
    file = tmp_path / "completion"
    monkeypatch.setattr(sys, "argv", ["ppo_dialog.py", "--tyro-write-completion", shell, str(file)])
    with pytest.raises(SystemExit) as ended:
        ppo_dialog.main()
    assert ended.value.code in (0, None) and "kl-target" in file.read_text()
