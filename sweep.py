"""Run ppo_dialog.py with several settings and seeds, and compare them on one page.

    python sweep.py --grid lr=1e-4,2e-4 kl_coef=0.1,0.2 --seeds 0 1 2
    python sweep.py --settings settings.yaml --jobs 2 --output runs/rates -- --config my.yaml --eval-limit 200

What follows `--` goes to every run. If the sweep is stopped, the same command continues it: runs that are done stay,
and a run that was begun resumes. If a run fails, the sweep goes on. OUTPUT/comparison.html is report.py's page of all
runs: those that differ by their seed alone are one curve, and one row of the table.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
import yaml
from pydantic import NonNegativeInt, PositiveInt

from ppo_config import PPOConfig
from support.config import check_command_line, command_line, parse_config
from support.errors import UserError, did_you_mean, need_package, run_script
from support.files import write_json
from support.options import check_values

ROOT = Path(__file__).resolve().parent
DONE = "sweep-done"  # file in the folder of a run that came to its end
PLACE = {"seed": "--seeds", "run_dir": "--output", "experiment_name": "--settings", "resume": "the same command again"}
SBATCH = ROOT / "support" / "sweep.sbatch"  # {NAME} stands for what differs between sweeps


@dataclass
class SweepConfig:
    """Train with several settings, each with several seeds."""

    grid: tuple[str, ...] = ()
    """Values of options of ppo_dialog.py, each as NAME=VALUE,VALUE. Every combination is a setting."""
    settings: Path | None = None
    """YAML file with a mapping from names to options, such as `high_kl: {kl_coef: 0.2}`. Combined with --grid."""
    seeds: tuple[NonNegativeInt, ...] = (0, 1, 2)
    """Seeds of each setting."""
    jobs: PositiveInt = 1
    """Runs at a time, which share the cores; with --gpus, on each GPU. What they print is in OUTPUT/NAME.log."""
    gpus: tuple[str, ...] = ()
    """Numbers of the GPUs that take the runs in turn (CUDA_VISIBLE_DEVICES)."""
    output: Path = Path("runs/sweep")
    """Folder of the runs and of their page."""
    slurm: bool = False
    """Write OUTPUT/sweep.sbatch, an array with a task for each run, and start nothing."""
    only: NonNegativeInt | None = None
    """Number of the only run that is started, from 0, as a task of Slurm's array does."""
    of_runs: Annotated[tuple[str, ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    """What followed `--`: options of every run."""

    def check(self) -> None:
        """Raise UserError, or exit with tyro's message, for a mistake in what is swept or in the options of a run."""
        check_values(self)
        runs = plan(self)
        if self.only is not None and self.only >= len(runs):
            raise UserError(f"only is {self.only}; the sweep has {len(runs)} runs, numbered from 0.")
        for run in runs:
            made = parse_config(PPOConfig, run.words(self.output), "")[0]
            if made.push_to_hub:
                raise UserError("an upload of every run would go to one name; upload the best: hf upload NAME FOLDER.")
            made.check()
        check_earlier(self.output, runs)
        need_package("scipy", "the page of several seeds")


@dataclass(frozen=True)
class Planned:
    """A run: its folder in OUTPUT, and its options, without the place."""

    name: str
    options: tuple[str, ...]

    def words(self, output: Path) -> list[str]:
        """Return all options that ppo_dialog.py is given."""
        return [*self.options, f"--run-dir={output}", f"--experiment-name={self.name}"]


def parse_sweep(cls: type, argv: Sequence[str], description: str) -> tuple[SweepConfig, list[str]]:
    """Return the options of the sweep, with those of every run, which follow `--`."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    config = command_line(cls, description, argv[:end])
    return dataclasses.replace(config, of_runs=tuple(argv[end + 1 :])), []


def plan(config: SweepConfig) -> list[Planned]:
    """Return the runs, all settings with the first seed first, so that an early page compares all settings."""
    settings = [
        (" ".join(filter(None, (name, *(f"{k}{v}" for k, v in chosen.items())))), given | chosen)
        for name, given in read_settings(config.settings).items()
        for chosen in read_grid(config.grid)
    ]
    runs = []
    for seed in dict.fromkeys(config.seeds):
        for label, options in settings:
            name = re.sub(r"[^\w.+-]+", "-", f"{label} seed{seed}".strip()).strip("-.")[-100:]
            given = options | {"seed": seed}
            refuse_twice(config.of_runs, {*given, *PLACE})
            words = [word for option, value in given.items() for word in words_of(option, value)]
            runs.append(Planned(name, (*config.of_runs, *words)))
    names = [run.name for run in runs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two settings would have the folder '{twice}'; name them by a file, with --settings.")
    return runs


def read_grid(grid: Iterable[str]) -> list[dict[str, Any]]:
    """Return every combination of the values of NAME=VALUE,VALUE. UserError for another form or an unknown name."""
    axes: dict[str, list[Any]] = {}
    for word in grid:
        name, _, values = word.partition("=")
        name = name.removeprefix("--").replace("-", "_")
        chosen = list(dict.fromkeys(filter(None, values.split(","))))
        if not chosen:
            raise UserError(f"grid has '{word}'; expected NAME=VALUE,VALUE, such as lr=1e-4,2e-4.")
        if name in axes:
            raise UserError(f"grid has {name} twice; give its values in one word: {name}=VALUE,VALUE.")
        switch = option_type(name, "grid") in ("bool", "bool | None")
        axes[name] = [yaml.safe_load(value) for value in chosen] if switch else chosen
    return [dict(zip(axes, values)) for values in itertools.product(*axes.values())]


def read_settings(file: Path | None) -> dict[str, dict[str, Any]]:
    """Return the settings of a YAML file by name; one without options if there is no file. UserError for its faults."""
    if file is None:
        return {"": {}}
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"settings is '{file}', which cannot be read: {' '.join(str(error).split())}.") from error
    options_of = list(settings.values()) if isinstance(settings, dict) else []
    if not options_of or not all(value is None or isinstance(value, dict) for value in options_of):
        raise UserError(f"'{file}' has no settings; expected names with options, such as 'high_kl: {{kl_coef: 0.2}}'.")
    found = {}
    for name, options in settings.items():
        found[str(name)] = {str(option).replace("-", "_"): value for option, value in (options or {}).items()}
        for option in found[str(name)]:
            option_type(option, f"'{file}'")
    return found


def option_type(name: str, source: str) -> str:
    """Return the type of an option of ppo_dialog.py, as text. UserError for a name that cannot be swept."""
    if name in PLACE:
        raise UserError(f"{source} has {name}, which the sweep sets itself; use {PLACE[name]}.")
    types = {field.name: field.type for field in dataclasses.fields(PPOConfig)}
    if name not in types:
        raise UserError(f"{source} has {name}, which is no option of ppo_dialog.py.{did_you_mean(name, types)}")
    return types[name]


def words_of(name: str, value: Any) -> list[str]:
    """Return an option and its value as words of a command line."""
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, dict):
        return [f"--{flag}", *(f"{key}={inner}" for key, inner in value.items())]
    if isinstance(value, list):
        return [f"--{flag}", *map(str, value)]
    return [f"--{flag}={value}"]


def refuse_twice(of_runs: Iterable[str], given: Iterable[str]) -> None:
    """UserError for an option after `--` that the sweep sets too."""
    for word in of_runs:
        name = word.partition("=")[0].removeprefix("--").removeprefix("no-").replace("-", "_")
        if word.startswith("--") and name in given:
            raise UserError(f"{word.partition('=')[0]} stands after `--`, and the sweep sets it too; leave one out.")


def check_earlier(output: Path, runs: Iterable[Planned]) -> None:
    """UserError if a folder holds a run of this name that had other options."""
    kept = read_plan(output)
    for run in runs:
        if run.name in kept and kept[run.name] != list(run.options):
            differ = [word for word in run.options if word not in kept[run.name]]
            now = shlex.join(differ or set(kept[run.name]) - set(run.options))
            raise UserError(
                f"'{output}' holds the run {run.name} with other options ({now}); name another folder by --output."
            )


def read_plan(output: Path) -> dict[str, list[str]]:
    """Return the options of the runs that a folder holds, by name."""
    file = output / "sweep.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def write_sbatch(config: SweepConfig, runs: Sequence[Planned]) -> Path:
    """Write the script that starts each run as a task of Slurm's array, and return its path."""
    own = [sys.executable, str(ROOT / "sweep.py")]
    for option in ("grid", "seeds"):
        if values := getattr(config, option):
            own += [f"--{option}", *map(str, values)]
    if config.settings:
        own += ["--settings", str(config.settings.resolve())]
    own += ["--output", str(config.output.resolve())]
    file = config.output / "sweep.sbatch"
    file.write_text(
        SBATCH.read_text(encoding="utf-8").format(
            last=len(runs) - 1,
            output=config.output.resolve(),
            here=shlex.quote(os.getcwd()),
            command=shlex.join(own),
            of_runs=f" -- {shlex.join(config.of_runs)}" if config.of_runs else "",
        ),
        encoding="utf-8",
    )
    return file


def places_of(config: SweepConfig) -> list[dict[str, str]]:
    """Return the environment of each run at a time: its GPU, or its share of the cores."""
    if config.gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(config.jobs) for gpu in config.gpus]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = {} if config.jobs == 1 else {"TORCH_NUM_THREADS": str(max(1, cores // config.jobs))}
    return [share | {k: v for k, v in os.environ.items() if k == "TORCH_NUM_THREADS"}] * config.jobs


def run_all(config: SweepConfig, runs: Sequence[Planned]) -> list[Planned]:
    """Make the runs that are not done, and return those that failed. A signal stops all of them, which save first."""
    waiting = deque(run for run in runs if not is_done(config.output / run.name))
    places = places_of(config)
    free, running, failed = deque(range(len(places))), {}, []

    def stop(*_: Any) -> None:
        for process, _, _ in running.values():
            process.terminate()
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, stop)
    try:
        while waiting or running:
            while waiting and free:
                run, place = waiting.popleft(), free.popleft()
                log = None if len(places) == 1 else (config.output / f"{run.name}.log").open("a", encoding="utf-8")
                running[place] = start(config.output / run.name, run, places[place], log), run, log
            time.sleep(0.1)
            for place, (process, run, log) in list(running.items()):
                if process.poll() is not None:
                    del running[place]
                    free.append(place)
                    failed += [run] * finish(config.output / run.name, run, process.returncode, log)
    finally:
        for process, _, _ in running.values():
            process.wait()
    return failed


def start(folder: Path, run: Planned, place: dict[str, str], log: Any) -> subprocess.Popen:
    """Start a run, from its newest checkpoint where there is one."""
    resume = ["--resume"] * any(folder.glob("checkpoints/update-*"))
    print(f"== {run.name}{' resumes' if resume else ''}", flush=True)
    command = [sys.executable, str(ROOT / "ppo_dialog.py"), *run.words(folder.parent), *resume]
    return subprocess.Popen(command, env=os.environ | place, stdout=log, stderr=log)


def finish(folder: Path, run: Planned, status: int, log: Any) -> bool:
    """Say how a run ended, and return whether it failed. An interrupted run ends the sweep."""
    if log:
        log.close()
    if status in (128 + signal.SIGINT, -signal.SIGINT):
        raise KeyboardInterrupt
    if status:
        print(f"== {run.name} failed with status {status}" + (f"; see {log.name}" if log else ""), flush=True)
        return True
    (folder / DONE).touch()
    if log:
        print(f"== {run.name} is done", flush=True)
    return False


def is_done(folder: Path) -> bool:
    return (folder / DONE).exists() or (folder / "eval.json").exists()


def compare(output: Path, names: Iterable[str]) -> None:
    """Write the page of the runs that are there, and print what each setting gained, the best first."""
    from report import groups_of, load_runs, reward_cell, write_report

    folders = [output / name for name in names if (output / name / "metrics.jsonl").exists()]
    if not folders:
        return
    groups = [(group, cell) for group in groups_of(load_runs(folders)) if (cell := reward_cell(group))]
    if groups:
        print("gain in reward on held-out samples, with its 95% interval over seeds and samples:")
    for group, cell in sorted(groups, key=lambda pair: -pair[1]["value"]):
        interval = f"[{cell['low']:+.4f}, {cell['high']:+.4f}]"
        seeds = f"{len(cell['seeds'])} seed{'s' if len(cell['seeds']) > 1 else ''}"
        print(f"  {group.name:40} {cell['value']:+.4f} {interval}  {seeds}")
    print(f"the page of all runs: {write_report(folders, output / 'comparison.html')}")


def main() -> None:
    config = parse_sweep(SweepConfig, sys.argv[1:], __doc__)[0]
    config.check()
    runs = plan(config)
    config.output.mkdir(parents=True, exist_ok=True)
    write_json(config.output / "sweep.json", read_plan(config.output) | {run.name: list(run.options) for run in runs})
    if config.slurm:
        print(f"{len(runs)} runs; submit them: sbatch {shlex.quote(str(write_sbatch(config, runs)))}")
        print("Then give the same command without --slurm: it writes the page, and makes what is missing.")
        return
    chosen = runs if config.only is None else [runs[config.only]]
    failed = run_all(config, chosen)
    if config.only is None:
        compare(config.output, [run.name for run in runs])
    if failed:
        print(f"failed: {', '.join(run.name for run in failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    check_command_line(SweepConfig, __doc__, parse=parse_sweep, loading="")
    run_script(main)
