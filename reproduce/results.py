"""Write the table, the figures and the dialogues of docs/notebook/results.md from the folder of reproduce.sh.

    python reproduce/results.py runs/reproduce --results docs/notebook --seeds 0 1 2

It reads SPLIT/eval/*.json, SPLIT/frontier, SPLIT/replies/*.jsonl, the metrics.jsonl of each run, and the records of the
judges and the supervised model. It writes results.json, results-*.png and the part of results.md between two marks. The
rest of results.md is written by hand and stays. The text of that part is results.md.jinja.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jinja2
import numpy as np
import tyro
from jinja2.environment import TemplateModule
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from eval_metrics import meteor_scores
from report import charts_of, draw_curves, load_runs
from reproduce.frontier import best_temperature, read_points
from support.config import command_line
from support.errors import UserError, run_script
from support.files import write_json
from support.metric_names import LABELS
from support.words import repeats, word_tokenizer_for

MARKS = "<!-- made by results.py: begin -->", "<!-- made by results.py: end -->"
# what the tutorial reports of its own PPO against its own supervised model (docs/quick_start/train_nlp)
TUTORIAL = {"rouge1": 0.10, "rougeLsum": 0.12, "meteor": 0.25, "sacrebleu": 0.43, "intent": 0.019}
TUTORIAL["mean_output_length"] = -0.014
PUBLISHED = {  # its absolute figures, which RL4LMs' scoring gave
    "tutorial, supervised": {"rouge1": 0.164, "rougeLsum": 0.137, "meteor": 0.234, "sacrebleu": 0.063},
    "tutorial, PPO": {"rouge1": 0.181, "rougeLsum": 0.153, "meteor": 0.292, "sacrebleu": 0.090},
}
REPORTED = "rouge1 rougeLsum meteor sacrebleu intent intent_second_judge mean_output_length distinct2".split()
# panels of report.py, by their first figures
CURVES = "episode_reward intent reward_* validation_reward kl_div alpha mean_output_length clipfrac entropy".split()
ESTIMATORS = {"ppo": "PPO", "critic": "PPO with a critic", "rloo": "RLOO", "grpo": "GRPO"}
IN_TABLE = "meteor rouge1 sacrebleu intent_second_judge distinct2 repetition mean_output_length".split()
QUALITIES = {"meteor": "METEOR, gain in %", "intent_second_judge": "intent by the unseen judge, gain in %"}
DIVERSITIES = {"distinct2": "distinct-2", "repetition": "replies that say three words twice"}
ABLATIONS = {
    "no-kl": "without KL (`--kl-coef 0`)",
    "no-meteor": "without METEOR (`--meteor-coef 0 --consensus-coef 0`)",
}


@dataclass
class ResultsConfig:
    """What is read and written."""

    out: tyro.conf.Positional[str]
    """Folder of reproduce.sh."""
    split: Literal["train", "validation", "test"] = "validation"
    """Split of the evaluations."""
    results: str = "docs/notebook"
    """Folder for results.md, results.json and the figures."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the runs."""
    main: Literal["ppo", "critic", "rloo", "grpo"] = "ppo"
    """Estimator whose runs MAIN-SEED fill the table of gains and the curves. It has to be evaluated with all seeds."""
    tutorial: bool = True
    """Show what OpenRL's tutorial reports beside the gains. It is about DailyDialog."""
    dialogues: int = 20
    """Dialogues that are shown, picked by a fixed seed (0: none)."""


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


def read_all(here: Path, names: Iterable[str], ending: str = "") -> dict[str, dict[str, Any]]:
    """Return the evaluations of some models that are there, by name."""
    return {name: read(file) for name in names if (file := here / "eval" / f"{name}{ending}.json").exists()}


def win_rate(evaluation: dict[str, Any]) -> dict[str, Any] | None:
    """Return how often the reward model that training never saw prefers a model's reply; None if none was asked."""
    return next(iter(evaluation["win_rate"].values()), None)


