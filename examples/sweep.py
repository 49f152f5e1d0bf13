"""Learning rates across seeds: a run for each pair, and a table of what each rate gains, mean and deviation.

    python examples/sweep.py --lr 1e-4 2e-4 4e-4 --seeds 0 1 2
    python examples/sweep.py --lr 5e-6 1e-5 --seeds 0 1 --output runs/sweep-lr --config my.yaml --eval-limit 200

Further options go to every run of ppo_dialog.py. Stopped at any point, the same command goes on from there: runs that
are done stay, one that was begun resumes. A run that fails is a dash in the table, and the sweep goes on. The figures
are the test reward of the result less that of its start.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pandas

ROOT = Path(__file__).resolve().parents[1]


def gain_of(run: Path, options: list[object]) -> float:
    """What the run brought; it is made, or gone on with, where it is not done. NaN where it fails."""
    file = run / "eval.json"
    if not file.exists():
        place = ["--run-dir", run.parent, "--experiment-name", run.name]
        resume = ["--resume"] * any(run.glob("checkpoints/update-*"))
        print(f"== {run.name}", flush=True)
        process = subprocess.Popen([sys.executable, ROOT / "ppo_dialog.py", *map(str, place + options + resume)])
        try:
            process.wait()
        except KeyboardInterrupt:  # it has reached the run as well, which saves before it ends
            sys.exit(process.wait())
    return json.loads(file.read_text())["reward"]["difference"] if file.exists() else float("nan")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--lr", nargs="+", default=["1e-4", "2e-4", "4e-4"], help="learning rates of the policy")
    parser.add_argument("--seeds", nargs="+", default=["0", "1", "2"], help="seeds of each")
    parser.add_argument("--output", type=Path, default=Path("runs/sweep"), help="folder for the runs and table.txt")
    args, of_run = parser.parse_known_args()
    args.output.mkdir(parents=True, exist_ok=True)
    kept = args.output / "options.json"
    if kept.exists() and json.loads(kept.read_text()) != of_run:
        sys.exit(f"'{args.output}' holds a sweep with other options (options.json); name another folder by --output.")
    kept.write_text(json.dumps(of_run))

    gains = pandas.DataFrame(index=args.lr, columns=args.seeds, dtype=float)
    for seed in args.seeds:  # all rates with one seed, then the next: the table soon says something
        for lr in args.lr:
            options = ["--lr", lr, "--seed", seed, *of_run]
            gains.loc[lr, seed] = gain_of(args.output / f"lr{lr}-seed{seed}", options)
            table = gains.assign(mean=gains.mean(axis=1), sd=gains.std(axis=1)).sort_values("mean", ascending=False)
            text = table.to_string(float_format="{:+.4f}".format, na_rep="-")
            (args.output / "table.txt").write_text(text + "\n")
    print(text)
