"""README's pictures and the output that it quotes: made of one run, and still those of that run."""

import hashlib
import json
import sys

import pytest
from PIL import Image
from test_report import ROOT, evaluation_of, made_run, metric_rows

from eval_metrics import format_table
from report import Run
from support.errors import UserError

sys.path.insert(0, str(ROOT / "docs"))
import chat_picture  # noqa: E402
import pictures  # noqa: E402


def test_readme_quotes_the_run_of_its_pictures():
    images, readme = ROOT / "docs" / "images", (ROOT / "README.md").read_text(encoding="utf-8")
    record = json.loads((images / "run.json").read_text(encoding="utf-8"))
    for text in pictures.texts_of(record):
        assert f"\n{text}\n" in readme, f"README.md has not this of docs/images/run.json:\n{text}"
    for name, checksum in record["sha256"].items():
        assert hashlib.sha256((images / name).read_bytes()).hexdigest() == checksum, f"{name} is of another run"
        assert f"docs/images/{name}" in readme


def test_the_live_picture_and_the_quoted_output_come_from_the_runs_files(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures.DialogueFormat, "load", lambda folder: pictures.DialogueFormat())
    rows = [
        {"update": u, "env_steps": 100 * u, "context": ["Hello?"], "before": "old", "human": "Hi.", "now": text,
         "scores": {"before": {"score": 0.5}, "now": {"score": score}}}
        for u, text, score in ((1, "harm", 0.1), (4, "the best", 0.9), (8, "the same", 0.5), (12, "better", 0.6))
    ]  # fmt: skip
    evaluation = evaluation_of({name: (0.01, 0.02, 0.03) for name in ("rouge1", "rouge2", "meteor")})
    evaluation["shuffled"] = {"rouge1": 0.005, "rouge2": None, "meteor": 0.005}
    config = dict(log_interval=1, progress="plain", run_dir="/a/place")
    figures = dict(score=lambda i: 0.5, kl_div=lambda i: 0.01, alpha=lambda i: 0.2)
    run = Run(made_run(tmp_path / "mine", metric_rows(12, **figures), evaluation, samples=rows, config=config))
    best, update, sentence = pictures.shown_dialogue(run)
    assert (
        best["now"] == "the best" and update == 7 and "2 scored higher than before training, 1 lower, 1 the" in sentence
    )
    svg = pictures.live_picture(run).replace("&#160;", " ")
    for words in ("the best", "update 7", "700 of 1,000 steps", "0:14 gone, 0:06 left"):
        assert words in svg, words
    assert "harm" not in svg and "url(" not in svg.replace("url(#", "")  # it loads nothing

    table = format_table(run.evaluation, headings=("supervised", "PPO"))
    end = "1,200 environment steps in 24 s: 50 tokens/s; results in /a/place/mine"
    log = f"update 12 ...\n{table}\ntest reward: 0.5\nreport: /a/place/mine/report.html\n{end}\ntalk to it: ...\n"
    quoted = pictures.quoted_output(run, log)
    assert quoted[-1] == end.replace("/a/place", "runs") and quoted[-2] == "test reward: 0.5"
    assert [line.split()[0] for line in quoted[:-2]] == ["shuffled", "ROUGE-1", "METEOR"]
    for other in (log.replace("+0.0200", "+0.0300"), log.replace("1,200 env", "1,201 env")):
        with pytest.raises(UserError, match="the log is not of the run"):
            pictures.quoted_output(run, other)


def test_the_picture_of_the_page_for_talking_is_small_and_its_command_stands_beside_it():
    picture, page = ROOT / "docs" / "images" / "chat_page.png", (ROOT / "docs" / "chat.md").read_text(encoding="utf-8")
    with Image.open(picture) as opened:
        assert opened.format == "PNG" and opened.size == (chat_picture.WIDTH, chat_picture.HEIGHT)
    assert picture.stat().st_size < 150_000
    assert "(images/chat_page.png)" in page and "`python docs/chat_picture.py runs/ppo_dialog`" in page
