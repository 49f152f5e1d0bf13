"""Write the table, the figures and the dialogues of docs/notebook/results.md from the folder of reproduce.sh.

    python reproduce/results.py runs/reproduce --results docs/notebook --seeds 0 1 2

It reads eval/*.json, replies/*.jsonl, the metrics.jsonl of each run, and the records of the judges and the supervised
model. It writes results.json, results-*.png and the part of results.md between two marks. The rest of results.md is
written by hand and stays. The text of that part is results.md.jinja.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import tyro
from jinja2.environment import TemplateModule
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval_metrics import meteor_scores
from report import charts_of, draw_curves, load_runs
from support.config import command_line
from support.errors import UserError, run_script
from support.files import write_json
from support.metric_names import LABELS
from support.words import repeats, word_tokenizer_for

MARKS = "<!-- made by results.py: begin -->", "<!-- made by results.py: end -->"
# what the tutorial reports of its own PPO against its own supervised model (docs/quick_start/train_nlp)
TUTORIAL = {"rouge1": 0.10, "rougeLsum": 0.12, "meteor": 0.25, "sacrebleu": 0.43, "intent": 0.019}
TUTORIAL["mean_output_length"] = -0.014
REPORTED = "rouge1 rougeLsum meteor sacrebleu intent intent_second_judge mean_output_length distinct2".split()
# panels of report.py, by their first figures
CURVES = "episode_reward intent reward_* validation_reward kl_div alpha mean_output_length clipfrac entropy".split()
ABLATIONS = {
    "no-kl": "without KL (`--kl-coef 0`)",
    "no-meteor": "without METEOR (`--meteor-coef 0 --consensus-coef 0`)",
}


@dataclass
class ResultsConfig:
    """What is read and written."""

    out: tyro.conf.Positional[str]
    """Folder of reproduce.sh."""
    results: str = "docs/notebook"
    """Folder for results.md, results.json and the figures."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs ppo-SEED."""
    dialogues: int = 20
    """Dialogues that are shown, picked by a fixed seed."""


def read(file: Path) -> Any:
    """Return the value in a JSON file, or the list of those in a JSONL file. Raise UserError if it cannot be read."""
    try:
        text = file.read_text(encoding="utf-8")
        return list(map(json.loads, text.rstrip("\n").split("\n"))) if file.suffix == ".jsonl" else json.loads(text)
    except (OSError, ValueError) as error:
        raise UserError(f"'{file}' cannot be read ({type(error).__name__}); run reproduce.sh to its end.") from error