def frontier_of(out: Path, split: str, names: Iterable[str]) -> dict[str, Any]:
    """Return what was measured at several temperatures, and what follows from it.

    `points` are evaluations of each model. `matched` compares a policy with the supervised model at the temperature
    where their distinct-2 is the same. `best` is the supervised model at the temperature that is best for a metric on
    the validation split, and `over_best` compares a policy at temperature 1 with it. `above` is the smallest distance
    of a policy's points from the supervised model's curve at the same distinct-2, in units of the metric.
    """
    here = out / split
    points = {name: read_points(folder) for name in ("sft", *names) if (folder := here / "frontier" / name).is_dir()}
    found: dict[str, Any] = {"points": points, "best": {}, "over_best": {}}
    matched = read_all(here, names, "-matched")
    found["matched"] = {name: gains(e) | matched_settings(e) for name, e in matched.items()}
    for metric in ("meteor", "intent_second_judge"):
        compared = read_all(here, names, f"-over-best-{metric}")
        if compared:
            temperature = best_temperature(read_points(out / "validation" / "frontier" / "sft"), metric)
            metrics = next(iter(compared.values()))["baseline"]
            found["best"][metric] = {"temperature": temperature, "metrics": metrics}
        found["over_best"][metric] = {name: gains(e) for name, e in compared.items()}
    found["above"] = {
        name: {metric: least_distance(points["sft"], curve, metric) for metric in QUALITIES}
        for name, curve in points.items()
        if name != "sft" and "sft" in points
    }
    return found


