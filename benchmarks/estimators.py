"""Compare the estimators of advantages: runs of each with several seeds, at equal steps and at equal wall time.

    python benchmarks/estimators.py --task desk --seeds 0 1 2
    python benchmarks/estimators.py --task replies --seeds 0 1 2
    python benchmarks/estimators.py --task replies --name daily --model-path models/mine --data-path messages ...

Further options go to every run of ppo_dialog.py. Runs that are complete are kept, and one that was begun is resumed. At
equal wall time a run has as many steps as its speed at equal steps allows in the seconds of the first estimator. A run
whose speed is within 5% of that one's counts in both tables. They give the mean over seeds, and the smallest and the
largest in brackets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ESTIMATORS = {  # name -> options
    "gae, shared trunk": [],
    "gae, own critic": ["--no-use-share-model"],
    "rloo": ["--advantage", "rloo", "--samples-per-prompt", "4"],
    "grpo": ["--advantage", "grpo", "--samples-per-prompt", "8"],
    "reinforce": ["--advantage", "reinforce"],
}
AS_FAST = 0.05  # relative difference of speeds that needs no run of its own
DESK = f"--config {ROOT}/configs/desk.yaml --total-time-steps 450000 --validation-limit 0 --sample-interval 0"
TASKS = {  # what all runs of a task have, and what those without a critic have
    "replies": (["--total-time-steps", "50000"], []),
    "desk": (DESK.split(), ["--value-coef", "0"]),
}


def run_once(folder: Path, options: Sequence[str]) -> bool:
    """Make a run, or resume it, unless it is complete. Return whether it is."""
    if not (folder / "eval.json").exists():
        place = ["--run-dir", str(folder.parent), "--experiment-name", folder.name, "--progress", "plain"]
        resume = ["--resume"] * any(folder.glob("checkpoints/update-*"))
        print(f"== {folder.name}", flush=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f"{folder.name}.log", "a", encoding="utf-8") as log:
            command = [sys.executable, str(ROOT / "ppo_dialog.py"), *options, *place, *resume]
            subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
    return (folder / "eval.json").exists()


def figures_of(folder: Path) -> dict[str, float]:
    """Return the figures of a complete run."""
    result = json.loads((folder / "eval.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [b["env_steps"] - a for a, b in zip([0, *(row["env_steps"] for row in rows)], rows)]
    seconds = sum(n / row["fps"] for n, row in zip(steps, rows))
    last = rows[len(rows) * 9 // 10 :]
    found = {"reward before": result["reward"]["baseline"], "reward after": result["reward"]["policy"]}
    for name in ("meteor", "intent", "distinct2"):
        if result["policy"].get(name) is not None and result["baseline"].get(name):
            found[f"{name}, change"] = result["policy"][name] / result["baseline"][name] - 1
    return found | {
        "KL": statistics.fmean(row["kl_div"] for row in last),
        "seconds": seconds,
        "tokens/s": sum(steps) / seconds,
        "MiB": max(row["peak_memory_mb"] for row in rows),
    }


def show(label: str, folders: dict[str, list[Path]]) -> None:
    """Print a table: a row for each estimator, over the seeds that are complete."""
    print(f"\n{label}\n")
    heading = False
    for name, runs in folders.items():
        figures = [figures_of(run) for run in runs if (run / "eval.json").exists()]
        if not figures:
            continue
        if not heading:
            print(f"| estimator | seeds | {' | '.join(figures[0])} |\n{'|---' * (len(figures[0]) + 2)}|")
            heading = True
        cells = [describe([row[key] for row in figures], key) for key in figures[0]]
        print(f"| {name} | {len(figures)} | " + " | ".join(cells) + " |")


def describe(values: Sequence[float], key: str) -> str:
    """Return `0.912 [0.905, 0.925]`, with as many digits as the figure deserves."""
    form = "{:,.0f}" if key in ("seconds", "tokens/s", "MiB") else "{:+.1%}" if "change" in key else "{:.3f}"
    mean, *ends = (form.format(x) for x in (statistics.fmean(values), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} [{', '.join(ends)}]"


def without(options: Sequence[str], name: str) -> list[str]:
    """Return options without one that has a value."""
    return [o for i, o in enumerate(options) if name not in (o, options[i - 1] if i else "")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=list(TASKS), default="replies", help="what is learned")
    parser.add_argument("--name", default="", help="name of the table's folder (left out: that of the task)")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"], help="seeds of each estimator")
    parser.add_argument("--only", nargs="+", default=list(ESTIMATORS), help="some of the estimators")
    parser.add_argument("--output", type=Path, default=ROOT / "runs" / "estimators", help="folder of the runs")
    args, of_run = parser.parse_known_args()
    common, without_critic = TASKS[args.task]
    options = {}
    for name in args.only:
        options[name] = [*common, *([] if name.startswith("gae") else without_critic), *ESTIMATORS[name], *of_run]
    words = options[args.only[0]]
    total = int(words[max(i for i, word in enumerate(words) if word == "--total-time-steps") + 1])
    folder = args.output / (args.name or args.task)
    tables: dict[str, dict[str, list[Path]]] = {"equal steps": {}, "equal wall time": {}}
    for seed in args.seeds:  # all estimators with one seed, then the next: the table soon says something
        seconds = 0.0
        for name, of_estimator in options.items():
            short = name.replace(", ", "-").replace(" ", "-")
            run = folder / f"{short}-seed{seed}"
            tables["equal steps"].setdefault(name, []).append(run)
            if not run_once(run, [*of_estimator, "--seed", seed]):
                continue
            figures = figures_of(run)
            seconds = seconds or figures["seconds"]
            steps = round(total * seconds / figures["seconds"])
            timed = folder / f"{short}-timed-seed{seed}" if abs(steps / total - 1) > AS_FAST else run
            tables["equal wall time"].setdefault(name, []).append(timed)
            of_time = [*without(of_estimator, "--total-time-steps"), "--total-time-steps", str(steps)]
            run_once(timed, [*of_time, "--seed", seed])
        for label, folders in tables.items():
            show(f"{label}, {args.name or args.task}", folders)


if __name__ == "__main__":
    main()