def gains(evaluation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return relative gains over the supervised model and their 95% intervals, by metric."""
    differences = {n: d for n in REPORTED if (d := evaluation["difference"].get(n))}
    bases = {n: evaluation["baseline"][n] for n in differences}
    return {
        "gain": {n: d["relative"] for n, d in differences.items()},
        "ci95": {n: [v / bases[n] for v in d["ci95"]] if bases[n] else None for n, d in differences.items()},
    }


def meteor_elsewhere(rows: list[dict[str, Any]]) -> float:
    """Return the mean METEOR of replies against human replies to other prompts: what any reply scores.

    Reply i is compared with the human reply half a split further on, the same one for every model.
    """
    half = len(rows) // 2
    elsewhere = [row["reply"] for row in rows[half:] + rows[:half]]
    return float(meteor_scores([row["text"] for row in rows], elsewhere).mean())


def habits(file: Path) -> dict[str, float]:
    """Return the shares of a file's replies that end at the limit of tokens, and that repeat three words in a row."""
    rows = read(file)[1:]
    word_tokenizer = word_tokenizer_for(row["reply"] for row in rows)
    return {
        "at_limit": statistics.fmean(not row["ended"] for row in rows),
        "repeating": statistics.fmean(repeats(row["text"], word_tokenizer) for row in rows),
    }


def summarize(out: Path, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Return the content of results.json. An ablation that has not been evaluated is left out."""
    evaluations = {f"ppo-{s}": read(out / "eval" / f"ppo-{s}.json") for s in seeds}
    ablations = {n: read(file) for n in ABLATIONS if (file := out / "eval" / f"{n}.json").exists()}
    first, policies = evaluations[f"ppo-{seeds[0]}"], {n: e["policy"] for n, e in (evaluations | ablations).items()}
    per_seed = [{"seed": s} | gains(evaluations[f"ppo-{s}"]) for s in seeds]
    replies = {n: out / "replies" / f"{n}.jsonl" for n in ("sft", *policies)}
    return {
        "samples": first["settings"]["samples"],
        "supervised": first["baseline"],
        "ppo": {str(s): policies[f"ppo-{s}"] for s in seeds},
        "seeds": per_seed,
        "gain_mean": {
            name: statistics.fmean(row["gain"][name] for row in per_seed)
            for name in REPORTED
            if all(row["gain"].get(name) is not None for row in per_seed)
        },
        "meteor": {
            name: {"own": values["meteor"], "elsewhere": meteor_elsewhere(read(replies[name])[1:])}
            for name, values in ({"sft": first["baseline"]} | policies).items()
        },
        "habits": {name: habits(file) for name, file in replies.items()},
        "ablations": {name: gains(evaluation) for name, evaluation in ablations.items()},
        "environment_steps": {name: read(out / name / "metrics.jsonl")[-1]["env_steps"] for name in policies},
        "judges": {n: read(out / n / "intent.json")["validation"] for n in ("judge", "second_judge")},
        "supervised_curve": [
            {k: row[k] for k in ("step", "minutes", "loss", "perplexity")}
            for row in read(out / "sft" / "sft.json")["history"]
        ],
    }


def shown_dialogues(out: Path, seed: int, number: int, ablations: Iterable[str]) -> list[tuple[int, str, dict]]:
    """Pick dialogues by a generator that starts at 0: their number, context, and the replies by model."""
    shown = {"supervised": "sft", "PPO": f"ppo-{seed}"} | {ABLATIONS[name].split(" (")[0]: name for name in ablations}
    replies = {label: read(out / "replies" / f"{name}.jsonl")[1:] for label, name in shown.items()}
    first, dialogues = replies["supervised"], []

    def plain(text):
        return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

    for i in sorted(random.Random(0).sample(range(len(first)), min(number, len(first)))):
        context = " / ".join(plain(u) for u in first[i]["prompt"].split("<EOU>") if u.strip())
        said = {"human": first[i]["reply"]} | {label: rows[i]["text"] for label, rows in replies.items()}
        dialogues.append((i, context, {label: plain(text) for label, text in said.items()}))
    return dialogues


def write_text(summary: dict[str, Any], config: ResultsConfig) -> TemplateModule:
    """Fill results.md.jinja. The result has its text (`str`) and the macro `gain_table`."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True)
    environment.filters["percent"] = lambda value: "-" if value is None else f"{value:+.1%}"
    dialogues = shown_dialogues(Path(config.out), config.seeds[0], config.dialogues, summary["ablations"])
    names = dict(labels=LABELS, ablation_labels=ABLATIONS, reported=REPORTED, tutorial=TUTORIAL)
    return environment.get_template("results.md.jinja").make_module(
        summary | names | {"config": config, "dialogues": dialogues}
    )


def draw_gains(summary: dict[str, Any], file: Path) -> None:
    names, seeds = list(summary["gain_mean"]), summary["seeds"]
    figure = Figure((9, 4), layout="tight")
    axes, width = figure.subplots(), 0.8 / len(seeds)
    for k, row in enumerate(seeds):
        x = [i + (k - (len(seeds) - 1) / 2) * width for i in range(len(names))]
        heights = [100 * row["gain"][n] for n in names]
        errors = [[abs(100 * (row["ci95"][n][side] - row["gain"][n])) for n in names] for side in (0, 1)]
        axes.bar(x, heights, width * 0.9, yerr=errors, capsize=2, label=f"seed {row['seed']}")
    tutorial = [(i, 100 * TUTORIAL[n]) for i, n in enumerate(names) if n in TUTORIAL]
    axes.scatter(*zip(*tutorial), marker="_", s=600, color="black", zorder=3, label="tutorial")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(names)), [LABELS[n] for n in names], rotation=20, ha="right")
    axes.set_ylabel("gain over the supervised start, %")
    axes.legend()
    figure.savefig(file, dpi=120)


def draw_supervised(curve: list[dict[str, float]], file: Path) -> None:
    figure = Figure((6, 3.2), layout="tight")
    axes = figure.subplots()
    axes.plot([row["step"] for row in curve], [row["loss"] for row in curve], marker="o", markersize=3)
    axes.set(xlabel="step", ylabel="validation loss of human replies, nats per token")
    figure.savefig(file, dpi=120)


def main() -> None:
    config = command_line(ResultsConfig, __doc__)
    out, results = Path(config.out), Path(config.results)
    summary = summarize(out, config.seeds)
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / "results.json", summary)
    draw_gains(summary, results / "results-gains.png")
    runs = load_runs(out / name for name in summary["environment_steps"])
    charts = [chart for section in charts_of(runs)[0].values() for chart in section]
    charts = [chart for chart in charts if chart.panel.names.split()[0] in CURVES]
    draw_curves(charts, runs, results / "results-curves.png")
    draw_supervised(summary["supervised_curve"], results / "results-supervised.png")
    page = results / "results.md"
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Results\n\n{MARKS[0]}\n{MARKS[1]}\n"
    if not all(text.count(mark) == 1 for mark in MARKS):
        raise UserError(f"'{page}' has not the two lines '{MARKS[0]}' and '{MARKS[1]}' once each; put them in.")
    head, rest = text.split(MARKS[0])
    made = write_text(summary, config)
    page.write_text(f"{head}{MARKS[0]}\n\n{str(made).strip()}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")
    print(made.gain_table().strip())
    print(f"written to {page}, results.json and three figures beside it")


if __name__ == "__main__":
    run_script(main)