def matched_settings(evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return temperature, repetition and win rate of a policy whose distinct-2 is that of the supervised model."""
    both = {name: evaluation[of]["repetition"] for name, of in (("policy", "policy"), ("supervised", "baseline"))}
    temperature = evaluation["settings"]["temperature"]
    return {"temperature": temperature, "repetition": both, "win_rate": win_rate(evaluation)}


def least_distance(start: list[dict[str, Any]], curve: list[dict[str, Any]], metric: str) -> float | None:
    """Return the smallest difference between a policy's points and the start's curve at the same distinct-2.

    Only points at top-p 1 count, and of these only those between the start's ends. None if there is no such point, or
    no such metric.
    """
    ends = sorted((p["metrics"]["distinct2"], p["metrics"].get(metric)) for p in start if p["top_p"] == 1.0)
    mine = [(p["metrics"]["distinct2"], p["metrics"].get(metric)) for p in curve if p["top_p"] == 1.0]
    if not ends or any(value is None for _, value in (*ends, *mine)):
        return None
    x, y = zip(*ends)
    return min((v - float(np.interp(d, x, y)) for d, v in mine if x[0] <= d <= x[-1]), default=None)


def summarize(out: Path, split: str, main: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Return the content of results.json. A run that has not been evaluated is left out, except the main one's.

    `ppo` has the metrics of the runs of the estimator `main`, by seed.
    """
    here = out / split
    evaluations = {f"{main}-{s}": read(here / "eval" / f"{main}-{s}.json") for s in seeds}
    others = read_all(here, [f"{kind}-{s}" for kind in ESTIMATORS if kind != main for s in seeds])
    ablations = read_all(here, ABLATIONS)
    trained = evaluations | others
    first, policies = evaluations[f"{main}-{seeds[0]}"], {n: e["policy"] for n, e in (trained | ablations).items()}
    per_seed = [{"seed": s} | gains(evaluations[f"{main}-{s}"]) for s in seeds]
    replies = {n: here / "replies" / f"{n}.jsonl" for n in ("sft", *policies)}
    scored = read_all(here, ("sft", *policies), "-rl4lms")
    return {
        "samples": first["settings"]["samples"],
        "supervised": first["baseline"],
        "main": main,
        "ppo": {str(s): policies[f"{main}-{s}"] for s in seeds},
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
        "estimators": {
            name: {"metrics": e["policy"], "win_rate": win_rate(e)} | gains(e) for name, e in trained.items()
        },
        "shuffled": {"plain": first["shuffled"], "rl4lms": next(iter(scored.values()))["shuffled"] if scored else None},
        "scoring_rl4lms": {name: evaluation["policy"] for name, evaluation in scored.items()},
        "frontier": frontier_of(out, split, trained),
        "environment_steps": {name: read(out / name / "metrics.jsonl")[-1]["env_steps"] for name in policies},
        "judges": {n: read(out / n / "intent.json")["validation"] for n in ("judge", "second_judge")},
        "supervised_curve": [
            {k: row[k] for k in ("step", "minutes", "loss", "perplexity")}
            for row in read(out / "sft" / "sft.json")["history"]
        ],
    }


def shown_dialogues(here: Path, policy: str, number: int, ablations: Iterable[str]) -> list[tuple[int, str, dict]]:
    """Pick dialogues by a generator that starts at 0: their number, context, and the replies by model."""
    shown = {"supervised": "sft", ESTIMATORS[policy.split("-")[0]]: policy}
    shown |= {ABLATIONS[name].split(" (")[0]: name for name in ablations}
    replies = {label: read(here / "replies" / f"{name}.jsonl")[1:] for label, name in shown.items()}
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
    here, policy = Path(config.out) / config.split, f"{config.main}-{config.seeds[0]}"
    dialogues = shown_dialogues(here, policy, config.dialogues, summary["ablations"])
    names = dict(labels=LABELS, ablation_labels=ABLATIONS, reported=REPORTED)
    names["tutorial"] = TUTORIAL if config.tutorial else {}
    counted = {"human replies, shuffled": summary["shuffled"]["rl4lms"]} | summary["scoring_rl4lms"]
    counted |= PUBLISHED if config.tutorial else {}
    names |= dict(systems=systems_of(summary), in_table=IN_TABLE, counted=counted)
    names["over_best"] = over_best_of(summary["frontier"])
    return environment.get_template("results.md.jinja").make_module(
        summary | names | {"config": config, "dialogues": dialogues, "main_label": ESTIMATORS[config.main]}
    )


def systems_of(summary: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Return the rows of the table: the values of each metric, one for each seed, by what was measured."""

    def values(metrics: list[dict[str, Any]], rates: list[dict[str, Any] | None]) -> dict[str, list[float]]:
        found = {name: [m[name] for m in metrics if m.get(name) is not None] for name in IN_TABLE}
        return found | {"win_rate": [rate["value"] for rate in rates if rate]}

    rows = {"human replies, shuffled": values([summary["shuffled"]["plain"]], [])}
    rows["supervised, T = 1"] = values([summary["supervised"]], [])
    best = summary["frontier"].get("best", {}).get("meteor")
    if best and best["temperature"] != 1:
        place = best["temperature"], 1.0
        points = summary["frontier"]["points"].get("sft", [])
        rates = [win_rate(point) for point in points if (point["temperature"], point["top_p"]) == place]
        rows[f"supervised, T = {best['temperature']:g}, its best METEOR"] = values([best["metrics"]], rates)
    for kind, label in ESTIMATORS.items():
        of_kind = [row for name, row in summary["estimators"].items() if name.startswith(f"{kind}-")]
        if of_kind:
            rows[label] = values([row["metrics"] for row in of_kind], [row["win_rate"] for row in of_kind])
    return rows


def over_best_of(frontier: dict[str, Any]) -> dict[float, tuple[list[str], dict[str, Any]]]:
    """Return metrics, and gains of policies, by the supervised model's temperature that is best for the metrics."""
    found: dict[float, tuple[list[str], dict[str, Any]]] = {}
    for metric, best in frontier["best"].items():
        metrics, rows = found.setdefault(best["temperature"], ([], {}))
        metrics.append(LABELS[metric])
        rows |= frontier["over_best"][metric]
    return found


def draw_frontier(frontier: dict[str, Any], file: Path) -> None:
    """Draw quality against diversity: a line for each model and top-p, a point for each temperature.

    Numbers are the supervised model's temperatures.
    """
    panels = {**QUALITIES, "win_rate": "win rate by the unseen reward model"}
    figure = Figure((12, 7.5), layout="tight")
    all_axes = figure.subplots(len(DIVERSITIES), len(panels))
    kinds = list(dict.fromkeys(name.rpartition("-")[0] or name for name in frontier["points"]))
    for row, (diversity, of_x) in zip(all_axes, DIVERSITIES.items()):
        for axes, (quality, of_y) in zip(row, panels.items()):
            for name, points in frontier["points"].items():
                kind = name.rpartition("-")[0] or name
                color = "black" if kind == "sft" else f"C{kinds.index(kind)}"
                for top_p in dict.fromkeys(point["top_p"] for point in points):
                    curve = [point for point in points if point["top_p"] == top_p]
                    heights = [height_of(point, quality) for point in curve]
                    if any(height is None for height in heights):
                        continue
                    x, (y, low, high) = [point["metrics"][diversity] for point in curve], zip(*heights)
                    label = f"{ESTIMATORS.get(kind, 'supervised')}, top-p {top_p:g}"
                    shown = label not in axes.get_legend_handles_labels()[1]
                    errors = [np.subtract(y, low), np.subtract(high, y)]
                    style = dict(linestyle="-" if top_p == 1.0 else "--", linewidth=1, elinewidth=0.5)
                    axes.errorbar(x, y, errors, None, color=color, marker=".", label=label if shown else None, **style)
                    if kind == "sft" and top_p == 1.0:
                        for point, at in zip(curve, zip(x, y)):
                            text = f"{point['temperature']:g}"
                            axes.annotate(text, at, xytext=(3, 3), textcoords="offset points", fontsize=8)
            axes.set(xlabel=of_x, ylabel=of_y)
            axes.margins(x=0.05)
            axes.locator_params(axis="x", nbins=5)
    all_axes[0][0].legend(fontsize=7)
    figure.savefig(file, dpi=110)


def height_of(point: dict[str, Any], quality: str) -> tuple[float, float, float] | None:
    """Return a point's value and its 95% interval: a gain over the supervised model at temperature 1, or a win rate."""
    if quality == "win_rate":
        rate = win_rate(point)
        return rate and (rate["value"], *rate["ci95"])
    difference = point["difference"].get(quality)
    if not difference or difference["relative"] is None:
        return None
    base = point["metrics"][quality] - difference["value"]
    return tuple(100 * value / base for value in (difference["value"], *difference["ci95"]))


def draw_gains(summary: dict[str, Any], tutorial: bool, file: Path) -> None:
    names, seeds = list(summary["gain_mean"]), summary["seeds"]
    figure = Figure((9, 4), layout="tight")
    axes, width = figure.subplots(), 0.8 / len(seeds)
    for k, row in enumerate(seeds):
        x = [i + (k - (len(seeds) - 1) / 2) * width for i in range(len(names))]
        heights = [100 * row["gain"][n] for n in names]
        errors = [[abs(100 * (row["ci95"][n][side] - row["gain"][n])) for n in names] for side in (0, 1)]
        axes.bar(x, heights, width * 0.9, yerr=errors, capsize=2, label=f"seed {row['seed']}")
    if tutorial:
        reported = [(i, 100 * TUTORIAL[n]) for i, n in enumerate(names) if n in TUTORIAL]
        axes.scatter(*zip(*reported), marker="D", s=30, color="black", zorder=3, label="tutorial")
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xticks(range(len(names)), [LABELS[n] for n in names], rotation=20, ha="right")
    axes.set_ylabel("gain over the supervised model, %")
    axes.legend()
    figure.savefig(file, dpi=120)


def draw_supervised(curve: list[dict[str, float]], file: Path) -> None:
    figure = Figure((6, 3.2), layout="tight")
    axes = figure.subplots()
    axes.plot([row["step"] for row in curve], [row["loss"] for row in curve], marker="o", markersize=3)
    axes.set(xlabel="step", ylabel="validation loss, nats per token", title="Human replies")
    figure.savefig(file, dpi=120)


def main() -> None:
    config = command_line(ResultsConfig, __doc__)
    out, results = Path(config.out), Path(config.results)
    summary = summarize(out, config.split, config.main, config.seeds)
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / "results.json", summary)
    draw_gains(summary, config.tutorial, results / "results-gains.png")
    if summary["frontier"]["points"]:
        draw_frontier(summary["frontier"], results / "results-frontier.png")
    runs = load_runs(
        out / name for name in summary["environment_steps"] if name.startswith(f"{config.main}-") or name in ABLATIONS
    )
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
    text = "\n".join(line.rstrip() for line in str(made).strip().split("\n"))
    page.write_text(f"{head}{MARKS[0]}\n\n{text}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}", encoding="utf-8")
    print(made.systems_table().strip())
    print(f"written to {page}, results.json and figures beside it")


if __name__ == "__main__":
    run_script(main)
