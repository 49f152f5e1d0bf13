"""The table, the figures and the dialogues of docs/notebook/results.md, from what reproduce.sh left in its folder.

    python reproduce/results.py runs/reproduce --results docs/notebook --seeds 0 1 2

Reads eval/*.json, replies/*.jsonl, the metrics.jsonl of each run and what the judges and the supervised start say of
themselves; writes results.json, results-*.png and the part of results.md between its two marks. The rest of
results.md is written by hand and stays.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval_metrics import meteor_scores
from report import draw_curves, load_run, panels_of  # noqa: E402
from support.config import command_line  # noqa: E402
from support.errors import UserError, run_script  # noqa: E402
from support.files import write_json  # noqa: E402
from support.metric_names import LABELS
from support.words import spaced, word_tokenizer_for  # noqa: E402

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARKS = "<!-- made by results.py: begin -->", "<!-- made by results.py: end -->"
# what the tutorial reports of its own PPO against its own supervised model (docs/quick_start/train_nlp)
TUTORIAL = {"rouge1": 0.10, "rougeLsum": 0.12, "meteor": 0.25, "sacrebleu": 0.43, "intent": 0.019}
TUTORIAL["mean_output_length"] = -0.014
REPORTED = "rouge1 rougeLsum meteor sacrebleu intent intent_second_judge mean_output_length distinct2".split()
CURVES = (  # panels of report.py, by their figures
    "episode_reward",
    "intent meteor consensus commonplace",
    "reward_*",
    "validation_reward",
    "kl_div",
    "alpha",
    "mean_output_length",
    "clipfrac",
    "entropy",
)
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


def read(file: Path, parse: Callable[[str], Any]) -> Any:
    """What `parse` makes of a file's text; UserError where it cannot be read."""
    try:
        return parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{file}' cannot be read ({type(error).__name__}); run reproduce.sh to its end.") from error


def read_json(file: Path) -> Any:
    return read(file, json.loads)


def read_lines(file: Path) -> list[dict[str, Any]]:
    return read(file, lambda text: [json.loads(line) for line in text.rstrip("\n").split("\n")])


def gains(evaluation: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Relative gains over the supervised start and their 95% intervals, by metric."""
    gain, interval = {}, {}
    for name in REPORTED:
        if difference := evaluation["difference"].get(name):
            base = evaluation["baseline"][name]
            gain[name] = difference["value"] / base if base else None
            interval[name] = [bound / base for bound in difference["ci95"]] if base else None
    return {"gain": gain, "ci95": interval}


def meteor_elsewhere(file: Path) -> float:
    """Mean METEOR of a file's replies against human replies to other prompts: what METEOR pays whatever is asked.

    Reply i is held against the human reply of half a split further on, the same one for every model.
    """
    rows = read_lines(file)[1:]
    half = len(rows) // 2
    elsewhere = [row["reply"] for row in rows[half:] + rows[:half]]
    return float(meteor_scores([row["text"] for row in rows], elsewhere).mean())


def habits(file: Path) -> dict[str, float]:
    """Shares of a file's replies that end at the limit of tokens, and that say some three words in a row twice."""
    first, *rows = read_lines(file)
    word_tokenizer = word_tokenizer_for(row["reply"] for row in rows)

    def repeats(text: str) -> bool:
        words = spaced(text, word_tokenizer).split()
        triples = list(zip(words, words[1:], words[2:]))
        return len(set(triples)) < len(triples)

    return {
        "at_limit": statistics.fmean(row["length"] >= first["format"]["max_new_tokens"] for row in rows),
        "repeating": statistics.fmean(repeats(row["text"]) for row in rows),
    }


def summarize(out: Path, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Everything that results.json holds; an ablation that has not been evaluated is left out."""
    evaluations = {name: read_json(out / "eval" / f"{name}.json") for name in [f"ppo-{s}" for s in seeds]}
    per_seed = [{"seed": s} | gains(evaluations[f"ppo-{s}"]) for s in seeds]
    first = next(iter(evaluations.values()))
    sft = read_json(out / "sft" / "sft.json")["history"]
    ablations = {n: read_json(out / "eval" / f"{n}.json") for n in ABLATIONS if (out / "eval" / f"{n}.json").exists()}
    meteor = {"sft": first["baseline"]} | {n: e["policy"] for n, e in (evaluations | ablations).items()}
    return {
        "samples": first["settings"]["samples"],
        "supervised": first["baseline"],
        "ppo": {str(s): evaluations[f"ppo-{s}"]["policy"] for s in seeds},
        "seeds": per_seed,
        "gain_mean": {
            name: statistics.fmean(row["gain"][name] for row in per_seed)
            for name in REPORTED
            if all(row["gain"].get(name) is not None for row in per_seed)
        },
        "meteor": {
            name: {"own": values["meteor"], "elsewhere": meteor_elsewhere(out / "replies" / f"{name}.jsonl")}
            for name, values in meteor.items()
        },
        "habits": {name: habits(out / "replies" / f"{name}.jsonl") for name in meteor},
        "ablations": {name: gains(evaluation) for name, evaluation in ablations.items()},
        "environment_steps": {
            name: read_lines(out / name / "metrics.jsonl")[-1]["env_steps"] for name in [*evaluations, *ablations]
        },
        "judges": {n: read_json(out / n / "intent.json")["validation"] for n in ("judge", "second_judge")},
        "supervised_curve": [{k: row[k] for k in ("step", "minutes", "loss", "perplexity")} for row in sft],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Text


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *body])


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"


def with_interval(row: dict[str, Any], name: str) -> str:
    if row["gain"].get(name) is None:
        return "-"
    low, high = row["ci95"][name]
    return f"{row['gain'][name]:+.1%} [{low:+.1%}, {high:+.1%}]"


def gain_table(summary: dict[str, Any]) -> str:
    """A row for each metric: supervised, the mean gain, each seed's with its interval, the tutorial's."""
    seeds = summary["seeds"]
    rows = [["", "supervised", "mean gain", *(f"seed {row['seed']}" for row in seeds), "tutorial"]]
    for name in REPORTED:
        if name in summary["supervised"] and summary["supervised"][name] is not None:
            cells = [f"{summary['supervised'][name]:.4f}", f"**{percent(summary['gain_mean'].get(name))}**"]
            rows.append(
                [LABELS[name], *cells, *(with_interval(row, name) for row in seeds), percent(TUTORIAL.get(name))]
            )
    return table(rows)


def ablation_table(summary: dict[str, Any]) -> str:
    ablations = summary["ablations"]
    rows = [["", "mean of the seeds", *(ABLATIONS[name] for name in ablations)]]
    for name in summary["gain_mean"]:
        cells = [with_interval(ablation, name) for ablation in ablations.values()]
        rows.append([LABELS[name], percent(summary["gain_mean"][name]), *cells])
    return table(rows)


def reply_table(summary: dict[str, Any]) -> str:
    """How much of each model's METEOR has to do with the prompt, and the habits of its replies."""

    def label(name):
        return "supervised" if name == "sft" else name

    rows = [["", *map(label, summary["meteor"])]]
    for row, value in {
        "METEOR against the human reply to this prompt": lambda m: m["own"],
        "METEOR against that to another prompt": lambda m: m["elsewhere"],
        "difference": lambda m: m["own"] - m["elsewhere"],
    }.items():
        rows.append([row, *(f"{value(meteor):.4f}" for meteor in summary["meteor"].values())])
    for row, key in {"replies at the limit of tokens": "at_limit", "that say three words twice": "repeating"}.items():
        rows.append([row, *(f"{shares[key]:.1%}" for shares in summary["habits"].values())])
    return table(rows)


def shown_dialogues(out: Path, seed: int, number: int, ablations: Iterable[str]) -> str:
    """Dialogues before and after, picked by a generator that always starts at 0, with the ablations' replies."""
    shown = {"supervised": "sft", "PPO": f"ppo-{seed}"} | {ABLATIONS[name].split(" (")[0]: name for name in ablations}
    replies = {label: read_lines(out / "replies" / f"{name}.jsonl")[1:] for label, name in shown.items()}
    first = replies["supervised"]
    picked = sorted(random.Random(0).sample(range(len(first)), min(number, len(first))))

    def plain(text):
        return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

    parts = []
    for i in picked:
        context = " / ".join(plain(u) for u in first[i]["prompt"].split("<EOU>") if u.strip())
        said = {"human": first[i]["reply"]} | {label: rows[i]["text"] for label, rows in replies.items()}
        parts.append(f"**{i}.** {context}\n\n" + "\n".join(f"- {label}: {plain(t)}" for label, t in said.items()))
    return "\n\n".join(parts)


def text_of(summary: dict[str, Any], out: Path, config: ResultsConfig) -> str:
    judges = [
        f"{name.replace('_', ' ')}: accuracy {j['accuracy']:.3f}, macro-F1 {j['macro_f1']:.3f}"
        for name, j in summary["judges"].items()
    ]
    curve = summary["supervised_curve"]
    best = min(curve, key=lambda row: row["loss"])
    steps = ", ".join(f"{name} {n:,}" for name, n in summary["environment_steps"].items())
    return "\n\n".join(
        [
            f"{summary['samples']:,} validation samples; gains relative to the supervised start, with the 95% interval "
            "of each seed (paired bootstrap; jackknife for distinct-2).",
            gain_table(summary),
            reply_table(summary),
            f"Judges on human utterances of the validation split: {'; '.join(judges)}. Supervised start: validation "
            f"perplexity of the human replies {curve[0]['perplexity']:.2f} before, {best['perplexity']:.2f} at its "
            f"best look (step {best['step']}, {best['minutes']:.0f} minutes). Environment steps: {steps}.",
            "![gains](results-gains.png)",
            "![curves](results-curves.png)",
            "![supervised](results-supervised.png)",
            "## Ablations",
            ablation_table(summary) if summary["ablations"] else "None has been run.",
            f"## {config.dialogues} dialogues, picked by a fixed seed, with the run of seed {config.seeds[0]}",
            shown_dialogues(out, config.seeds[0], config.dialogues, summary["ablations"]),
        ]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def draw_gains(summary: dict[str, Any], file: Path) -> None:
    names = list(summary["gain_mean"])
    figure, axes = plt.subplots(figsize=(9, 4))
    width = 0.8 / len(summary["seeds"])
    for k, row in enumerate(summary["seeds"]):
        x = [i + (k - (len(summary["seeds"]) - 1) / 2) * width for i in range(len(names))]
        heights = [100 * row["gain"][n] for n in names]
        errors = [[abs(100 * (row["ci95"][n][side] - row["gain"][n])) for n in names] for side in (0, 1)]
        axes.bar(x, heights, width * 0.9, yerr=errors, capsize=2, label=f"seed {row['seed']}")
    tutorial = [(i, 100 * TUTORIAL[n]) for i, n in enumerate(names) if n in TUTORIAL]
    axes.scatter(*zip(*tutorial), marker="_", s=600, color="black", zorder=3, label="tutorial")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(names)), [LABELS[n] for n in names], rotation=20, ha="right")
    axes.set_ylabel("gain over the supervised start, %")
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_runs(out: Path, names: list[str], file: Path) -> None:
    """Reward parts, KL with its coefficient, length and clipping over environment steps, as report.py draws them."""
    runs = [load_run(out / name) for name in names]
    panels = [pair for section in panels_of(runs)[0].values() for pair in section]
    draw_curves(runs, file, [(panel, figures) for panel, figures in panels if panel.names in CURVES])


def draw_supervised(curve: list[dict[str, float]], file: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.2))
    axes.plot([row["step"] for row in curve], [row["loss"] for row in curve], marker="o", markersize=3)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss of human replies, nats per token")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    config = command_line(ResultsConfig, __doc__)
    out, results = Path(config.out), Path(config.results)
    summary = summarize(out, config.seeds)
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / "reproduce.results.json", summary)
    draw_gains(summary, results / "results-gains.png")
    draw_runs(out, [*(f"ppo-{s}" for s in config.seeds), *summary["ablations"]], results / "results-curves.png")
    draw_supervised(summary["supervised_curve"], results / "results-supervised.png")
    page = results / "results.md"
    text = page.read_text(encoding="utf-8") if page.exists() else f"# Results\n\n{MARKS[0]}\n{MARKS[1]}\n"
    if not all(text.count(mark) == 1 for mark in MARKS):
        raise UserError(f"'{page}' has not the two lines '{MARKS[0]}' and '{MARKS[1]}' once each; put them in.")
    head, rest = text.split(MARKS[0])
    made = text_of(summary, out, config)
    page.write_text(f"{head}{MARKS[0]}\n\n{made}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")
    print(gain_table(summary))
    print(f"written to {page}, results.json and three figures beside it")


if __name__ == "__main__":
    run_script(main)
